"""Tests of the one check of ranges and choices."""

import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from workbench.io.checks import as_path, check, check_fields
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


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (3, "out must be a path (a text or a pathlib.Path), not 3"),
        (None, "out must be a path (a text or a pathlib.Path), not None"),
        (b"x", "out must be a path (a text or a pathlib.Path), not b'x'"),
        (["x"], "out must be a path (a text or a pathlib.Path), not ['x']"),
        ("", "out is an empty text; give a path"),
        ("a\x00b", "out is 'a\\x00b', which cannot be the name of a file; give another path"),
        (Path("a\x00"), "out is 'a\\x00', which cannot be the name of a file; give another path"),
        ("x" * 256, f"out is {'x' * 256!r:.60}, which cannot be the name of a file; give another path"),
        ("\ud800", "out is '\\ud800', which cannot be the name of a file; give another path"),
    ],
)
def test_what_is_no_path_is_refused_in_one_sentence(value, sentence):
    with pytest.raises(RequestError) as caught:
        as_path("out", value)
    assert str(caught.value) == sentence


def test_texts_and_path_objects_are_paths():
    class Folder:
        def __fspath__(self):
            return "a/b"

    assert as_path("out", "a/b") == as_path("out", Path("a/b")) == as_path("out", Folder()) == Path("a/b")
