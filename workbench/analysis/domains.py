"""Comparison of domains of text: a statistic of heads in each, and the gap between the two that differ most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from workbench.analysis.sequences import Sequences
from workbench.results.bootstrap import group_means


def permuted_gap(
    values: Float[np.ndarray, "sequence statistic"], sequences: Sequences, *, permutations: int, seed: int
) -> float:
    """Returns the gap that the largest of all statistics reaches in 5 % of permutations of domains over documents.

    A gap above it is unlikely for texts whose domain does not matter, however many statistics are looked at. NaN for
    fewer than two domains of two documents or more.

    Args:
        values: Statistics of each sequence.
        sequences: The sequences, with their domains and documents.
        permutations: Number of permutations.
        seed: Random seed.
    """
    has_domain = sequences.domain >= 0
    pairs = np.stack([sequences.document[has_domain], sequences.domain[has_domain]], 1)
    documents, index = np.unique(pairs, axis=0, return_inverse=True)
    totals, counts = np.zeros((len(documents), values.shape[1])), np.bincount(index.ravel(), minlength=len(documents))
    np.add.at(totals, index.ravel(), values[has_domain])
    number = np.bincount(documents[:, 1], minlength=len(sequences.domains))
    compared_domains = np.flatnonzero(number > 1)
    if len(compared_domains) < 2:
        return float("nan")
    draw, largest = np.random.default_rng(seed), []
    for _ in range(permutations):
        member = (draw.permutation(documents[:, 1]) == compared_domains[:, None]).astype(float)
        means = (member @ totals) / (member @ counts)[:, None]
        largest.append(np.ptp(means, axis=0).max())
    return float(np.quantile(largest, 0.95))


def compare_domains(
    values: Mapping[int, Float[np.ndarray, "sequence head"]],
    sequences: Sequences,
    *,
    layers: Sequence[int],
    heads: int,
    resamples: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Returns `attention` in each domain and the `gap`, with 95 % intervals over documents, over (layer, head).

    `gap_most` and `gap_least` are the domains of the gap, `documents` the documents of each domain. A domain of one
    document has no interval and takes no part in the gap. NaN stands where there is no value.

    Args:
        values: Layer to a statistic of each sequence and head.
        sequences: The sequences, with their domains and documents.
        layers: Layers of the first axis.
        heads: Heads of the second axis; layers may have fewer.
        resamples: Number of resamples of documents.
        seed: Random seed of the resamples.
    """
    n, shape = len(sequences.domains), (len(layers), heads)
    arrays: dict[str, np.ndarray] = {}
    arrays |= {name: np.full((n, *shape), np.nan) for name in ("attention", "attention_low", "attention_high")}
    arrays |= {name: np.full(shape, np.nan) for name in ("gap", "gap_low", "gap_high", "gap_most", "gap_least")}
    arrays["documents"] = np.zeros(n, dtype=np.int64)
    for layer, of_layer in values.items():
        at = (layers.index(layer), slice(of_layer.shape[1]))
        means = group_means(of_layer, sequences.domain, n, sequences.document, resamples=resamples, seed=seed)
        arrays["documents"] = means.clusters
        for name, part in {"": means.mean, "_low": means.low, "_high": means.high}.items():
            arrays[f"attention{name}"][:, *at] = part
        arrays["gap"][at], arrays["gap_low"][at], arrays["gap_high"][at] = means.gap, means.gap_low, means.gap_high
        for name, part in {"gap_most": means.most, "gap_least": means.least}.items():
            arrays[name][at] = np.where(part < 0, np.nan, part)
    return arrays
