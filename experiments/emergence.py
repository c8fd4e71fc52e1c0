"""Emergence in training: measures of any probes over the checkpoints of one model, one line a measure.

Checkpoints are folders, revisions of a hub id, or one folder that holds a folder for each; the step is the last number
in the name. A measure is PROBE.VARIABLE, or PROBE.VARIABLE:max for one over heads or layers (max, min, mean, first or
last over its axes).

    python -m workbench.experiments.emergence --checkpoints EleutherAI/pythia-14m@step512 EleutherAI/pythia-14m@step1000
    workbench sweep emergence --checkpoints run --measures induction-heads.excess:max --text repeats --sites pattern
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

import workbench as wb
from workbench.embedded import NAME as DEMO
from workbench.experiments.inputs import RECORDINGS, documents_of, model_of
from workbench.experiments.panels import groups
from workbench.figures.safe_text import label
from workbench.figures.theme import CATEGORIES, TEMPLATE
from workbench.io.checks import check_fields
from workbench.io.errors import RequestError, nearest
from workbench.recording.cache import record_once
from workbench.results.experiment import make_result
from workbench.results.registry import find_probe

NAME = "emergence"
REPEATS = "repeats"
OVER_AXES = ("max", "min", "mean", "first", "last")


@dataclass(frozen=True)
class Config:
    """Measures of probes at each checkpoint on the same texts."""

    checkpoints: tuple[str, ...] = (DEMO,)
    """Folders, or hub ids with @revision, in the order of training; or one folder of such folders."""
    measures: tuple[str, ...] = ("attention-sinks.sink", "logit-lens.mean_cross_entropy:last")
    """PROBE.VARIABLE, or with :max, :min, :mean, :first, :last over the variable's axes."""
    settings: tuple[str, ...] = ("logit-lens.detail=0",)
    """Settings of the probes that are not their defaults, as PROBE.SETTING=VALUE."""
    sites: tuple[str, ...] = ("attn_received", "resid_post")
    """Sites that the probes need."""
    text: str = DEMO
    """File (.txt .json .jsonl .csv .tsv .parquet), hf:NAME of a dataset, demo: the embedded corpus, or repeats: random
    tokens that repeat at random distances, for induction heads."""
    documents: int = 1000
    """Documents read from the beginning of the text, in the order of the seed; or sequences of repeats."""
    rows: int = 6400
    """Maximum number of tokens to record."""
    length: int = 64
    """Tokens per sequence; probes that have a setting `length` get it."""
    seed: int = 0
    """Random seed, of the order of documents and of the probes."""
    device: str | None = None
    """Device: cpu, cuda, cuda:1. None: the GPU if there is one."""
    recordings: Path = field(default=RECORDINGS, compare=False)
    """Folder of the recordings that runs share. It does not affect results."""

    def __post_init__(self) -> None:
        check_fields(self, "documents", "rows", "length", at_least=1)
        check_fields(self, "seed", at_least=0)
        if not self.checkpoints:
            raise RequestError("checkpoints is empty; name one or more folders, or hub ids with @revision")
        if not self.measures:
            raise RequestError("measures is empty; name one or more, such as attention-sinks.sink")
        if len(set(self.measures)) < len(self.measures):
            raise RequestError("measures names one twice")
        probes_of(self)  # checks names and settings before anything runs


def run(config: Config) -> wb.Result:
    """Returns one line per checkpoint and measure: step, value with its 95 % CI where the probe has one, units."""
    checkpoints = all_checkpoints(config.checkpoints)
    probes = probes_of(config)
    lines, stores = [], []
    for checkpoint, step in zip(checkpoints, training_steps(checkpoints), strict=True):
        model = model_of(checkpoint, device=config.device)
        options = {"context": config.length, "max_rows": config.rows, "sites": config.sites}
        store = record_once(model, _texts(config, model), folder=config.recordings, **options)
        results = {name: probe.run(store, model=model) for name, probe in probes.items()}
        for measure in config.measures:
            name, variable, over = split_measure(measure)
            value, low, high, units = read_measure(results[name].data, measure, variable, over)
            lines.append(
                {"checkpoint": checkpoint, "step": step, "measure": measure, "value": value, "low": low, "high": high}
                | {"units": units, "tokens": store.rows}
            )
        stores.append(store)
    return make_result(NAME, config, pd.DataFrame(lines), *stores)


