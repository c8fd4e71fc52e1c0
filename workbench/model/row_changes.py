"""Interventions on chosen rows of one site: how a record of them is bound to a model and applied in its passes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.io.checks import check_kind
from workbench.io.errors import DataError, RequestError
from workbench.model.attention import AttentionInputs, change_attention
from workbench.model.forward import attention_name, change_tensor, fixed_shape, hook_tensor
from workbench.model.intervene import Bound, CurrentTokens, Intervention, overridden
from workbench.model.load import Model
from workbench.model.positions import PassTokens
from workbench.model.token_choice import At, Tokens, tokens_at, whole
from workbench.sites.grammar import Site, Tap

Head = int | Sequence[int] | None
"""Heads of a site with an axis of heads. None: all."""

_MIDDLE = 1e-2
"""Relative distance at which a stream between attention and MLP is not the one that a change was made for."""


@dataclass(frozen=True)
class ChosenRows:
    """Tokens of the rows that a change gets."""

    tokens: PassTokens
    choice: Tokens | Tensor
    sequence: Int[Tensor, " row"]
    """Sequence of each row in the batch."""
    column: Int[Tensor, " row"]

    @property
    def position(self) -> Int[Tensor, " row"]:
        """Position of each row in its sequence. DataError if the pass does not decide it."""
        if self.tokens.position is None:
            raise DataError("the model was called without mask of two axes and without position_ids")
        return self.tokens.position[self.sequence, self.column]

    @property
    def token_id(self) -> Int[Tensor, " row"]:
        """Id of each token. DataError if the model was called with embeddings."""
        if self.tokens.ids is None:
            raise DataError("token ids are not known here: the model was called with embeddings, or these are keys")
        return self.tokens.ids[self.sequence, self.column]

    @property
    def named(self) -> Int[Tensor, " row"]:
        """Number of the named position that each row is, in the order of `at`; -1: none."""
        return self.tokens.named(self.choice)[self.sequence, self.column]

    def donors(self, count: int) -> Int[Tensor, " row"]:
        """Returns for each row the one of `count` sequences that belongs to it; see `PassTokens.donors`."""
        return self.tokens.donors(count)[self.sequence]


Change = Callable[[Float[Tensor, "row ..."], ChosenRows], Float[Tensor, "row ..."]]
"""From rows of a site, in float32 or wider, to their new values; a row that it leaves alone is returned bit by bit."""


@dataclass(frozen=True)
class Place:
    """Part of a site's rows that a record changes, in one model."""

    site: Site
    heads: tuple[int, ...] | None
    """Heads, where not all of them."""
    tap: Tap
    """Where the change is made: of resid_pre behind the block before, of resid_mid at attention's output."""
    stream: Tap | None = None
    """For resid_mid: the stream that attention's output is added to."""
    factor: float = 1.0
    """For resid_mid: number by which the block multiplies attention's output before it adds it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row of what is changed, with an axis for the heads, also for a single one."""
        shape = fixed_shape(self.site)
        return shape if self.heads is None else (len(self.heads), *shape[1:])

    @property
    def single_head(self) -> bool:
        """True if one head is changed."""
        return self.heads is not None and len(self.heads) == 1

    @property
    def label(self) -> str:
        """Name of the site, with heads where not all are changed."""
        name = self.site.short or self.site.name
        return name if self.heads is None else f"{name} head {', '.join(map(str, self.heads))}"

    def meets(self, other: Place) -> bool:
        """Returns True if both are parts of one tensor that have a value in common."""
        shared = self.heads is None or other.heads is None or bool({*self.heads} & {*other.heads})
        return self.tap == other.tap and shared

    def fit(self, name: str, value: Tensor) -> Float[Tensor, "*row"]:
        """Returns a value of one row in the shape of a row, also if the axis of a single head was left out.

        Raises:
            RequestError: Another shape.
        """
        if tuple(value.shape) == self.shape:
            return value
        if self.single_head and tuple(value.shape) == self.shape[1:]:
            return value[None]
        raise RequestError(f"{name} has the shape {tuple(value.shape)}, and a row of {self.label} {self.shape}")


class RowIntervention(Intervention):
    """A record that changes chosen rows of one site."""

    at: At
    """Tokens that it changes."""
    head: Head = None
    """Heads that it changes, on q, k, v and z; on k and v key/value heads. None: all."""
    sets = False
    """True if new values do not depend on the old ones."""

    @property
    @abstractmethod
    def place(self) -> str:
        """Name of the site."""

    @abstractmethod
    def change(self, model: Model, place: Place) -> Change:
        """Returns the change of chosen rows.

        Raises:
            RequestError: The record does not fit the model or the site.
        """

    def bind(self, model: Model) -> Bound:
        """Returns the record made ready for one model; see `Intervention.bind`."""
        return BoundRows(self, model)


