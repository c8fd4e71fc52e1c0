"""An autoencoder under another sparsity rule than its own: the features that `extract_features(sparsity=...)` makes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.io import files
from workbench.io.errors import RequestError, shown
from workbench.io.torch_state import plain_torch
from workbench.sae.autoencoder import Sae
from workbench.sae.choice import Linear, TopK, linear_form
from workbench.sae.sparsity import SparsityRule, sparsity_record

RULE = "allocation"
"""Key of the rule in a config, as format version 1 has it."""


@dataclass(frozen=True, eq=False)
class RuledSae(Sae):
    """An autoencoder whose features are the k largest pre-activations of each row. Made by `with_sparsity`."""

    rule: TopK

    @plain_torch()
    def encode(self, rows: Float[Tensor, "row ..."], *, gradients: bool = False) -> Float[Tensor, "row feature"]:
        """Returns the dense activations of all features in float32; see `Sae.encode`."""
        with torch.enable_grad() if gradients else torch.no_grad():
            pre = self._linear.pre(self.module.process_sae_in(self._shaped(rows)).flatten(1))
            value, feature = pre.topk(self.rule.k, dim=1)
            return torch.zeros_like(pre).scatter(1, feature, value.relu())

    def config(self) -> dict[str, Any]:
        """Returns the content of its `cfg.json` and the rule."""
        return super().config() | {RULE: sparsity_record(self.rule)}

    def fingerprint(self) -> str:
        """Returns the SHA-256 of weights, settings and rule."""
        return ruled_fingerprint(Sae(self.module, self.name).fingerprint(), sparsity_record(self.rule))

    @cached_property
    def _linear(self) -> Linear:
        form = linear_form(self, replaced=True)
        if form is None:
            raise no_preactivations(self)
        return form[0]


def with_sparsity(sae: Sae, rule: SparsityRule) -> RuledSae:
    """Returns an autoencoder whose features are the k largest pre-activations of each row, as far as they are above 0.

    They are those of `extract_features(store, sae, sparsity=rule)`; `Feature` and `sae_metrics` take it as any SAE.

    Args:
        sae: The autoencoder.
        rule: `TopK(k)`. MutualChoice and FeatureChoice rank the rows of a whole store and have no features of one row.

    Raises:
        RequestError: Another rule, k > d_sae, or an SAE without pre-activations (matching pursuit, temporal, hooks).
    """
    if type(rule) is not TopK:
        raise RequestError(f"rule is {shown(rule)}, expected TopK(k): others rank the rows of a whole store")
    if isinstance(sae, RuledSae):
        sae = Sae(sae.module, sae.name.removesuffix(_suffix(sae.rule)))
    if rule.k > sae.d_sae:
        raise RequestError(f"k is {rule.k}, but SAE {sae.name!r} has only {sae.d_sae} features; give a smaller k")
    if type(sae) is not Sae or linear_form(sae, replaced=True) is None:
        raise no_preactivations(sae)
    return RuledSae(sae.module, sae.name + _suffix(rule), rule)


def ruled_name(name: str, rule: SparsityRule) -> str:
    """Returns the name of an autoencoder under a rule."""
    return name + _suffix(rule)


def ruled_fingerprint(fingerprint: str, rule: dict[str, Any]) -> str:
    """Returns the fingerprint of features under a rule, given as `sparsity_record` returns it."""
    return files.sha256_bytes(f"{fingerprint} {rule}".encode())


def no_preactivations(sae: Sae) -> RequestError:
    """Returns the error about a rule for an autoencoder that it cannot select from."""
    return RequestError(
        f"SAE {sae.name!r} ({sae.architecture}) has no pre-activations to select from; leave sparsity out"
    )


def _suffix(rule: SparsityRule) -> str:
    return f"-{sparsity_record(rule)['choice']}-{rule.k}"
