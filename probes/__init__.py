"""The probes: one question each, one file each, asked of a store. Each is loaded when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "AttentionSinks": "probes.attention_sinks",
    "FutureLens": "probes.future_lens",
    "FuturePrompts": "probes.future_prompts",
    "LogitLens": "probes.logit_lens",
    "SuccessorHeads": "probes.successor_heads",
    "TokenErasure": "probes.token_erasure",
    "TunedLens": "probes.tuned_lens",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'probes' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_PUBLIC[name]), name)


if TYPE_CHECKING:
    from probes.attention_sinks import AttentionSinks
    from probes.future_lens import FutureLens
    from probes.future_prompts import FuturePrompts
    from probes.logit_lens import LogitLens
    from probes.successor_heads import SuccessorHeads
    from probes.token_erasure import TokenErasure
    from probes.tuned_lens import TunedLens
