"""Settings of every probe: values of another type are refused, and never end in another error."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from refusals import unchecked

from workbench.io.errors import RequestError
from workbench.probes import FiberBundle, LogitLens, OverSquashing, Steering, VocabularyKeys
from workbench.results.registry import find_probe, installed_probes

WRONG = [-1, 2.5, float("nan"), float("inf"), "x", "", (), ("x",), (float("nan"),), [0], None, {"a": 1}, object(), True]


@pytest.mark.parametrize("name", installed_probes())
def test_a_probe_takes_a_setting_or_refuses_it(name):
    probe = find_probe(name)
    for setting in (field.name for field in fields(probe)):
        for value in WRONG:
            try:
                record = unchecked(probe, **{setting: value})
            except RequestError:
                continue
            assert not isinstance(getattr(record, setting), list | dict), (setting, value)


def test_values_become_those_of_the_fields():
    lens = unchecked(LogitLens, top_k=np.int64(3), detail=10.0, layers=[0, np.int32(-1)])
    assert lens == LogitLens(top_k=3, detail=10, layers=(0, -1))
    assert type(lens.top_k) is int
    assert unchecked(OverSquashing, tokens="a").tokens == ("a",)
    assert unchecked(Steering, scales=2).scales == (2.0,)


@pytest.mark.parametrize(
    ("probe", "settings", "message"),
    [
        (LogitLens, {"top_k": 2.5}, "top_k must be a whole number, not 2.5"),
        (LogitLens, {"layers": "x"}, "layers must be whole numbers, not 'x'"),
        (LogitLens, {"where": 5}, "where must be a text, not 5"),
        (Steering, {"scales": (1.0, float("nan"))}, "scales must be numbers, not nan"),
        (VocabularyKeys, {"unit": "no"}, "unit must be True or False, not 'no'"),
        (Steering, {"seed": 1 << 63}, "seed must be below 9223372036854775808, not 9223372036854775808"),
        (FiberBundle, {"seed": 1 << 70}, "seed must be below 9223372036854775808, not 1180591620717411303424"),
    ],
)
def test_the_message_names_the_setting_and_the_type(probe, settings, message):
    with pytest.raises(RequestError) as caught:
        unchecked(probe, **settings)
    assert str(caught.value) == message
