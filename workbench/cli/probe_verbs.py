"""Verbs of probes: probes, probe NAME."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated

from workbench.cli.arguments import Command, docstring, parse
from workbench.cli.options import Meaning, Positional
from workbench.cli.terminal import print_items, print_plain
from workbench.io.files import check_writable
from workbench.results.probe import Probe

HELP = "Run a probe on a store and save the result with its figures: workbench probe NAME STORE --out DIR"


@dataclass(frozen=True)
class Probes:
    """List the installed probes."""

    def run(self) -> int:
        """Prints the installed probes, one line each."""
        from workbench.results.registry import installed_probes, summary

        print_items({name: summary(entry) for name, entry in installed_probes().items()})
        return 0


def probe_command(arguments: list[str]) -> Command:
    """Returns the command of `workbench probe ARGUMENTS`. Imports only the requested probe."""
    from workbench.results.registry import find_probe, installed_probes

    if not arguments or arguments[0] in ("-h", "--help"):
        print_plain(HELP + "\n")
        return Probes()
    name, *rest = arguments
    if name not in installed_probes():
        find_probe(name)  # raises RequestError with the nearest name
    if rest and not rest[0].startswith("-"):
        from workbench.store.manifest import read_manifest

        read_manifest(rest[0])  # a wrong path is refused before the probe, and torch, are loaded
    probe = find_probe(name)
    return parse(probe_options(name, probe), f"workbench probe {name}", rest, docstring(probe))


def probe_options(name: str, probe: type) -> type[Command]:
    """Returns the class that the arguments of one probe are parsed into."""
    return make_dataclass(
        name,
        [
            ("store", Annotated[Positional[Path], Meaning("Store to analyse.")]),
            ("out", Annotated[Path, Meaning("Folder for data, table and figures.")]),
            ("settings", probe, field(default_factory=probe)),
        ],
        bases=(_RunProbe,),
        frozen=True,
    )


class _RunProbe:
    store: Path
    out: Path
    settings: Probe

    def run(self) -> int:
        from workbench.results.result import provenance, refuse_other
        from workbench.store.reader import open_store

        store = open_store(self.store)
        refuse_other(self.out, self.settings.name, provenance(store, self.settings))
        check_writable(self.out)
        result = self.settings.run(store)
        path = result.save(self.out)
        print_plain(result.headline())
        note = result.data.attrs.get("note", "")
        if note and note not in result.headline():
            print_plain(f"Note: {note}")
        for figure in sorted((path / "figures").glob("*.html")):
            print_plain(f"figure  {figure}")
        return 0
