"""Positions of the tokens of forward passes: which entries of a batch are tokens, of the prompt, new, or in the cache.

Positions are those of `token_choice`. They are read at the top of a pass: inside of the blocks the cache counts the
current tokens already.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from workbench.io.errors import DataError
from workbench.model.token_choice import Tokens

_CACHES = ("past_key_values", "cache_params", "state")
"""Arguments by which models of transformers continue earlier passes."""


@dataclass(frozen=True, eq=False)
class PassLabels:
    """Facts about a batch of a recording that its token ids do not give."""

    sequence: Int[Tensor, " batch"]
    """Number of each sequence in the store."""
    chosen: Mapping[str, Bool[Tensor, "batch position"]]
    """Tokens that conditions on the token table choose, by `table_key`."""
    generated: Bool[Tensor, "batch position"] | None = None
    """Tokens that a model generated, which are the new ones here too; the tokens before them are the prompt. None: the
    texts are not generated, and each sequence is a prompt."""


def table_key(choice: Tokens) -> str:
    """Returns the name of a choice's conditions on the token table."""
    return repr((choice.span, choice.sql))


@dataclass(frozen=True, eq=False)
class PassTokens:
    """Tokens of one forward pass, or the keys that its attention reads."""

    position: Int[Tensor, "batch position"] | None
    """Position of each entry in its sequence, -1 for padding; None if the call does not decide it."""
    prompt: Int[Tensor, " batch"] | None
    """Number of tokens of each sequence's prompt: of its first pass. None if the positions are not known."""
    shape: tuple[int, int]
    fresh: int
    """Index of the first column that no earlier pass had: a step without cache runs the whole sequence again."""
    split: bool
    """True if the pass continues a sequence by several tokens, so that prompt and new tokens cannot be separated."""
    ids: Int[Tensor, "batch position"] | None = None
    """Token ids; None if the model was called with embeddings, or for keys."""
    labels: PassLabels | None = None
    cached: int = 0
    """Tokens that earlier passes left in the cache, padding included."""
    pads: Int[Tensor, " batch"] | None = None
    """Padding before the first token of each sequence; None if the tokens are not in consecutive columns."""
    set_rows: list[Any] = field(default_factory=list, repr=False)
    """Record, place and mask of each record that set rows in this pass."""
    _masks: dict[int, tuple[object, Tensor]] = field(default_factory=dict, repr=False)
    _keys: dict[int, PassTokens] = field(default_factory=dict, repr=False)

    def chosen(self, choice: Tokens | Bool[Tensor, "batch position"]) -> Bool[Tensor, "batch position"]:
        """Returns a mask of the chosen tokens, on the CPU; computed once for all records with the same choice.

        Raises:
            DataError: The pass does not decide the positions or the ids, or a mask of another shape.
        """
        entry = self._masks.get(id(choice))
        if entry is None or entry[0] is not choice:
            entry = self._masks[id(choice)] = choice, self._choose(choice)
        return entry[1]

    def named(self, choice: Tokens | Tensor) -> Int[Tensor, "batch position"]:
        """Returns, for each entry, the number of the named position that it is, in the order of `at`; -1: none."""
        number = torch.full(self.shape, -1, dtype=torch.long, device="cpu")
        for index, position in enumerate(choice.positions if isinstance(choice, Tokens) else ()):
            number[self._at(position)] = index
        return number

    def position_of(self, mask: Bool[Tensor, "batch position"]) -> Int[Tensor, " row"]:
        """Returns the positions of the tokens of a mask. DataError if the pass does not decide them."""
        if self.position is None:
            raise DataError("the model was called without mask of two axes and without position_ids")
        return self.position[mask]

    def came_up(self, choice: Tokens | Tensor) -> set[int]:
        """Returns the named positions of `at` that a sequence of the pass has."""
        mask = self.chosen(choice)
        positions = choice.positions if isinstance(choice, Tokens) else ()
        return {position for position in positions if bool((self._at(position) & mask).any())}

    def donors(self, count: int) -> Int[Tensor, " batch"]:
        """Returns for each sequence the one of `count` others that belongs to it.

        In a recording one serves all, or each has its own; elsewhere, beams and repeated sequences share theirs.

        Raises:
            DataError: The batch is no multiple of `count`.
        """
        if self.labels is not None:
            return torch.zeros_like(self.labels.sequence) if count == 1 else self.labels.sequence
        batch = self.shape[0]
        if not count or batch % count:
            raise DataError(f"the batch has {batch} sequences, no multiple of the {count} that values are given for")
        return torch.arange(batch, device="cpu") // (batch // count)

    def keys(self, key_count: int) -> PassTokens:
        """Returns the keys that a layer's attention reads, when its cache gives `key_count` of them.

        Key j is token j + max(0, tokens seen - key_count): so in growing, sliding and static caches alike.

        Raises:
            DataError: The pass does not decide the positions.
        """
        if key_count not in self._keys:
            self._keys[key_count] = self._read_keys(key_count)
        return self._keys[key_count]

    def _read_keys(self, key_count: int) -> PassTokens:
        if self.pads is None:
            raise DataError(
                "keys: the positions of the tokens in the cache are not known; call the model with a mask of two axes "
                "whose tokens are in consecutive columns, or with position_ids"
            )
        token_count = self.cached + self.shape[1]
        column = torch.arange(key_count, device="cpu") + max(0, token_count - key_count)
        position = column - self.pads[:, None]
        position = torch.where((position >= 0) & (column < token_count) & ~self._padded(column), position, -1)
        fresh = max(0, max(self.cached, self.fresh) - max(0, token_count - key_count))
        return PassTokens(position, self.prompt, (self.shape[0], key_count), fresh, self.split, labels=self.labels)

    def _padded(self, column: Int[Tensor, " key"]) -> Bool[Tensor, "batch key"]:
        """Mask of the columns of this pass that are padding, behind the tokens, too; keys of earlier passes are not."""
        assert self.position is not None
        place = column - self.cached
        inside = (place >= 0) & (place < self.shape[1])
        return inside & (self.position[:, place.clamp(0, self.shape[1] - 1)] < 0)

    def _choose(self, choice: Tokens | Tensor) -> Tensor:
        if isinstance(choice, Tensor):
            if tuple(choice.shape) != self.shape:
                raise DataError(f"at is a mask of shape {tuple(choice.shape)}, and the batch has {self.shape}")
            return choice.cpu()
        mask = self._indexed(choice)
        if choice.ids is not None:
            if self.ids is None:
                raise DataError(f"at={choice}: token ids are not known here; give positions")
            mask = mask & torch.isin(self.ids, torch.tensor(sorted(choice.ids), device="cpu"))
        if choice.needs_table:
            if self.labels is None:
                raise DataError(f"at={choice}: spans and SQL choose tokens while recording; give positions or ids")
            mask = mask & self.labels.chosen[table_key(choice)]
        return mask

    def _indexed(self, choice: Tokens) -> Tensor:
        index = choice.index
        if self.position is None:
            if isinstance(index, str) and index == "all":
                return torch.ones(self.shape, dtype=torch.bool, device="cpu")
            raise DataError(f"at={choice}: the model was called without mask of two axes and without position_ids")
        assert self.prompt is not None
        if self.split and choice.needs_prompt:
            raise DataError(
                f"at={choice}: a pass continues a sequence by several tokens at once (chunked prefill, assisted "
                "generation), so prompt and new tokens cannot be separated; give positions from 0"
            )
        position, prompt = self.position, self.prompt[:, None]
        token = position >= 0
        if isinstance(index, str):
            generated = None if self.labels is None else self.labels.generated
            return token if index == "all" else token & (position >= prompt if generated is None else generated)
        if isinstance(index, slice):
            start, stop = (prompt + bound if bound and bound < 0 else bound for bound in (index.start or 0, index.stop))
            start = start.clamp(min=0) if isinstance(start, Tensor) else start
            inside = token & (position >= start) & ((position - start) % (index.step or 1) == 0)
            return inside if stop is None else inside & (position < stop)
        mask = torch.zeros_like(token)
        for place in choice.positions:
            mask |= self._at(place)
        return mask

    def _at(self, index: int) -> Tensor:
        assert self.position is not None
        assert self.prompt is not None
        return (self.position >= 0) & (self.position == (self.prompt[:, None] + index if index < 0 else index))


