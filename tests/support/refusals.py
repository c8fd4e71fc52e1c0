"""Helper for refused requests: an error of the expected kind with a one-line message."""

from dataclasses import MISSING, fields

import pytest


def refused(kind, call) -> str:
    """Returns the message of the `kind` that `call` raises."""
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def unchecked(kind, **settings):
    """A settings record. Not by its `__init__`, whose arguments beartype checks while the tests run."""
    record = object.__new__(kind)
    for field in fields(kind):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        object.__setattr__(record, field.name, settings.get(field.name, default))
    record.__post_init__()
    return record
