"""Loading of the model that a store was recorded from, for analyses that need weights or interventions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from workbench.io.errors import RequestError
from workbench.model.load import Model, load_model

if TYPE_CHECKING:
    from workbench.store.reader import Store


def recorded_model(store: Store, model: Model | str | None = None, device: str | torch.device | None = None) -> Model:
    """Returns the model that a store was recorded from, after comparing its weights.

    Costs a checksum of all weights, about 1 s a gigabyte.

    Args:
        store: The store.
        model: A loaded model, or what `load_model` takes. None: the name in the manifest, which suffices for "demo"
            and hub ids; a local directory must be given, because a store keeps no paths of a machine.
        device: Device to load it on. None: the GPU if there is one.

    Raises:
        RequestError: The model cannot be loaded, or has other weights.
    """
    recorded = store.manifest.model
    if model is None:
        try:
            model = load_model(recorded.name, revision=recorded.revision, device=device, dtype=recorded.dtype)
        except RequestError as error:
            raise RequestError(
                f"model is not given, and {recorded.name!r}, which the store names, cannot be loaded; "
                f"give model=, the directory it was recorded from ({error})"
            ) from error
    loaded = model if isinstance(model, Model) else load_model(model, device=device, dtype=recorded.dtype)
    if loaded.fingerprint() != recorded.fingerprint:
        raise RequestError(
            f"model {loaded.name!r} has other weights than the store {store.path.name!r} was recorded from "
            f"({recorded.name!r}, {recorded.architecture}); give the one that was recorded"
        )
    return loaded
