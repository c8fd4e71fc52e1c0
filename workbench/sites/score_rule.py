"""Rule by which a layer turns queries and keys into attention scores, before its mask and the softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ScoreRule:
    """Numbers with which one layer turns queries and keys into attention scores."""

    layer: int
    queries: str
    """Site that the layer scores: `rot_q.3`, or `q.3` where nothing is rotated."""
    keys: str
    scale: float
    """Factor of the dot product: 1 / sqrt(d_head) in most models, 1 / sqrt(query_pre_attn_scalar) in Gemma."""
    softcap: float | None
    """c of c * tanh(score / c), which bounds the scores; None: no soft-cap."""
    window: int | None
    """Keys that a query sees, its own included, in a sliding window; None: all at and before it."""
    biased: bool
    """True if the layer adds numbers to the scores that its queries and keys do not hold (ALiBi, T5)."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window of layer {self.layer} is {self.window}; at least 1 expected")

    def visible(self, query: Any, key: Any) -> Any:
        """Returns whether positions `query` see positions `key` in a causal model; numbers or arrays, broadcast."""
        causal = key <= query
        return causal if self.window is None else causal & (query - key < self.window)
