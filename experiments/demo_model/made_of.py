"""Fingerprints of the embedded model, autoencoder and corpus, for the pages that are generated from them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from workbench.embedded import CORPUS, MODEL, SAE

_LINE = "*Made of:* "
_WEIGHTS = ("config.json", "model.safetensors", "tokenizer.json")
_DICTIONARY = ("cfg.json", "sae_weights.safetensors")


def fingerprint(files: Iterable[Path]) -> str:
    """Returns the first 16 hexadecimal digits of the SHA-256 of the files' contents, one after another."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def model_fingerprint(folder: Path) -> str:
    """Returns the fingerprint of a directory in Hugging Face format: config, weights, tokenizer."""
    return fingerprint(folder / name for name in _WEIGHTS)


def sae_fingerprint(folder: Path) -> str:
    """Returns the fingerprint of a directory in SAELens' format: config, weights."""
    return fingerprint(folder / name for name in _DICTIONARY)


def embedded() -> dict[str, str]:
    """Returns the fingerprints of everything that ships: model, SAE and texts."""
    return {
        "model demo": model_fingerprint(MODEL),
        "SAE demo": sae_fingerprint(SAE),
        "texts demo_corpus": fingerprint([CORPUS]),
    }


def made_of(fingerprints: Mapping[str, str], settings: Mapping[str, object]) -> str:
    """Returns the line of a generated page that says what it was made of."""
    parts = [f"{name} `{digits}`" for name, digits in fingerprints.items()]
    parts += [f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}" for name, value in settings.items()]
    return f"{_LINE}{'; '.join(parts)}.\n"


def read_made_of(page: str) -> dict[str, str]:
    """Returns the fingerprints that a generated page states; empty where it states none."""
    lines = [line for line in page.splitlines() if line.startswith(_LINE)]
    return dict(re.findall(r"(?:^|; )([^;`]+) `([0-9a-f]{16})`", lines[0].removeprefix(_LINE))) if lines else {}
