"""Claims about the sites of a model: names of TransformerLens' adapters, or of the structure, and their places.

An adapter is a tree of components that maps, for one architecture, each module to its role and to TransformerLens'
names of its input and output. Nothing is wrapped: the tree is only read. For an architecture without an adapter the
residual stream is found by structure.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from workbench.io.errors import RequestError
from workbench.model.forward import text_config
from workbench.sites.grammar import Tap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOP_ALIASES = {"hook_embed": ("embed_ln.hook_out", "embed.hook_out"), "hook_pos_embed": ("pos_embed.hook_out",)}


@dataclass(frozen=True)
class Claims:
    """Claims of an adapter (or of the structure): TransformerLens name -> tap, and aliases to other names."""

    taps: Mapping[str, Tap]
    aliases: Mapping[str, tuple[str, ...]]
    blocks: str
    adapter: str | None
    rotary: frozenset[str] = frozenset()
    attention: tuple[str, ...] = ()
    heads: tuple[tuple[int, int], ...] = ()
    """(heads, d_head) of the config, for queries and for keys; used if no attention call shows them."""


def adapter_claims(module: nn.Module) -> Claims | None:
    adapter = transformer_lens_adapter(module)
    if adapter is None:
        return None
    modules = dict(module.named_modules())
    taps: dict[str, Tap] = {}
    aliases: dict[str, tuple[str, ...]] = dict(_TOP_ALIASES)
    rotary, attention = set(), []

    def walk(component, name: str, path: str) -> None:
        has_module = bool(component.name)
        if has_module:
            taps[f"{name}.hook_in"], taps[f"{name}.hook_out"] = Tap(path, "in"), Tap(path, "out")
        elif "out" in component.submodules:  # no module of its own: OPT's MLP is two layers of its block
            aliases[f"{name}.hook_out"] = (f"{name}.out.hook_out",)
        for alias, targets in _bound_aliases(component, modules.get(path) if has_module else None).items():
            targets = (targets,) if isinstance(targets, str) else targets
            aliases[f"{name}.{alias}"] = tuple(f"{name}.{target}" for target in targets)
        if hasattr(component, "hook_pattern"):
            attention.append(name)
            if has_module:
                taps[f"{name}.hook_pattern"] = Tap(path, "returned_weights")
            if hasattr(component, "hook_rot_q") and not hasattr(component, "hook_q"):
                rotary.add(name)  # multi-head latent attention rotates a part, and calls what it attends with q and k
        for key, child in component.submodules.items():
            walk(child, f"{name}.{key}", f"{path}.{child.name}".strip(".") if child.name else path)

    components = adapter.component_mapping or {}
    blocks = components.get("blocks")
    path = (blocks and blocks.name) or ""
    inner, outer = _surroundings(module, path)
    if blocks is None or inner is None:
        return None
    list_path = f"{inner}{path.removeprefix(outer)}"
    for layer in range(len(blocks_at(modules, list_path))):
        walk(blocks, f"blocks.{layer}", f"{list_path}.{layer}")
    for key, component in components.items():
        if not component.is_list_item:
            walk(component, key, f"{inner}{component.name.removeprefix(outer)}" if component.name else "")
    taps["logits"] = Tap("", "logits")
    n_heads, d_head = getattr(adapter.cfg, "n_heads", 0) or 0, getattr(adapter.cfg, "d_head", 0) or 0
    heads = ((n_heads, d_head), (getattr(adapter.cfg, "n_key_value_heads", None) or n_heads, d_head))
    return Claims(taps, aliases, list_path, type(adapter).__name__, frozenset(rotary), tuple(attention), heads)


def blocks_at(modules: Mapping[str, nn.Module], path: str) -> nn.ModuleList:
    return cast("nn.ModuleList", modules[path])


def _surroundings(module: nn.Module, blocks: str) -> tuple[str | None, str]:
    """What the model's paths have before the adapter's, and what they lack: a model without head is the inside of one
    with a head, whose blocks are not "model.layers" but "layers"."""
    modules, parts = dict(module.named_modules()), blocks.split(".") if blocks else []
    for cut in range(len(parts) if not has_head(module) else min(1, len(parts))):
        inner = _inner_path(modules, ".".join(parts[cut:]))
        if inner is not None:
            return inner, "".join(f"{part}." for part in parts[:cut])
    return None, ""


def has_head(module: nn.Module) -> bool:
    """Returns True if a model has a language-model head, as AutoModelForCausalLM's and not AutoModel's have."""
    return getattr(module, "get_output_embeddings", lambda: None)() is not None


def _inner_path(modules: Mapping[str, nn.Module], blocks: str) -> str | None:
    """Prefix of the model's paths: "" or, inside of PEFT or torch.compile, "base_model.model." or "_orig_mod."."""
    lists = (path for path, part in modules.items() if isinstance(part, nn.ModuleList))
    return min(
        (path.removesuffix(blocks) for path in lists if f".{path}".endswith(f".{blocks}")), key=len, default=None
    )


