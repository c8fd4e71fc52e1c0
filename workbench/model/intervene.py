"""Interventions on a running model: records that change one tensor each, applied inside of a context manager.

    with wb.intervene(model, wb.Add("resid_post.9", direction, 4.0, at="new")) as run:
        model.module.generate(...)
    run.table()

The model stays the Hugging Face module that it is; forward hooks change the tensor at a site, and everything behind it
is computed by the model. All hooks are gone after the block, also after an exception.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.io.checks import check
from workbench.io.errors import DataError, RequestError
from workbench.model.forward import change_tensor, fixed_shape
from workbench.model.load import Model
from workbench.model.passes import bound
from workbench.model.positions import At, PassReader, PassTokens, check_at, named_positions
from workbench.sites.grammar import Site

if TYPE_CHECKING:
    import pandas as pd

Change = Callable[[Float[Tensor, "row ..."]], Float[Tensor, "row ..."]]
"""From rows of a site, in float32 or wider, to their new values; a row that it leaves alone is returned bit by bit."""


class Intervention(ABC):
    """A frozen record that changes the tensor at one site; it holds nothing of a model."""

    at: At
    """The tokens that it changes."""

    @property
    @abstractmethod
    def place(self) -> str:
        """Name of the site."""

    @abstractmethod
    def change(self, model: Model, site: Site) -> Change:
        """Returns the change of chosen rows.

        Raises:
            RequestError: The record does not fit the model or the site.
        """


@dataclass(frozen=True, eq=False)
class Add(Intervention):
    """Adds a direction to the chosen rows of a site: x <- x + scale · d."""

    site: str
    direction: Float[Tensor, "*row"]
    """d, of the shape of a row of the site."""
    scale: float = 1.0
    unit: Literal["raw", "unit", "norm"] = "raw"
    """"raw": d as it is; "unit": d divided by its L2 norm; "norm": d / ‖d‖ times the L2 norm of the row."""
    at: At = field(default="all", kw_only=True)

    @property
    def place(self) -> str:
        """Name of the site."""
        return self.site

    def change(self, model: Model, site: Site) -> Change:
        """Returns the change of rows; see `Intervention.change`."""
        check("unit", self.unit, one_of=("raw", "unit", "norm"))
        check("scale", self.scale, above=-float("inf"), below=float("inf"))
        direction = torch.as_tensor(self.direction).float()
        shape = fixed_shape(site)
        if tuple(direction.shape) != shape:
            raise RequestError(f"direction has the shape {tuple(direction.shape)}, and a row of {self.site} {shape}")
        if not bool(direction.detach().isfinite().all()):
            raise RequestError("direction has a value that is not finite")
        if self.unit != "raw":
            if not (norm := direction.norm()):
                raise RequestError(f"direction is 0 and has no unit vector; choose unit='raw', not {self.unit!r}")
            direction = direction / norm
        return partial(_add, direction=self.scale * direction, relative=self.unit == "norm")

    def __str__(self) -> str:
        return f"add {self.scale:g} at {self.site}"


def _add(rows: Tensor, direction: Tensor, relative: bool) -> Tensor:
    step = direction.to(rows)
    if relative:
        norm = rows.flatten(1).norm(dim=1)
        step = norm.reshape(-1, *[1] * (rows.ndim - 1)) * step
    return torch.where(step == 0, rows, rows + step)


@dataclass
class _Count:
    """Counts of what a record changed."""

    passes: int = 0
    rows: int = 0
    changed: int = 0
    relative: float = 0.0
    finite: bool = True
    seen: set[int] = field(default_factory=set)
    """Named positions that came up."""

    def add(self, old: Tensor, new: Tensor) -> None:
        """Counts rows, old and new, that no earlier pass had."""
        old, new = old.detach().flatten(1), new.detach().flatten(1)
        norm = old.norm(dim=1)
        relative = (new - old).norm(dim=1) / torch.where(norm > 0, norm, 1)
        self.rows += len(old)
        self.changed += int((new != old).any(1).sum())
        self.relative += float(relative.sum())


class Intervened:
    """Result of `intervene`: a context that changes a model inside its block, and counts what was changed."""

    def __init__(self, model: Model, records: tuple[Intervention, ...]) -> None:
        self.model, self.records = model, records
        self._hooks = [_Hook(model, record) for record in records]
        self._stack: ExitStack | None = None
        self._tokens: PassTokens | None = None

    def __enter__(self) -> Intervened:
        if self._stack is not None:
            raise RequestError("these interventions were entered before; call wb.intervene again for another block")
        self._stack = ExitStack()
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # compiled code ignores hooks that are added after its first call
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            self._read_tokens(self.model.module, stack)
            for hook in self._hooks:
                part = self.model.module.get_submodule(hook.site.tap.path)
                change = partial(hook.apply, lambda: self._tokens)
                stack.enter_context(change_tensor(part, hook.side, change))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        if self._stack is not None:
            self._stack.close()
        if kind is None:
            for hook in self._hooks:
                hook.check()

    def _read_tokens(self, module: nn.Module, stack: ExitStack) -> None:
        """Reads positions at the beginning of each pass of the whole model: a block does not know them."""
        reader, in_pass = PassReader(module), bound()

        def begin(_module: nn.Module, args: Any, kwargs: Any) -> None:
            if in_pass():
                self._tokens = reader.read(args, kwargs)

        def end(*_call: object) -> None:
            if in_pass():
                self._tokens = None

        stack.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
        stack.callback(module.register_forward_hook(end, always_call=True).remove)

    def table(self) -> pd.DataFrame:
        """Returns one line per record: what it is and what it changed so far.

        Columns record; site; passes, forward passes that reached it; rows, distinct tokens chosen; changed, those whose
        values differ afterwards; relative_change, mean of ‖x' - x‖ / ‖x‖ over the chosen tokens, NaN without any.
        """
        import pandas as pd  # a second

        return pd.DataFrame(
            [
                {
                    "record": str(hook.record),
                    "site": hook.site.short or hook.site.name,
                    "passes": hook.count.passes,
                    "rows": hook.count.rows,
                    "changed": hook.count.changed,
                    "relative_change": hook.count.relative / hook.count.rows if hook.count.rows else float("nan"),
                }
                for hook in self._hooks
            ]
        )


def intervene(model: Model, *records: Intervention) -> Intervened:
    """Returns a context manager that applies interventions to a model for any code inside its block.

    Records apply in their order, those of an outer block first; later ones see what earlier ones did. Hooks act in the
    thread that opened the block alone. A cache of keys and values that was filled inside keeps the changes.

    Args:
        model: The model; `model.module` is called or generates inside the block.
        records: What to change: `Add`, `Feature`.

    Returns:
        The context; as the value of `with ... as run` it counts what was changed: `run.table()`.

    Raises:
        RequestError: A record that does not fit the model: unknown site, a site that cannot be changed, another width.
        DataError: When the block ends without exception: no pass of the model, no token chosen, a named position that
            never came up, values that are not finite.
    """
    if not records:
        raise RequestError("no intervention is given; give one or more records, such as wb.Feature(sae, 17)")
    return Intervened(model, records)


class _Hook:
    """One record at its site of a model."""

    def __init__(self, model: Model, record: Intervention) -> None:
        check_at(record.at)
        self.record, self.count = record, _Count()
        self.site = changeable_site(model, record.place)
        self.side: Literal["in", "out"] = "in" if self.site.tap.part == "in" else "out"
        self.change = record.change(model, self.site)

    def apply(self, tokens: Callable[[], PassTokens | None], tensor: Tensor) -> Tensor:
        """Returns the tensor with the chosen rows changed; the original stays as it is."""
        present = tokens()
        if present is None:
            raise DataError(f"{self.record}: a part of the model ran alone; call the whole model inside the block")
        mask = present.chosen(self.record.at)
        self.count.passes += 1
        self._see(present, mask)
        if not bool(mask.any()):
            return tensor
        rows = tensor.reshape(mask.numel(), *fixed_shape(self.site))
        chosen = mask.flatten().nonzero()[:, 0].to(rows.device)
        wide = torch.promote_types(rows.dtype, torch.float32)
        old = rows[chosen].to(wide)
        new = self.change(old)
        self.count.finite &= bool(new.detach().isfinite().all())
        fresh = (mask.nonzero()[:, 1] >= present.fresh).to(rows.device)
        self.count.add(old[fresh], new[fresh])
        return rows.index_copy(0, chosen, new.to(rows.dtype)).reshape(tensor.shape)

    def _see(self, present: PassTokens, mask: Tensor) -> None:
        for index in set(named_positions(self.record.at)) - self.count.seen:
            if bool((present.chosen(index) & mask).any()):
                self.count.seen.add(index)

    def check(self) -> None:
        """Raises DataError for what did not happen, or gave no numbers."""
        count, missing = self.count, sorted(set(named_positions(self.record.at)) - self.count.seen)
        if not count.passes:
            raise DataError(f"{self.record}: no forward pass reached it inside the block; call the model inside")
        if missing:
            raise DataError(f"{self.record}: no sequence had a token at position {missing[0]}; name another")
        if not count.rows:
            raise DataError(f"{self.record}: at={self.record.at!r} chose no token of {count.passes} passes")
        if not count.finite:
            raise DataError(f"{self.record}: its new values are not finite; look for NaN in the model or a huge value")


def changeable_site(model: Model, name: str) -> Site:
    """Returns the one site of a model that `name` selects, if it can be changed.

    Raises:
        RequestError: Another number of sites than one, or a site that is no single input or output of a module.
    """
    sites = model.site_map.select((name,))
    if len(sites) != 1:
        raise RequestError(f"site {name!r} selects {len(sites)} sites; name one, such as {sites[0].short!r}")
    (site,) = sites
    if site.of or site.tap.part not in ("in", "out") or site.name.endswith("hook_resid_mid"):
        raise RequestError(
            f"site {site.short or site.name} cannot be changed: it is read in several places, or inside of attention; "
            "resid_pre, resid_post, attn_out and mlp_out can"
        )
    return site
