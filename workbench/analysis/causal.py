"""Refusal of models that are not causal, by analyses of next-token prediction."""

from __future__ import annotations

from workbench.io.errors import RequestError
from workbench.store.reader import Store


def require_causal(store: Store, probe: str) -> None:
    """Refuses a store of a model in which later tokens change what is computed at earlier positions.

    Args:
        store: The store.
        probe: Name of the analysis, for the message.

    Raises:
        RequestError: The model is not causal.
    """
    model = store.manifest.model
    if not model.causal:
        raise RequestError(
            f"{probe} needs a causal language model; in {model.name!r} ({model.architecture}), which {store.path.name} "
            "was recorded from, earlier positions depend on later tokens; record a decoder"
        )
