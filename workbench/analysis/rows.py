"""Rows of a store that a probe reads: selected by SQL, divided by document, read layer by layer in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import xarray as xr
from jaxtyping import Bool, Int

from workbench.analysis.read_layers import choose_layers, layers_of, layers_text, require_any
from workbench.corpus.places import NEXT
from workbench.io.counted import counted
from workbench.io.errors import RequestError
from workbench.store.reader import Store

ROWS_PER_DIMENSION = 5
"""Training rows needed for each dimension of a state; fewer leave a linear map badly determined."""

_BLOCK_BYTES = 4 << 20  # of one block of logits in float32: five such, which live at a time, stay in a CPU's cache
_BLOCK_ROWS = 128  # at least, or reading W_U for every block would be most of the work


def recorded_layers(store: Store, kind: str, layers: Sequence[int] | None = None) -> tuple[list[int], list[str]]:
    """Returns the layers at which sites of a kind were recorded, and the sites' labels.

    Args:
        store: The recorded activations.
        kind: A kind of site without a layer, such as resid_post.
        layers: The layers to return, in any order; negative ones count from the last block. None: all recorded ones.

    Raises:
        RequestError: No such site was recorded, at one of `layers` or at all, or its axes are not (row, d_model).
    """
    if "." in kind:
        raise RequestError(f"site must be a kind without a layer, such as resid_post, not {kind!r}")
    shorts = {site.short or "": site for site in store.sites}
    sites = {int(short.split(".")[1]): site for short, site in shorts.items() if short.startswith(f"{kind}.")}
    if not sites:
        require_any(store, kind)
    axes = next(iter(sites.values())).axes
    if axes != ("row", "d_model"):
        raise RequestError(f"site {kind!r} has axes ({', '.join(axes)}); a site of axes (row, d_model) is needed")
    chosen_layers = choose_layers(sorted(sites), layers, store.manifest.model.n_layers)
    return chosen_layers, [f"{kind}.{layer}" for layer in chosen_layers]


def selected_rows(store: Store, where: str | None) -> Int[np.ndarray, " row"]:
    """Returns the ids of the rows for which an SQL condition holds; all rows for None.

    Raises:
        RequestError: The condition selects no row.
    """
    rows = np.arange(store.rows) if where is None else store.where(where).ids
    if not len(rows):
        raise RequestError(f"where {where!r} selects no token of {store.rows:,}")
    return rows


def next_tokens(store: Store) -> Int[np.ndarray, " row"]:
    """Returns the id of the token that follows each row in its document and sequence; -1 where none does."""
    return tokens_at(store, 1)


def tokens_at(store: Store, offset: int) -> Int[np.ndarray, " row"]:
    """Returns the id of the token `offset` tokens after each row in its document and sequence; -1 where none is there.

    A negative offset counts backwards. A store of chosen rows knows the next token alone.

    Raises:
        RequestError: Another offset than 1, and a store of chosen rows.
    """
    tokens = store.tokens
    if offset == 1 and store.manifest.chosen:
        return tokens[NEXT].fill_null(-1).to_numpy().astype(np.int64)
    store.require_whole_sequences(f"the token {offset} tokens on")
    ids, sequence, document = (tokens[name].to_numpy() for name in ("token_id", "sequence", "document"))
    source = np.arange(max(0, -offset), len(ids) - max(0, offset))
    same_text = (sequence[source] == sequence[source + offset]) & (document[source] == document[source + offset])
    targets = np.full(len(ids), -1, dtype=np.int64)
    targets[source] = np.where(same_text, ids[source + offset], -1)
    return targets


def blocks(rows: int, vocab: int) -> Iterator[slice]:
    """Returns slices of `rows` whose logits take 4 MiB in float32, of 128 rows or more."""
    step = max(_BLOCK_ROWS, _BLOCK_BYTES // (4 * vocab))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


def split_by_document(
    documents: Int[np.ndarray, " row"],
    held_out: float,
    validation: float | None = None,
    *,
    purpose: str,
    uses: str = "to train on, to stop by and to read",
    seed: int = 0,
) -> tuple[Bool[np.ndarray, " row"], Bool[np.ndarray, " row"], Bool[np.ndarray, " row"]]:
    """Returns masks of the rows to train on, to validate on and to test on; no document is in two parts.

    Args:
        documents: The document of each row.
        held_out: Share of the documents to test on, at least one.
        validation: Share of the documents that decide when training ends or what is chosen, at least one; None: half
            as many as are tested on.
        purpose: What the rows are for, as an error names it: "a tuned lens".
        uses: What the three parts are for, as an error says it.
        seed: Random seed of the split.

    Raises:
        RequestError: No document is left to train on.
    """
    shuffled_documents = np.random.default_rng(seed).permutation(np.unique(documents))
    tested = max(1, round(held_out * len(shuffled_documents)))
    validating = max(1, round(tested / 2 if validation is None else validation * len(shuffled_documents)))
    if len(shuffled_documents) < tested + validating + 1:
        raise RequestError(
            f"store has {counted(len(shuffled_documents), 'document')} among the selected tokens; {purpose} needs "
            f"three or more, {uses}"
        )
    test_mask, validation_mask, training_mask = (
        np.isin(documents, part) for part in np.split(shuffled_documents, [tested, tested + validating])
    )
    return training_mask, validation_mask, test_mask


def note_few_rows(rows: int, d_model: int) -> str:
    """Returns a note that a d_model x d_model map was fitted on too few rows; "" where they are enough."""
    minimum = ROWS_PER_DIMENSION * d_model
    if rows >= minimum:
        return ""
    return f"{counted(rows, 'training row')} are few for {d_model} x {d_model} maps; {minimum:,} or more are needed"


def note_missing(
    store: Store, data: xr.Dataset, needs: Mapping[str, Sequence[str]], words: Mapping[str, str] | None = None
) -> list[str]:
    """Returns a note for each variable that was not computed, or not at some layers, with the sites it needs.

    Args:
        store: The recorded activations.
        data: Arrays over (layer, head) or (layer).
        needs: Variable to the kinds of sites, one of which it is computed from.
        words: Variable to its name in the note, where that is not the variable's own.
    """
    words = {name: name for name in needs} | dict(words or {})
    absent = [name for name in needs if name not in data]
    notes = [f"{words[name]} not computed: {' or '.join(needs[name])} was not recorded" for name in absent]
    for name, kinds in needs.items():
        known_layers = layers_of(store, *kinds)
        missing = [layer for layer in data["layer"].to_numpy().tolist() if layer not in known_layers]
        if missing and name in data:
            lack = f"{' or '.join(kinds)} was not recorded there"
            notes.append(f"{words[name]} is NaN at layers {layers_text(missing)}: {lack}")
    return notes
