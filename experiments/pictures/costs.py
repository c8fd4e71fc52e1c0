"""The costs of interventions, drawn from their table in docs/benchmarks.md.

`python -m workbench.experiments.pictures.costs` writes docs/images/intervention-costs.png, two columns of a paper wide.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

import workbench as wb
from workbench.figures.error_bars import error_bars
from workbench.figures.theme import NEUTRAL
from workbench.figures.themed import ThemedFigure

DOCS = Path(__file__).parents[2] / "docs"
NAME = "intervention-costs"
_LINE = re.compile(r"^\| ([^|]+?) +\|.*?\| ([\d.]+) times +\| 95 % CI \[([\d.]+), ([\d.]+)\]", re.MULTILINE)


def costs(page: str) -> dict[str, tuple[float, float, float]]:
    """Returns speed relative to the plain pass, and the ends of its 95 % interval, by kind of record."""
    section = page.partition("## interventions\n")[2].partition("\n## ")[0]
    return {name: (float(ratio), float(low), float(high)) for name, ratio, low, high in _LINE.findall(section)}


def figure(page: str) -> go.Figure:
    """Returns a point with its interval for each kind of record; 1 is the speed of the plain pass."""
    known = costs(page)
    ratio, low, high = np.array(list(known.values())).T
    drawn = ThemedFigure()
    drawn.add_scatter(x=ratio, y=list(known), error_x=error_bars(ratio, low, high), mode="markers", marker={"size": 8})
    drawn.add_vline(1.0, line={"dash": "dash", "color": NEUTRAL})
    subtitle = "tokens per second, times those of the plain pass (dashed); median and 95 % interval of pairs"
    drawn.update_layout(
        title={"text": "Speed of a pass with interventions, SmolLM2-135M", "subtitle": {"text": subtitle}},
        height=460,
        width=760,
    )
    drawn.update_xaxes(title="Times the plain pass")
    return drawn.update_yaxes(autorange="reversed")


def main() -> None:
    """Writes the picture."""
    drawn = figure((DOCS / "benchmarks.md").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        wb.export(drawn, Path(folder) / NAME, formats=("png",), columns=2)
        path = shutil.copy(Path(folder) / NAME / f"{NAME}.png", DOCS / "images")
    print(f"wrote  {path}")


if __name__ == "__main__":
    main()
