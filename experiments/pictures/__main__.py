"""The pictures in the README and the docs, drawn anew from the embedded model.

`python -m workbench.experiments.pictures` runs the demo into `--demo`, unless its results are there, and writes
docs/images, two columns of a paper wide. It needs a Chrome.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import workbench as wb
from workbench.demo.run import demo

IMAGES = Path(__file__).parents[2] / "docs" / "images"
PICTURES = {
    "attention-sinks": "sinks",
    "logit-lens": "grid",
    "successor-heads": "circuit",
    "token-erasure": "accuracy",
}
"""Probe to the figure that is shown; the picture has the probe's name."""


def draw(results: Path, images: Path) -> list[Path]:
    """Writes a PNG for each of `PICTURES` from the demo's `results`; the files written."""
    images.mkdir(parents=True, exist_ok=True)
    written = []
    for probe, figure in PICTURES.items():
        result = wb.load_result(results / probe)
        with tempfile.TemporaryDirectory(dir=images) as folder:
            wb.export(result, folder, figures=[figure], formats=("png",), columns=2)
            written.append((Path(folder) / f"{figure}.png").replace(images / f"{probe}.png"))
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m workbench.experiments.pictures", description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="folder of `workbench demo`")
    parser.add_argument("--out", type=Path, default=IMAGES)
    asked = parser.parse_args(arguments)
    results = asked.demo / "results"
    if not all((results / probe).is_dir() for probe in PICTURES):
        demo(asked.demo)
    for path in draw(results, asked.out):
        print(f"wrote  {path}")


if __name__ == "__main__":
    main()
