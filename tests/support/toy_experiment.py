"""A toy: y = factor x + seed. It counts how often it ran, and two of its models fail."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from workbench.io.errors import RequestError
from workbench.results.experiment import make_result

NAME = "toy"
RAN: list = []


@dataclass(frozen=True)
class Config:
    """Settings of the toy."""

    model: str = "a"
    """Name of the line: a, b, broken, refused."""
    factor: float = 1.0
    """Its slope."""
    seed: int = 0
    """Its intercept."""
    positions: tuple[int, ...] = (0, 1, 2)
    """Position at which the line is read."""
    recordings: Path = field(default=Path("recordings"), compare=False)
    """Changes no number."""

    def __post_init__(self) -> None:
        if self.factor < 0:
            raise RequestError(f"factor must not be negative, but is {self.factor}")


def run(config):
    RAN.append(config)
    print("drawing a line")
    if config.model == "broken":
        raise RuntimeError("the line\nbroke")
    if config.model == "refused":
        raise RequestError("model 'refused' is refused; give another")
    table = pd.DataFrame({"x": config.positions, "y": [config.factor * x + config.seed for x in config.positions]})
    return make_result(NAME, config, table)


def headline(result):
    return f"y up to {result.table['y'].max():g}"


def figures(result):
    return {"lines": go.Figure(go.Scatter(x=result.table["x"], y=result.table["y"]))}
