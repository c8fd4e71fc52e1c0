"""Cache of recordings that several runs share: each is made once, in a folder named by everything it depends on.

    recordings/demo-3f2c81d09ab4e6f1/
      request.json     model, texts and settings, as digests and as words
      store.acts/      the store

A process waits for another one that makes the same recording; an interrupted recording is resumed by the next process.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from workbench.io.checks import as_path
from workbench.io.errors import RequestError
from workbench.io.files import PARTIAL, explain_full_disk, locked, remove, replace_file, sha256_bytes, sha256_file
from workbench.io.log import PROGRESS
from workbench.io.tasks import ThisProcess
from workbench.sites.settings import RecordingOptions, recording
from workbench.store.manifest import MANIFEST, read_manifest

if TYPE_CHECKING:
    from workbench.model.load import Model
    from workbench.store.reader import Store

STORE, REQUEST = "store.acts", "request.json"


def record_once(
    model: Model,
    texts: Sequence[Any] | str | Path,
    *,
    folder: str | Path,
    show_progress: bool = True,
    **options: Unpack[RecordingOptions],
) -> Store:
    """Returns the recording of texts by a model from a cache, after making it if it is not there.

    A recording is identified by the weights, config, tokenizer and name of the model, the texts and the settings. If
    the model behaves otherwise than the recorded one, because of a hook or an adapter, the recording is made in a
    folder of its own, whose name ends in `-2`, `-3`, .... Costs a checksum of the weights, about 1 s a gigabyte, a
    forward pass over 16 tokens, and a checksum of the texts.

    Args:
        model: The model.
        texts: A file, or a list of what `record` takes.
        folder: Folder of the cache.
        show_progress: Show progress bars.
        **options: Fields of `Recording`.

    Raises:
        RequestError: As `record`, and for texts that are neither a file nor a list.
    """
    from workbench.model.stored_model import model_record  # takes seconds: torch
    from workbench.recording.planning import plan_recording
    from workbench.recording.record import record_plan
    from workbench.store.reader import open_store  # takes seconds: DuckDB, pandas and xarray
    from workbench.store.writer import remove_leftovers

    folder, settings, present = as_path("folder", folder), recording(**options), model_record(model)
    request = {
        "model": present.name,
        "revision": present.revision,
        "weights": present.fingerprint,
        "config": present.config_fingerprint,
        "tokenizer": present.tokenizer_fingerprint,
        "texts": _digest(texts),
        "recording": asdict(settings),
    }
    text = json.dumps(request, indent=1, sort_keys=True) + "\n"
    name = f"{_slug(model.name)}-{sha256_bytes(text.encode())[:16]}"
    number = 1
    while True:
        place = folder / (name if number == 1 else f"{name}-{number}")
        path = place / STORE
        with locked(place, wait=partial(PROGRESS.info, f"waiting for another process that records {path}")):
            manifest = read_manifest(path) if (path / MANIFEST).exists() else None
            if manifest is None or not manifest.model.difference(present):
                for leftover in place.glob(f".{REQUEST}.*{PARTIAL}"):
                    remove(leftover)
                if manifest is not None and manifest.complete:
                    remove_leftovers(path, manifest)
                    return open_store(path)
                with explain_full_disk(f"{place / REQUEST}", "run the same command again"):
                    replace_file(place / REQUEST, text.encode())
                plan = plan_recording(model, settings, path, present=present)
                return record_plan(plan, model, texts, path, False, ThisProcess(), show_progress)
        number += 1


def _digest(texts: Sequence[Any] | str | Path) -> str:
    """SHA-256 of a file's bytes, or of a list's JSON."""
    if isinstance(texts, str | Path) and Path(texts).is_file():
        return sha256_file(texts)
    if not isinstance(texts, list | tuple):
        raise RequestError(f"texts must be a file or a list of documents, not {str(texts)[:60]!r}")
    digest = hashlib.sha256()
    for document in texts:
        digest.update(json.dumps(document, sort_keys=True, default=_as_list).encode() + b"\n")
    return digest.hexdigest()


def _as_list(value: Any) -> Any:
    if hasattr(value, "tolist"):  # token ids as an array
        return value.tolist()
    raise RequestError(f"texts holds a {type(value).__name__}; give strings, mappings or token ids")


def _slug(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name, flags=re.ASCII).strip("-.")[-60:] or "model"
