"""Figures that follow the theme of the notebook that shows them."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

DARK_FILTER = "invert(0.95) hue-rotate(180deg)"
"""CSS filter of a figure on a dark notebook: lightness is inverted, hues stay."""

_SIGN = "workbench-figure"
_OUTPUT = f".jp-OutputArea-child:has(.{_SIGN})"
_STYLE = (
    f"<style>{_OUTPUT}{{display:none}}"
    f'body[data-jp-theme-light="false"] {_OUTPUT}+.jp-OutputArea-child .jp-RenderedPlotly{{filter:{DARK_FILTER}}}'
    f'</style><span class="{_SIGN}"></span>'
)


class ThemedFigure(go.Figure):
    """A plotly figure that is dark in a dark JupyterLab or Notebook 7, and changes with their theme.

    A notebook draws plotly's format in the colours of the figure. A hidden output before the figure holds a style
    that applies to the next output alone; other plotly figures, other front ends and exported files are unchanged.
    """

    def show(self, *args: Any, **kwargs: Any) -> None:
        """Shows the figure as plotly does, after the style that follows the theme of a notebook."""
        _show_style(kwargs.get("renderer"))
        super().show(*args, **kwargs)

    def _ipython_display_(self) -> None:
        _show_style(None)
        super()._ipython_display_()


def themed(figure: go.Figure) -> ThemedFigure:
    """Returns the figure as one that follows the theme of a notebook."""
    return figure if isinstance(figure, ThemedFigure) else ThemedFigure(figure)


def is_style(markup: str) -> bool:
    """Returns True for the markup of the hidden output before a figure."""
    return markup == _STYLE


def _show_style(renderer: str | None) -> None:
    from plotly import io

    if "plotly_mimetype" in (renderer or io.renderers.default or ""):
        from IPython.display import display  # comes with the notebook that displays

        display({"text/html": _STYLE, "text/plain": ""}, raw=True)
