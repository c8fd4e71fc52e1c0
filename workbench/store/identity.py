"""The identity of a model's behaviour, as a store records it: what the forward pass computes with, and what it gives.

Equal weights do not make equal activations: a forward hook, an adapter that is switched off, a changed buffer or
attribute change them too. What can be named is compared by name; the rest shows in the logits of one short pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

TOLERANCE = {"float64": 3e-5, "float32": 3e-5, "float16": 5e-3, "bfloat16": 0.03}
"""Relative distance (L2) up to which two answers count as equal, by the type in which the model computes.

Another instruction set (AVX2 in place of AVX-512, SmolLM2-135M) differs by 6e-7, 1.3e-3 and 0.012 in float32, float16
and bfloat16, eager attention by less, another number of threads not at all.
"""


@dataclass(frozen=True)
class Identity:
    """Facts that decide what a model's forward pass computes."""

    weights: str
    """SHA-256 of the parameters and saved buffers."""
    config: dict[str, str]
    """Fields of the config that differ from the defaults of its class, as JSON; long ones as SHA-256."""
    dtype: str
    """Type in which the model computes."""
    attention: str
    """Name of the attention implementation."""
    adapters: tuple[str, ...]
    """States of adapters: "active lora", "disabled lora", "merged lora"."""
    hooks: tuple[str, ...]
    """Forward hooks and pre-hooks: "path: function"."""
    buffers: dict[str, tuple[float, ...]]
    """Shape, mean and weighted mean of each buffer that is not saved with the weights."""
    answers: dict[str, tuple[float, ...]]
    """Summaries of the last residual stream and of the logits after one short pass over fixed token ids."""


def difference(recorded: Identity, present: Identity) -> str | None:
    """Returns a phrase that names what differs in `present`, or None where both behave alike.

    The weights' digests are compared as they are, the answers within `TOLERANCE` of the type of `recorded`.
    """
    if recorded.dtype != present.dtype:
        return f"it computes in {present.dtype}, not in {recorded.dtype}; load it with dtype={recorded.dtype!r}"
    if fields := _changed(recorded.config, present.config):
        name = fields[0]
        old, new = recorded.config.get(name, "the default"), present.config.get(name, "the default")
        return f"its config has {name} = {new}, not {old}{_more(fields)}"
    if recorded.weights != present.weights:
        return f"its weights are other ones ({present.weights[:12]}, not {recorded.weights[:12]})"
    if recorded.adapters != present.adapters:
        return f"its adapters are {_names(present.adapters)}, not {_names(recorded.adapters)}"
    if recorded.hooks != present.hooks:
        return f"its forward hooks are {_names(present.hooks)}, not {_names(recorded.hooks)}"
    if recorded.attention != present.attention:
        return f"its attention is computed by {present.attention}, not by {recorded.attention}"
    if buffers := _changed_buffers(recorded.buffers, present.buffers):
        return f"its buffer {buffers[0]} has other values{_more(buffers)}"
    tolerance = TOLERANCE.get(recorded.dtype, 0.03)
    for name in dict.fromkeys((*recorded.answers, *present.answers)):
        error = _distance(recorded.answers.get(name, ()), present.answers.get(name, ()))
        if not error <= tolerance:
            return (
                f"its {name} after a short fixed text differs by {error:.2g} (relative), with equal weights and hooks: "
                "an attribute or a method of a module was changed"
            )
    return None


def _changed(recorded: Mapping[str, object], present: Mapping[str, object]) -> list[str]:
    return [name for name in dict.fromkeys((*recorded, *present)) if recorded.get(name) != present.get(name)]


def _changed_buffers(recorded: Mapping[str, tuple[float, ...]], present: Mapping[str, tuple[float, ...]]) -> list[str]:
    """Names of buffers that differ by more than rounding: they are computed anew on each machine."""
    return [name for name in _changed(recorded, present) if not _alike(recorded.get(name), present.get(name))]


def _alike(a: tuple[float, ...] | None, b: tuple[float, ...] | None) -> bool:
    return (
        a is not None
        and b is not None
        and len(a) == len(b)
        and all(abs(x - y) <= 1e-5 * max(abs(x), abs(y)) for x, y in zip(a, b, strict=True))
    )


def _distance(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Relative distance (L2) of `b` from `a`."""
    if len(a) != len(b):
        return math.inf
    error, size = math.dist(a, b), math.hypot(*a)
    return error / size if size else float(error > 0)


def _names(names: Iterable[str]) -> str:
    listed = list(names)
    return f"{', '.join(listed[:3])}{_more(listed[2:])}" if listed else "none"


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
