"""A recording in place of another store, which stays readable until the new one is complete."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.io.files import PARTIAL, locked, put_in_place, remove
from workbench.store.manifest import MANIFEST
from workbench.store.owned_files import STORE_FILES
from workbench.store.writer import OtherRecording

if TYPE_CHECKING:
    from workbench.store.reader import Store


def overwrite_store(path: Path, write: Callable[[Path], Store]) -> Store:
    """Returns the store that `write` makes, at `path`, in place of the store that is there.

    The new one is made in a hidden folder beside it, in which an interrupted call of the same request is resumed; when
    it is complete, both exchange their names. Files of others in the old folder are kept.
    """
    from workbench.store.reader import open_store  # takes seconds: DuckDB, pandas and xarray

    path = path if path.name not in ("", "..") else path.resolve()  # "." has no name
    place = path.with_name(f".{path.name}.overwrite{PARTIAL}")
    if not (path / MANIFEST).exists() and not place.exists():
        return write(path)  # which refuses a folder that is no store
    with locked(path):
        try:
            write(place)
        except OtherRecording:  # begun by another request
            remove(place)
            write(place)
        put_in_place(place, path, STORE_FILES)
    return open_store(path)
