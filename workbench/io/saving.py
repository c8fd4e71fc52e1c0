"""Text files that are saved whole: one by its path, or several in a folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from workbench.io.checks import as_path
from workbench.io.errors import RequestError
from workbench.io.files import explain_full_disk, refuse_full, replace_file, replace_folder, write_file


def save_text(path: str | os.PathLike[str], text: str) -> Path:
    """Writes a text file, in place of one of that name, into a folder that is made if need be; returns its path.

    Raises:
        RequestError: The path is a folder.
        DataError: The disk is full, read-only or failing.
    """
    path = as_path("path", path)
    if path.is_dir():
        raise RequestError(f"path {str(path)!r} is a folder; name a file in it")
    with explain_full_disk(str(path), "write it again"):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode("utf-8", "replace"))
    return path


def save_texts(folder: str | os.PathLike[str], texts: Mapping[str, str]) -> Path:
    """Writes text files by name into an empty or new folder, all or none, and returns the folder.

    Raises:
        RequestError: The folder is not empty, or is a file.
        DataError: The disk is full, read-only or failing.
    """
    folder = as_path("folder", folder)
    refuse_full(folder)
    with explain_full_disk(str(folder), "save it again"), replace_folder(folder.resolve(), ()) as new:
        for name, text in texts.items():
            write_file(new / name, text.encode("utf-8", "replace"))
    return folder
