"""Comparison of stores of the same tokens: distances of their activations, and the results of probes on each.

For two models of one shape, two checkpoints of one training, or two dtypes of one model. Rows are compared one by one,
so both stores must hold the same tokens in the same sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.io.errors import RequestError, WorkbenchError, nearest
from workbench.io.progress import progress
from workbench.io.saving import save_texts
from workbench.io.spreadsheet import csv_text
from workbench.io.torch_state import plain_torch
from workbench.results.bootstrap import clustered_means, intervals, resampled_means
from workbench.results.registry import find_probe, installed_probes
from workbench.sites.grammar import short_name
from workbench.store.lost_values import lost_values, refuse_nonfinite
from workbench.store.manifest import SiteRecord, short_list
from workbench.store.reader import Rows, Store, StoreOrPath, opened
from workbench.store.run_difference import run_difference

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from workbench.results.result import Result

_BLOCK_BYTES = 32 << 20  # of one store's rows in float64; a few such live at a time
_GROUPS = 1000
"""Maximum number of groups in which documents are resampled, so that memory does not grow with them."""
_SAME = ("sequence", "position", "document", "token_id")


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`."""

    a: str
    """Path of the first store."""
    b: str
    sites: pd.DataFrame
    """A row for each site: `cosine`, the mean over tokens of cos(a, b), -1 to 1, and `relative_error`, the mean of
    |a - b| / |a|, 0 and up, each with its 95 % interval over documents; `largest_error` of any token; the number of
    `rows`, of `skipped` ones, which are all zeros in either store, or not finite, and of values that are `clipped` to
    the range of the stored type in either store."""
    probes: pd.DataFrame
    """A row for each measure of each probe: its value in a and b, with the probe's 95 % intervals, and b - a. For means
    over tokens, which are the same in both stores, the interval of the difference is that of paired differences."""
    not_run: Mapping[str, str]
    """Probe to the reason why it was not run."""
    model_difference: str | None = None
    """First difference of the second store's model, hooks and adapters included, and interventions where they differ;
    None: both ran the same model in the same way."""

    def figure(self) -> Figure:
        """Returns the mean cosine of each kind of site by layer, with 95 % intervals."""
        from workbench.figures.error_bars import error_bars  # plotly: seconds, which the command line does not pay
        from workbench.figures.safe_text import label
        from workbench.figures.themed import ThemedFigure
        from workbench.figures.ticks import integer_step

        figure = ThemedFigure()
        layer_sites = self.sites[self.sites["layer"] >= 0]
        for kind, part in layer_sites.groupby("kind", sort=False):
            figure.add_scatter(
                x=np.asarray(part["layer"]),
                y=np.asarray(part["cosine"]),
                error_y=error_bars(*(np.asarray(part[name]) for name in ("cosine", "cosine_low", "cosine_high"))),
                name=label(str(kind), 30),
                mode="lines+markers",
                hovertemplate="layer %{x}: %{y:.5g}",
            )
        figure.update_layout(
            title={
                "text": "Cosine similarity of activations of the same tokens in two stores",
                "subtitle": {"text": f"{label(Path(self.a).name, 40)} and {label(Path(self.b).name, 40)}"},
            },
            width=760,
            height=440,
            margin={"t": 110},
            showlegend=True,
        )
        figure.update_xaxes(title="layer", dtick=integer_step(layer_sites["layer"]))
        figure.update_yaxes(title="cosine similarity, mean over tokens")
        return figure

    def save(self, folder: str | Path) -> Path:
        """Writes sites.csv, probes.csv and cosine.html into an empty or new folder; RequestError if it is neither."""
        page = self.figure().to_html(include_mathjax=False, div_id="cosine")
        tables = {"sites.csv": csv_text(self.sites), "probes.csv": csv_text(self.probes)}
        return save_texts(folder, tables | {"cosine.html": page})


