"""Tests of the one check of ranges and choices."""

import math
from dataclasses import dataclass

import pytest

from workbench.io.checks import check, check_fields
from workbench.io.errors import RequestError


@pytest.mark.parametrize(
    ("value", "limits"),
    [
        (1, {"at_least": 1}),
        (0.0, {"at_least": 0, "at_most": 1}),
        (0.5, {"above": 0, "below": 1}),
        (3, {"whole": True, "at_least": 1}),
        (3.0, {"whole": True, "at_least": 1}),
        (None, {"at_least": 1, "optional": True}),
        ("float16", {"one_of": ("float16", "float32")}),
        (None, {"one_of": ("float16",), "optional": True}),
    ],
)
def test_a_value_within_its_limits_passes(value, limits):
    check("value", value, **limits)


@pytest.mark.parametrize(
    ("value", "limits", "sentence"),
    [
        (0, {"at_least": 1}, "limit must be at least 1, not 0"),
        (1.5, {"at_least": 0, "at_most": 1}, "limit must be from 0 to 1, not 1.5"),
        (0, {"above": 0, "below": 1}, "limit must be above 0 and below 1, not 0"),
        (1, {"at_least": 0, "below": 1}, "limit must be at least 0 and below 1, not 1"),
        (math.inf, {"above": 0, "below": math.inf}, "limit must be above 0 and finite, not inf"),
        (math.nan, {"at_least": 0}, "limit must be at least 0, not nan"),
        (2.5, {"at_least": 1, "whole": True}, "limit must be a whole number, at least 1, not 2.5"),
        (math.inf, {"at_least": 1, "whole": True}, "limit must be a whole number, at least 1, not inf"),
        ("many", {"at_least": 1}, "limit must be at least 1, not 'many'"),
        (None, {"at_least": 1}, "limit must be at least 1, not None"),
        ("int8", {"one_of": ("float16", "float32")}, "limit must be one of float16, float32, not 'int8'"),
        (
            "logit",
            {"one_of": ("logits", "rank", "kl", "top")},
            "limit must be one of logits, rank, kl, top, not 'logit'",
        ),
    ],
)
def test_a_value_outside_is_refused_in_one_sentence(value, limits, sentence):
    with pytest.raises(RequestError) as error:
        check("limit", value, **limits)
    assert str(error.value).startswith(sentence)


def test_a_choice_among_many_names_the_nearest():
    with pytest.raises(RequestError, match="nearest: logits"):
        check("metric", "logit", one_of=("logits", "rank", "kl", "top"))


def test_the_fields_of_a_record_are_checked_by_name():
    @dataclass(frozen=True)
    class Settings:
        batch: int = 1
        seed: int = -1

    check_fields(Settings(), "batch", at_least=1)
    with pytest.raises(RequestError, match=r"^seed must be at least 0, not -1$"):
        check_fields(Settings(), "batch", "seed", at_least=0)
