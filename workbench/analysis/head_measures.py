"""Measures of every head of a model, from the probes that measure heads, as one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from workbench.analysis.received import attention_source
from workbench.figures.head_grid import head_name
from workbench.io.errors import RequestError, nearest
from workbench.io.progress import progress
from workbench.model.load import Model
from workbench.model.reload import recorded_model
from workbench.results.registry import find_probe
from workbench.results.result import Result
from workbench.store.reader import Store, StoreOrPath, opened

LENGTH = 64
"""Tokens of the sequences on which attention received is compared, where they are as long."""
ROWS = 2_000
"""Tokens, at most, on which direct contributions to logits are averaged."""


@dataclass(frozen=True)
class HeadMeasure:
    """A column of the atlas: a variable of a probe over (layer, head)."""

    name: str
    probe: str
    variable: str
    meaning: str
    null: str
    """Value under the null."""
    limits: tuple[float, float] | None = (0.0, 1.0)
    """Range of its possible values; None: unknown. Colours end at the largest value that was measured."""
    read: Callable[[Result], xr.DataArray] | None = None
    """Reads it from a result; None: it is the variable."""


def _share(result: Result) -> xr.DataArray:
    """Mean absolute contribution of each head to the logit, by the sum of that of all terms."""
    table = result.table
    heads = table.loc[table["kind"] == "head"]
    share = heads["absolute"].to_numpy(float) / table["absolute"].sum()
    series = pd.Series(share, pd.MultiIndex.from_arrays([heads["layer"].astype(int), heads["index"].astype(int)]))
    return xr.DataArray(series.unstack(), dims=("layer", "head"))


MEASURES: tuple[HeadMeasure, ...] = (
    HeadMeasure("sink", "active-dormant", "sink_attention", "attention that the sink token receives", "H_T / T"),
    HeadMeasure("active", "active-dormant", "active", "share of sequences on which the sink receives 0.3 or less", "1"),
    HeadMeasure(
        "drain", "active-dormant", "drain", "the sink's value through W_O, times the others' median", "1", None
    ),
    HeadMeasure("domain_gap", "active-dormant", "gap", "active in one domain less that in another", "gap_permuted"),
    HeadMeasure(
        "hidden_sink", "hidden-sinks", "share_fixed", "share of sequences with a sink after the first token", "0"
    ),
    HeadMeasure(
        "value_overlap", "value-aware-importance", "overlap_top", "top keys by attention that stay with values", "1"
    ),
    HeadMeasure("induction", "induction-heads", "induction", "attention to what followed the token before", "uniform"),
    HeadMeasure("excess", "induction-heads", "excess", "induction less what position alone explains", "0"),
    HeadMeasure("duplicate", "induction-heads", "duplicate", "attention to the token's earlier occurrences", "uniform"),
    HeadMeasure("previous", "induction-heads", "previous", "attention to the token before", "1 / visible keys"),
    HeadMeasure("current", "induction-heads", "current", "attention to the token itself", "1 / visible keys"),
    HeadMeasure(
        "copying", "induction-heads", "copying", "share of tokens that the head raises most itself", "1 / tokens"
    ),
    HeadMeasure("copying_eigen", "induction-heads", "copying_eigen", "copying from eigenvalues", "0", (-1.0, 1.0)),
    HeadMeasure("successor", "successor-heads", "macro", "successor has the largest logit of its class", "null_macro"),
    HeadMeasure(
        "dla_share", "direct-logit-attribution", "absolute", "share of the terms of the top logit", "", None, _share
    ),
)
"""Columns of the atlas, in order."""


@dataclass(frozen=True)
class HeadMeasures:
    """What was measured of every head of a model."""

    model: str
    table: pd.DataFrame
    """A line for each head: name, layer, head, and a column for each measure that could be computed."""
    measures: tuple[HeadMeasure, ...]
    """The columns."""
    missing: Mapping[str, str]
    """Measure that could not be computed to the reason."""
    headlines: Mapping[str, str]
    """Headline of each probe that ran."""


def measure_heads(
    store: StoreOrPath,
    *,
    model: Model | str | None = None,
    repeats: StoreOrPath | None = None,
    domain: str | None = None,
    device: str | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> HeadMeasures:
    """Returns every measure of heads that a store and its model allow, and the reason why others are missing.

    Costs the runs of six probes: see their pages. Longest with the model are `successor-heads` and, at 2,000 tokens,
    `direct-logit-attribution`.

    Args:
        store: The store, or its path; each probe reads the sites that it has.
        model: The recorded model, or what `load_model` takes. None: the name in the manifest, where that suffices.
        repeats: Store of random tokens that repeat (`wb.random_repeats`), for induction. None: `store`.
        domain: Metadata column by whose values active and dormant heads are compared. None: no comparison.
        device: Device of the model and of products with its weights. None: the GPU if there is one.
        seed: Random seed of the probes.
        show_progress: Show a progress bar.

    Raises:
        RequestError: Nothing could be measured, or the model or `repeats` is of another model.
    """
    store = opened(store)
    repeats = None if repeats is None else opened(repeats, "repeats")
    if repeats is not None and (difference := store.manifest.model.difference(repeats.manifest.model)):
        raise RequestError(f"repeats: {repeats.path} was recorded from another model: {difference}")
    if domain is not None and domain not in (column_names := store.tokens.column_names):
        raise RequestError(f"domain {domain!r} is not a column of the token table{nearest(domain, column_names)}")
    try:
        loaded, refusal = recorded_model(store, model, device), ""
    except RequestError as error:
        if model is not None:
            raise
        loaded, refusal = None, str(error)
    results, missing = {}, {}
    settings = _settings(store, domain, device, seed)
    with progress("heads", len(settings), "probes", show=show_progress) as advance:
        for name, probe_settings in settings.items():
            probe = find_probe(name)
            read = repeats if repeats is not None and name == "induction-heads" else store
            try:
                if probe.needs_model and loaded is None:
                    raise RequestError(refusal)
                results[name] = probe(**probe_settings).run(read, model=loaded)
            except RequestError as error:
                missing |= {measure.name: str(error) for measure in MEASURES if measure.probe == name}
            advance(1)
    return _join(store, results, missing, refusal)


def _settings(store: Store, domain: str | None, device: str | None, seed: int) -> dict[str, dict[str, Any]]:
    """Settings of each probe: intervals are not shown, so resamples are few."""
    starts = np.flatnonzero(np.diff(store.tokens["sequence"].to_numpy(), prepend=-1))
    longest = int(np.diff(starts, append=store.rows).max(initial=0))
    try:
        derived = attention_source(store)[0] == "derived"
    except RequestError:
        derived = False
    length = max(3, longest if derived else min(LENGTH, longest))
    few: dict[str, Any] = {"resamples": 50, "seed": seed}
    step = -(-store.rows // ROWS)
    return {
        "active-dormant": few
        | {"length": length, "min_visible": min(8, length - 1), "domain": domain, "device": device},
        "hidden-sinks": few | {"length": length, "min_visible": min(8, length - 1)},
        "value-aware-importance": few | {"length": length, "effect_sequences": 1, "device": device},
        "induction-heads": few | {"ablated": 0, "device": device},
        "successor-heads": {"permutations": 100, "seed": seed, "row_limit": 200, "device": device},
        "direct-logit-attribution": few | {"parts": "heads", "detail": 0, "where": f'"row" % {step} = 0'},
    }


def _join(store: Store, results: Mapping[str, Result], missing: dict[str, str], refusal: str) -> HeadMeasures:
    columns: dict[str, pd.Series] = {}
    for measure in MEASURES:
        if measure.name in missing:
            continue
        result = results[measure.probe]
        values = measure.read(result) if measure.read else result.data.get(measure.variable)
        if values is None or values.isnull().all():
            missing[measure.name] = _reason(measure, result, refusal)
        else:
            columns[measure.name] = values.to_series().dropna()
    if not columns:
        raise RequestError(f"no measure of heads could be computed of {store.path}: {next(iter(missing.values()))}")
    frame = pd.DataFrame(columns)
    layers, heads = (frame.index.get_level_values(i).to_numpy(int) for i in (0, 1))
    names = [head_name(int(layer), int(head)) for layer, head in zip(layers, heads, strict=True)]
    table = pd.DataFrame({"name": names, "layer": layers, "head": heads})
    for name in columns:
        table[name] = frame[name].to_numpy(float)
    table = table.sort_values(["layer", "head"], ignore_index=True)
    measures = tuple(measure for measure in MEASURES if measure.name in columns)
    lines = {name: result.headline() for name, result in results.items()}
    return HeadMeasures(store.manifest.model.name, table, measures, missing, lines)


def _reason(measure: HeadMeasure, result: Result, refusal: str) -> str:
    """Reason why a probe that ran does not have a variable."""
    if measure.name == "domain_gap" and not result.provenance["settings"]["domain"]:
        return "no domain was named (domain=, --domain)"
    note = result.data.attrs.get("note", "")
    return "; ".join(filter(None, [f"{measure.probe} did not compute {measure.variable}", note, refusal]))
