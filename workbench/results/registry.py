"""Installed probes and experiments: found by their entry points, and listed without importing all of them.

A probe is a class registered in the group `workbench.probes`, an experiment a module registered in the group
`workbench.experiments`. Ours and those of other packages are registered in the same way.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.io.errors import RequestError, nearest, printable

if TYPE_CHECKING:
    from workbench.results.experiment import Experiment
    from workbench.results.probe import Probe

PROBES, EXPERIMENTS = "workbench.probes", "workbench.experiments"

_USED: dict[str, type] = {}
"""Classes that made or drew a result in this process, by reference: those inside functions have no other address."""


def installed_probes() -> dict[str, EntryPoint]:
    """Returns the entry point of every registered probe by name; none is imported."""
    return _installed(PROBES)


def installed_experiments() -> dict[str, EntryPoint]:
    """Returns the entry point of every registered experiment by name; none is imported."""
    return _installed(EXPERIMENTS)


def find_probe(name: str) -> type[Probe]:
    """Imports the probe class registered as `name`. Raises RequestError with the nearest names."""
    return _load("probe", name, installed_probes())


def find_experiment(name: str) -> Experiment:
    """Imports the module registered as experiment `name`. Raises RequestError with the nearest names."""
    return _load("experiment", name, installed_experiments())


def reference(probe: type) -> str:
    """Returns the address of a probe's class, "module:Class", as provenance records it, and remembers the class."""
    address = f"{probe.__module__}:{probe.__qualname__}"
    _USED[address] = probe
    return address


def find_maker(name: str, address: str | None = None) -> type[Probe] | Experiment:
    """Returns the probe or the experiment that made a result.

    A result's file does not decide what is imported: its class is taken where it is registered or in use already.

    Args:
        name: Name of the probe or the experiment.
        address: Class of the probe, "module:Class": one that is registered, or that this process has imported or
            defined, in a notebook, a script or a function. None, or a class that is not there: the one registered as
            `name`.

    Raises:
        RequestError: Neither is there; with the nearest names, and what to import.
    """
    reason = ""
    if address is not None:
        try:
            return _at_address(name, address)
        except Exception as error:  # whatever the import of a registered module raises
            kind = "" if isinstance(error, RequestError) else f"{type(error).__name__}: "
            reason = kind + " ".join(str(error).split())[:160]
    if name in installed_experiments():
        return find_experiment(name)
    if name in installed_probes() or not reason:
        return find_probe(name)
    raise RequestError(
        f"probe {name!r} is not installed, and its class {printable(str(address), 120)} is not here ({reason}); import "
        "the class and give it: load_result(path, probe=CLASS)"
    )


def _at_address(name: str, address: str) -> type[Probe]:
    module, _, qualified = address.partition(":")
    probe: Any = None
    if "<locals>" not in qualified and (probe := sys.modules.get(module)) is not None:
        for part in qualified.split("."):
            probe = getattr(probe, part, None)
    if probe is None:  # last, as it reads the records of all installed packages: 20 ms
        registered = next((entry for entry in installed_probes().values() if entry.value == address), None)
        probe = registered.load() if registered else _USED.get(address)
    if probe is None:
        missing = "does not define it here" if module in sys.modules else "is not imported"
        raise RequestError(f"{printable(module, 120)} {missing}")
    if not isinstance(probe, type) or getattr(probe, "name", None) != name:
        raise RequestError(f"it is not a probe named {name!r}")
    return probe


def summary(entry: EntryPoint) -> str:
    """Returns the first line of a probe's or an experiment's docstring, read from its source without importing it.

    Importing every one would take seconds. Where the module does not exist, the line says so, so that a package that is
    half uninstalled does not hide the others.
    """
    try:
        node = _source(entry)
    except ModuleNotFoundError:
        return f"cannot be loaded: there is no module {entry.module}"
    docstring = ast.get_docstring(node) if node else None
    return (docstring or "").strip().partition("\n")[0]


def runs_on_models(entry: EntryPoint) -> bool:
    """Returns True for a probe whose class says `needs_store: ClassVar[bool] = False`, read without importing it."""
    node = _source(entry)
    return any(
        isinstance(part, ast.AnnAssign)
        and isinstance(part.target, ast.Name)
        and part.target.id == "needs_store"
        and isinstance(part.value, ast.Constant)
        and part.value.value is False
        for part in (node.body if node else ())
    )


def _source(entry: EntryPoint) -> ast.Module | ast.ClassDef | None:
    """The parsed class of a probe, or module of an experiment; None where the module does not define it."""
    spec = find_spec(entry.module)
    source = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
    module = ast.parse(source)
    if not entry.attr:
        return module
    classes = (part for part in ast.walk(module) if isinstance(part, ast.ClassDef))
    return next((part for part in classes if part.name == entry.attr), None)


def _installed(group: str) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in sorted(entry_points(group=group), key=lambda entry: entry.name)}


def _load(kind: str, name: str, installed: Mapping[str, EntryPoint]) -> Any:
    if name not in installed:
        raise RequestError(f"{kind} {name!r} is not installed{nearest(name, installed)}; known: {', '.join(installed)}")
    return installed[name].load()
