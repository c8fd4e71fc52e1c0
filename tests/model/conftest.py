"""A saved model, and tests without a network."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
IDS = torch.arange(8, 20).reshape(2, 6)


@pytest.fixture
def no_network(monkeypatch):
    """Whoever connects, or looks a host up, is refused, and is in the list."""
    attempts = []

    def refuse(*arguments, **_options):
        attempts.append(arguments)
        raise OSError("the network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return attempts


@pytest.fixture(scope="session")
def saved(tiny_models, tiny_tokenizer, tmp_path_factory):
    """The tiny Llama and its tokenizer, as save_pretrained writes them."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_models["llama"].save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model_dir(saved, tmp_path):
    """A copy of `saved`, to be spoilt."""
    return Path(shutil.copytree(saved, tmp_path / "tiny-llama"))