def split_measure(measure: str) -> tuple[str, str, str]:
    """Returns probe, variable and what is taken over its axes ("" for none) of "induction-heads.excess:max"."""
    match = re.fullmatch(r"([a-z0-9-]+)\.(\w+)(?::(\w+))?", measure)
    if not match or (match[3] or OVER_AXES[0]) not in OVER_AXES:
        raise RequestError(
            f"measures: {measure!r} is no measure; write PROBE.VARIABLE or PROBE.VARIABLE:max (or "
            f"{', '.join(OVER_AXES[1:])}), such as induction-heads.excess:max"
        )
    return match[1], match[2], match[3] or ""


def probes_of(config: Config) -> dict[str, Any]:
    """Returns the probes that the measures name, with their settings."""
    names = list(dict.fromkeys(split_measure(measure)[0] for measure in config.measures))
    kinds: dict[str, Any] = {name: find_probe(name) for name in names}
    for measure in config.measures:
        name, variable, _ = split_measure(measure)
        known = [declaration.name for declaration in kinds[name].variables]
        if variable not in known:
            raise RequestError(f"measures: {name} has no variable {variable!r}{nearest(variable, known)}")
    chosen: dict[str, dict[str, Any]] = {name: {} for name in names}
    for setting in config.settings:
        match = re.fullmatch(r"([a-z0-9-]+)\.(\w+)=(.*)", setting)
        if not match:
            raise RequestError(f"settings: {setting!r} is no setting; write PROBE.SETTING=VALUE")
        if match[1] not in kinds:
            continue  # of a probe that no measure names, as the default
        known = [setting_field.name for setting_field in fields(kinds[match[1]])]
        if match[2] not in known:
            raise RequestError(f"settings: {match[1]} has no setting {match[2]!r}{nearest(match[2], known)}")
        chosen[match[1]][match[2]] = _value(match[3])
    shared = {"seed": config.seed, "length": config.length, "device": config.device}
    for name, kind in kinds.items():
        known = {setting_field.name for setting_field in fields(kind)}
        chosen[name] = {key: value for key, value in shared.items() if key in known} | chosen[name]
    return {name: kind(**chosen[name]) for name, kind in kinds.items()}


