"""Atlas of heads: every head of a model with all that was measured about it, as a table, a figure and a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from workbench.analysis.head_measures import HeadMeasure, HeadMeasures, measure_heads
from workbench.figures.markup import cell, escape, frame, inert, table
from workbench.figures.safe_text import label, sentence
from workbench.io.checks import as_path
from workbench.io.counted import counted
from workbench.io.errors import RequestError
from workbench.io.saving import save_text
from workbench.pages.report import document, figure_markup, wide

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

    from workbench.model.load import Model
    from workbench.store.reader import StoreOrPath

_FOLDER = Path(__file__).parent
_SHOWN = 10


@dataclass(frozen=True, eq=False)
class HeadAtlas:
    """Every head of a model with all that was measured about it."""

    measured: HeadMeasures
    """The measures, the reasons for missing ones, and the headlines of the probes."""

    @property
    def table(self) -> pd.DataFrame:
        """A line for each head: name, layer, head, and a column for each measure."""
        return self.measured.table

    @property
    def missing(self) -> dict[str, str]:
        """Measures that could not be computed, with the reason."""
        return dict(self.measured.missing)

    def figure(self) -> Figure:
        """Returns a heat map of layers by heads for each measure."""
        from workbench.figures.head_panels import HeadPanel, head_panels

        data, layers = self.table, sorted(self.table["layer"].unique().tolist())
        heads = int(data["head"].to_numpy().max()) + 1
        panels = []
        for measure in self.measured.measures:
            values = np.full((len(layers), heads), np.nan)
            values[np.searchsorted(layers, data["layer"]), data["head"]] = data[measure.name]
            panels.append(HeadPanel(sentence(measure.name), values, _limits(measure, data)))
        title = f"Heads of {label(self.measured.model, 60)}"
        subtitle = f"{counted(len(data), 'head')}; the range of colours stands behind each name"
        return head_panels(panels, layers=layers, title=title, subtitle=subtitle)

    def write(self, path: str | Path) -> Path:
        """Writes a page with the figure and the table, sortable by each column, and replaces an existing file.

        The page works offline; about 5 MB of it are plotly's script. Text of models is escaped.

        Raises:
            RequestError: `path` is a folder.
        """
        path = as_path("path", path)
        if path.is_dir():
            raise RequestError(f"out {str(path)!r} is a folder; name the file, such as {str(path / 'atlas.html')!r}")
        title = f"Heads of {self.measured.model}"
        style, script = ((_FOLDER / f"head_atlas.{end}").read_text(encoding="utf-8") for end in ("css", "js"))
        page = document(title, self._body(title), style=style, scripts=[script])
        return save_text(path, page)

    def _body(self, title: str) -> str:
        measured = self.measured
        columns = [(measure.name, measure.probe, measure.null, measure.meaning) for measure in measured.measures]
        lines = [[f"<code>{escape(name)}</code>", *map(escape, rest)] for name, *rest in columns]
        missing = [[f"<code>{escape(name)}</code>", escape(reason)] for name, reason in measured.missing.items()]
        headlines = "".join(
            f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in measured.headlines.items()
        )
        return "\n".join(
            [
                f"<header><h1>{escape(title)}</h1>",
                f"<p>{counted(len(self.table), 'head')}, {counted(len(measured.measures), 'measure')}. "
                "Sort by a column with its button; "
                "a second time turns the order round.</p></header>",
                '<main id="results">',
                figure_markup(self.figure(), "heads"),
                '<p id="order" role="status" aria-live="polite"></p>',
                wide(_sortable(self.table, measured.measures), "All heads"),
                "<h2>Columns</h2>",
                wide(table(("column", "probe", "value under the null", "meaning"), lines), "Columns"),
                "<h2>Not measured</h2>" + wide(table(("column", "reason"), missing), "Not measured") if missing else "",
                f"<h2>Headlines</h2><dl>{headlines}</dl>",
                "</main>",
            ]
        )

    def _repr_html_(self) -> str:
        """The first lines of the table, for notebooks."""
        lines = [f"<p>{escape(name)} not measured: {escape(reason)}</p>" for name, reason in self.missing.items()]
        return inert(
            f"<strong>Heads of {escape(self.measured.model)}</strong>{frame(self.table, _SHOWN)}{''.join(lines)}"
        )


def head_atlas(
    store: StoreOrPath,
    *,
    model: Model | str | None = None,
    repeats: StoreOrPath | None = None,
    domain: str | None = None,
    device: str | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> HeadAtlas:
    """Returns every head of a model with all that a store and the model allow to measure about it.

    Measures: attention to the sink, active share, value drain, hidden sinks, value-aware importance, induction,
    duplicate, previous and current token, copying, succession, and the share of direct contributions to logits. Each
    comes from a probe, whose page defines it; a measure that could not be computed has its reason in `missing`. Costs
    the runs of these probes.

    Args:
        store: The store, or its path; each probe reads the sites that it has.
        model: The recorded model, or what `load_model` takes. None: the name in the manifest, where that suffices.
        repeats: Store of random tokens that repeat (`wb.random_repeats`), for induction. None: `store`.
        domain: Metadata column by whose values active and dormant heads are compared. None: no comparison.
        device: Device of the model. None: the GPU if there is one.
        seed: Random seed of the probes.
        show_progress: Show a progress bar.

    Raises:
        RequestError: Nothing could be measured, or the model or `repeats` is another one.
    """
    measured = measure_heads(
        store, model=model, repeats=repeats, domain=domain, device=device, seed=seed, show_progress=show_progress
    )
    return HeadAtlas(measured)


def _limits(measure: HeadMeasure, data: pd.DataFrame) -> tuple[float, float]:
    """Range of a measure's colours: from 0 to its largest value, or as far below 0 where it can be negative."""
    from workbench.figures.colour_limits import colour_limits

    signed = measure.limits is not None and measure.limits[0] < 0
    return colour_limits(data[measure.name].to_numpy(float), signed=signed)


def _sortable(data: pd.DataFrame, measures: tuple[HeadMeasure, ...]) -> str:
    """The table with a button in each heading; cells have their value, and the share of the column's range, for CSS."""
    limits = {measure.name: _limits(measure, data) for measure in measures}
    meanings = {measure.name: measure.meaning for measure in measures}
    names = [name for name in data.columns if name not in ("layer", "head")]
    heading = "".join(
        f'<th scope="col" aria-sort="{"ascending" if name == "name" else "none"}">'
        f'<button type="button" title="{escape(meanings.get(name, "layer and head"))}">{escape(name)}</button></th>'
        for name in names
    )
    lines = []
    for number, line in enumerate(data.to_dict("records")):
        cells = [f'<th scope="row" data-value="{number}">{escape(line["name"])}</th>']
        for name in names[1:]:
            value, (low, high) = float(line[name]), limits[name]
            if np.isnan(value):
                cells.append("<td></td>")
                continue
            share = min(1.0, max(0.0, (value - max(low, 0.0)) / (high - max(low, 0.0))))
            cells.append(
                f'<td data-value="{value:.6g}" style="--share:{100 * share:.0f}%">{cell(round(value, 3) + 0.0)}</td>'
            )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<table class="atlas"><thead><tr>{heading}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
