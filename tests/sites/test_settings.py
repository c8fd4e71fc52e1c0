"""Tests of the settings of a recording."""

import dataclasses
from typing import get_type_hints

import pytest
import torch
from refusals import refused

from workbench.io.errors import RequestError
from workbench.sites.settings import Recording, RecordingOptions, recording


def test_names_and_types_may_be_written_in_several_ways():
    expected = Recording(sites=("resid_post",), dtype="bfloat16", metadata=("title",))
    for dtype in ("bfloat16", torch.bfloat16):
        for sites in ("resid_post", ["resid_post"], ("resid_post",)):
            assert recording(sites=sites, dtype=dtype, metadata=["title"]) == expected
    assert recording() == Recording()


def test_options_replace_fields_of_settings():
    settings = Recording(sites=("z",), context=64)
    assert recording(settings, context=None, packed=True) == Recording(sites=("z",), packed=True)
    assert recording(settings) == settings


def test_the_options_are_the_fields_of_the_record():
    known = get_type_hints(RecordingOptions, localns={"torch": torch})
    assert list(known) == [field.name for field in dataclasses.fields(Recording)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context must be at least 1, not 0"),
        ({"max_rows": -1}, "max_rows must be at least 1, not -1"),
        ({"dtype": torch.float64}, "dtype must be one of float16, bfloat16, float32, not 'float64'"),
        ({"bos": "maybe"}, "bos must be one of model, always, never, not 'maybe'"),
        ({"sites": []}, "sites is empty; name at least one, for example resid_post"),
        ({"metadata": ["spans"]}, "metadata names 'spans', which is the column of spans; name another in span_column="),
    ],
)
def test_a_value_out_of_range_is_refused(options, message):
    assert refused(RequestError, lambda: recording(**options)).startswith(message)