def _bound_aliases(component, part: nn.Module | None) -> Mapping[str, str | list[str]]:
    """The aliases of a component in one layer. Some choose them when they are bound to their module (a mixture of
    experts, by whether this layer is dense), so a copy is bound to a stand-in; but attention is not, whose binding
    reaches into transformers, and which has no such choice."""
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    binds = type(component).set_original_component is not GeneralizedComponent.set_original_component
    if part is None or not binds or hasattr(component, "hook_pattern"):
        return component.hook_aliases
    bound = copy.deepcopy(component, {id(component.config): component.config})
    try:
        with torch.device("meta"):  # some split fused weights: nothing is allocated, no random number drawn
            bound.set_original_component(_stand_in(part))
    except Exception:  # a component that cannot be bound this way keeps the names it was declared with
        return component.hook_aliases
    return bound.hook_aliases


def _stand_in(part: nn.Module) -> nn.Module:
    """A module of the same structure without weights, which may be changed and leaves `part` as it is."""
    twin = copy.copy(part)
    weights = part._parameters.items()
    twin._parameters = {
        name: w if w is None else nn.Parameter(torch.empty_like(w, device="meta")) for name, w in weights
    }
    twin._buffers = dict(part._buffers)
    twin._modules = {name: child if child is None else _stand_in(child) for name, child in part._modules.items()}
    return twin


def transformer_lens_adapter(module: nn.Module):
    """Returns the TransformerLens architecture adapter for a Hugging Face module, or None.

    The bridge is not booted and the module not changed; only its config is read.
    """
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
    from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = cast("PreTrainedModel", module).config
    with_head = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    names = [*(config.architectures or [type(module).__name__]), *([] if has_head(module) else [with_head])]
    for name in filter(None, names):
        try:
            named_config = type(config).from_dict({**config.to_dict(), "architectures": [name]})
            architecture = determine_architecture_from_hf_config(named_config)
            bridge_config = build_bridge_config_from_hf(named_config, architecture, architecture, torch.float32)
            return ArchitectureAdapterFactory.select_architecture_adapter(bridge_config)
        except Exception:  # an adapter that refuses this config counts as none: the structure decides
            continue
    return None


def structural_claims(module: nn.Module) -> Claims:
    """Residual sites of the one list of blocks as long as the model is deep."""
    n_layers = getattr(text_config(module), "num_hidden_layers", None)
    lists = [path for path, part in module.named_modules() if isinstance(part, nn.ModuleList) and len(part) == n_layers]
    outermost = [path for path in lists if not any(path.startswith(f"{outer}.") for outer in lists)]
    if len(outermost) > 1:  # a vision tower as deep as the language model
        language_model = cast("PreTrainedModel", module)
        decoder = next(path for path, part in module.named_modules() if part is language_model.get_decoder())
        outermost = [path for path in outermost if decoder and path.startswith(f"{decoder}.")] or outermost
    if len(outermost) != 1:
        names = ", ".join(outermost) or "none"
        raise RequestError(
            f"model {type(module).__name__}: TransformerLens has no adapter for it and its blocks cannot be found by "
            f"structure: lists of {n_layers} modules found: {names}; it cannot be recorded"
        )
    blocks = outermost[0]
    taps = {"logits": Tap("", "logits")}
    for layer in range(len(cast("nn.ModuleList", module.get_submodule(blocks)))):
        taps[f"blocks.{layer}.hook_resid_pre"] = Tap(f"{blocks}.{layer}", "in")
        taps[f"blocks.{layer}.hook_resid_post"] = Tap(f"{blocks}.{layer}", "out")
    return Claims(taps, {}, blocks, adapter=None)
