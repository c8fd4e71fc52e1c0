"""Checks of a model by its config.json alone, before libraries and weights are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from workbench.io.errors import DataError, RequestError
from workbench.io.parse import read_json
from workbench.model.location import Location
from workbench.model.module_names import module_names
from workbench.sites.grammar import check_patterns

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def check_config(location: Location, sites: Iterable[str] | None = None) -> None:
    """Refuses a model that is no decoder, and sites that it cannot have.

    Costs milliseconds, and for names of modules the import of torch and transformers. What a config does not state, and
    a model that is yet to be fetched, pass: loading and the trial pass check them.

    Args:
        location: Location of the model.
        sites: Patterns of sites to record. None: none yet.

    Raises:
        RequestError: An encoder-decoder model, an unknown kind of site, a layer or module that the model does not have.
    """
    try:
        config = (
            read_json(Path(location.path) / "config.json", finite=False) if location.local and not location.file else {}
        )
    except DataError:
        config = {}  # loading says what is wrong with it
    if config.get("is_encoder_decoder") is True:
        raise RequestError(
            f"model {location.name!r} is an encoder-decoder ({_architecture(config)}); give a causal language model, "
            "which has one stack of blocks, such as gpt2"
        )
    has_modules = bool(config) and not location.file
    check_patterns(sites or (), _layers(config), lambda: module_names(location) if has_modules else None)


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else str(config.get("model_type", "no architecture"))


def _layers(config: Mapping[str, Any]) -> int | None:
    """Number of blocks of the text model; None where the config does not state it in a usual way."""
    inner = next((config[name] for name in ("text_config", "llm_config") if isinstance(config.get(name), dict)), config)
    numbers = [inner[name] for name in _LAYERS if isinstance(inner.get(name), int)]
    return numbers[0] if numbers and numbers[0] > 0 else None