class SiteIntervention(RowIntervention):
    """A record that names its site."""

    site: str

    @property
    def place(self) -> str:
        """Name of the site."""
        return self.site


@dataclass(frozen=True, eq=False)
class RowFunction(SiteIntervention):
    """A change of rows by any function, for analyses of one process: it has no JSON form and cannot be recorded."""

    site: str
    function: Change
    name: str
    """Name in messages and tables."""
    at: At = field(default="all", kw_only=True)

    def change(self, model: Model, place: Place) -> Change:
        """Returns the function."""
        return self.function

    def __str__(self) -> str:
        return f"{self.name} at {self.site}"


class BoundRows(Bound):
    """A change of rows of one site of a model."""

    def __init__(self, record: RowIntervention, model: Model) -> None:
        self.at = tokens_at(record.at)
        self.where = changeable_place(model, record.place, record.head)
        super().__init__(record, self.where.label)
        self.sets, self.change = record.sets, record.change(model, self.where)
        self._stream: list[Tensor | None] = [None]
        self._middle: Tensor | None = None

    def attach(self, module: nn.Module, tokens: CurrentTokens, stack: ExitStack) -> None:
        """Registers the hook; see `Bound.attach`."""
        tap = self.where.tap
        part = module.get_submodule(tap.path)
        if tap.part in ("query", "key", "value"):
            change = partial(self._in_attention, tokens, tap.part)
            stack.enter_context(change_attention(attention_name(module), part, change))
        else:
            side: Literal["in", "out"] = "in" if tap.part == "in" else "out"
            stack.enter_context(change_tensor(part, side, lambda tensor: self.apply(tensor, tokens.of(self.record))))

    def attach_readers(self, module: nn.Module, stack: ExitStack) -> None:
        """Reads the stream around a change between attention and MLP; see `Bound.attach_readers`."""
        before, between = self.where.stream, self.where.site.tap
        if before is None:
            return

        def keep(tensor: Tensor | None) -> None:
            self._stream[0] = tensor

        stack.enter_context(hook_tensor(module.get_submodule(before.path), _side(before), keep))
        stack.enter_context(hook_tensor(module.get_submodule(between.path), _side(between), self._check_middle))

    def overrides(self, other: Bound) -> bool | None:
        """Returns whether both set the same rows; see `Bound.overrides`."""
        if not (isinstance(other, BoundRows) and self.sets and other.sets):
            return False
        if not self.where.meets(other.where):
            return False
        a, b = self.at, other.at
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            return None
        if a.described() == b.described() or {"index": "all"} in (a.described(), b.described()):
            return True
        positions = set(a.positions) & set(b.positions)
        return bool(positions) if a.described().keys() == b.described().keys() == {"index"} else None

    def apply(self, tensor: Tensor, present: PassTokens) -> Tensor:
        """Returns the tensor with the chosen rows changed; the original stays as it is."""
        mask = present.chosen(self.at)
        self.count.passes += 1
        self.seen |= present.came_up(self.at)
        if not bool(mask.any()):
            return tensor
        if self.sets and not self.override:
            self._refuse_second(present, mask)
        sequence, column = mask.nonzero().unbind(1)
        rows = tensor.reshape(-1, *fixed_shape(self.where.site))
        if len(rows) != mask.numel():
            raise DataError(
                f"{self.record}: {self.place} has {len(rows)} rows in a pass of {mask.numel()} tokens, so a row is no "
                "token; run one sequence at a time, or change another site"
            )
        index = (sequence * mask.shape[1] + column).to(rows.device)
        whole_rows = rows[index]
        old = whole_rows.to(torch.promote_types(rows.dtype, torch.float32))
        offset = self._offset(tensor, index)
        part = old if self.where.heads is None else old[:, list(self.where.heads)]
        part = part if offset is None else self.where.factor * part + offset
        new = self.change(part, ChosenRows(present, self.at, sequence, column))
        fresh = (column >= present.fresh).to(rows.device)
        self.count.add(part[fresh], new[fresh])
        new = new if offset is None else torch.where(new == part, old, (new - offset) / self.where.factor)
        if self.where.heads is not None:
            head = torch.tensor(self.where.heads, device=old.device)
            new = old.index_copy(1, head, new)
        new_tensor = rows.index_copy(0, index, new.to(rows.dtype)).reshape(tensor.shape)
        if offset is not None:
            self._middle = new_tensor.detach()
        return new_tensor

    def _refuse_second(self, present: PassTokens, mask: Tensor) -> None:
        """Refuses a token that an earlier record of this run set in the same pass."""
        for earlier, place, earlier_mask in present.set_rows:
            if self.where.meets(place) and bool((mask & earlier_mask).any()):
                raise RequestError(overridden(self.record, earlier, self.place))
        present.set_rows.append((self.record, self.where, mask))

    def _offset(self, tensor: Tensor, index: Tensor) -> Tensor | None:
        """For resid_mid: rows of the stream that attention's output is added to."""
        if self.where.stream is None:
            return None
        stream = self._stream[0]
        if stream is None:
            raise DataError(f"{self.record}: the stream before attention did not come up; change attn_out instead")
        rows = stream.reshape(-1, *fixed_shape(self.where.site))
        return rows[index.to(rows.device)].to(tensor.device, torch.promote_types(tensor.dtype, torch.float32))

    def _check_middle(self, between: Tensor | None) -> None:
        """Refuses a model whose stream between attention and MLP is not the sum that was changed."""
        middle, stream = self._middle, self._stream[0]
        self._middle = self._stream[0] = None
        if middle is None or stream is None or between is None:
            return
        total = (stream.detach().double() + self.where.factor * middle.to(stream.device).double()).flatten()
        error = (between.detach().to(stream.device).double().flatten() - total).norm()
        if not error <= _MIDDLE * total.norm():
            raise DataError(
                f"{self.record}: in this model the stream between attention and MLP is not resid_pre + attn_out; "
                "change attn_out instead"
            )

    def _in_attention(self, tokens: CurrentTokens, part: str, inputs: AttentionInputs) -> AttentionInputs:
        present, tensor = tokens.of(self.record), getattr(inputs, part).transpose(1, 2)
        if part != "query":
            present = present.keys(tensor.shape[1])
        new_tensor = self.apply(tensor.contiguous(), present)
        return inputs.replaced(**{part: new_tensor.transpose(1, 2)})


