"""A model sent to other processes as the request that loads it, or as the pickled module."""

from __future__ import annotations

from dataclasses import replace

from workbench.io.errors import RequestError, first_line
from workbench.io.tasks import import_ray
from workbench.model.load import Loading, Model
from workbench.model.reload import recorded_difference
from workbench.store.manifest import ModelRecord

_PASS_MODULE = (
    "workers load it anew, without what was changed since load_model: save it and name the directory, pass the module "
    "itself, or record without workers"
)


def pack_model(model: Model, recorded: ModelRecord) -> Loading | bytes:
    """Returns what another process needs to have the same model.

    Args:
        model: The model.
        recorded: What a store records of it.

    Raises:
        RequestError: A model that was given hooks after `load_model`, or a module that cannot be pickled or is not on
            the CPU.
    """
    if model.loading is not None:
        if recorded.identity is not None and (hooks := recorded.identity.hooks):
            raise RequestError(f"model {model.name!r} has a forward hook ({hooks[0]}); {_PASS_MODULE}")
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


def unpack_model(packed: Loading | bytes, device: str, recorded: ModelRecord) -> Model:
    """Returns the model that `pack_model` packed, on `device`.

    Raises:
        RequestError: A model that behaves otherwise than the recorded one, because it was changed after it was loaded.
    """
    if isinstance(packed, Loading):
        model = packed.load(device)
    else:
        model = import_ray().cloudpickle.loads(packed)
        model.module.to(device)
    if problem := recorded_difference(recorded, model):
        raise RequestError(f"model {model.name!r} is another one in a worker: {problem}; {_PASS_MODULE}")
    return model
