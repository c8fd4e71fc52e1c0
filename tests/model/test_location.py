"""Locations of models: directories, the local cache and the hub; wrong ones are refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from model_files import refusal

from workbench.model.load import load_model
from workbench.model.location import locate

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("no_network")


def test_a_wrong_path_names_the_nearest(saved):
    assert refusal(load_model, str(saved.parent / "tiny-lama")) == (
        f"model {str(saved.parent / 'tiny-lama')!r}: no such directory "
        f"({saved.parent.name}/ has no 'tiny-lama'; nearest: tiny-llama)"
    )
    assert refusal(load_model, saved.parent / "nowhere" / "deeper") == (
        f"model {str(saved.parent / 'nowhere' / 'deeper')!r}: no such directory ({saved.parent.name}/ has no 'nowhere')"
    )


def test_a_path_object_is_never_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2-small").mkdir()
    (tmp_path / ".gpt").mkdir()
    assert refusal(load_model, Path("gpt2")) == (
        f"model 'gpt2': no such directory ({tmp_path.name}/ has no 'gpt2'; nearest: gpt2-small)"
    )


def test_a_name_in_a_folder_that_is_here_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert refusal(locate, "models/lama") == (
        "model 'models/lama': no such directory (models/ has no 'lama'; nearest: llama)"
    )


def test_a_file(saved):
    assert refusal(load_model, saved / "model.safetensors") == (
        f"model {str(saved / 'model.safetensors')!r} is a file; give the folder that holds config.json"
    )


def test_a_directory_that_holds_no_model(tmp_path):
    assert refusal(load_model, tmp_path) == (
        f"model {str(tmp_path)!r} is a directory without config.json (it holds nothing); "
        "give the folder that save_pretrained wrote"
    )
    for name in "fedcba":
        (tmp_path / name).touch()
    assert "(it holds a, b, c, d, e)" in refusal(load_model, tmp_path)


def test_an_empty_name():
    assert refusal(load_model, "") == "model is an empty string; give a directory or a hub id"


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "a..b", "-a", "a--b", "a/b/c", "mo del", "тест", "."])
def test_names_that_no_hub_id_can_have(name, tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    assert refusal(locate, name).startswith(f"model {name!r}")
    assert no_network == []


def test_a_hub_id_when_offline(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2-mine").mkdir()
    assert refusal(load_model, "gpt2") == (
        "model 'gpt2' is no directory here, and not in the local hub cache (HF_HUB_OFFLINE is set); nearest: gpt2-mine"
    )
    assert refusal(load_model, "openai-community/gpt2") == (
        "model 'openai-community/gpt2' is no directory here, and not in the local hub cache (HF_HUB_OFFLINE is set)"
    )
    assert no_network == []


def test_a_hub_id_that_the_hub_refuses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def model_info(_self, name, revision, timeout):
        assert timeout < 2
        error = RuntimeError(f"{name} {revision}")
        error.response = SimpleNamespace(status_code=404)
        raise error

    monkeypatch.setattr(HfApi, "model_info", model_info)
    assert refusal(load_model, "gpt3", revision="v1") == (
        "model 'gpt3' is no directory here, and the hub answers 404; check the name or give a path"
    )
    monkeypatch.setattr(HfApi, "model_info", lambda *_arguments, **_options: None)
    assert (locate("user/gpt3").path, locate("user/gpt3").local) == ("user/gpt3", False)


def hub_cache(folder: Path, name: str, files: list[Path], revision: str = "main") -> None:
    """Lays files out as huggingface_hub's cache does."""
    repository = folder / f"models--{name.replace('/', '--')}"
    (repository / "snapshots" / "abc").mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text("abc")
    for file in files:
        shutil.copy(file, repository / "snapshots" / "abc" / file.name)


