"""Verbs that write or serve pages and figures: demo, report, atlas, index, serve, export."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from threading import Event
from typing import Literal

from workbench.cli.options import Positional
from workbench.cli.terminal import print_plain
from workbench.io.checks import check_fields
from workbench.io.errors import RequestError
from workbench.io.files import check_writable, check_writable_file
from workbench.io.saving import save_text
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
        check_fields(self, "rows", at_least=1, optional=True)
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
    plotlyjs: Literal["inside", "shared"] = "inside"
    """plotly's script inside the page (5 MB), or in one file beside it for all pages of the folder."""

    def run(self) -> int:
        """Writes the report."""
        from workbench.pages.report import section, write_report  # seconds: plotly
        from workbench.results.result import load_result

        check_writable_file(self.out)
        sections = [section(load_result(path)) for path in self.result]
        today = date.today().isoformat()
        page = write_report(sections, self.out, title=self.title, date=today, plotlyjs=self.plotlyjs)
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

        for name, path in (("out", self.out), ("table", self.table)):
            if path is not None:
                check_writable_file(path, name)
        repeats = None if self.repeats is None else open_store(self.repeats)
        settings = {"model": self.model, "repeats": repeats, "domain": self.domain, "device": self.device}
        atlas = head_atlas(open_store(self.store), **settings)  # pyright: ignore[reportArgumentType]  # each of its type
        for name, reason in atlas.missing.items():
            print_plain(f"not measured  {name}: {reason}")
        if self.table is not None:
            save_text(self.table, csv_text(atlas.table))
            print_plain(f"table  {self.table}")
        print_plain(f"atlas  {atlas.write(self.out)}")
        return 0


@dataclass(frozen=True)
class Index:
    """Write an HTML page that lists every feature, sortable and searchable, and pages of features that it links."""

    features: Positional[Path]
    """Folder that `workbench features` printed, or a store that has one."""
    out: Path
    """Folder to write: index.html and the pages."""
    pages: int = 0
    """Number of features that get a page: those that are active on most tokens."""
    feature: tuple[int, ...] = ()
    """Ids of further features that get a page."""
    sae: str | None = None
    """SAE of the features; adds promoted tokens and nearest features to the pages."""
    sae_id: str | None = None
    """SAE within a release, or path within a folder of several."""

    def run(self) -> int:
        """Writes the index of features and the pages."""
        if self.sae is None and self.sae_id is not None:
            raise RequestError("--sae-id chooses one of several SAEs; give --sae too")
        if self.sae is not None and not (self.pages or self.feature):
            raise RequestError("--sae is used on pages of features alone; give --pages or --feature too")
        check_fields(self, "pages", at_least=0)
        from workbench.features.feature_store import open_features  # seconds: pandas
        from workbench.pages.feature_index import feature_pages
        from workbench.sae.load import load_sae

        check_writable(self.out)
        features = open_features(self.features)
        most = features.counts.argsort(kind="stable")[::-1][: self.pages].tolist()
        chosen = list(dict.fromkeys([*most, *self.feature]))
        for feature in chosen:
            features.rows_of(feature)  # a wrong number is refused before SAELens is loaded
        sae = None if self.sae is None else load_sae(self.sae, self.sae_id, device="cpu")
        index, *pages = feature_pages(features, self.out, chosen, sae=sae)
        print_plain(f"index  {index}\npages  {len(pages)}")
        return 0


@dataclass(frozen=True)
class Serve:
    """Show linked views of a store in a browser on this machine: text, sinks, heads, lens, features, neighbours."""

    store: Positional[Path]
    """Store to show; only what is looked at is read."""
    features: tuple[Path, ...] = ()
    """Folders that `workbench features` printed; the page chooses among several. Default: all inside the store."""
    port: int = 0
    """Port on the loopback interface. Default: a free one."""

    def run(self) -> int:
        """Serves the views until it is interrupted."""
        from workbench.features.feature_store import open_features  # seconds: pandas
        from workbench.pages.serve import serve
        from workbench.store.reader import open_store

        store = open_store(self.store)
        features = [open_features(folder, store) for folder in self.features]
        served = serve(store, features or None, port=self.port)
        print_plain(f"serving  {served.address}\nstop with Ctrl-C")
        try:
            Event().wait()
        except KeyboardInterrupt:
            served.close()
        return 0


@dataclass(frozen=True)
class Export:
    """Write the figures of a result or a store as HTML, PDF, SVG and PNG, with their data, captions and provenance."""

    result: Positional[Path]
    """Folder written by `workbench probe --out`, or a store, of which the overview is drawn."""
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
        """Exports the figures."""
        from workbench.pages.figure_export import export  # seconds: plotly

        check_writable(self.out)
        paths = export(
            self.result,
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
