"""Record that gives heads the attention pattern of another run."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from torch import nn

from workbench.io.errors import RequestError
from workbench.model.attention_records import attention_call, attention_heads
from workbench.model.intervene import Bound, CurrentTokens, Intervention
from workbench.model.load import Model
from workbench.model.row_changes import Head
from workbench.model.stored_rows import Patch, opened_donors
from workbench.sites.grammar import Site
from workbench.store.reader import Rows, StoreOrPath


@dataclass(frozen=True, eq=False)
class FreezePattern(Intervention):
    """Gives heads the attention pattern of a recorded run: queries and keys, after rotation, are those of a store.

    Exact for a float32 store. Every token of a pass needs its token in the store; see `Patch` for which.
    """

    layer: int
    head: Head
    """Query heads: all of each group that shares keys. None: all."""
    of: StoreOrPath | Rows
    """Store, or its path, with the layer's queries and keys: `rot_q` and `rot_k`, or `q` and `k` where nothing is
    rotated."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "of", opened_donors(self.of))

    def bind(self, model: Model) -> Bound:
        """Returns the record made ready for one model; see `Intervention.bind`."""
        return _BoundPattern(self, model)

    def __str__(self) -> str:
        heads = "" if self.head is None else f" head {self.head}"
        return f"freeze the attention pattern of layer {self.layer}{heads}"


class _BoundPattern(Bound):
    """Queries and keys of a layer's attention call, set to those of a store."""

    def __init__(self, record: FreezePattern, model: Model) -> None:
        super().__init__(record, f"attention.{record.layer}")
        heads = attention_heads(model, record.layer, record.head)
        path = attention_call(model, record.layer)
        query, key = (self._site(model, path, part) for part in ("query", "key"))
        queries, keys = query.shape[0] or 1, key.shape[0] or 1
        group = queries // keys
        shared = sorted({head // group for head in heads})
        whole = [group * key_head + number for key_head in shared for number in range(group)]
        if sorted(heads) != whole:
            raise RequestError(
                f"head {record.head}: {group} query heads of layer {record.layer} share each key head, so their "
                f"patterns are frozen together; give head={whole}"
            )
        patches = Patch(query.name, record.of, at="all", head=heads), Patch(key.name, record.of, at="all", head=shared)
        self._parts = [patch.bind(model) for patch in patches]
        self.count = self._parts[0].count

    def _site(self, model: Model, path: str, part: str) -> Site:
        for site in model.site_map.sites.values():
            if site.tap.path == path and site.tap.part == part and site.axes[0] == "head":
                return site
        raise RequestError(
            f"{self.record}: {model.architecture} has no site for the {part} of its attention call, so it cannot be set"
        )

    def attach(self, module: nn.Module, tokens: CurrentTokens, stack: ExitStack) -> None:
        """Registers both changes; see `Bound.attach`."""
        for part in self._parts:
            part.attach(module, tokens, stack)

    def check(self) -> None:
        """Raises DataError for what did not happen; see `Bound.check`."""
        for part in self._parts:
            part.check()
