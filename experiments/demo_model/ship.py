"""Copy a trained model, its SAE and the held-out corpus into the package.

python -m workbench.experiments.demo_model.ship runs/demo-0
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from workbench.embedded import MODEL, SAE
from workbench.experiments.demo_model import corpus
from workbench.io.errors import RequestError

LIMIT = 20_000_000
"""Maximum bytes of everything that ships."""


def ship(run: Path) -> int:
    """Replaces the embedded model and SAE by those of `run`, and returns the bytes of everything embedded."""
    for name in ("model", "sae"):
        if not (run / name).is_dir():
            raise RequestError(f"run {str(run)!r} has no {name}; run python -m workbench.experiments.demo_model.{name}")
    for source, target in ((run / "model", MODEL), (run / "sae", SAE)):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    shutil.copy(run / "training.json", MODEL / "training.json")
    corpus.main([])
    return sum(path.stat().st_size for path in MODEL.parent.rglob("*") if path.is_file())


def main(arguments: Sequence[str] | None = None) -> None:
    """Copies a run into the package and prints the size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    size = ship(parser.parse_args(arguments).run)
    print(f"embedded: {size / 1e6:.1f} MB of at most {LIMIT / 1e6:.0f}")


if __name__ == "__main__":
    main()
