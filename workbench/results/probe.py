"""The contract of a probe, and what a report reads from its source: definition and meaning of each setting.

A probe is a frozen dataclass of settings whose `run(store)` answers one question about a store. It is installed by an
entry point in the group `workbench.probes` (see `workbench.results.registry`). `workbench.testing.ProbeContract` tests
the contract.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from workbench.model.load import Model
    from workbench.results.result import Result
    from workbench.store.reader import Store


class Probe(Protocol):
    """The contract: a frozen dataclass with a name, a run and the figures of its result.

    A report quotes its module's docstring as the definition and the docstrings of its settings. A probe may also have

        headline(result) -> str             static: the finding with its numbers, in one line of plain text
        sources: ClassVar[tuple[str, ...]]  the papers, as they are cited: "Gu et al. 2024, arXiv 2410.10781"
        controls: ClassVar[Mapping]         comparisons for the result: a variable of `data`, or a name of its own, to
                                            its meaning
        needs_store: ClassVar[bool]         False for a probe of weights, whose `run` takes a model in place of a store;
                                            see `workbench.probing.WeightsProbe`
    """

    name: ClassVar[str]
    needs_model: ClassVar[bool]
    """True for a probe that computes with the recorded model itself (weights, interventions), False for one that
    reads the store alone and ignores `model`."""

    def __init__(self, **settings: Any) -> None: ...

    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Answers the probe's question about a store.

        Args:
            store: The recorded activations.
            model: The recorded model, if the caller has it in memory. A probe with `needs_model` that is not given one
                loads the model that the store names; other probes ignore it.
        """
        ...

    @staticmethod
    def figures(result: Result) -> dict[str, Figure]:
        """Returns the figures of a result by name, the one for a paper first; made of the result and nothing else."""
        ...


def definition(probe: type) -> str:
    """Returns the docstring of a probe's module, which defines what it measures; "" where there is none."""
    return inspect.cleandoc(getattr(inspect.getmodule(probe), "__doc__", None) or "")


def setting_meanings(settings: type) -> dict[str, str]:
    """Returns the docstring under each field of a dataclass, inherited fields included.

    "" stands for a field without one; a class whose source cannot be read contributes no field.
    """
    meanings: dict[str, str] = {}
    for base in reversed(settings.__mro__):
        if is_dataclass(base):
            meanings |= _meanings_in(base)
    return meanings


@cache
def _meanings_in(settings: type) -> dict[str, str]:
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(settings))).body
    except (OSError, TypeError):
        return {}
    meanings = {}
    body = node.body if isinstance(node, ast.ClassDef) else []
    for field, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            meanings[field.target.id] = ""
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                meanings[field.target.id] = inspect.cleandoc(str(below.value.value))
    return meanings
