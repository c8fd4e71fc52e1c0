"""What a probe is, and which are installed.

A probe is a frozen dataclass of settings whose `run(store)` answers one question about a store. It becomes
known by an entry point in the group "workbench.probes"; ours and anybody else's plug in the same way.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import is_dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, ClassVar, Protocol

from workbench.results.plugins import load_named, no_module, parsed

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from workbench.results.result import Result
    from workbench.store.reader import Store

GROUP = "workbench.probes"


class Probe(Protocol):
    """The contract: a frozen dataclass with a name, a run and the figures of its result.

    A report quotes its module's docstring as the definition and the docstrings of its settings. A probe may also have

        headline(result) -> str             static: what was found and where, in one line of plain text
        sources: ClassVar[tuple[str, ...]]  the papers, as they are cited: "Gu et al. 2024, arXiv 2410.10781"
        controls: ClassVar[Mapping]         what to hold the result against: a variable of `data`, or a name of its own,
                                            to what it means
    """

    name: ClassVar[str]

    def run(self, store: Store) -> Result:
        """Answers the probe's question from the store alone."""

    @staticmethod
    def figures(result: Result) -> dict[str, Figure]:
        """The figures of a result by name, the one for a paper first; made of the result and nothing else."""


def installed_probes() -> dict[str, EntryPoint]:
    """Every registered probe by name, not yet imported."""
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)}


def summary(entry: EntryPoint) -> str:
    """First line of a probe's docstring, read from its source."""
    if (module := parsed(entry)) is None:
        return no_module(entry)
    classes = (node for node in ast.walk(module) if isinstance(node, ast.ClassDef))
    found = next((ast.get_docstring(node) for node in classes if node.name == entry.attr), None)
    return (found or "").strip().partition("\n")[0]


def find_probe(name: str) -> type:
    """The probe class registered as `name`. Raises RequestError with the nearest names."""
    return load_named("probe", name, installed_probes())


def definition(probe: type) -> str:
    """How a probe's module defines what it measures: its docstring; "" where it has none."""
    return inspect.cleandoc(getattr(inspect.getmodule(probe), "__doc__", None) or "")


def settings_told(probe: type) -> dict[str, str]:
    """Meaning of each setting, inherited ones too: the docstring under its field. "" where there is none, or no source
    to read."""
    told = {}
    for base in filter(is_dataclass, reversed(probe.__mro__)):
        told |= _own_settings(base)
    return told


def _own_settings(probe: type) -> dict[str, str]:
    try:
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(probe))).body
    except (OSError, TypeError):
        return {}
    told = {}
    for field, below in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            said = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            told[field.target.id] = inspect.cleandoc(str(below.value.value)) if said else ""
    return told