@dataclass(frozen=True)
class Comparisons:
    """The result of `compare` for three stores or more: each one against the first."""

    each: tuple[Comparison, ...]
    """The comparison of the first store with each other one, in the order in which they were given."""

    @property
    def sites(self) -> pd.DataFrame:
        """The tables of sites below each other, with the name of the other store in the first column, `store`."""
        return self._stacked("sites")

    @property
    def probes(self) -> pd.DataFrame:
        """The tables of probes below each other, with the name of the other store in the first column, `store`."""
        return self._stacked("probes")

    def figure(self) -> Figure:
        """Returns the mean cosine with the first store by layer, a line for each other store and kind of site."""
        from workbench.figures.safe_text import label  # plotly: seconds

        figure = self.each[0].figure()
        figure.data = ()
        for name, comparison in zip(self._names, self.each, strict=True):
            traces: Any = comparison.figure().data  # plotly makes their attributes at run time
            for trace in traces:
                figure.add_trace(trace.update(name=f"{label(name, 30)}, {trace.name}"))
        subtitle = f"each with {label(Path(self.each[0].a).name, 40)}"
        return figure.update_layout(title={"subtitle": {"text": subtitle}})

    def save(self, folder: str | Path) -> Path:
        """Writes sites.csv, probes.csv and cosine.html into an empty or new folder; RequestError if it is neither."""
        page = self.figure().to_html(include_mathjax=False, div_id="cosine")
        tables = {"sites.csv": csv_text(self.sites), "probes.csv": csv_text(self.probes)}
        return save_texts(folder, tables | {"cosine.html": page})

    @property
    def _names(self) -> list[str]:
        """Names of the other stores: of their folders, or whole paths where two folders have one name."""
        names = [Path(comparison.b).name for comparison in self.each]
        return names if len(set(names)) == len(names) else [comparison.b for comparison in self.each]

    def _stacked(self, table: str) -> pd.DataFrame:
        tables = [getattr(comparison, table).copy() for comparison in self.each]
        for name, frame in zip(self._names, tables, strict=True):
            frame.insert(0, "store", name)
        return pd.concat(tables, ignore_index=True)


@overload
def compare(
    a: StoreOrPath,
    b: StoreOrPath,
    *,
    sites: Sequence[str] | str | None = None,
    probes: Sequence[str] | str | None = None,
    allow_nonfinite: bool = False,
) -> Comparison: ...


@overload
def compare(
    a: StoreOrPath,
    b: StoreOrPath,
    c: StoreOrPath,
    /,
    *others: StoreOrPath,
    sites: Sequence[str] | str | None = None,
    probes: Sequence[str] | str | None = None,
    allow_nonfinite: bool = False,
) -> Comparisons: ...


@plain_torch()
def compare(
    a: StoreOrPath,
    b: StoreOrPath,
    *others: StoreOrPath,
    sites: Sequence[str] | str | None = None,
    probes: Sequence[str] | str | None = None,
    allow_nonfinite: bool = False,
) -> Comparison | Comparisons:
    """Compares the activations and probe results of stores of the same tokens, in bounded memory.

    Of three stores or more, each is compared with the first one, such as the base model of several finetunes. Costs one
    pass over the sites of both stores of a pair, and the runs of the probes, one a store.

    Args:
        a: The store, or its path, that relative errors refer to.
        b: The other store.
        *others: More stores, each to compare with `a`.
        sites: Names or kinds, `resid_post.3` or `resid_post`. None: all, which then must be the same in both.
        probes: Probes to run with their default settings. None: every installed one; those that either store does not
            permit are named in `not_run`. (): none.
        allow_nonfinite: True skips rows with a NaN or infinite value at a site, and counts them; False refuses the
            stores. Probes refuse such rows in either case.

    Raises:
        RequestError: The stores have different tokens, sites or widths, a site has NaN or infinite values, or a probe
            is not installed.
    """
    sites, probes = ((value,) if isinstance(value, str) else value for value in (sites, probes))
    for name in probes or ():
        find_probe(name)
    first, *rest = (opened(store, "stores") for store in (a, b, *others))
    for store in rest:  # before the first pass
        _check_tokens(first, store)
        _select_sites(first, store, sites)
    results: dict[str, Result | WorkbenchError] = {}
    names = tuple(installed_probes()) if probes is None else tuple(probes)
    comparisons = tuple(_compare_pair(first, store, sites, names, allow_nonfinite, results) for store in rest)
    return Comparisons(comparisons) if others else comparisons[0]


