"""Trial passes over short sequences: which tensors pass where, of which shapes, and how often."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from workbench.io.errors import RequestError
from workbench.model.attention import AttentionCall, pattern_blocks, tap_attention
from workbench.model.claims import Claims
from workbench.model.forward import attention_name, first_tensor, hook_output, hook_tensor, run, trial_ids
from workbench.sites.grammar import Part, Tap

BATCH = 2
_SHARED = 3
"""Tokens at the beginning that both sequences of a trial share; the later ones differ."""


@dataclass
class Trial:
    """Observations of one trial pass. `order` counts them, so that sites can be sorted by time."""

    lengths: tuple[int, ...]
    stream: Tap
    """Input of the first block: tensors of its shape are kept."""
    shapes: dict[Tap, tuple[int, ...]] = field(default_factory=dict)
    counts: dict[Tap, int] = field(default_factory=dict)
    order: dict[Tap, int] = field(default_factory=dict)
    calls: dict[str, AttentionCall] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    looks_ahead: bool = False
    """True if a layer's queries attend to later keys."""
    values: dict[Tap, Tensor] = field(default_factory=dict)
    """Copies on the CPU of what is shaped as the residual stream, at claimed taps."""
    several: dict[Tap, int] = field(default_factory=dict)
    """Number of tensors with a row per token in the output of a module, where there are several."""
    answer: Tensor | None = None
    """Copy on the CPU of the logits or, without a head, of the last hidden state."""

    def see(self, tap: Tap, tensor: Tensor | None, *, keep: bool = True) -> None:
        self.counts[tap] = self.counts.get(tap, 0) + 1
        self.order.setdefault(tap, len(self.order))
        if tensor is not None and tensor.is_floating_point():
            self.shapes[tap] = tuple(tensor.shape)
            row = self.row_shape(tap)
            if keep and row is not None and len(row) == 1 and row == self.row_shape(self.stream):
                self.values[tap] = tensor.detach().to("cpu", copy=True).reshape(BATCH, max(self.lengths), -1)

    def see_output(self, tap: Tap, keep: bool, output: Any) -> None:
        """Observes the whole output of a module."""
        self.see(tap, first_tensor(output), keep=keep)
        parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
        tensors = [part for part in parts if isinstance(part, Tensor) and part.is_floating_point()]
        rows = sum(self._rows_of(tuple(part.shape)) is not None for part in tensors)
        if rows > 1:
            self.several[tap] = rows

    def rows(self, tap: Tap) -> Tensor | None:
        """Tensor at a tap at all real tokens, (token, d_model); None if it is not shaped as the residual stream."""
        value = self.values.get(tap)
        if value is None:
            return None
        return value[torch.arange(value.shape[1], device="cpu") < torch.tensor(self.lengths, device="cpu")[:, None]]

    def causal(self, tap: Tap) -> bool:
        """True if no attention looks ahead, and neither the tensor at a tap nor the answer differs at the tokens that
        both sequences share."""
        states = (self.values.get(tap), self.answer)
        return not self.looks_ahead and all(state is None or self._causal(state) for state in states)

    def _causal(self, state: Tensor) -> bool:
        shared_states, later_states = (
            state[:, positions].double() for positions in (slice(_SHARED), slice(_SHARED, min(self.lengths)))
        )
        change, effect = (
            (part[0] - part[1]).norm(dim=-1) / part[0].norm(dim=-1) for part in (shared_states, later_states)
        )
        tolerance = max(1e-5, 4 * torch.finfo(state.dtype).eps)
        return not bool((change > tolerance * effect.mean().clamp(max=1)).any())

    def row_shape(self, tap: Tap) -> tuple[int, ...] | None:
        """Shape of one row of the tensor at a tap; None: it has no batch and position axes."""
        return self._rows_of(self.shapes.get(tap, ()))

    def _rows_of(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        positions = max(self.lengths)
        if shape[:2] == (BATCH, positions):
            return shape[2:]
        return shape[1:] if shape[:1] == (BATCH * positions,) else None


def try_model(module: nn.Module, names: Claims, modules: Mapping[str, nn.Module], lengths: tuple[int, ...]) -> Trial:
    """Runs the model over right-padded sequences of these lengths; observes every tap and every module's output."""
    trial = Trial(lengths, Tap(f"{names.blocks}.0", "in"))
    ids = trial_ids(module, BATCH, max(lengths), seed=0)
    ids[1, :_SHARED] = ids[0, :_SHARED]
    mask = (torch.arange(max(lengths), device="cpu") < torch.tensor(lengths, device="cpu")[:, None]).long()
    paths = {path: part for path, part in modules.items() if path.startswith(f"{names.blocks}.")}
    callbacks = {part: partial(_see_call, trial, path) for path, part in paths.items()}
    with ExitStack() as stack:
        taps = dict.fromkeys(names.taps.values())  # no set: hooks of one module run in this order, which sites keep
        for tap in taps:
            part = tap.part
            if tap.path in modules and part == "out":
                stack.enter_context(hook_output(modules[tap.path], partial(trial.see_output, tap, True)))
            elif tap.path in modules and part in ("in", "returned_weights"):
                see = partial(_see_weights if part == "returned_weights" else Trial.see, trial, tap)
                stack.enter_context(hook_tensor(modules[tap.path], part, see))
        for path, part in modules.items():
            tap = Tap(path, "out")
            if path and tap not in taps:
                stack.enter_context(hook_output(part, partial(trial.see_output, tap, False)))
        stack.enter_context(tap_attention(attention_name(module), callbacks))
        try:
            output = run(module, ids, mask)
        except Exception as error:
            raise RequestError(
                f"model {type(module).__name__}: a trial pass over {BATCH} x {max(lengths)} tokens failed: "
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
    logits = getattr(output, "logits", None)
    if logits is not None:
        trial.see(Tap("", "logits"), first_tensor(logits))
    answer = first_tensor(output if logits is None else logits)
    if answer is not None and answer.shape[:2] == (BATCH, max(lengths)):
        trial.answer = answer[:, : min(lengths)].detach().to("cpu", copy=True).flatten(2)
    return trial


def _see_weights(trial: Trial, tap: Tap, weights: Tensor | None) -> None:
    """Observes weights that a module returns, if they are attention: rows that sum to 1 and do not look ahead."""
    if weights is None or weights.shape[::2] != (BATCH, max(trial.lengths)):
        return
    real = weights[trial.lengths.index(max(trial.lengths))].float()
    if bool(((real.sum(-1) - 1).abs() < 0.01).all()) and not real.triu(1).any():
        trial.see(tap, weights.transpose(1, 2))


def _see_call(trial: Trial, path: str, call: AttentionCall) -> None:
    """Observes one attention call; refuses its pattern if pattern @ value is not the output."""
    inputs: tuple[tuple[Part, Tensor], ...] = (("query", call.query), ("key", call.key), ("value", call.value))
    for part, tensor in inputs:
        trial.see(Tap(path, part), tensor.transpose(1, 2))
    trial.see(Tap(path, "output"), call.output)
    trial.see(Tap(path, "weights"), None)
    trial.calls[path] = call
    trial.shapes[Tap(path, "weights")] = (BATCH, max(trial.lengths), call.query.shape[1], call.key.shape[2])
    if call.key.shape[2] != call.query.shape[2]:
        trial.refused[path] = "queries and keys differ in number"
        return
    groups = call.query.shape[1] // call.key.shape[1]
    value = call.value.float().repeat_interleave(groups, dim=1)
    pattern = torch.cat([block for _, block in pattern_blocks(call)], dim=2)
    z = (pattern @ value).transpose(1, 2)
    real = torch.arange(z.shape[1], device="cpu") < torch.tensor(trial.lengths, device="cpu")[:, None]
    error = (z.cpu() - call.output.float().cpu())[real].abs().max()
    scale = call.output.float().abs().max().cpu()
    if not error <= 0.02 * scale + 1e-6:  # bf16 output against float32 pattern: 1 % apart at most
        trial.refused[path] = "attention differs from softmax(q k) v, so its pattern cannot be recomputed"
    elif pattern[trial.lengths.index(max(trial.lengths))].triu(1).sum() > 1e-3:
        trial.looks_ahead = True
