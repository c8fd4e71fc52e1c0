"""Changes to a saved model, and the errors they cause."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from workbench.io.errors import RequestError

ROOT = Path(__file__).parents[2]
IDS = torch.arange(8, 20).reshape(2, 6)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(RequestError) as caught:
        call(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text
