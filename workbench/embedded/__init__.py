"""The model, sparse autoencoder and labelled corpus that ship inside the package, so that every probe has something
to find on a machine without network: `load_model("demo")`, `load_sae("demo")`, `demo_corpus()`.

How they were made and what they show: docs/demo-model.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAME = "demo"
"""What `load_model` and `load_sae` call the embedded ones; a directory of that name is written ./demo."""

FOLDER = Path(__file__).parent
MODEL, SAE, CORPUS = FOLDER / "model", FOLDER / "sae", FOLDER / "corpus.jsonl"


def demo_corpus() -> list[dict[str, Any]]:
    """The embedded corpus, held out from the embedded model's training: documents with `text`, `domain` and `spans`.

    `record` takes it as it is. `domain` then is a column of the token table, and each label of `spans` two: `entity`
    (person, place), `concept` (class of a word), `ordinal` (class) and `ordinal_index` (from 0), `trigger`, `word`,
    `copy_source` (character at which the word that is copied begins), each with a `_span` that numbers the spans.
    About 0.1 s.
    """
    with CORPUS.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