def _value(text: str) -> Any:
    """A value as JSON has it, or the text itself; a list is a tuple."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return tuple(value) if isinstance(value, list) else value


def read_measure(data: xr.Dataset, measure: str, variable: str, over: str) -> tuple[float, float, float, str]:
    """Returns a measure with the ends of its interval (NaN where there is none) and its units.

    Of "max" and "min" the interval is that of the same place: not one of the largest of several.

    Raises:
        RequestError: The probe did not compute the variable, it is text, or it has axes and nothing says what to take
            over them.
    """
    if variable not in data:
        note = data.attrs.get("note", "")
        raise RequestError(f"measures: {measure} was not computed{f' ({note})' if note else ''}; record other sites")
    if data[variable].dtype.kind not in "biuf":
        raise RequestError(f"measures: {measure} is text; name a variable with numbers")
    values = data[variable].to_numpy().astype(float)
    if values.ndim and not over:
        axes = ", ".join(map(str, data[variable].dims))
        raise RequestError(f"measures: {measure} has the axes {axes}; write {measure}:max, or another of {OVER_AXES}")
    names = [f"{variable}_{end}" for end in ("low", "high")]
    unknown = np.full(values.shape, np.nan)
    ends = [data[name].to_numpy().astype(float) if name in data else unknown for name in names]
    units = str(data[variable].attrs.get("units", ""))
    if np.isnan(values).all():
        return float("nan"), float("nan"), float("nan"), units
    if over == "mean":
        return float(np.nanmean(values)), float("nan"), float("nan"), units
    if over in ("max", "min"):
        place = np.unravel_index(np.nanargmax(values if over == "max" else -values), values.shape)
    else:
        place = tuple((0 if over == "first" else length - 1) for length in values.shape)
    return float(values[place]), float(ends[0][place]), float(ends[1][place]), units


def _texts(config: Config, model: wb.Model) -> list[Any]:
    if config.text != REPEATS:
        return documents_of(config.text, config.documents, config.seed)
    most = max(2, min(60, config.length // 3))  # filler and two copies fit
    ids = model.tokenizer if model.tokenizer is not None else list(range(model.vocab))
    number = min(config.documents, -(-config.rows // config.length))
    period, filler = (max(2, most // 2), most), (1, max(1, config.length - 2 * most - 2))
    return wb.random_repeats(ids, number, period=period, filler=filler, seed=config.seed)


def all_checkpoints(checkpoints: Sequence[str]) -> tuple[str, ...]:
    """Returns the checkpoints; a folder without a model is the folders in it that have one, by training step."""
    known: list[str] = []
    for checkpoint in checkpoints:
        folder = Path(checkpoint)
        inside = sorted(str(path.parent) for path in folder.glob("*/config.json")) if folder.is_dir() else []
        if not inside or (folder / "config.json").is_file():
            known.append(checkpoint)
            continue
        numbered = [name for name in inside if re.search(r"\d", Path(name).name)] or inside  # not a final "model"
        known += [name for _, name in sorted(zip(training_steps(numbered), numbered, strict=True))]
    return tuple(known)


def training_steps(checkpoints: Sequence[str]) -> list[int]:
    """Returns the last number in each name or revision, 500 of "checkpoint-500"; indices if one is missing or two are
    equal."""
    numbers = [re.findall(r"\d+", Path(name.rpartition("@")[2]).name) for name in checkpoints]
    steps = [int(digits[-1]) if digits else -1 for digits in numbers]
    return steps if len({*steps}) == len(steps) and min(steps) >= 0 else list(range(len(steps)))


def headline(result: wb.Result) -> str:
    """Returns each measure at the first and the last checkpoint as a sentence."""
    parts = []
    for measure, part in result.table.groupby("measure", sort=False):
        ordered = part.sort_values("step", kind="stable")
        parts.append(f"{measure} from {ordered['value'].iloc[0]:.3g} to {ordered['value'].iloc[-1]:.3g}")
    steps = result.table["step"]
    return f"Over {steps.nunique()} checkpoints (steps {steps.min():,} to {steps.max():,}): {'; '.join(parts)}."


def figures(result: wb.Result) -> dict[str, Any]:
    """Returns "emergence": a panel for each measure over training steps, a line for each differing setting."""
    measures = result.table["measure"].unique().tolist()
    columns = min(3, len(measures))
    rows = -(-len(measures) // columns)
    titles = [label(measure, 60) for measure in measures]
    figure = make_subplots(rows, columns, subplot_titles=titles, vertical_spacing=0.2 / rows)
    lines = groups(result, ("checkpoints", "measures", "settings"))
    for number, (name, part) in enumerate(lines):
        for place, measure in enumerate(measures):
            of_measure = part.loc[part["measure"] == measure].groupby("step", sort=True)
            at = of_measure.agg(value=("value", "mean"), low=("low", "min"), high=("high", "max"))
            curve = go.Scatter(
                x=at.index.tolist(),
                y=at["value"],
                error_y=_bars(at),
                mode="lines+markers",
                line={"color": CATEGORIES[number % len(CATEGORIES)]},
                name=name,
                legendgroup=name,
                showlegend=place == 0 and len(lines) > 1,
                hovertemplate="step %{x}: %{y:.4g}",
            )
            row, column = place // columns + 1, place % columns + 1
            figure.add_trace(curve, row=row, col=column)
            units = result.table.loc[result.table["measure"] == measure, "units"].iloc[0]
            figure.update_yaxes(title=label(units, 40).replace("·", " "), rangemode="tozero", row=row, col=column)
    figure.update_layout(
        template=TEMPLATE,
        title={"text": "Emergence in training", "subtitle": {"text": "by checkpoint; bars: 95 % CI of the probe"}},
        width=max(640, 160 + 340 * columns),
        height=200 + 290 * rows,
        margin={"t": 120},
    )
    figure.update_annotations(font_size=13)
    figure.update_traces(cliponaxis=False)  # the checkpoint before training lies on the axis
    return {"emergence": figure.update_xaxes(title="training step", rangemode="tozero")}


def _bars(at: pd.DataFrame) -> dict[str, Any] | None:
    """Error bars of a line; None where the probe has no interval."""
    if not at["low"].notna().to_numpy().any():
        return None
    above, below = (at["high"] - at["value"]).fillna(0), (at["value"] - at["low"]).fillna(0)
    return {"type": "data", "array": above, "arrayminus": below, "thickness": 1}


if __name__ == "__main__":
    from workbench.cli.main import run_experiment

    run_experiment(NAME)