class PassReader:
    """Reads the tokens of consecutive passes of one model from its inputs.

    A pass continues the one before if it has a cache with tokens or, without cache, the same prompts and one more
    token; else it begins with a prompt.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = inspect.signature(module.forward)
        self._ids: Tensor | None = None
        self._prompt: Tensor | None = None
        self._columns = 0
        """Columns of the last prompt."""
        self._seen = 0
        """Columns of the last sequences, those of earlier passes included."""
        self._pads: Tensor | None = None
        """Padding before the prompts, as of `PassTokens.pads`."""

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], labels: PassLabels | None = None) -> PassTokens:
        """Returns the tokens of a pass, from the arguments of the model's call and the labels of a recording.

        Raises:
            DataError: The call has neither token ids nor embeddings, or continues a recurrent state of other passes.
        """
        inputs = self._named(args, kwargs)
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        source = ids if isinstance(ids, Tensor) else embeds
        if not isinstance(source, Tensor) or source.ndim < 2:
            raise DataError("the model was called without input_ids and inputs_embeds; give one of them by name")
        batch, columns = shape = (int(source.shape[0]), int(source.shape[1]))
        cached = _cached(inputs)
        recurrent = cached is None
        cached = self._continued() if cached is None else cached
        position = _positions(inputs, shape, cached)
        if recurrent and inputs.get("attention_mask") is None and position is not None and self._pads is not None:
            position = position - self._pads.repeat_interleave(batch // len(self._pads))[:, None]
        repeated = not cached and self._repeats(ids)
        if cached or repeated:
            fresh = columns - 1 if repeated else 0
            prompt = self._expanded(batch, position)
            split = not repeated and columns > 1
        else:
            prompt = None if position is None else _prompt(position, labels)
            fresh, split, self._prompt, self._columns = 0, False, prompt, columns
            self._pads = _pads(inputs, position, cached)
        self._seen = cached + columns
        self._ids = ids.detach() if isinstance(ids, Tensor) else None
        return PassTokens(
            position=position,
            prompt=prompt,
            shape=shape,
            fresh=fresh,
            split=split,
            ids=ids.detach().cpu() if isinstance(ids, Tensor) and ids.ndim == 2 else None,
            labels=labels,
            cached=cached,
            pads=_pads(inputs, position, cached),
        )

    def _continued(self) -> int:
        """Tokens that a recurrent state holds: those of the passes before."""
        if not self._seen:
            raise DataError(
                "the model continues a state of passes outside of the block, whose number of tokens is not known; "
                "begin with the prompts inside the block"
            )
        return self._seen

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        bound = self._parameters.bind_partial(*args, **kwargs).arguments
        variadic = {p.name: p.kind for p in self._parameters.parameters.values()}
        inputs: dict[str, Any] = {}
        for name, value in bound.items():
            if variadic[name] is inspect.Parameter.VAR_KEYWORD:
                inputs |= value
            elif variadic[name] is inspect.Parameter.VAR_POSITIONAL:
                inputs |= {"input_ids": value[0]} if value else {}
            else:
                inputs[name] = value
        return inputs

    def _repeats(self, ids: Any) -> bool:
        """True for a step without cache: the prompts of the pass before, and one more token than it."""
        last = self._ids
        if not isinstance(ids, Tensor) or last is None or ids.ndim != 2 or last.ndim != 2:
            return False
        longer = ids.shape[0] == last.shape[0] and ids.shape[1] == last.shape[1] + 1
        return longer and bool(torch.equal(ids[:, : self._columns].to(last.device), last[:, : self._columns]))

    def _expanded(self, batch: int, position: Tensor | None) -> Tensor | None:
        """Prompts of the sequences of this pass; a cache that was filled before counts as prompt."""
        if position is None:
            return None
        if self._prompt is None:
            return position.clamp(min=0).amin(1)
        if batch % len(self._prompt):
            raise DataError(f"a pass of {batch} sequences continues one of {len(self._prompt)}; begin with the prompts")
        return self._prompt.repeat_interleave(batch // len(self._prompt))


def _prompt(position: Tensor, labels: PassLabels | None) -> Tensor:
    """Number of tokens of each prompt in the first pass over it."""
    tokens = (position >= 0).sum(1)
    if labels is None or labels.generated is None:
        return tokens
    return torch.where(labels.generated.any(1), labels.generated.long().argmax(1), tokens)


def _cached(inputs: Mapping[str, Any]) -> int | None:
    """Tokens that the cache holds at the beginning of a pass; inside the blocks it counts the current ones already.

    None: it is a recurrent state (Mamba, RWKV, xLSTM) of some tokens, which does not count them.
    """
    cache = next((inputs[name] for name in _CACHES if inputs.get(name) is not None), None)
    if cache is None or getattr(cache, "rnn_state_initial", False):
        return 0
    if hasattr(cache, "get_seq_length"):
        try:
            return int(cache.get_seq_length())
        except ValueError:  # no layer of it has attention
            return None if cache.has_previous_state() else 0
    if inputs.get("past_key_values") is None:
        return None
    return int(cache[0][0].shape[-2]) if len(cache) and cache[0] else 0


def _positions(inputs: Mapping[str, Any], shape: tuple[int, int], cached: int) -> Tensor | None:
    """Position of each token, -1 for padding; None where the arguments leave it open."""
    batch, columns = shape
    mask, ids = inputs.get("attention_mask"), inputs.get("position_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        mask = (mask != 0).cpu().long()
        position = torch.where(mask == 1, mask.cumsum(1) - 1, -1)
        longer = mask.shape[1] >= cached + columns  # as long as a static cache, or as the tokens up to now
        return position[:, cached : cached + columns] if longer else position[:, -columns:]
    if mask is None:
        return (cached + torch.arange(columns, device="cpu")).expand(batch, columns)
    if not isinstance(ids, Tensor):
        return None
    position = (ids[0] if ids.ndim == 3 else ids).cpu().long().expand(batch, columns)
    if cached:
        return position
    # generate numbers left padding as it likes; the tokens begin at the last 0
    column = torch.arange(columns, device="cpu")
    start = torch.where(position == 0, column, 0).amax(1, keepdim=True)
    return torch.where(column >= start, position, -1)


def _pads(inputs: Mapping[str, Any], position: Tensor | None, cached: int) -> Tensor | None:
    """Columns before the first token of each sequence, counted from the first column that the cache ever held."""
    if position is None:
        return None
    mask, columns = inputs.get("attention_mask"), position.shape[1]
    if isinstance(mask, Tensor) and mask.ndim == 2:
        real = (mask != 0).cpu()
        begins = real & ~torch.cat([torch.zeros_like(real[:, :1]), real[:, :-1]], dim=1)
        consecutive = bool((begins.sum(1) <= 1).all())
        return real.long().argmax(1) if consecutive and real.shape[1] >= cached + columns else None
    last = position[:, -1]
    return torch.where(last >= 0, cached + columns - 1 - last, 0)
