"""Interventions on a running model: records that change one tensor each, applied inside of a context manager.

    with wb.intervene(model, wb.Add("resid_post.9", direction, 4.0, at="new")) as run:
        model.module.generate(...)
    run.table()

The model stays the Hugging Face module that it is; forward hooks change the tensor at a site, and everything behind it
is computed by the model. All hooks are gone after the block, also after an exception.
"""

from __future__ import annotations

import logging
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.io.errors import DataError, RequestError
from workbench.model.counts import Count
from workbench.model.forward import attention_name
from workbench.model.load import Model, check_model
from workbench.model.passes import bound
from workbench.model.positions import PassLabels, PassReader, PassTokens
from workbench.model.token_choice import Tokens

if TYPE_CHECKING:
    import pandas as pd


_LOG = logging.getLogger(__name__)


class Intervention(ABC):
    """A frozen record of one change of a running model. It holds nothing of a model and no function."""

    @abstractmethod
    def bind(self, model: Model) -> Bound:
        """Returns the record made ready for one model.

        Raises:
            RequestError: The record does not fit the model.
        """


def kind_of(record: Intervention | type[Intervention]) -> str:
    """Returns the name of a kind of record, as in JSON: `scale_attention`."""
    name = (record if isinstance(record, type) else type(record)).__name__
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


class Bound(ABC):
    """A record made ready for one model, and the count of what it did there."""

    first = False
    """True for a change of the model's structure, which is in place before all others."""
    at: Tokens | Tensor = Tokens()
    """Tokens that it changes."""
    override = False
    """True if it may replace what an earlier record sets."""
    kernel: str | None = None
    """Attention kernel that computes its layer in place of the model's own; None: the model's own."""

    def __init__(self, record: Intervention, place: str) -> None:
        self.record, self.place, self.count = record, place, Count()
        self.seen: set[int] = set()
        """Named positions that came up."""

    @property
    def choices(self) -> tuple[Tokens | Tensor, ...]:
        """All its choices of tokens."""
        return (self.at,)

    @abstractmethod
    def attach(self, module: nn.Module, tokens: CurrentTokens, stack: ExitStack) -> None:
        """Registers hooks on a model until `stack` closes."""

    def attach_readers(self, module: nn.Module, stack: ExitStack) -> None:
        """Registers hooks that must see what all changes did; by default none."""
        return

    def overrides(self, other: Bound) -> bool | None:
        """Returns True if it replaces what an earlier record sets at a token; None if the passes decide."""
        return False

    def check(self) -> None:
        """Raises DataError for what did not happen, or gave no numbers."""
        count = self.count
        if not count.passes:
            raise DataError(f"{self.record}: no forward pass reached it inside the block; call the model inside")
        positions = self.at.positions if isinstance(self.at, Tokens) else ()
        if missing := sorted(set(positions) - self.seen):
            raise DataError(f"{self.record}: no sequence had a token at position {missing[0]}; name another")
        if not count.rows:
            choice = self.at if isinstance(self.at, Tokens) else "a mask"
            raise DataError(f"{self.record}: at={choice} chose no token of {count.passes} passes")
        if not count.finite:
            raise DataError(f"{self.record}: its new values are not finite; look for NaN in the model or a huge value")


class CurrentTokens:
    """Tokens of the pass that runs, read at its top."""

    def __init__(self, module: nn.Module) -> None:
        self._reader, self._module = PassReader(module), module
        self._tokens: PassTokens | None = None
        self.labels: PassLabels | None = None
        """Labels of the next passes."""

    def read(self, stack: ExitStack) -> None:
        """Registers hooks at the top of the model, until `stack` closes: a block does not know the positions."""
        in_pass = bound()

        def begin(_module: nn.Module, args: Any, kwargs: Any) -> None:
            if in_pass():
                self._tokens = self._reader.read(args, kwargs, self.labels)

        def end(*_call: object) -> None:
            if in_pass():
                self._tokens = None

        stack.callback(self._module.register_forward_pre_hook(begin, with_kwargs=True).remove)
        stack.callback(self._module.register_forward_hook(end, always_call=True).remove)

    def of(self, record: Intervention) -> PassTokens:
        """Returns the tokens of the pass. DataError if a part of the model runs alone."""
        if self._tokens is None:
            raise DataError(f"{record}: a part of the model ran alone; call the whole model inside the block")
        return self._tokens


