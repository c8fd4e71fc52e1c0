"""Trials of a layer's mask: attention that divides its scores after the mask (CodeGen) divides what the mask adds, and
some attention takes one mask for all heads alone (XGLM)."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from workbench.io.torch_state import plain_torch
from workbench.model.capture import capture
from workbench.model.forward import change_arguments, trial_ids
from workbench.model.passes import unseen_pass
from workbench.sites.grammar import Site

_SMALLEST = 1e-3
"""Weights below this tell nothing about their ratio."""
_ROUNDED = 0.02

_MEASURED: weakref.WeakKeyDictionary[nn.Module, dict[str, float]] = weakref.WeakKeyDictionary()
_BY_HEAD: weakref.WeakKeyDictionary[nn.Module, dict[str, bool]] = weakref.WeakKeyDictionary()


def mask_gain(model: nn.Module, attention: nn.Module, site: Site) -> float:
    """Returns the number by which a layer multiplies what its mask adds to the scores; 1 in all models but CodeGen.

    Interventions on the model do not see the trial. Costs two passes over 5 tokens up to the layer, once, where
    transformers does not compute its attention; else it is 1.

    Args:
        model: The model.
        attention: The module of the layer that takes the mask.
        site: Site of the layer's pattern, as the module returns it.
    """
    if site.tap.part != "returned_weights":
        return 1.0
    gains = _MEASURED.setdefault(model, {})
    if site.name not in gains:
        gains[site.name] = _measure(model, attention, site)
    return gains[site.name]


@plain_torch()
def takes_mask_by_head(model: nn.Module, attention: nn.Module, site: Site, heads: int) -> bool:
    """Returns True if a layer takes a mask with an axis of heads; XGLM refuses it. Costs as `mask_gain`."""
    if site.tap.part != "returned_weights":
        return True
    by_site = _BY_HEAD.setdefault(model, {})
    if site.name not in by_site:
        try:
            _pattern(model, site, change_arguments(attention, partial(_by_head, heads)))
            by_site[site.name] = True
        except (ValueError, RuntimeError):  # what attention modules raise of a mask of another size
            by_site[site.name] = False
    return by_site[site.name]


def _by_head(heads: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an attention module with its mask repeated for each head."""
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] == 1:
        return {**arguments, "attention_mask": mask.expand(-1, heads, -1, -1)}
    return arguments


@plain_torch()
def _measure(model: nn.Module, attention: nn.Module, site: Site) -> float:
    patterns = [_pattern(model, site, change) for change in (nullcontext(), change_arguments(attention, _raised))]
    before, after = (rows[0, -1, :, :2].double().cpu() for rows in patterns)
    certain = (torch.minimum(before, after) > _SMALLEST).all(-1)
    if not bool(certain.any()):
        return 1.0
    odds = [rows[certain, 0].log() - rows[certain, 1].log() for rows in (before, after)]
    gain = (odds[1] - odds[0]).median().item()
    return 1.0 if abs(gain - 1) < _ROUNDED or gain < _ROUNDED else gain


def _pattern(model: nn.Module, site: Site, change: AbstractContextManager[Any]) -> Tensor:
    """The pattern that a layer returns in a short pass with a change."""
    ids, patterns = trial_ids(model, 1, 5, seed=5), []
    with unseen_pass(model), change:
        capture(model, (site,), ids, torch.ones_like(ids), lambda _site, rows, _first: patterns.append(rows))
    return patterns[0]


def _raised(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an attention module whose mask adds 1 to the scores of the first key."""
    mask = arguments.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 4 or not mask.is_floating_point():
        return arguments
    mask = mask.clone()
    mask[..., 0] += 1
    return {**arguments, "attention_mask": mask}
