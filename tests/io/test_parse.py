"""Tests of JSON as it is written and parsed."""

import json

from hypothesis import given
from hypothesis import strategies as st

from workbench.io.parse import to_json


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=20,
    )
)
def test_json_round_trips(value):
    assert json.loads(to_json({"value": value, "": [value]})) == {"value": value, "": [value]}
