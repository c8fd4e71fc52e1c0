"""Helper for refused requests: an error of the expected kind with a one-line message."""

import pytest


def refused(kind, call) -> str:
    """Returns the message of the `kind` that `call` raises."""
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)
