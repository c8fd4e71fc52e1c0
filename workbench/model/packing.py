"""A model sent to other processes as the request that loads it, or as the pickled module."""

from __future__ import annotations

from dataclasses import replace

from workbench.io.errors import RequestError
from workbench.io.tasks import first_line, import_ray
from workbench.model.load import Loading, Model


def pack_model(model: Model) -> Loading | bytes:
    """Returns what another process needs to have the same model.

    Raises:
        RequestError: A module that was not loaded by `load_model` and cannot be pickled, or is not on the CPU.
    """
    if model.loading is not None:
        return model.loading
    if model.device.type != "cpu":
        raise RequestError(
            f"a module on {model.device} cannot be sent to workers; move it to the CPU, or name its directory"
        )
    cloudpickle = import_ray().cloudpickle
    try:
        return cloudpickle.dumps(replace(model))  # without what it has cached
    except Exception as error:  # whatever its parts and hooks raise; those of output_hidden_states cannot travel
        raise RequestError(
            f"module {model.name!r} cannot be sent to workers ({first_line(error)}); save it with save_pretrained and "
            "name the directory"
        ) from None


def unpack_model(packed: Loading | bytes, device: str, fingerprint: str) -> Model:
    """Returns the model that `pack_model` packed, on `device`.

    Raises:
        RequestError: Weights with another fingerprint, because the model was changed after it was loaded.
    """
    if isinstance(packed, Loading):
        model = packed.load(device)
    else:
        model = import_ray().cloudpickle.loads(packed)
        model.module.to(device)
    if model.fingerprint() != fingerprint:
        raise RequestError(
            f"model {model.name!r} has other weights here than where it is loaded anew; it was changed after "
            "load_model: save it and name the directory, or pass the module itself"
        )
    return model