OUTCOMES = """
import json, socket, sys, time
attempts = []
def refuse(*arguments, **options):
    attempts.append(arguments)
    raise OSError("unreachable")
socket.socket.connect = socket.getaddrinfo = refuse
waits = []
time.sleep = waits.append
from workbench.model.load import load_model
def outcome(*arguments, **options):
    attempts.clear()
    waits.clear()
    try:
        model = load_model(*arguments, **options)
        said = [model.name, model.revision, model.tokenizer is not None]
    except Exception as error:
        said = type(error).__name__ + ": " + str(error)
    return [said, bool(attempts), sum(waits)]
saved = sys.argv[1]
print(json.dumps({
    "directory": outcome(saved),
    "cached": outcome("user/whole"),
    "revision": outcome("user/tagged", revision="v1"),
    "other revision": outcome("user/tagged", revision="v2"),
    "config only": outcome("user/config-only"),
    "half": outcome("user/half"),
    "damaged": outcome("user/damaged"),
    "pickled": outcome("user/pickled"),
    "weights": outcome("user/weights"),
    "weights and words": outcome("user/weights", tokenizer="user/words"),
    "wrong": outcome("user/nothing"),
    "cached tokenizer": outcome(saved, tokenizer="user/words"),
    "wrong tokenizer": outcome(saved, tokenizer=saved + "/nowhere"),
    "hub tokenizer": outcome("user/whole", tokenizer="user/none"),
}))
"""
"""Program that loads models and prints the result, the attempts to connect, and the seconds of waiting."""


def test_outside_the_test_environment(saved, tmp_path):
    """As a user has it, the hub not forbidden but out of reach: who asks for it, and what the cache is good for."""
    files = sorted(saved.iterdir())
    words = [path for path in files if "token" in path.name]
    weights = [saved / "config.json", saved / "model.safetensors"]
    index, pickled = tmp_path / "model.safetensors.index.json", tmp_path / "pytorch_model.bin"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    part = Path(shutil.copy(saved / "model.safetensors", tmp_path / "model-1.safetensors"))
    damaged = tmp_path / "damaged.safetensors.index.json"
    damaged.write_text('{"weight_map": 7}')
    pickled.touch()
    cache = tmp_path / "hub"
    hub_cache(cache, "user/whole", files)
    hub_cache(cache, "user/tagged", files, revision="v1")
    hub_cache(cache, "user/config-only", [saved / "config.json"])
    hub_cache(cache, "user/half", [saved / "config.json", index, part])
    hub_cache(cache, "user/damaged", [saved / "config.json", damaged])
    hub_cache(cache, "user/pickled", [saved / "config.json", pickled])
    hub_cache(cache, "user/weights", weights)
    hub_cache(cache, "user/words", words)
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_HUB_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", OUTCOMES, str(saved)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stderr == ""
    outcomes = json.loads(result.stdout)
    unreachable = "is no directory here, and the hub cannot be reached; check the name or give a path"
    message, connected, _ = outcomes.pop("damaged")
    assert message.startswith(f"DataError: {cache}/")
    assert message.endswith("lists no files of weights; delete it from the hub's cache, so that it is fetched again")
    assert not connected
    assert {name: (outcome, connected) for name, (outcome, connected, _) in outcomes.items()} == {
        "directory": (["tiny-llama", None, True], False),
        "cached": (["user/whole", None, True], False),
        "revision": (["user/tagged", "v1", True], False),
        "other revision": (f"RequestError: model 'user/tagged' {unreachable}", True),
        "config only": (f"RequestError: model 'user/config-only' {unreachable}", True),
        "half": (f"RequestError: model 'user/half' {unreachable}", True),
        "pickled": (
            "RequestError: model 'user/pickled' has only pickled weights (pytorch_model.bin), which can run code when "
            "read; convert them to safetensors or pass allow_pickle=True if you trust their author",
            False,
        ),
        "weights": (f"RequestError: tokenizer 'user/weights' {unreachable}", True),
        "weights and words": (["user/weights", None, True], False),
        "wrong": (f"RequestError: model 'user/nothing' {unreachable}", True),
        "cached tokenizer": (["tiny-llama", None, True], False),
        "wrong tokenizer": (
            f"RequestError: tokenizer '{saved}/nowhere': no such directory (tiny-llama/ has no 'nowhere')",
            False,
        ),
        "hub tokenizer": (f"RequestError: tokenizer 'user/none' {unreachable}", True),
    }
    assert {waited for _, _, waited in outcomes.values()} == {0}  # the library's habit is to try again for seconds