def _compare_pair(
    a: Store,
    b: Store,
    sites: Sequence[str] | None,
    probes: Sequence[str],
    allow_nonfinite: bool,
    results: dict[str, Result | WorkbenchError],
) -> Comparison:
    """The comparison of two stores; `results` of probes on the first one are kept for the next pair."""
    site_pairs = _select_sites(a, b, sites)
    labels = [site.label for site, _ in site_pairs]
    losses = [lost_values(store, labels) for store in (a, b)]
    for values in losses:
        if not allow_nonfinite:
            refuse_nonfinite(values, a.rows)
    lines = []
    with progress("comparing", len(site_pairs) * a.rows, "rows") as tick:
        groups = _document_groups(a)
        for a_site, b_site in site_pairs:
            clipped = sum(values[a_site.label].clipped for values in losses if a_site.label in values)
            lines.append(_compare_site(a, b, a_site, b_site, groups, tick) | {"clipped": clipped})
    measures, not_run = _run_probes(a, b, probes, results)
    difference = run_difference(a.manifest, b.manifest)
    return Comparison(str(a.path), str(b.path), pd.DataFrame(lines), measures, not_run, difference)


# ---- checks of the two stores ------------------------------------------------------------------------------


def _names(a: Store, b: Store) -> str:
    """Names of both stores for an error."""
    same_name = a.path.name == b.path.name
    return f"{a.path} and {b.path}" if same_name else f"{a.path.name} and {b.path.name}"


def _check_tokens(a: Store, b: Store) -> None:
    """Refuses stores whose rows are not the same tokens in the same sequences, reading a segment of each at a time."""
    if a.rows != b.rows:
        raise RequestError(
            f"{_names(a, b)} hold different tokens: {a.rows:,} and {b.rows:,} rows; record both from the same texts"
        )
    for start, stop in pairwise(a.manifest.starts):
        ids = np.arange(start, stop)
        tables = [Rows(store, ids).tokens for store in (a, b)]
        for name in _SAME:
            a_values, b_values = (table[name].to_numpy() for table in tables)
            if len(differ := np.flatnonzero(a_values != b_values)):
                at = int(differ[0])
                raise RequestError(
                    f"{_names(a, b)} hold different tokens: row {start + at:,} has {name} {a_values[at]} and "
                    f"{b_values[at]}; record both from the same texts with the same tokenizer, context and BOS"
                )


def _select_sites(a: Store, b: Store, patterns: Sequence[str] | None) -> list[tuple[SiteRecord, SiteRecord]]:
    sites_by_store = [{site.name: site for site in store.sites} for store in (a, b)]
    if patterns is None:
        for sites, second_sites, store, second_store in ((*sites_by_store, a, b), (*sites_by_store[::-1], b, a)):
            if missing_sites := [site.label for name, site in sites.items() if name not in second_sites]:
                raise RequestError(
                    f"{_names(a, b)} hold different sites: {store.path.name} has {short_list(missing_sites)}, which "
                    f"{second_store.path.name} lacks; name the sites to compare in sites="
                )
        names = list(sites_by_store[0])
    else:
        names = [name for pattern in patterns for name in _matching(a, b, sites_by_store, pattern)]
    pairs = [(sites_by_store[0][name], sites_by_store[1][name]) for name in dict.fromkeys(names)]
    for a_site, b_site in pairs:
        if (a_site.axes, a_site.shape) != (b_site.axes, b_site.shape):
            raise RequestError(
                f"{_names(a, b)} hold {a_site.label} of different widths: {_shape(a_site)} and {_shape(b_site)}; "
                "their rows cannot be compared"
            )
    return pairs


