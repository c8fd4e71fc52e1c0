"""Folders of PEFT: a small adapter, merged into the base model that it names."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.io.errors import RequestError, first_line
from workbench.io.parse import read_json
from workbench.model.location import ADAPTER, Location, locate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOG = logging.getLogger(__name__)


def base_location(location: Location) -> Location | None:
    """Returns the location of the base model of a folder of PEFT; None for a folder that holds a model itself.

    A path in its adapter_config.json is one of the working directory, or of the adapter's own folder.

    Raises:
        RequestError: The config names no base, or one that cannot be found.
    """
    folder = Path(location.path)
    if not location.local or location.file or (folder / "config.json").is_file() or not (folder / ADAPTER).is_file():
        return None
    config = read_json(folder / ADAPTER, "save the adapter again", finite=False)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        raise RequestError(
            f"adapter {location.name!r} names no base model; add base_model_name_or_path to its {ADAPTER}"
        )
    beside = folder / name
    try:
        return locate(beside if beside.is_dir() and not Path(name).is_dir() else name, revision)
    except RequestError as error:
        raise RequestError(
            f"adapter {location.name!r} is for a base model that was not found: {error}; "
            f"correct base_model_name_or_path in its {ADAPTER}"
        ) from error


def merge(module: PreTrainedModel, location: Location, allow_pickle: bool) -> PreTrainedModel:
    """Adds an adapter's changes to the weights of its base, in the base's dtype; the module stays of its own class.

    Raises:
        RequestError: The package peft is missing, or the adapter is pickled, does not fit the base, or is of a kind
            that cannot be merged, such as a learned prompt.
    """
    folder, name = Path(location.path), f"adapter {location.name!r}"
    if not allow_pickle and not (folder / "adapter_model.safetensors").is_file():
        raise RequestError(
            f"{name} has no adapter_model.safetensors; pickled weights can run code when read: "
            "convert them, or pass allow_pickle=True if you trust their author"
        )
    try:
        from peft import PeftConfig, PeftModel  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError:
        raise RequestError(f"{name} needs the package peft: pip install 'interp-workbench[peft]'") from None
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            if PeftConfig.from_pretrained(str(folder)).is_prompt_learning:
                merged, unfit = None, []
            else:
                adapted = PeftModel.from_pretrained(module, str(folder))
                report = adapted.load_adapter(str(folder), "default")  # again: only this says what had no place
                unfit = [*report.missing_keys, *report.unexpected_keys]
                merged = None if unfit else _merged(adapted)
        except Exception as error:  # each reader and tuner raises its own kinds
            raise RequestError(f"{name} cannot be merged into its base: {first_line(error)}") from error
    if unfit:
        raise RequestError(
            f"{name} does not fit its base {type(module).__name__}: {len(unfit)} of its tensors are missing or have no "
            f"place there, {unfit[0]}, ..."
        )
    if merged is None:
        raise RequestError(f"{name} is a learned prompt, which has no weights to merge; give an adapter of weights")
    changes = [warning for warning in heard if not issubclass(warning.category, FutureWarning | DeprecationWarning)]
    for message in dict.fromkeys(" ".join(str(warning.message).split()) for warning in changes):
        _LOG.warning(f"{name}: peft warns: {message[:300]}")
    return merged


def _merged(adapted: object) -> PreTrainedModel:
    """The base with the adapter in its weights, as trainable as any loaded model."""
    merged = adapted.merge_and_unload(safe_merge=True)  # pyright: ignore[reportAttributeAccessIssue]
    return merged.requires_grad_(True).eval()
