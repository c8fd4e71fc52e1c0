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
from workbench.experiments import emergence
from workbench.experiments.demo_model.made_of import embedded
from workbench.probes import ActivationPatching

IMAGES = Path(__file__).parents[2] / "docs" / "images"
RECORD = "made-of.json"
"""File beside the pictures, with the fingerprints of model, SAE and texts."""
PICTURES = {
    "activation-patching": "lines",
    "attention-sinks": "sinks",
    "direct-logit-attribution": "terms",
    "logit-lens": "grid",
    "successor-heads": "circuit",
    "token-erasure": "accuracy",
}
"""Figure of each probe; the picture is named after the probe."""
IOI = "ioi-patching"
"""Picture of a model that does not ship: `--ioi` draws it anew."""
EMERGENCE = "emergence"
"""Picture of a training run, whose checkpoints do not ship: `--emergence` draws it anew."""
EMERGING = ("excess:max", "loss_repeated", "loss_new", "previous:max", "duplicate:max", "copying:max")
"""Variables of the probe induction-heads that it shows."""
TRAINING = {
    "emergence-texts": ("attention-sinks.sink", "logit-lens.mean_cross_entropy:last", "successor-heads.macro:max"),
    "emergence-repeats": ("induction-heads.excess:max", "induction-heads.previous:max"),
}
"""Pictures of the training of the embedded model with their measures, on its texts and on repeats: `--training`."""
IOI_PAIRS, IOI_LAYERS = 8, (0, 4, 8, 12, 16, 18, 20, 22, 24, 26, 29)


def draw(results: Path, images: Path) -> list[Path]:
    """Writes a PNG for each of `PICTURES` from the demo's `results`, and returns the files."""
    images.mkdir(parents=True, exist_ok=True)
    paths = []
    for probe, figure in PICTURES.items():
        paths.append(draw_one(wb.load_result(results / probe), figure, images / f"{probe}.png"))
    (images / RECORD).write_text(json.dumps(embedded(), indent=1) + "\n", encoding="utf-8")
    return [*paths, images / RECORD]


def draw_one(result: wb.Result, figure: str, path: Path) -> Path:
    """Writes one figure of a result as a PNG, two columns of a paper wide."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        wb.export(result, folder, figures=[figure], formats=("png",), columns=2)
        return (Path(folder) / f"{figure}.png").replace(path)


def draw_ioi(source: str, images: Path) -> Path:
    """Patches indirect objects in SmolLM2-135M, which takes minutes, and writes the picture of the residual stream."""
    model = wb.load_model(source, device="cpu", dtype="float32")
    result = ActivationPatching(layers=IOI_LAYERS).run_pairs(model, wb.prompt_pairs("ioi", model, IOI_PAIRS))
    return draw_one(result, "lines", images / f"{IOI}.png")


def draw_emergence(run: str, images: Path) -> Path:
    """Follows induction over the checkpoints of a training run, which takes minutes, and writes its picture."""
    config = emergence.Config(
        checkpoints=(run,),
        measures=tuple(f"induction-heads.{name}" for name in EMERGING),
        settings=("induction-heads.copying_tokens=256", "induction-heads.resamples=200"),
        sites=("pattern", "resid_post"),
        text=emergence.REPEATS,
        rows=3200,
    )
    return draw_one(emergence.run(config), "emergence", images / f"{EMERGENCE}.png")


def draw_training(run: str, images: Path) -> list[Path]:
    """Follows the training of the embedded model over its checkpoints, which takes minutes, and writes its pictures."""
    texts, repeats = TRAINING.values()
    on_texts = emergence.Config(checkpoints=(run,), measures=texts, rows=3200)
    on_repeats = emergence.Config(
        checkpoints=(run,), measures=repeats, sites=("pattern",), text=emergence.REPEATS, rows=3200, length=96
    )
    results = zip(TRAINING, (on_texts, on_repeats), strict=True)
    return [draw_one(emergence.run(config), "emergence", images / f"{name}.png") for name, config in results]


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the pictures of the documentation."""
    parser = argparse.ArgumentParser(prog="python -m workbench.experiments.pictures", description=__doc__)
    parser.add_argument("--demo", type=Path, help="folder of a finished `workbench demo`; default: run it")
    parser.add_argument("--ioi", help="folder of SmolLM2-135M; draws its picture, too")
    parser.add_argument("--emergence", help="folder of a training run with checkpoints; draws its picture, too")
    parser.add_argument("--training", help="folder of the embedded model's training; draws its pictures, too")
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder to write")
    request = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if request.demo is None:
            demo(Path(folder) / "demo")
        for path in draw((request.demo or Path(folder) / "demo") / "results", request.out):
            print(f"wrote  {path}")
    if request.ioi:
        print(f"wrote  {draw_ioi(request.ioi, request.out)}")
    if request.emergence:
        print(f"wrote  {draw_emergence(request.emergence, request.out)}")
    for path in draw_training(request.training, request.out) if request.training else ():
        print(f"wrote  {path}")


if __name__ == "__main__":
    main()