def _side(tap: Tap) -> Literal["in", "out"]:
    return "in" if tap.part == "in" else "out"


def changeable_place(model: Model, name: str, head: Head = None) -> Place:
    """Returns the one site of a model that `name` selects, with the heads that are changed.

    Raises:
        RequestError: Another number of sites than one, a site that is no single tensor of a module or of the attention
            call, or heads that the site does not have.
    """
    check_kind("site", name, str, "the name of one, such as resid_post.3")
    sites = model.site_map.select((name,))
    if len(sites) != 1:
        raise RequestError(
            f"site {name!r} selects {len(sites)} sites; name one, such as {sites[0].short or sites[0].name!r}"
        )
    (site,) = sites
    if site.of or site.tap.part not in ("in", "out", "query", "key", "value"):
        reason = "is computed from another one" if site.of else "is a result of attention or of the whole model"
        raise RequestError(
            f"site {site.short or site.name} cannot be changed: it {reason}; resid_pre, resid_mid, resid_post, "
            "attn_out, mlp_out, q, k, v, z, mlp_post and embed can"
        )
    heads = _heads(model, site, head)
    if site.kind == "resid_mid" and site.tap.part == "in":
        (before,) = model.site_map.select((f"resid_pre.{site.layer}",))
        factor = model.site_map.factors.get(f"blocks.{site.layer}.hook_attn_out")
        name = f"attn_out.{site.layer}" if factor is None else f"blocks.{site.layer}.attn.hook_out"
        return Place(site, heads, model.site_map.select((name,))[0].tap, before.tap, factor or 1.0)
    if site.kind == "resid_pre" and site.layer in model.site_map.chained:
        return Place(site, heads, model.site_map.select((f"resid_post.{site.layer - 1}",))[0].tap)
    return Place(site, heads, site.tap)


def _heads(model: Model, site: Site, head: Head) -> tuple[int, ...] | None:
    if head is None:
        return None
    heads = tuple(head) if isinstance(head, Sequence) else (head,)
    label = site.short or site.name
    if site.axes[0] != "head":
        raise RequestError(f"head: {label} has no axis of heads; leave head out, or name a site such as z.{site.layer}")
    if not heads or not all(map(whole, heads)) or len(set(heads)) < len(heads):
        raise RequestError(f"head must be a head, or several that differ, not {head!r}")
    count = site.shape[0] or 0
    for number in heads:
        if not 0 <= number < count:
            queries = query_heads(model, site.layer)
            if queries and queries > count and number < queries:
                group = queries // count
                raise RequestError(
                    f"head {number}: {label} has the {count} key/value heads 0 to {count - 1}, each for {group} query "
                    f"heads; query head {number} reads key/value head {number // group}"
                )
            raise RequestError(f"head {number}: {label} has the heads 0 to {count - 1}")
    return tuple(int(number) for number in heads)


def query_heads(model: Model, layer: int | None) -> int | None:
    """Returns the number of query heads of a layer; None if no site shows it."""
    sites = model.site_map.sites
    for kind in ("z", "rot_q", "q", "pattern"):
        for site in sites.values():
            if site.layer == layer and site.kind == kind and site.axes[0] == "head":
                return site.shape[0]
    return None
