"""Counts of trials, for the table of docs/reliability.md: a line of JSON in the file that WORKBENCH_TRIALS names."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping


def note(kind: str, name: str, counts: Mapping[str, int], problems: int) -> None:
    """Adds one trial, of the test that runs.

    Args:
        kind: "crash points" or "mutations".
        name: What was tried: an operation, a file.
        counts: Number of trials by fault or by outcome.
        problems: Trials that lost something, or raised an exception of another library.
    """
    if path := os.environ.get("WORKBENCH_TRIALS"):
        test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0]
        line = {"kind": kind, "test": test, "name": name, "counts": dict(counts), "problems": problems}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
