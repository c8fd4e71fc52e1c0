"""Attention scores before the softmax, computed from recorded queries and keys."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from workbench.io.errors import RequestError
from workbench.io.torch_state import plain_torch
from workbench.model.attention_scores import attention_scores, layer_rule, score_rules
from workbench.model.load import Model
from workbench.sites.score_rule import ScoreRule
from workbench.store.computed import ComputedArray
from workbench.store.layers import known_layer
from workbench.store.manifest import SiteRecord
from workbench.store.reader import ActivationArray, StoreOrPath, opened


def attn_scores(store: StoreOrPath, layer: int, model: Model | str | None = None) -> ComputedArray:
    """Returns the attention scores of a layer before the softmax, `hook_attn_scores` of TransformerLens.

    Scaled, soft-capped and masked as the model does it: minus infinity at keys that the query does not see, of which
    softmax makes the pattern (in a layer with a learned sink logit the pattern is smaller). Null: 0 for a query that is
    orthogonal to a key. Costs heads x d_head operations a query and key; a row is computed with the keys of its whole
    sequence, so read the rows of a sequence together.

    Args:
        store: A store, or its path, with queries and keys of the layer as it scores them: `rot_q` and `rot_k`, or `q`
            and `k` where nothing is rotated.
        layer: Layer; -1 is the last one.
        model: The recorded model, for a store from before manifests had the scale. None: the name in the manifest.

    Returns:
        Array with the axes (row, head, key), computed where it is indexed; keys count from the sequence's first token,
        as many as the longest sequence has.

    Raises:
        RequestError: Queries or keys were not recorded, the store holds chosen rows, the model is not causal, or it
            adds a bias by position to its scores.
    """
    store = opened(store)
    number = known_layer(store.manifest, layer)
    if not store.manifest.model.causal:
        raise RequestError(f"attention scores need a causal model, and {store.manifest.model.name} is not")
    store.require_whole_sequences("an array of attention scores")
    rule = layer_rule(score_rules(store, model), store, number)
    queries = store[rule.queries]
    sequence = store.tokens["sequence"].to_numpy()
    starts = np.flatnonzero(np.diff(sequence, prepend=-1))
    longest = int(np.diff(starts, append=store.rows).max(initial=1))
    scores = _Scores(rule, queries, store[rule.keys], starts, longest)
    name, shape = f"blocks.{number}.attn.hook_attn_scores", (queries.site.shape[0], longest)
    site = SiteRecord(name, f"attn_scores.{number}", ("row", "head", "key"), shape, "float32")
    return ComputedArray(store, site, scores)


@dataclass(frozen=True, eq=False)
class _Scores:
    """Scores of rows against the keys of their sequences."""

    rule: ScoreRule
    queries: ActivationArray
    keys: ActivationArray
    starts: Int64[np.ndarray, " sequence"]
    longest: int

    @plain_torch()
    @torch.inference_mode()
    def __call__(self, ids: Int64[np.ndarray, " row"]) -> Float[Tensor, "row head key"]:
        scores = torch.full((len(ids), self.queries.site.shape[0], self.longest), -torch.inf)
        sequences = np.searchsorted(self.starts, ids, side="right") - 1
        ends = np.append(self.starts[1:], len(self.queries))
        for sequence in np.unique(sequences).tolist():
            places = np.flatnonzero(sequences == sequence)
            first, end = int(self.starts[sequence]), int(ends[sequence])
            raw = attention_scores(self.rule, self.queries[ids[places]], self.keys[first:end]).transpose(0, 1)
            visible = self.rule.visible((ids[places] - first)[:, None], np.arange(end - first))
            hidden = ~torch.from_numpy(np.asarray(visible))[:, None]
            scores[torch.from_numpy(places), :, : end - first] = raw.masked_fill(hidden, -torch.inf)
        return scores
