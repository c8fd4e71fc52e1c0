"""Names of a model's modules, and the class that loads it, before its weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workbench.model.location import Location


def auto_class(location: Location, options: Mapping[str, Any]) -> Any:
    """Returns AutoModelForCausalLM, or AutoModel for a checkpoint that was saved without a language-model head."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM  # takes seconds
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    names = AutoConfig.from_pretrained(location.path, **options).architectures or ()
    return AutoModel if names and names[0] in MODEL_MAPPING_NAMES.values() else AutoModelForCausalLM


def module_names(location: Location) -> frozenset[str] | None:
    """Returns the names of the modules of a local model, built without weights; None where it cannot be built so.

    Costs the import of torch and transformers, which loading needs too, and a fraction of a second.
    """
    import torch  # takes seconds
    from transformers import AutoConfig
    from transformers.utils import logging as library

    level = library.get_verbosity()
    library.set_verbosity_error()
    try:
        options = {"local_files_only": True, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(location.path, **options)
        with torch.device("meta"):
            module = auto_class(location, options).from_config(config)
    except Exception:  # loading says what is wrong with it
        return None
    finally:
        library.set_verbosity(level)
    return frozenset(path for path, _ in module.named_modules() if path)
