"""Attention scores, before the softmax, as a layer computes them from recorded queries and keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.model.reload import recorded_model
from workbench.sites.score_rule import ScoreRule
from workbench.store.reader import Store


def attention_scores(
    rule: ScoreRule,
    query: Float[Tensor, "*batch query head d_head"],
    key: Float[Tensor, "*batch key kv_head d_head"],
) -> Float[Tensor, "*batch head query key"]:
    """Returns the scores of every query and key, scaled and soft-capped; keys that a query does not see included.

    Their softmax over the keys of `rule.visible` is the pattern, except in layers with a learned sink logit. Computed
    in float32, or float64 for float64 inputs. Null: 0 for orthogonal queries and keys.

    Args:
        rule: Rule of the layer, from `score_rules`.
        query: Queries as the layer scores them: `rot_q`, or `q` where nothing is rotated.
        key: Keys, `rot_k` or `k`, of which several query heads may share one.
    """
    query, key = (part if part.dtype == torch.float64 else part.float() for part in (query, key))
    query = rearrange(query, "... q (kv g) d -> ... kv g q d", kv=key.shape[-2])
    scores = rule.scale * torch.einsum("...hgqd,...khd->...hgqk", query, key)
    scores = rearrange(scores, "... kv g q k -> ... (kv g) q k")
    return scores if rule.softcap is None else rule.softcap * torch.tanh(scores / rule.softcap)


def score_rules(store: Store, model: Model | str | None = None) -> Mapping[int, ScoreRule]:
    """Returns the score rule of each layer of a store; layers that attend in their own way are left out.

    Args:
        store: The store. One that was recorded before manifests had the rules needs the model.
        model: The recorded model, or what `load_model` takes. None: the name in the manifest, where it is needed.

    Raises:
        RequestError: The model is needed and cannot be loaded, or is another one.
    """
    rules = store.manifest.model.score_rules
    if rules is None:
        rules = recorded_model(store, model).site_map.score_rules
    return {rule.layer: rule for rule in rules}


def recorded_rules(
    store: Store, model: Model | str | None = None, layers: Sequence[int] | None = None
) -> dict[int, ScoreRule]:
    """Returns the rules of the layers whose queries and keys were recorded.

    Args:
        store: The store.
        model: As for `score_rules`.
        layers: Layers to read; negative numbers count from the last. None: every recorded one.

    Raises:
        RequestError: No layer was recorded, or a chosen one has no scores to be computed; see `layer_rule`.
    """
    rules = score_rules(store, model)
    labels = {site.label for site in store.sites}
    chosen_layers = [layer for layer, rule in rules.items() if {rule.queries, rule.keys} <= labels]
    if layers is not None:
        count = store.manifest.model.n_layers
        chosen_layers = sorted({layer + count if layer < 0 else layer for layer in layers})
    if not chosen_layers:
        layer_rule(rules, store, next(iter(rules), 0))  # which names what is missing
        raise RequestError("no layer has both queries and keys; record rot_q and rot_k")
    return {layer: layer_rule(rules, store, layer) for layer in chosen_layers}


def layer_rule(rules: Mapping[int, ScoreRule], store: Store, layer: int) -> ScoreRule:
    """Returns the rule of a layer whose scores can be computed from its recorded queries and keys.

    Raises:
        RequestError: They were not recorded, or the layer's scores are more than queries and keys.
    """
    if layer not in rules:
        raise RequestError(
            f"layer {layer}: {store.manifest.model.architecture} has no attention there whose scores are products of "
            "queries and keys alone"
        )
    rule = rules[layer]
    if rule.biased:
        raise RequestError(
            f"layer {layer}: {store.manifest.model.architecture} adds a bias by position to its scores, which queries "
            "and keys do not hold"
        )
    store.require(rule.queries, rule.keys)
    return rule
