"""What every refusal has in common: an error of its kind, told in one line."""

import pytest


def refused(kind, call) -> str:
    """What `call` says when it raises `kind`."""
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)
