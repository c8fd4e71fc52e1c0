"""Token positions in forward passes: which entries of a batch are tokens, which of the prompt, and which are new.

A position is an index into the tokens of a sequence, not into the padded tensor: the first real token has 0, padding
has none. So left-padded, right-padded and cached passes mean the same tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from workbench.io.errors import DataError, RequestError

At = int | Sequence[int] | slice | str | Bool[Tensor, "batch position"]
"""Choice of tokens: a position or several (-1 is the last token of the prompt), a slice of positions (which includes
generated tokens where it has no end), "all" tokens, the "new" ones after the prompt, or a mask of the batch."""


def check_at(at: Any) -> None:
    """Raises RequestError for a choice of tokens that is none of `At`."""
    if isinstance(at, str) and at in ("all", "new"):
        return
    if isinstance(at, Tensor) and at.dtype == torch.bool and at.ndim == 2:
        return
    if isinstance(at, slice):
        bounds = (at.start, at.stop, at.step)
        if all(bound is None or _whole(bound) for bound in bounds) and (at.step is None or at.step > 0):
            return
        raise RequestError(f"at: {at} needs whole numbers and a step above 0")
    if _whole(at) or (isinstance(at, Sequence) and not isinstance(at, str) and len(at) and all(map(_whole, at))):
        return
    raise RequestError(
        f'at must be a position, a list of positions, a slice, "all", "new" or a mask (batch, position), not {at!r}'
    )


def _whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


@dataclass(frozen=True)
class PassTokens:
    """Tokens of one forward pass."""

    position: Int[Tensor, "batch position"] | None
    """Position of each entry in its sequence, -1 for padding; None if the call does not decide it."""
    prompt: Int[Tensor, " batch"] | None
    """Number of tokens of each sequence's prompt: of its first pass. None if the positions are not known."""
    shape: tuple[int, int]
    fresh: int
    """Index of the first column that no earlier pass had: a step without cache runs the whole sequence again."""
    split: bool
    """True if the pass continues a sequence by several tokens, so that prompt and new tokens cannot be separated."""

    def chosen(self, at: At) -> Bool[Tensor, "batch position"]:
        """Returns a mask of the tokens that `at` chooses, on the CPU.

        Raises:
            DataError: The pass does not decide the positions, or a mask of another shape.
        """
        if isinstance(at, Tensor):
            if tuple(at.shape) != self.shape:
                raise DataError(f"at is a mask of shape {tuple(at.shape)}, and the batch has {self.shape}")
            return at.cpu()
        if self.position is None:
            if isinstance(at, str) and at == "all":
                return torch.ones(self.shape, dtype=torch.bool, device="cpu")
            raise DataError(f"at={at!r}: the model was called without mask of two axes and without position_ids")
        assert self.prompt is not None
        if self.split and _needs_prompt(at):
            raise DataError(
                f"at={at!r}: a pass continues a sequence by several tokens at once (chunked prefill, assisted "
                "generation), so prompt and new tokens cannot be separated; give positions from 0"
            )
        position, prompt = self.position, self.prompt[:, None]
        token = position >= 0
        if isinstance(at, str):
            return token if at == "all" else token & (position >= prompt)
        if isinstance(at, slice):
            start, stop = (prompt + bound if bound and bound < 0 else bound for bound in (at.start or 0, at.stop))
            start = start.clamp(min=0) if isinstance(start, Tensor) else start
            inside = token & (position >= start) & ((position - start) % (at.step or 1) == 0)
            return inside if stop is None else inside & (position < stop)
        mask = torch.zeros_like(token)
        for index in named_positions(at):
            mask |= token & (position == (prompt + index if index < 0 else index))
        return mask


def named_positions(at: At) -> tuple[int, ...]:
    """Returns the positions that `at` names one by one; none for slices, masks and words."""
    if isinstance(at, str | slice | Tensor):
        return ()
    return tuple(int(index) for index in (at if isinstance(at, Sequence) else (at,)))


def _needs_prompt(at: At) -> bool:
    if isinstance(at, slice):
        return (at.start or 0) < 0 or (at.stop or 0) < 0
    return at == "new" if isinstance(at, str) else any(index < 0 for index in named_positions(at))


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

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> PassTokens:
        """Returns the tokens of a pass, from the arguments of the model's call.

        Raises:
            DataError: The call has neither token ids nor embeddings.
        """
        inputs = self._named(args, kwargs)
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        source = ids if isinstance(ids, Tensor) else embeds
        if not isinstance(source, Tensor) or source.ndim < 2:
            raise DataError("the model was called without input_ids and inputs_embeds; give one of them by name")
        batch, columns = shape = (int(source.shape[0]), int(source.shape[1]))
        cached = _cached(inputs.get("past_key_values"))
        position = _positions(inputs, shape, cached)
        repeated = not cached and self._repeats(ids)
        if cached or repeated:
            fresh = columns - 1 if repeated else 0
            prompt = self._expanded(batch, position)
            split = not repeated and columns > 1
        else:
            prompt = None if position is None else (position >= 0).sum(1)
            fresh, split, self._prompt, self._columns = 0, False, prompt, columns
        self._ids = ids.detach() if isinstance(ids, Tensor) else None
        return PassTokens(position, prompt, shape, fresh, split)

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


def _cached(cache: Any) -> int:
    """Tokens that a cache holds at the beginning of a pass; inside the blocks it counts the current ones already."""
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache[0][0].shape[-2]) if len(cache) and cache[0] else 0


def _positions(inputs: Mapping[str, Any], shape: tuple[int, int], cached: int) -> Tensor | None:
    """Position of each token, -1 for padding; None where the arguments leave it open."""
    batch, columns = shape
    mask, ids = inputs.get("attention_mask"), inputs.get("position_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        mask = (mask != 0).cpu().long()
        return torch.where(mask == 1, mask.cumsum(1) - 1, -1)[:, -columns:]
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
