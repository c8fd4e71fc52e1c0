"""Discovery of the sites of a model: names from TransformerLens' adapters, existence and shapes from trial passes.

An adapter is a tree of components that maps, for one architecture, each module to its role and to TransformerLens'
names of its input and output. Nothing is wrapped: the tree is only read. For an architecture without an adapter the
residual stream is found by structure. In both cases every name is tried on short sequences of two lengths: a site is
offered if a tensor with batch and position axes, and otherwise of constant shape, passes there exactly once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from workbench.io.errors import RequestError
from workbench.model.attention import AttentionCall, pattern_blocks, tap_attention
from workbench.model.forward import attention_name, first_tensor, hook_tensor, run, text_config, trial_ids
from workbench.sites.grammar import Part, Site, SiteMap, Tap, short_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOP_ALIASES = {"hook_embed": ("embed_ln.hook_out", "embed.hook_out"), "hook_pos_embed": ("pos_embed.hook_out",)}
_ATTENTION_SITES: Mapping[str, Part] = {
    "hook_q": "query",
    "hook_k": "key",
    "hook_v": "value",
    "hook_rot_q": "query",
    "hook_rot_k": "key",
    "hook_pattern": "weights",
}
_HEADED = {"hook_q": "query", "hook_k": "key", "hook_v": "value", "hook_z": "output"}
_BATCH, _LENGTHS, _OTHER_LENGTHS = 2, (7, 5), (6, 11)


@dataclass(frozen=True)
class _Names:
    """Claims of an adapter (or of the structure): TransformerLens name -> tap, and aliases to other names."""

    taps: Mapping[str, Tap]
    aliases: Mapping[str, tuple[str, ...]]
    blocks: str
    adapter: str | None
    rotary: frozenset[str] = frozenset()
    attention: tuple[str, ...] = ()
    heads: tuple[tuple[int, int], ...] = ()
    """(heads, d_head) of the config, for queries and for keys; used if no attention call shows them."""


@dataclass
class _Trial:
    """Observations of one trial pass. `order` counts them, so that sites can be sorted by time."""

    lengths: tuple[int, ...]
    shapes: dict[Tap, tuple[int, ...]] = field(default_factory=dict)
    counts: dict[Tap, int] = field(default_factory=dict)
    order: dict[Tap, int] = field(default_factory=dict)
    calls: dict[str, AttentionCall] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def see(self, tap: Tap, tensor: Tensor | None) -> None:
        self.counts[tap] = self.counts.get(tap, 0) + 1
        self.order.setdefault(tap, len(self.order))
        if tensor is not None and tensor.is_floating_point():
            self.shapes[tap] = tuple(tensor.shape)

    def row_shape(self, tap: Tap) -> tuple[int, ...] | None:
        """Shape of one row of the tensor at a tap; None: it has no batch and position axes."""
        shape, positions = self.shapes.get(tap, ()), max(self.lengths)
        if shape[:2] == (_BATCH, positions):
            return shape[2:]
        return shape[1:] if shape[:1] == (_BATCH * positions,) else None


def find_sites(module: nn.Module) -> SiteMap:
    """Returns the site map of a Hugging Face causal LM. Costs two forward passes, over 2 x 7 and 2 x 11 tokens."""
    names = _adapter_names(module) or _structural_names(module)
    modules = dict(module.named_modules())
    trial = _try(module, names, modules, _LENGTHS)
    other = _try(module, names, modules, _OTHER_LENGTHS)
    trial.refused |= other.refused
    n_layers = len(_blocks(modules, names.blocks))
    taps, missing = _resolve(names, trial, modules)
    by_tap: dict[Tap, list[str]] = {}
    for name, tap in taps.items():
        by_tap.setdefault(tap, []).append(name)
    sites, synonyms = {}, {}
    for tap in sorted(by_tap, key=trial.order.__getitem__):
        reason = _refusal(tap, trial, other)
        canonical = min(by_tap[tap], key=lambda name: (short_name(name) is None, name not in names.aliases))
        if reason:
            missing |= dict.fromkeys(by_tap[tap], reason)
            continue
        sites[canonical] = _site(canonical, tap, trial, names)
        synonyms |= {name: canonical for name in by_tap[tap] if name != canonical}
    return SiteMap(sites, synonyms, missing, names.blocks, n_layers, names.adapter)


# ---- names: what the adapter claims ---------------------------------------------------------------------


def _adapter_names(module: nn.Module) -> _Names | None:
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
    inner = _inner_path(modules, blocks.name) if blocks and blocks.name else None
    if blocks is None or inner is None:
        return None
    list_path = f"{inner}{blocks.name}"
    for layer in range(len(_blocks(modules, list_path))):
        walk(blocks, f"blocks.{layer}", f"{list_path}.{layer}")
    for key, component in components.items():
        if not component.is_list_item:
            walk(component, key, f"{inner}{component.name}" if component.name else "")
    taps["logits"] = Tap("", "logits")
    n_heads, d_head = getattr(adapter.cfg, "n_heads", 0) or 0, getattr(adapter.cfg, "d_head", 0) or 0
    heads = ((n_heads, d_head), (getattr(adapter.cfg, "n_key_value_heads", None) or n_heads, d_head))
    return _Names(taps, aliases, list_path, type(adapter).__name__, frozenset(rotary), tuple(attention), heads)


def _blocks(modules: Mapping[str, nn.Module], path: str) -> nn.ModuleList:
    return cast("nn.ModuleList", modules[path])


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

    config = cast("PreTrainedModel", module).config
    if not config.architectures:
        config = type(config).from_dict({**config.to_dict(), "architectures": [type(module).__name__]})
    try:
        architecture = determine_architecture_from_hf_config(config)
        bridge_config = build_bridge_config_from_hf(config, architecture, architecture, torch.float32)
        return ArchitectureAdapterFactory.select_architecture_adapter(bridge_config)
    except Exception:  # an adapter that refuses this config counts as none: the structure decides
        return None


def _structural_names(module: nn.Module) -> _Names:
    """Residual sites of the one list of blocks as long as the model is deep."""
    n_layers = getattr(text_config(module), "num_hidden_layers", None)
    lists = [path for path, part in module.named_modules() if isinstance(part, nn.ModuleList) and len(part) == n_layers]
    outermost = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
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
    return _Names(taps, {}, blocks, adapter=None)


# ---- trial: what is really there ------------------------------------------------------------------------


def _try(module: nn.Module, names: _Names, modules: Mapping[str, nn.Module], lengths: tuple[int, ...]) -> _Trial:
    """Runs the model over right-padded sequences of these lengths and observes every tap."""
    trial = _Trial(lengths)
    ids = trial_ids(module, _BATCH, max(lengths), seed=0)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    paths = {path: part for path, part in modules.items() if path.startswith(f"{names.blocks}.")}
    callbacks = {part: partial(_see_call, trial, path) for path, part in paths.items()} if names.attention else {}
    with ExitStack() as stack:
        taps = dict.fromkeys(names.taps.values())  # no set: hooks of one module run in this order, which sites keep
        for tap in taps:
            part = tap.part
            if tap.path in modules and part in ("in", "out", "returned_weights"):
                see = partial(_see_weights if part == "returned_weights" else _Trial.see, trial, tap)
                stack.enter_context(hook_tensor(modules[tap.path], part, see))
        stack.enter_context(tap_attention(attention_name(module), callbacks))
        try:
            output = run(module, ids, mask)
        except Exception as error:
            raise RequestError(
                f"model {type(module).__name__}: a trial pass over {_BATCH} x {max(lengths)} tokens failed: "
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
    trial.see(Tap("", "logits"), first_tensor(output.logits))
    return trial


def _see_weights(trial: _Trial, tap: Tap, weights: Tensor | None) -> None:
    """Observes weights that a module returns, if they are attention: rows that sum to 1 and do not look ahead."""
    if weights is None or weights.shape[::2] != (_BATCH, max(trial.lengths)):
        return
    real = weights[trial.lengths.index(max(trial.lengths))].float()
    if torch.allclose(real.sum(-1), torch.ones(()).to(real), atol=0.01) and not real.triu(1).any():
        trial.see(tap, weights.transpose(1, 2))


def _see_call(trial: _Trial, path: str, call: AttentionCall) -> None:
    """Observes one attention call; refuses its pattern if pattern @ value is not the output."""
    inputs: tuple[tuple[Part, Tensor], ...] = (("query", call.query), ("key", call.key), ("value", call.value))
    for part, tensor in inputs:
        trial.see(Tap(path, part), tensor.transpose(1, 2))
    trial.see(Tap(path, "output"), call.output)
    trial.see(Tap(path, "weights"), None)
    trial.calls[path] = call
    trial.shapes[Tap(path, "weights")] = (_BATCH, max(trial.lengths), call.query.shape[1], call.key.shape[2])
    if call.key.shape[2] != call.query.shape[2]:
        trial.refused[path] = "queries and keys differ in number"
        return
    groups = call.query.shape[1] // call.key.shape[1]
    value = call.value.float().repeat_interleave(groups, dim=1)
    z = torch.cat([block @ value for _, block in pattern_blocks(call)], dim=2).transpose(1, 2)
    real = torch.arange(z.shape[1]) < torch.tensor(trial.lengths)[:, None]
    error = (z.cpu() - call.output.float().cpu())[real].abs().max()
    scale = call.output.float().abs().max().cpu()
    if not error <= 0.02 * scale + 1e-6:  # bf16 output against float32 pattern: 1 % apart at most
        trial.refused[path] = "attention differs from softmax(q k) v, so its pattern cannot be recomputed"


# ---- from claims and trial to sites ---------------------------------------------------------------------


def _resolve(names: _Names, trial: _Trial, modules: Mapping[str, nn.Module]) -> tuple[dict[str, Tap], dict[str, str]]:
    """Tap of every name, with aliases followed and attention parts filled in; reason for each name without one."""
    taps = {name: tap for name, tap in names.taps.items() if tap in trial.order}
    missing = {
        name: "its module does not run" if tap.path in modules else "this architecture has no such module"
        for name, tap in names.taps.items()
        if name not in taps
    }

    def follow(name: str, depth: int = 0) -> Tap | None:
        if name in taps or depth > 4:
            return taps.get(name)
        targets = (follow(target, depth + 1) for target in names.aliases.get(name, ()))
        return next((tap for tap in targets if tap), None)

    for name in names.aliases:
        tap = follow(name)
        if tap:
            taps[name] = tap
        else:
            missing[name] = "this architecture has no such module"
    for attention in names.attention:
        for site, tap in _attention_taps(attention, names, trial):
            name = f"{attention}.{site}"
            if isinstance(tap, Tap) and name not in taps:
                taps[name] = tap
                missing.pop(name, None)
            elif not isinstance(tap, Tap) and name not in taps:
                missing[name] = tap
    return taps, missing


def _attention_taps(attention: str, names: _Names, trial: _Trial) -> Iterator[tuple[str, Tap | str]]:
    """Each site of one attention component with its tap, or with the reason why there is none."""
    layer = attention.split(".")[1]
    paths = [path for path in trial.calls if path.startswith(f"{names.blocks}.{layer}.")]
    for site, part in _ATTENTION_SITES.items():
        if len(paths) != 1:
            yield (
                site,
                (
                    "it computes attention without transformers.AttentionInterface"
                    if not paths
                    else "its block attends more than once"
                ),
            )
        elif site in ("hook_rot_q", "hook_rot_k") and attention not in names.rotary:
            yield site, "its queries and keys are not rotated, or not as a whole; record q and k"
        elif site in ("hook_q", "hook_k") and attention in names.rotary:
            yield site, "before rotation it exists only inside a fused projection; record rot_q and rot_k"
        elif site == "hook_pattern" and paths[0] in trial.refused:
            yield site, trial.refused[paths[0]]
        else:
            yield site, Tap(paths[0], part)
    if len(paths) == 1 and paths[0] not in trial.refused:
        yield "hook_z", Tap(paths[0], "output")


def _refusal(tap: Tap, trial: _Trial, other: _Trial) -> str | None:
    if trial.counts[tap] != 1:
        return f"it runs {trial.counts[tap]} times in a forward pass"
    if other.counts.get(tap) != 1:
        return "whether it runs depends on the sequence"
    if tap not in trial.shapes:
        return "no tensor of floating-point numbers passes there"
    if trial.row_shape(tap) is None:
        return f"its tensor of shape {trial.shapes[tap]} has no batch and position axes"
    if tap.part not in ("weights", "returned_weights") and trial.row_shape(tap) != other.row_shape(tap):
        return "its shape depends on the length of the sequence"
    return None


def _site(name: str, tap: Tap, trial: _Trial, names: _Names) -> Site:
    shape = tuple(trial.row_shape(tap) or ())
    if tap.part in ("weights", "returned_weights"):
        return Site(name, ("head", "key"), (shape[0], None), tap)
    if len(shape) == 1 and name.rsplit(".", 1)[-1] in _HEADED:
        shape = _split_heads(name, shape[0], trial, names) or shape
    return Site(name, _axes(name, shape, trial, names), shape, tap)


def _split_heads(name: str, width: int, trial: _Trial, names: _Names) -> tuple[int, int] | None:
    """`width` as (head, d_head), from the layer's own attention call."""
    layer = name.split(".")[1]
    part = _HEADED[name.rsplit(".", 1)[-1]]
    for path, call in trial.calls.items():
        if path.startswith(f"{names.blocks}.{layer}."):
            heads, size = call.query.shape[1], call.value.shape[-1]
            if part != "output":
                heads, size = getattr(call, part).shape[1], getattr(call, part).shape[-1]
            return (heads, size) if heads * size == width else None
    likely = names.heads[:1] if part in ("query", "output") else names.heads[1:]
    return next(((heads, size) for heads, size in likely if heads * size == width > 0), None)


def _axes(name: str, shape: tuple[int, ...], trial: _Trial, names: _Names) -> tuple[str, ...]:
    owner, hook = name.split(".")[-2:] if "." in name else ("", name)
    if name in ("logits", "unembed.hook_out"):
        return ("vocab",)
    if len(shape) == 2 and hook in {*_HEADED, *_ATTENTION_SITES}:
        return ("head", "d_head")
    residual = trial.row_shape(Tap(f"{names.blocks}.0", "in")) or ()
    if shape == residual and len(shape) <= 2:
        return ("stream", "d_model")[-len(shape) :]  # hyper-connections carry several residual streams
    if owner == "mlp" and len(shape) == 1:
        return ("d_mlp",)
    part = hook.removeprefix("hook_") if owner.isdigit() or not owner else owner
    return tuple(f"d_{part}" if len(shape) == 1 else f"d_{part}_{axis}" for axis in range(len(shape)))
