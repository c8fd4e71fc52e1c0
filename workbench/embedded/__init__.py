"""Model, sparse autoencoder and labelled corpus that ship with the package, so that every probe can run without a
network: `load_model("demo")`, `load_sae("demo")`, `demo_corpus()`.

docs/demo-model.md describes how they were made and what they show.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAME = "demo"
"""Name of the embedded model and SAE in `load_model` and `load_sae`; a directory of that name is written ./demo."""
PLANTED = "planted"
"""Name of the model and SAE whose weights code sets when they are loaded (`workbench.embedded.planted`)."""

FOLDER = Path(__file__).parent
MODEL, SAE, CORPUS = FOLDER / "model", FOLDER / "sae", FOLDER / "corpus.jsonl"


def demo_corpus() -> list[dict[str, Any]]:
    """Returns the embedded corpus, held out from the embedded model's training: documents with text, domain and spans.

    `record` accepts it as it is. `domain` is then a column of the token table, and each label of `spans` is two:
    `entity` (person, place), `concept` (class of a word), `ordinal` (class) and `ordinal_index` (from 0), `trigger`,
    `word`, `copy_source` (first character of the word that is copied), each with a `_span` that numbers the spans.
    About 0.1 s.
    """
    with CORPUS.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
