"""A saved model, and tests without a network."""

from __future__ import annotations

import copy
import shutil
import socket
from pathlib import Path

import pytest
import torch
from capture_example import LENGTHS, N

from workbench.model.discovery import find_sites

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


@pytest.fixture(scope="module")
def batch():
    ids = torch.randint(2, 300, (len(LENGTHS), N), generator=torch.Generator().manual_seed(3))
    return ids, (torch.arange(N) < torch.tensor(LENGTHS)[:, None]).long()


@pytest.fixture(scope="module")
def maps(tiny_models):
    return {family: find_sites(module) for family, module in tiny_models.items()}


@pytest.fixture
def llama(tiny_models, maps):
    """A llama of one's own, and its sites."""
    return copy.deepcopy(tiny_models["llama"]), maps["llama"]
