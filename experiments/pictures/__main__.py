"""Pictures of README and docs, drawn from the embedded model.

`python -m workbench.experiments.pictures` runs the demo into a temporary folder, or reads the results of `--demo`, and
writes docs/images, two columns of a paper wide, with the fingerprints of what they show in `made-of.json`. It needs a
Chrome, and takes about two minutes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import workbench as wb
from workbench.demo.run import demo
from workbench.experiments.demo_model.made_of import embedded

IMAGES = Path(__file__).parents[2] / "docs" / "images"
RECORD = "made-of.json"
"""File beside the pictures, with the fingerprints of model, SAE and texts."""
PICTURES = {
    "attention-sinks": "sinks",
    "logit-lens": "grid",
    "successor-heads": "circuit",
    "token-erasure": "accuracy",
}
"""Figure of each probe; the picture is named after the probe."""


def draw(results: Path, images: Path) -> list[Path]:
    """Writes a PNG for each of `PICTURES` from the demo's `results`, and returns the files."""
    images.mkdir(parents=True, exist_ok=True)
    paths = []
    for probe, figure in PICTURES.items():
        result = wb.load_result(results / probe)
        with tempfile.TemporaryDirectory(dir=images) as folder:
            wb.export(result, folder, figures=[figure], formats=("png",), columns=2)
            paths.append((Path(folder) / f"{figure}.png").replace(images / f"{probe}.png"))
    (images / RECORD).write_text(json.dumps(embedded(), indent=1) + "\n", encoding="utf-8")
    return [*paths, images / RECORD]


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the pictures of the documentation."""
    parser = argparse.ArgumentParser(prog="python -m workbench.experiments.pictures", description=__doc__)
    parser.add_argument("--demo", type=Path, help="folder of a finished `workbench demo`; default: run it")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder to write")
    request = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if request.demo is None:
            demo(Path(folder) / "demo")
        for path in draw((request.demo or Path(folder) / "demo") / "results", request.out):
            print(f"wrote  {path}")


if __name__ == "__main__":
    main()
