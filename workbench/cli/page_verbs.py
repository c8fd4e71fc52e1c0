"""Verbs that write pages and figures: demo, report, atlas, export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from workbench.cli.options import Positional
from workbench.cli.terminal import print_plain
from workbench.io.files import check_writable, replace_file
from workbench.io.spreadsheet import csv_text


@dataclass(frozen=True)
class Demo:
    """Run the whole workflow on a model: record, extract features, run every probe, write a report."""

    out: Path = Path("runs/demo")
    """Folder for the stores, the results and the report."""
    model: str = "demo"
    """Model: a directory, a hub id, or demo."""
    sae: str | None = None
    """Autoencoder of the model; default: that of the embedded model, or no features for another model."""
    rows: int | None = None
    """Maximum number of tokens; default: the whole corpus for the embedded model, 3,000 for another."""

    def run(self) -> int:
        """Runs the demo."""
        from workbench.demo.run import demo  # seconds: torch

        check_writable(self.out)
        demo(self.out, model=self.model, sae=self.sae, rows=self.rows, print_line=print_plain)
        return 0


@dataclass(frozen=True)
class Report:
    """Collect results of probes on one HTML page that needs no network."""

    result: Positional[tuple[Path, ...]]
    """Folders written by `workbench probe --out`."""
    out: Path
    """Page to write."""
    title: str = "Report"
    """Title of the page."""

    def run(self) -> int:
        """Writes the report."""
        from workbench.pages.report import section, write_report  # seconds: plotly
        from workbench.results.result import load_result

        check_writable(self.out)
        page = write_report([section(load_result(path)) for path in self.result], self.out, title=self.title)
        print_plain(f"report  {page}")
        return 0


@dataclass(frozen=True)
class Atlas:
    """Write a page of all heads of a model, with all that a store allows to measure about them, as a sortable table."""

    store: Positional[Path]
    """Store of any sites; each measure needs its own, and the page says which are missing."""
    out: Path
    """Page to write."""
    model: str | None = None
    """Folder or name of the recorded model. Default: the name in the store, where that suffices."""
    repeats: Path | None = None
    """Store of repeated random tokens, for induction. Default: the store."""
    domain: str | None = None
    """Metadata column by whose values active and dormant heads are compared."""
    table: Path | None = None
    """CSV file to write the table to, too."""
    device: str | None = None
    """Device of the model. Default: the GPU if there is one."""

    def run(self) -> int:
        """Writes the atlas."""
        from workbench.pages.head_atlas import head_atlas  # seconds: torch, plotly
        from workbench.store.reader import open_store

        for path in filter(None, (self.out, self.table)):
            check_writable(path)
        repeats = None if self.repeats is None else open_store(self.repeats)
        settings = {"model": self.model, "repeats": repeats, "domain": self.domain, "device": self.device}
        atlas = head_atlas(open_store(self.store), **settings)  # pyright: ignore[reportArgumentType]  # each of its type
        for name, reason in atlas.missing.items():
            print_plain(f"not measured  {name}: {reason}")
        if self.table is not None:
            replace_file(self.table, csv_text(atlas.table).encode())
            print_plain(f"table  {self.table}")
        print_plain(f"atlas  {atlas.write(self.out)}")
        return 0


@dataclass(frozen=True)
class Export:
    """Write the figures of a result as HTML, PDF, SVG and PNG, with their data, captions and provenance."""

    result: Positional[Path]
    """Folder written by `workbench probe --out`."""
    out: Path
    """Folder for the files."""
    figures: tuple[str, ...] = ()
    """Names of figures. Default: all."""
    formats: tuple[Literal["html", "pdf", "svg", "png"], ...] = ("html", "pdf", "svg", "png")
    """File formats. All but html need Chrome or Chromium."""
    columns: Literal[1, 2] = 1
    """Width of a printed figure in columns of a paper: 1 is 3.25 in, 2 is 6.75 in."""
    theme: Literal["light", "dark"] = "light"
    """Colours of the HTML pages."""
    data: Literal["parquet", "csv"] = "parquet"
    """Format of the plotted data."""
    plotlyjs: Literal["shared", "inside"] = "shared"
    """One plotly script for all pages of the folder, or one inside each page (5 MB)."""

    def run(self) -> int:
        """Exports the figures of a result."""
        from workbench.pages.figure_export import export  # seconds: plotly
        from workbench.results.result import load_result

        check_writable(self.out)
        paths = export(
            load_result(self.result),
            self.out,
            figures=self.figures or None,
            formats=self.formats,
            columns=self.columns,
            theme=self.theme,
            data=self.data,
            plotlyjs=self.plotlyjs,
        )
        for path in paths:
            print_plain(f"wrote  {path}")
        return 0
