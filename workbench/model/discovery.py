"""Discovery of the sites of a model: names are claimed (`claims`), tried in short passes (`trial`) and checked for what
they mean (`meaning`).

A site is offered if a tensor with batch and position axes, and otherwise of constant shape, passes there exactly once
in passes of two lengths, and if it is the tensor that its name stands for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from workbench.io.torch_state import plain_torch
from workbench.model.claims import Claims, adapter_claims, blocks_at, has_head, structural_claims
from workbench.model.forward import text_config
from workbench.model.meaning import check_block
from workbench.model.trial import Trial, try_model
from workbench.sites.grammar import Part, Site, SiteMap, Tap, short_name
from workbench.sites.score_rule import ScoreRule

_ATTENTION_SITES: Mapping[str, Part] = {
    "hook_q": "query",
    "hook_k": "key",
    "hook_v": "value",
    "hook_rot_q": "query",
    "hook_rot_k": "key",
    "hook_pattern": "weights",
}
_HEADED = {"hook_q": "query", "hook_k": "key", "hook_v": "value", "hook_z": "output"}
_LENGTHS, _OTHER_LENGTHS = (7, 5), (6, 11)
_NO_HEAD = "this model has no language-model head; AutoModelForCausalLM in place of AutoModel loads one"


@plain_torch()
def find_sites(module: nn.Module) -> SiteMap:
    """Returns the site map of a Hugging Face causal LM. Costs two forward passes, over 2 x 7 and 2 x 11 tokens."""
    names = adapter_claims(module) or structural_claims(module)
    modules = dict(module.named_modules())
    trial = try_model(module, names, modules, _LENGTHS)
    second_trial = try_model(module, names, modules, _OTHER_LENGTHS)
    trial.refused |= second_trial.refused
    n_layers = len(blocks_at(modules, names.blocks))
    taps, missing = _resolve(names, trial, modules)
    if not has_head(module):
        missing |= dict.fromkeys(("logits", "unembed.hook_out"), _NO_HEAD)
    factors: dict[str, float] = {}
    for layer in range(n_layers):
        moved_taps, reasons, multiplied = check_block(layer, taps, trial)
        missing, factors = missing | reasons, factors | multiplied
        taps = {name: tap for name, tap in (taps | moved_taps).items() if name not in reasons}
    by_tap: dict[Tap, list[str]] = {}
    for name, tap in taps.items():
        by_tap.setdefault(tap, []).append(name)
    sites, synonyms = {}, {}
    for tap in sorted(by_tap, key=trial.order.__getitem__):
        reason = _refusal(tap, trial, second_trial)
        canonical = min(by_tap[tap], key=lambda name: (short_name(name) is None, name not in names.aliases))
        if reason:
            missing |= dict.fromkeys(by_tap[tap], reason)
            continue
        sites[canonical] = _site(canonical, tap, trial, names)
        synonyms |= {name: canonical for name in by_tap[tap] if name != canonical}
    paths, other_sites, reasons = _modules(sites, modules, trial, second_trial)
    last = Tap(f"{names.blocks}.{n_layers - 1}", "out")
    causal = trial.causal(last) and second_trial.causal(last)
    chained = tuple(layer for layer in range(1, n_layers) if _chained(layer, names, trial))
    synonyms, missing, rules = synonyms | paths, missing | reasons, tuple(_score_rules(module, sites, trial))
    return SiteMap(
        sites, synonyms, missing, names.blocks, n_layers, names.adapter, causal, chained, other_sites, rules, factors
    )


def _modules(
    sites: Mapping[str, Site], modules: Mapping[str, nn.Module], trial: Trial, second_trial: Trial
) -> tuple[dict[str, str], dict[str, Site], dict[str, str]]:
    """Modules whose outputs are sites as they are, with these; sites of other outputs; reasons for the rest."""
    sites_by_tap = {site.tap: site for site in sites.values()}
    synonyms: dict[str, str] = {}
    other_sites: dict[str, Site] = {}
    missing: dict[str, str] = {}
    paths = {Tap(path, "out"): path for path in modules if path}
    for tap in sorted(paths, key=lambda tap: trial.order.get(tap, len(trial.order))):
        path, site, shape = paths[tap], sites_by_tap.get(tap), trial.row_shape(tap)
        if tap not in trial.counts:
            missing[path] = "its module does not run"
        elif reason := _refusal(tap, trial, second_trial):
            missing[path] = reason
        elif site and site.shape == shape:
            synonyms[path] = site.name
        elif (tensor_count := trial.several.get(tap)) or shape is None:
            missing[path] = f"it gives {tensor_count} tensors with a row per token"
        else:
            residual = shape == trial.row_shape(trial.stream) and len(shape) == 1
            part = path.rsplit(".", 1)[-1]
            axes = ("d_model",) if residual else _plain_axes(part, shape)
            other_sites[path] = Site(path, axes, shape, tap)
    return synonyms, other_sites, missing


def _score_rules(module: nn.Module, sites: Mapping[str, Site], trial: Trial) -> Iterator[ScoreRule]:
    """Rules of the layers whose attention is softmax(q k) v, with the sites of those queries and keys.

    Layers that attend within chunks (Llama 4) are left out: which keys a query sees is in their mask alone.
    """
    at = {site.tap: site for site in sites.values()}
    kinds = getattr(text_config(module), "layer_types", None) or ()
    for path, call in trial.calls.items():
        query, key = at.get(Tap(path, "query")), at.get(Tap(path, "key"))
        if path in trial.refused or query is None or key is None or query.layer is None:
            continue
        if "chunked_attention" in kinds[query.layer : query.layer + 1]:
            continue
        yield ScoreRule(
            layer=query.layer,
            queries=query.short or query.name,
            keys=key.short or key.name,
            scale=float(call.scaling),
            softcap=None if call.softcap is None else float(call.softcap),
            window=int(call.sliding_window) if call.sliding_window else None,
            biased=call.position_bias is not None or _adds_bias(call.mask),
        )


def _adds_bias(mask: Tensor | None) -> bool:
    """True if a mask holds numbers besides 0 and those that hide a key."""
    if mask is None or not mask.is_floating_point():
        return False
    return bool(((mask != 0) & (mask > 0.5 * torch.finfo(mask.dtype).min)).any())


def _chained(layer: int, names: Claims, trial: Trial) -> bool:
    """True if the input of a block is the output of the block before."""
    taps = Tap(f"{names.blocks}.{layer - 1}", "out"), Tap(f"{names.blocks}.{layer}", "in")
    before, after = (trial.values.get(tap) for tap in taps)
    return before is not None and after is not None and before.equal(after)


# ---- from claims and trial to sites ---------------------------------------------------------------------


def _resolve(names: Claims, trial: Trial, modules: Mapping[str, nn.Module]) -> tuple[dict[str, Tap], dict[str, str]]:
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


def _attention_taps(attention: str, names: Claims, trial: Trial) -> Iterator[tuple[str, Tap | str]]:
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


def _refusal(tap: Tap, trial: Trial, second_trial: Trial) -> str | None:
    if trial.counts[tap] != 1:
        return f"it runs {trial.counts[tap]} times in a forward pass"
    if second_trial.counts.get(tap) != 1:
        return "whether it runs depends on the sequence"
    if tap not in trial.shapes:
        return "no tensor of floating-point numbers passes there"
    if trial.row_shape(tap) is None:
        return f"its tensor of shape {trial.shapes[tap]} has no batch and position axes"
    if tap.part not in ("weights", "returned_weights") and trial.row_shape(tap) != second_trial.row_shape(tap):
        return "its shape depends on the length of the sequence"
    return None


def _site(name: str, tap: Tap, trial: Trial, names: Claims) -> Site:
    shape = tuple(trial.row_shape(tap) or ())
    if tap.part in ("weights", "returned_weights"):
        return Site(name, ("head", "key"), (shape[0], None), tap)
    if len(shape) == 1 and name.rsplit(".", 1)[-1] in _HEADED:
        shape = _split_heads(name, shape[0], trial, names) or shape
    return Site(name, _axes(name, shape, trial, names), shape, tap)


def _split_heads(name: str, width: int, trial: Trial, names: Claims) -> tuple[int, int] | None:
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


def _axes(name: str, shape: tuple[int, ...], trial: Trial, names: Claims) -> tuple[str, ...]:
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
    return _plain_axes(hook.removeprefix("hook_") if owner.isdecimal() or not owner else owner, shape)


def _plain_axes(part: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(f"d_{part}" if len(shape) == 1 else f"d_{part}_{axis}" for axis in range(len(shape)))
