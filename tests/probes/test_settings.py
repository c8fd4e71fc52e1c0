"""Settings of every probe: values of another type are refused, and never end in another error."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from workbench.io.errors import RequestError
from workbench.probes import LogitLens, OverSquashing, Steering, VocabularyKeys
from workbench.results.registry import find_probe, installed_probes

WRONG = [-1, 2.5, float("nan"), float("inf"), "x", "", (), ("x",), (float("nan"),), [0], None, {"a": 1}, object(), True]


@pytest.mark.parametrize("name", installed_probes())
def test_a_probe_takes_a_setting_or_refuses_it_by_name(name):
    probe = find_probe(name)
    for setting in (field.name for field in fields(probe)):
        for value in WRONG:
            try:
                made = getattr(probe(**{setting: value}), setting)
            except RequestError:
                continue
            assert not isinstance(made, list | dict), (setting, value)


def test_values_become_those_of_the_fields():
    assert LogitLens(top_k=np.int64(3), detail=10.0, layers=[0, np.int32(-1)]) == LogitLens(
        top_k=3, detail=10, layers=(0, -1)
    )
    assert type(LogitLens(top_k=np.int64(3)).top_k) is int
    assert OverSquashing(tokens="a").tokens == ("a",)
    assert Steering(scales=2).scales == (2.0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LogitLens(top_k=2.5), "top_k must be a whole number, not 2.5"),
        (lambda: LogitLens(layers="x"), "layers must be whole numbers, not 'x'"),
        (lambda: Steering(scales=(1.0, float("nan"))), "scales must be numbers, not nan"),
        (lambda: VocabularyKeys(unit="no"), "unit must be True or False, not 'no'"),
        (lambda: LogitLens(where=["a"]), "where must be a text, not ['a']"),
    ],
)
def test_the_message_names_the_setting_and_the_type(call, message):
    with pytest.raises(RequestError) as caught:
        call()
    assert str(caught.value) == message
