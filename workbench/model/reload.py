"""Loading of the model that a store was recorded from, for analyses that need weights or interventions."""

from __future__ import annotations

import logging
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING

import torch

from workbench.io.checks import check_kind
from workbench.io.errors import RequestError
from workbench.model.load import Model, load_model
from workbench.store.identity import difference
from workbench.store.reader import Store, StoreOrPath, opened

_LOG = logging.getLogger(__name__)

if TYPE_CHECKING:
    from workbench.store.manifest import ModelRecord


def recorded_model(
    store: StoreOrPath, model: Model | str | None = None, device: str | torch.device | None = None
) -> Model:
    """Returns the model that a store was recorded from, after comparing its behaviour.

    Costs a checksum of all weights, about 1 s a gigabyte, and a forward pass over 16 tokens.

    Args:
        store: The store, or its path.
        model: A loaded model, or what `load_model` takes. None: the name in the manifest, which suffices for "demo"
            and hub ids; a local directory must be given, because a store keeps no paths of a machine.
        device: Device to load it on. None: the GPU if there is one.

    Raises:
        RequestError: The model cannot be loaded, or is not the recorded one.
    """
    store = opened(store)
    check_kind("model", model, (Model, str, Path, NoneType), "a loaded model, such as wb.load_model('demo'), or a name")
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
    check_recorded(store, loaded)
    return loaded


def check_recorded(store: Store, model: Model) -> None:
    """Refuses a model that does not behave as the one that a store was recorded from; its hooks and adapters count.

    Costs a checksum of all weights, about 1 s a gigabyte, and a forward pass over 16 tokens.

    Raises:
        RequestError: The model differs, in its weights or in anything else that decides its activations.
    """
    recorded, changes = store.manifest.model, store.manifest.interventions
    if changes:
        _LOG.warning(
            f"store {store.path.name!r} was recorded with interventions ({', '.join(changes.names)}); the model "
            "runs here without them, so what it computes anew is not what the store holds"
        )
    if problem := recorded_difference(recorded, model):
        raise RequestError(
            f"model {model.name!r} is not the one that the store {store.path.name!r} was recorded from "
            f"({recorded.name!r}, {recorded.architecture}): {problem}; give the model as it was recorded"
        )


def recorded_difference(recorded: ModelRecord, model: Model) -> str | None:
    """Returns a phrase that names what differs in `model` from the recorded one; None if both behave alike.

    Of a store of format version 1 the weights alone are known.
    """
    if recorded.identity is not None:
        return difference(recorded.identity, model.identity())
    return None if model.fingerprint() == recorded.fingerprint else "its weights are other ones"