def _matching(a: Store, b: Store, sites_by_store: list[dict[str, SiteRecord]], pattern: str) -> list[str]:
    matches = [
        [site.name for site in store_sites.values() if _matches(site, pattern)] for store_sites in sites_by_store
    ]
    for store, second_store, names, second_names in ((a, b, *matches), (b, a, *matches[::-1])):
        if not names:
            labels = [site.label for site in store.sites]
            close, recorded_sites = nearest(pattern, labels), short_list(labels)
            raise RequestError(
                f"site {pattern!r} is not recorded in {store.path}{close}; recorded are {recorded_sites}"
            )
        if missing_names := [short_name(name) or name for name in second_names if name not in names]:
            raise RequestError(
                f"site {pattern!r}: {second_store.path.name} has {short_list(missing_names)}, which "
                f"{store.path.name} lacks; name the sites that both have"
            )
    return matches[0]


def _matches(site: SiteRecord, pattern: str) -> bool:
    return pattern in (site.name, site.short, (site.short or "").rpartition(".")[0])


def _shape(site: SiteRecord) -> str:
    return ", ".join(f"{axis} {length:,}" for axis, length in zip(site.axes[1:], site.shape, strict=True))


# ---- activations ----------------------------------------------------------------------------------------


def _document_groups(store: Store) -> Int[np.ndarray, " row"]:
    """Group of documents of each row: the document itself where there are few."""
    starts = store.manifest.starts
    parts = [
        Rows(store, np.arange(first, last)).tokens["document"].to_numpy() % _GROUPS for first, last in pairwise(starts)
    ]
    return np.concatenate([np.zeros(0, np.int16), *(part.astype(np.int16) for part in parts)])