class Intervened:
    """Result of `intervene`: a context that changes a model inside its block, and counts what was changed."""

    def __init__(
        self,
        model: Model,
        records: tuple[Intervention, ...],
        override: bool = False,
        proof: bool = True,
        numbered: bool = False,
    ) -> None:
        """Binds the records; with `numbered`, errors name a record by its number and kind, as a list in a file does."""
        self.model, self.records, self._proof = model, records, proof
        names = [f"record {number} ({kind_of(record)})" if numbered else "" for number, record in enumerate(records)]
        self._bound = [_bind(model, record, name) for record, name in zip(records, names, strict=True)]
        for bound_record in self._bound:
            bound_record.override = override
        if not override:
            _refuse_overridden(self._bound)
        self._tokens = CurrentTokens(model.module)
        self._stack: ExitStack | None = None

    def __repr__(self) -> str:
        return f"interventions on {self.model.name}: {'; '.join(map(str, self.records))}"

    def __enter__(self) -> Intervened:
        if self._stack is not None:
            raise RequestError("these interventions were entered before; call wb.intervene again for another block")
        self._stack = ExitStack()
        module = self.model.module
        with ExitStack() as stack:
            if "torch._dynamo" in sys.modules:  # compiled code ignores hooks that are added after its first call
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            self._tokens.read(stack)
            for bound_record in sorted(self._bound, key=lambda bound_record: not bound_record.first):
                bound_record.attach(module, self._tokens, stack)
            for bound_record in self._bound:
                bound_record.attach_readers(module, stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        if self._stack is not None:
            self._stack.close()
        if kind is None and self._proof:
            self.check()

    @property
    def counts(self) -> tuple[Count, ...]:
        """Counts of each record."""
        return tuple(bound_record.count for bound_record in self._bound)

    @property
    def kernels(self) -> tuple[str | None, ...]:
        """Attention kernel of each record that takes the place of the model's own; None: no other."""
        return tuple(bound_record.kernel for bound_record in self._bound)

    @property
    def choices(self) -> tuple[tuple[Tokens, ...], ...]:
        """Choices of tokens of each record, without masks."""
        return tuple(
            tuple(choice for choice in bound_record.choices if isinstance(choice, Tokens))
            for bound_record in self._bound
        )

    def warn_of_kernels(self) -> None:
        """Logs one warning about all layers that another attention kernel computes than the model's own."""
        layers = sorted({bound_record.place for bound_record in self._bound if bound_record.kernel})
        if layers:
            _LOG.warning(
                f"{', '.join(layers)}: {attention_name(self.model.module)} takes no additive mask, so SDPA computes "
                "these layers where their attention is changed; results differ by rounding from the kernel's own"
            )

    def check(self) -> None:
        """Raises DataError for a record that did not run, chose no token, or gave values that are not finite."""
        for bound_record in self._bound:
            bound_record.check()

    @contextmanager
    def labelled(self, labels: PassLabels) -> Iterator[None]:
        """Gives the passes inside the block the labels of a recording."""
        before, self._tokens.labels = self._tokens.labels, labels
        try:
            yield
        finally:
            self._tokens.labels = before

    def table(self) -> pd.DataFrame:
        """Returns one line per record: what it is and what it changed so far.

        Columns record; site; passes, forward passes that reached it; rows, distinct tokens chosen; changed, those whose
        values differ afterwards; exempt, chosen tokens at which the change is not defined, left as they are;
        relative_change, mean of ‖x' - x‖ / ‖x‖ over the chosen tokens, NaN without any. Records that change attention,
        and exchanged blocks, have no rows that could be compared: changed and relative_change are missing there.
        """
        import pandas as pd  # a second

        table = pd.DataFrame(
            [
                {
                    "record": str(bound_record.record),
                    "site": bound_record.place,
                    "passes": bound_record.count.passes,
                    "rows": bound_record.count.rows,
                    "changed": bound_record.count.changed,
                    "exempt": bound_record.count.exempt,
                    "relative_change": bound_record.count.relative_change,
                }
                for bound_record in self._bound
            ]
        )
        return table.astype({"changed": "Int64"})  # with missing values


def intervene(model: Model, *records: Intervention, override: bool = False) -> Intervened:
    """Returns a context manager that applies interventions to a model for any code inside its block.

    Records apply in their order, those of an outer block first; later ones see what earlier ones did. Hooks act in the
    thread that opened the block alone. A cache of keys and values that was filled inside keeps the changes.

    Args:
        model: The model; `model.module` is called or generates inside the block.
        records: What to change: `Set`, `Zero`, `Add`, `Project`, `Mean`, `Resample`, `Patch`, `Feature`.
        override: Allow a record that replaces what an earlier one sets at the same tokens.

    Returns:
        The context; as the value of `with ... as run` it counts what was changed: `run.table()`.

    Raises:
        RequestError: A record that does not fit the model: unknown site, a site that cannot be changed, another width;
            or two records that set the same rows.
        DataError: When the block ends without exception: no pass of the model, no token chosen, a named position that
            never came up, values that are not finite.
    """
    check_model(model)
    if not records:
        raise RequestError("no intervention is given; give one or more records, such as wb.Zero('z.3', head=0)")
    for record in records:
        if not isinstance(record, Intervention):
            raise RequestError(f"an intervention must be a record such as wb.Zero('z.3', head=0), not {record!r:.60}")
    intervened = Intervened(model, records, override)
    intervened.warn_of_kernels()
    return intervened


def _bind(model: Model, record: Intervention, name: str) -> Bound:
    try:
        return record.bind(model)
    except (DataError, RequestError) as error:
        if not name:
            raise
        raise type(error)(f"{name}: {error}") from None


def overridden(later: Intervention, earlier: Intervention, place: str) -> str:
    """Returns the message about two records that set the same rows."""
    return (
        f"{later} sets what {earlier} set before, at the same tokens of {place}; leave one out, or pass override=True"
    )


def _refuse_overridden(records: list[Bound]) -> None:
    for number, later in enumerate(records):
        for earlier in records[:number]:
            if later.overrides(earlier):
                raise RequestError(overridden(later.record, earlier.record, later.place))
