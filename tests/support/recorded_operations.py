"""Recordings for crash points: a tiny model with random weights, a few documents, segments of a few rows."""

from __future__ import annotations

import json
import shutil
import tarfile
import warnings
from pathlib import Path
from typing import Any

from crash_points import Operation
from feature_operations import without_scratch
from store_example import contents as bytes_of

from workbench.io.errors import DataError

TEXTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14], [15, 16, 17, 18, 19], [20, 21]]
MORE = [[30, 31, 32], [33, 34, 35, 36]]
SETTINGS = {"sites": ["resid_post.1", "pattern.0"], "context": 8, "segment_rows": 8, "dtype": "float32"}


def tiny_model() -> Any:
    """Returns a Llama of 2 layers x 16 with random weights, without a tokenizer; its sites are known."""
    warnings.simplefilter("ignore")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import workbench.store.reader  # DuckDB, pandas and xarray, once  # noqa: F401
    from workbench.model.load import Model

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = Model(
        LlamaForCausalLM(LlamaConfig(vocab_size=60, max_position_embeddings=32, **shape)).eval(), None, "tiny"
    )
    assert model.sites
    return model


def recorded(model: Any, out: Path, texts: Any = TEXTS, **options: Any) -> Any:
    """Returns a store of the texts, recorded with SETTINGS where `options` has no others."""
    from workbench.recording.record import record

    return record(model, texts, out=out, show_progress=False, **(SETTINGS | options))


def readable(folder: Path) -> None:
    """Raises where a store in the folder cannot be opened, or verify finds an error in it."""
    from workbench.store.reader import open_store

    for manifest in folder.rglob("manifest.json"):
        problems = open_store(manifest.parent).verify()
        assert not (problems["severity"] == "error").any(), problems.to_string()


def recording(**options: Any) -> Operation:
    """A recording of TEXTS."""
    from workbench.recording.record import record

    model = tiny_model()
    settings = SETTINGS | options

    def work(folder: Path) -> None:
        store = record(model, TEXTS, out=folder / "s.acts", show_progress=False, **settings)
        assert store.rows == sum(map(len, TEXTS))

    return Operation(work, check=readable)


def appending() -> Operation:
    """An append of MORE to a recording of TEXTS."""
    from workbench.recording.record import record

    model = tiny_model()

    def begin(folder: Path) -> None:
        record(model, TEXTS, out=folder / "s.acts", show_progress=False, **SETTINGS)

    def work(folder: Path) -> None:
        store = record(model, MORE, out=folder / "s.acts", append=True, show_progress=False, **SETTINGS)
        assert store.rows == sum(map(len, TEXTS + MORE))

    return Operation(work, begin=begin, check=readable)


def adding_sites() -> Operation:
    """Two sites that are added to a recording of TEXTS; until the end the store has those that it had."""
    from workbench.recording.record import record

    model = tiny_model()
    more = SETTINGS | {"sites": ["resid_mid", "resid_post.1", "pattern.0"]}

    def begin(folder: Path) -> None:
        record(model, TEXTS, out=folder / "s.acts", show_progress=False, **SETTINGS)

    def work(folder: Path) -> None:
        store = record(model, TEXTS, out=folder / "s.acts", show_progress=False, **more)
        assert len(store.sites) == 4

    return Operation(work, begin=begin, check=readable)


def deleting_sites() -> Operation:
    """A site that is deleted; once it is gone, the same call refuses it."""
    from workbench.io.errors import RequestError
    from workbench.recording.record import record
    from workbench.store.growth import delete_sites

    model = tiny_model()

    def begin(folder: Path) -> None:
        record(model, TEXTS, out=folder / "s.acts", show_progress=False, **SETTINGS)

    def work(folder: Path) -> None:
        try:
            delete_sites(folder / "s.acts", ["pattern.0"])
        except RequestError as error:
            if "is not recorded" not in str(error):
                raise

    return Operation(work, begin=begin, check=readable)


def merging() -> Operation:
    """A merge of recordings of TEXTS and of MORE."""
    from workbench.recording.record import record
    from workbench.store.merged_store import merge

    model = tiny_model()

    def begin(folder: Path) -> None:
        for name, texts in (("a", TEXTS), ("b", MORE)):
            record(model, texts, out=folder / name, show_progress=False, **SETTINGS)

    def work(folder: Path) -> None:
        assert merge([folder / "a", folder / "b"], folder / "m").rows == sum(map(len, TEXTS + MORE))

    return Operation(work, begin=begin, check=readable)


def packing(name: str = "sent.acts") -> Operation:
    """A store that is packed into a folder, or into one file if the name ends in .tar."""
    from workbench.recording.record import record
    from workbench.store.packed_copy import pack

    model = tiny_model()

    def begin(folder: Path) -> None:
        record(model, TEXTS, out=folder / "s.acts", show_progress=False, **SETTINGS)

    def work(folder: Path) -> None:
        if not (folder / name).exists():
            pack(folder / "s.acts", folder / name)

    def whole(folder: Path) -> None:
        if (folder / name).is_file():
            with tarfile.open(folder / name) as archive:
                archive.extractall(folder / "out", filter="data")
            readable(folder / "out")
            shutil.rmtree(folder / "out")
        elif (folder / name).exists():
            readable(folder / name)

    return Operation(work, begin=begin, check=whole, contents=without_scratch)


def removing() -> Operation:
    """A store that is removed."""
    from workbench.features.removal import remove
    from workbench.recording.record import record

    model = tiny_model()

    def begin(folder: Path) -> None:
        record(model, TEXTS, out=folder / "s.acts", show_progress=False, **SETTINGS)

    def work(folder: Path) -> None:
        if (folder / "s.acts").exists():
            remove(folder / "s.acts")

    return Operation(work, begin=begin)


def recording_once() -> Operation:
    """A recording of TEXTS in a cache."""
    from workbench.recording.cache import record_once

    model = tiny_model()

    def work(folder: Path) -> None:
        store = record_once(model, TEXTS, folder=folder, show_progress=False, **SETTINGS)
        assert store.rows == sum(map(len, TEXTS))

    return Operation(work, check=readable)


def sweeping() -> Operation:
    """A sweep of three runs, of which one fails. Times, and what was printed, are no part of what must be equal."""
    from importlib.metadata import EntryPoint

    import toy_experiment

    import workbench.store.reader  # DuckDB, pandas and xarray, once  # noqa: F401
    from workbench.results import registry
    from workbench.runs.sweep import sweep

    entry = EntryPoint("toy", "toy_experiment", "workbench.experiments")
    registry.entry_points = lambda group: [entry] if group == entry.group else []
    toy_experiment.figures = lambda _result: {}  # each with 5 MB of plotly
    configs = [toy_experiment.Config(model=model) for model in ("a", "refused", "b")]

    def work(folder: Path) -> None:
        swept = sweep("toy", configs, folder / "runs", report=lambda _line: None)
        failed = [outcome.message for outcome in swept.failed]
        if swept.unwritten or len(failed) != 1:  # as the command says it
            raise DataError(f"{swept.unwritten}; {failed}")

    def lasting(folder: Path) -> dict[str, bytes]:
        changing = ("environment.json", "log.txt", "sweep.json")
        files = {name: data for name, data in bytes_of(folder).items() if not name.endswith(changing)}
        states = json.loads((folder / "runs" / "summary" / "sweep.json").read_text())["cells"]
        return files | {"sweep.json": json.dumps(states).encode()}

    return Operation(work, contents=lasting)