def _compare_site(
    a: Store,
    b: Store,
    a_site: SiteRecord,
    b_site: SiteRecord,
    groups: Int[np.ndarray, " row"],
    tick: Callable[[int], object],
) -> dict[str, Any]:
    """The row of one site."""
    totals, counts = (np.zeros((_GROUPS, 2)) for _ in range(2))
    largest, skipped = 0.0, 0
    for block, x in a[a_site.label].blocks(max(1, _BLOCK_BYTES // (8 * max(1, int(np.prod(a_site.shape)))))):
        values = row_distances(x, b[b_site.label][block])
        finite = np.isfinite(values).all(1)
        group = groups[block][finite]
        np.add.at(totals, group, values[finite])
        np.add.at(counts, group, 1.0)
        skipped += int((~finite).sum())
        largest = max(largest, float(values[finite, 1].max(initial=0.0)))
        tick(len(x))
    nonempty = counts[:, 0] > 0
    (cosine, error), resamples = resampled_means(totals[nonempty], counts[nonempty])
    low, high = intervals(resamples) if nonempty.sum() > 1 else np.full((2, 2), np.nan)
    kind, _, layer = (a_site.short or a_site.name).rpartition(".")
    return {
        "site": a_site.label,
        "kind": kind if layer.isdecimal() else a_site.label,
        "layer": int(layer) if layer.isdecimal() else -1,
        "cosine": cosine,
        "cosine_low": low[0],
        "cosine_high": high[0],
        "relative_error": error,
        "relative_error_low": low[1],
        "relative_error_high": high[1],
        "largest_error": largest,
        "rows": int(counts[:, 0].sum()),
        "skipped": skipped,
    }


def row_distances(a: Float[Tensor, "row ..."], b: Float[Tensor, "row ..."]) -> Float[np.ndarray, "row 2"]:
    """Returns cos(a, b) and |a - b| / |a| of each row, in float64; NaN for a row that is all zeros or not finite."""
    x, y = a.double().flatten(1), b.double().flatten(1)
    lengths = x.norm(dim=1), y.norm(dim=1)
    cosine = ((x * y).sum(1) / (lengths[0] * lengths[1])).clamp(-1, 1)
    distances = torch.stack([cosine, (x - y).norm(dim=1) / lengths[0]], 1)
    distances[~torch.isfinite(distances).all(1)] = torch.nan
    return distances.numpy()


# ---- probes ---------------------------------------------------------------------------------------------


def _run_probes(
    a: Store, b: Store, names: Sequence[str], results: dict[str, Result | WorkbenchError]
) -> tuple[pd.DataFrame, dict[str, str]]:
    lines, not_run = [], {}
    document = None
    for name in names:
        if name not in results:
            results[name] = _run_probe(name, a)
        a_result = results[name]
        b_result = a_result if isinstance(a_result, WorkbenchError) else _run_probe(name, b)
        if isinstance(a_result, WorkbenchError) or isinstance(b_result, WorkbenchError):
            not_run[name] = f"{(a if b_result is a_result else b).path.name}: {b_result}"
            continue
        document = a.tokens["document"].to_numpy() if document is None else document
        lines += [{"probe": name, **line} for line in side_by_side(a_result, b_result, document)]
    return pd.DataFrame(lines), not_run


def _run_probe(name: str, store: Store) -> Result | WorkbenchError:
    try:
        return find_probe(name)().run(store)
    except WorkbenchError as error:
        return error


def side_by_side(a: Result, b: Result, document: Int[np.ndarray, " row"]) -> list[dict[str, Any]]:
    """Returns a line for each measure that both results have with an interval, at the same coordinates.

    These are variables with `_low` and `_high`, and variables over `row`, whose means over the rows of both stores,
    with intervals over documents, are computed here.
    """
    lines = []
    for name in a.data.data_vars:
        if name not in b.data or a.data[name].dtype.kind != "f":
            continue
        if {f"{name}_low", f"{name}_high"} <= {*a.data.data_vars} & {*b.data.data_vars}:
            lines += _with_intervals(a, b, str(name))
        elif "row" in a.data[name].dims and "row" in b.data[name].dims:
            lines += _over_rows(a, b, str(name), document)
    return lines


def _with_intervals(a: Result, b: Result, name: str) -> list[dict[str, Any]]:
    import xarray as xr

    parts = []
    for data in (a.data, b.data):
        parts += [data[name + suffix].reset_coords(drop=True) for suffix in ("", "_low", "_high")]
    parts = xr.align(*parts, join="inner")
    values = np.stack([part.to_numpy() for part in parts], -1)
    lines = []
    for place in np.ndindex(values.shape[:-1]):
        mean_a, low_a, high_a, mean_b, low_b, high_b = values[place].tolist()
        if np.isnan(mean_a) or np.isnan(mean_b):
            continue
        lines.append(
            {
                "measure": name,
                "at": _coordinates(parts[0], place),
                **{"a": mean_a, "a_low": low_a, "a_high": high_a},
                **{"b": mean_b, "b_low": low_b, "b_high": high_b},
                **{"difference": mean_b - mean_a, "difference_low": np.nan, "difference_high": np.nan},
                "units": a.data[name].attrs.get("units", ""),
            }
        )
    return lines


def _over_rows(a: Result, b: Result, name: str, document: Int[np.ndarray, " row"]) -> list[dict[str, Any]]:
    import xarray as xr

    a_array, b_array = xr.align(a.data[name], b.data[name], join="inner")
    if "row" not in a_array.coords or not a_array.sizes["row"]:
        return []
    a_array, b_array = (part.transpose(..., "row") for part in (a_array, b_array))
    clusters = document[a_array["row"].to_numpy()]
    lines = []
    for place in np.ndindex(a_array.shape[:-1]):
        values = np.stack([a_array.to_numpy()[place], b_array.to_numpy()[place]], 1).astype(np.float64)
        values[np.isnan(values).any(1)] = np.nan  # the same rows in both
        if np.isnan(values).all():
            continue
        mean, resamples = clustered_means(values, clusters)
        resamples = np.column_stack([resamples, resamples[:, 1] - resamples[:, 0]])
        low, high = intervals(resamples)
        lines.append(
            {
                "measure": f"mean {name}",
                "at": _coordinates(a_array.isel(row=0), place),
                **{"a": mean[0], "a_low": low[0], "a_high": high[0]},
                **{"b": mean[1], "b_low": low[1], "b_high": high[1]},
                **{"difference": mean[1] - mean[0], "difference_low": low[2], "difference_high": high[2]},
                "units": a.data[name].attrs.get("units", ""),
            }
        )
    return lines


def _coordinates(array: Any, place: tuple[int, ...]) -> str:
    """Coordinates in words: "layer 3, offset -1"."""
    return ", ".join(
        f"{axis} {array[axis].to_numpy()[index] if axis in array.coords else index}"
        for axis, index in zip(array.dims, place, strict=True)
    )
