"""Verbs that read stores: info, verify, query, compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from workbench.cli.options import Positional
from workbench.cli.terminal import print_frame, print_plain, print_table
from workbench.io.checks import check_fields
from workbench.io.counted import counted
from workbench.io.files import check_new_folder


@dataclass(frozen=True)
class Info:
    """Describe a store: model, sites, rows, texts."""

    store: Positional[Path]
    """Store to read."""

    def run(self) -> int:
        """Prints the description of a store."""
        from workbench.store.manifest import as_lines, facts, read_manifest

        print_plain(as_lines(facts(self.store, read_manifest(self.store))))
        return 0


@dataclass(frozen=True)
class Verify:
    """Check every file of a store and its features, of features, a result, a run or a sweep."""

    path: Positional[Path]
    """Folder to check."""

    def run(self) -> int:
        """Prints the findings of the verification; returns 1 if one is an error."""
        from workbench.features.verify_folder import verify  # seconds: pandas

        findings = verify(self.path)
        for finding in findings.to_dict("records"):
            place = "/".join(part for part in (finding["segment"], finding["file"]) if part)
            print_plain(f"{finding['severity']:5}  {place}: {finding['finding']}: {finding['detail']}")
        errors = findings["severity"].tolist().count("error")
        print_plain(f"{counted(errors, 'error')}, {counted(len(findings) - errors, 'note')}")
        return 1 if errors else 0


@dataclass(frozen=True)
class Remove:
    """Remove a store, features, a result, a run or a sweep, or sites of a store; files of others stay."""

    path: Positional[Path]
    """Folder to remove."""
    sites: tuple[str, ...] | None = None
    """Sites of a store to delete, such as resid_post.3, or resid_post for every layer. Default: the whole folder."""

    def run(self) -> int:
        """Removes the folder or the sites."""
        if self.sites is not None:
            from workbench.store.growth import delete_sites

            delete_sites(self.path, self.sites)
            return Info(self.path).run()
        from workbench.features.removal import remove  # seconds: xarray

        foreign_entries = remove(self.path)
        print_plain(
            f"removed  {self.path}"
            + (f", but {len(foreign_entries)} entries of others: {foreign_entries[0]}" if foreign_entries else "")
        )
        return 0


@dataclass(frozen=True)
class Pack:
    """Copy a store and its features to a folder or a .tar file that is complete in itself."""

    store: Positional[Path]
    """Store to copy."""
    out: Positional[Path]
    """New folder, or a name that ends in .tar."""

    def run(self) -> int:
        """Packs the store."""
        from workbench.store.packed_copy import pack

        print_plain(f"packed  {pack(self.store, self.out)}; on the other side: workbench verify STORE")
        return 0


@dataclass(frozen=True)
class Merge:
    """Merge stores of the same sites of one model into one store."""

    stores: Positional[tuple[Path, ...]]
    """Two or more stores."""
    out: Path
    """Folder of the new store."""
    column: str = "store"
    """New column of the token table with the name of the store that a row comes from."""

    def run(self) -> int:
        """Merges the stores."""
        from workbench.store.merged_store import merge  # seconds: torch

        merge(self.stores, self.out, column=self.column)
        return Info(self.out).run()


@dataclass(frozen=True)
class Query:
    """List the tokens that an SQL predicate selects."""

    store: Positional[Path]
    """Store to read."""
    predicate: Positional[str]
    """For example "token = ' Monday' AND position > 0". The heading of the output names the columns."""
    limit: int = 20
    """Maximum number of rows (tokens) listed; all are counted."""

    def run(self) -> int:
        """Prints the selected tokens."""
        from workbench.store.manifest import read_manifest
        from workbench.store.query import query_tokens, select_rows  # seconds: duckdb

        check_fields(self, "limit", at_least=0)
        manifest = read_manifest(self.store)
        total = len(select_rows(self.store, manifest, self.predicate))
        table = query_tokens(self.store, manifest, self.predicate, self.limit)
        if table.num_rows:
            print_table(table.column_names, [list(row.values()) for row in table.to_pylist()])
        print_plain(
            f"{total:,} of {manifest.rows:,} rows" + (f", {table.num_rows} shown" if total > table.num_rows else "")
        )
        return 0


@dataclass(frozen=True)
class Compare:
    """Compare stores of the same tokens: models, checkpoints or dtypes."""

    store_a: Positional[Path]
    """One store."""
    store_b: Positional[Path]
    """The other store."""
    others: Positional[tuple[Path, ...]] = ()
    """More stores, each to compare with the first."""
    sites: tuple[str, ...] | None = None
    """Sites or kinds of site to compare, such as resid_post. Default: all; both stores must then have the same."""
    probes: tuple[str, ...] | None = None
    """Probes to run on every store. Default: all that the recorded sites permit. --probes without a name: none."""
    allow_nonfinite: bool = False
    """Skip and count rows with NaN or infinite values at a site, instead of refusing the stores."""
    out: Path | None = None
    """Folder for the tables (CSV) and the figure."""

    def run(self) -> int:
        """Compares the stores and writes the result."""
        from workbench.store.manifest import read_manifest

        paths = (self.store_a, self.store_b, *self.others)
        for store in paths:
            read_manifest(store)  # a wrong path is refused before torch is loaded
        from workbench.analysis.comparison import Comparisons, compare  # seconds: torch
        from workbench.store.reader import open_store

        if self.out is not None:
            check_new_folder(self.out)
        stores = [open_store(path) for path in paths]
        comparison = compare(*stores, sites=self.sites, probes=self.probes, allow_nonfinite=self.allow_nonfinite)
        print_frame(comparison.sites)
        if len(comparison.probes):
            print_plain("")
            print_frame(comparison.probes)
        several = isinstance(comparison, Comparisons)
        for pair in comparison.each if several else (comparison,):
            second = Path(pair.b).name if several else "the second"
            models = f"{second} differs: {difference}" if (difference := pair.model_difference) else "the same"
            print_plain(f"models  {models}")
            for probe, reason in pair.not_run.items():
                print_plain(f"not run  {probe}: {reason}")
        if self.out is not None:
            print_plain(f"tables  {comparison.save(self.out)}")
        return 0
