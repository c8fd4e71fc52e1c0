"""Planted stores of attention: heads that are sinks, uniform or on the previous token."""

from __future__ import annotations

import numpy as np
from store_example import token_table, writing

import workbench as wb
from workbench.probes.attention_sinks import AttentionSinks
from workbench.sites.grammar import full_name
from workbench.sites.settings import Recording
from workbench.store.manifest import Part, SiteRecord

DERIVED = ("attn_received", "attn_received_entropy", "attn_entropy", "attn_first", "v_norm", "resid_norm")
AXES = {"pattern": ("head", "key"), "v": ("head", "d_head"), "resid_post": ("d_model",), "resid_norm": ()}


# ---- planting -------------------------------------------------------------------------------------------


def uniform(n):
    return np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]


def sink_head(n, c, sink=0):
    """Every query that sees `sink` and others pays it c, the rest goes to the others evenly."""
    pattern = uniform(n)
    for i in range(n):
        if sink <= i and i > 0:
            pattern[i, : i + 1] = (1 - c) / i
            pattern[i, sink] = c
    return pattern


def previous(n):
    return np.eye(n, k=-1) + np.eye(n)[:1].T * np.eye(n)[:1]


def plant(path, lengths, arrays, documents=None, sources=None):
    """A store whose sites hold these arrays [row, ...]; `documents` and `sources` one for each sequence."""
    sites = [
        SiteRecord(
            full_name(short), short, ("row", *AXES.get(short.split(".")[0], ("head",))), array.shape[1:], "float32"
        )
        for short, array in arrays.items()
    ]
    tokens = token_table(lengths)
    for name, values in (("document", documents), ("source", sources)):
        if values is not None:
            column = np.repeat(np.array(values, dtype=object if name == "source" else np.int64), lengths)
            tokens = tokens.set_column(tokens.column_names.index(name), name, [column.tolist()])
    part = Part(sum(lengths), len(lengths), len(set(documents or [0])), 0, 0)
    settings = {"sites": tuple(sites), "recording": Recording(context=max(lengths), dtype="float32")}
    with writing(path, **settings) as writer:
        writer.begin(part, append=False)
        with writer.segment(sum(lengths), len(lengths), "d" * 64, tokens) as segment:
            for site in sites:
                array = np.ascontiguousarray(arrays[site.short], dtype=np.float32)
                segment.write(site.name, 0, array)
    return wb.open_store(path)


def rows_of(*sequences):
    """Patterns [head, query, key] of sequences as rows [row, head, key], keys padded to the longest."""
    longest = max(len(heads[0]) for heads in sequences)
    parts = [np.stack([np.pad(head, ((0, 0), (0, longest - len(head)))) for head in heads], 1) for heads in sequences]
    return np.concatenate(parts)


def planted(path, *sequences, **options):
    """A store of `pattern.0` with these sequences of heads."""
    return plant(path, [len(heads[0]) for heads in sequences], {"pattern.0": rows_of(*sequences)}, **options)


def run(store, **settings):
    return AttentionSinks(**settings).run(store)


def stream(top, position=0, dimension=2, n=8, width=6, seed=0):
    """Half of the values 0.05, half 0.15 in size, so the median is 0.1, and one planted."""
    values = np.where(np.arange(n * width).reshape(n, width) % 2, 0.05, 0.15)
    values *= np.random.default_rng(seed).choice([-1, 1], (n, width))
    values[position, dimension] = top
    return values
