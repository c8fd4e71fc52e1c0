"""Figures in the theme of the screen, which follow that of the notebook that shows them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from workbench.figures.theme import TEMPLATE
from workbench.figures.ticks import write_out_log_ticks

DARK_FILTER = "invert(0.95) hue-rotate(180deg)"
"""CSS filter of a figure on a dark notebook: lightness is inverted, hues stay."""

_TEMPLATE: dict[str, Any] = TEMPLATE.to_plotly_json()
_SIGN = "workbench-figure"
_OUTPUT = f".jp-OutputArea-child:has(.{_SIGN})"
_STYLE = (
    f"<style>{_OUTPUT}{{display:none}}"
    f'body[data-jp-theme-light="false"] {_OUTPUT}+.jp-OutputArea-child .jp-RenderedPlotly{{filter:{DARK_FILTER}}}'
    f'</style><span class="{_SIGN}"></span>'
)


class ThemedFigure(go.Figure):
    """A plotly figure in the theme of the screen that is dark in a dark JupyterLab or Notebook 7.

    A notebook draws plotly's format in the colours of the figure. A hidden output before the figure holds a style
    that applies to the next output alone; other plotly figures, other front ends and exported files are unchanged.

    Traces and layout are taken as they are; a layout is in plotly's JSON form (`{"title": {"text": "..."}}`), and what
    is None or empty in it is left out. Plotly validates a trace object when it is made, and would do so again for every
    figure that holds it. Later changes are validated as in any figure.
    """

    def __init__(self, data: Any = None, layout: Mapping[str, Any] | None = None, **options: Any) -> None:
        """Makes a figure as `plotly.graph_objects.Figure` does; a copy of another figure keeps its own template."""
        if not isinstance(data, go.Figure) and not (isinstance(data, Mapping) and "layout" in data):
            layout = {"template": _TEMPLATE, **_without_none(layout or {})}
        super().__init__(data, layout, _validate=False, **options)
        part: Any
        for part in (self, self.layout, *self.data):  # pyright: ignore[reportGeneralTypeIssues]  # plotly
            part._validate = True

    def show(self, *args: Any, **kwargs: Any) -> None:
        """Shows the figure as plotly does, after the style that follows the theme of a notebook."""
        _show_style(kwargs.get("renderer"))
        super().show(*args, **self._scripted(kwargs))

    def to_html(self, *args: Any, **kwargs: Any) -> str:
        """Returns the page that plotly makes, in which the pictures of heads react to the pointer."""
        return super().to_html(*args, **self._scripted(kwargs))

    def write_html(self, *args: Any, **kwargs: Any) -> None:
        """Writes the page of `to_html`."""
        super().write_html(*args, **self._scripted(kwargs))

    def _ipython_display_(self) -> None:
        from plotly import io

        if io.renderers.render_on_display and io.renderers.default:
            self.show()
        else:
            super()._ipython_display_()

    def _repr_mimebundle_(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return super()._repr_mimebundle_(*args, **self._scripted(kwargs))

    def _scripted(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of plotly's pages with the script of a figure that has pictures of heads."""
        meta = self.layout.meta  # pyright: ignore[reportAttributeAccessIssue]  # plotly
        if not isinstance(meta, Mapping) or "heads" not in meta:
            return dict(options)
        scripts = options.get("post_script") or []
        scripts = [scripts] if isinstance(scripts, str) else list(scripts)
        return {
            **options,
            "post_script": [*scripts, f'{head_pictures()}watchHeads(document.getElementById("{{plot_id}}"));'],
        }


def _without_none(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    parts = {name: _without_none(part) for name, part in value.items() if part is not None}
    return {name: part for name, part in parts.items() if part != {}}


def themed(figure: go.Figure) -> ThemedFigure:
    """Returns the figure as one that follows the theme of a notebook, its ticks written as numbers."""
    figure = figure if isinstance(figure, ThemedFigure) else ThemedFigure(figure)
    write_out_log_ticks(figure)
    return figure


def head_pictures() -> str:
    """Returns the script by which the pictures of heads react: `watchHeads(plot)`, after plotly's own."""
    return (Path(__file__).parent / "head_pictures.js").read_text(encoding="utf-8")


def is_style(markup: str) -> bool:
    """Returns True for the markup of the hidden output before a figure."""
    return markup == _STYLE


def _show_style(renderer: str | None) -> None:
    from plotly import io

    if "plotly_mimetype" in (renderer or io.renderers.default or ""):
        from IPython.display import display  # comes with the notebook that displays

        display({"text/html": _STYLE, "text/plain": ""}, raw=True)
