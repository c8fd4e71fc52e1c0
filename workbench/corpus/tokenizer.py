"""Tokens that a tokenizer adds around a text, the text of each token, and the columns of the token table."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, cast

import numpy as np
import pyarrow as pa
from jaxtyping import Int, Int32

from workbench.io.errors import RequestError, nearest
from workbench.sites.settings import BosPolicy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKEN_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("sequence", pa.int64()),
        ("position", pa.int32()),
        ("document", pa.int64()),
        ("token_id", pa.int32()),
        ("token", pa.dictionary(pa.int32(), pa.string())),
        ("char_start", pa.int32()),
        ("char_end", pa.int32()),
        ("is_special", pa.bool_()),
    ]
)
"""Columns of every token table, in this order; columns of metadata and of labels follow them.

`row`, `sequence` and `document` count through the store, `position` from the sequence's first token. `char_start` and
`char_end` are offsets into the document's text, null where there is none.
"""

_COMPARED_TOKENS = 1000
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class AddedTokens:
    """Token ids around a text that are not part of the text."""

    prefix: tuple[int, ...] = ()
    """At the beginning of every sequence."""
    suffix: tuple[int, ...] = ()
    """After the last token of a document."""


@dataclass(frozen=True)
class Encoding:
    """The tokens of one text, without added ones. Offsets count characters; -1 where the tokenizer has none."""

    ids: Int32[np.ndarray, " position"]
    char_start: Int32[np.ndarray, " position"]
    char_end: Int32[np.ndarray, " position"]


def added_tokens(tokenizer: PreTrainedTokenizerBase | None, bos: BosPolicy) -> AddedTokens:
    """Returns the tokens to add around a text. Without a tokenizer there are none: token ids are used as they are.

    Args:
        tokenizer: The model's.
        bos: "model": those that the tokenizer adds by itself, found by encoding a short text with and without special
            tokens, since configuration files and behaviour disagree. "always": the same, with BOS in front of them
            if they do not begin with it. "never": none.

    Raises:
        RequestError: "always", and the tokenizer has no BOS.
    """
    if tokenizer is None or bos == "never":
        return AddedTokens()
    added = _find_added_tokens(tokenizer)
    if bos == "model":
        return added
    bos_id = tokenizer.bos_token_id
    if not isinstance(bos_id, int):
        raise RequestError("bos='always', but the tokenizer has no BOS token; use bos='model' or bos='never'")
    return added if added.prefix[:1] == (bos_id,) else AddedTokens((bos_id, *added.prefix), added.suffix)


def token_texts(tokenizer: PreTrainedTokenizerBase | None, ids: Int[np.ndarray, " token"] | Sequence[int]) -> list[str]:
    """Returns the text of each token within a text, its leading space included: " Monday", "\\n", "ing".

    SentencePiece and WordPiece decoders treat the first token of a text differently, so each token is decoded
    after an ordinary one. Parts of a character ("<0xE2>", "â") and special tokens ("<s>") have their name in the
    vocabulary. Ids outside of the vocabulary give "<50300>"; without a tokenizer, id 7 gives "7".
    Two ids may share a text. Cost: one decoding each, 3 us, 10 us by a tokenizer with code of its own.
    """
    ids = [int(token_id) for token_id in ids]
    if tokenizer is None:
        return [str(token_id) for token_id in ids]
    anchor = _anchor(tokenizer)
    anchored = _decode(tokenizer, anchor)
    special = set(tokenizer.all_special_ids)
    known = len(tokenizer)
    pieces = [tokenizer.convert_ids_to_tokens(token_id) if token_id < known else None for token_id in ids]
    named = [token_id for token_id, piece in zip(ids, pieces, strict=True) if piece is not None]
    decoded = dict(zip(named, _decode_all(tokenizer, [[*anchor, token_id] for token_id in named]), strict=True))
    texts = []
    for token_id, piece in zip(ids, pieces, strict=True):
        if piece is None:
            texts.append(f"<{token_id}>")
            continue
        text = decoded[token_id]
        # False where the anchor is one byte and part of a character follows: the two do not make a character.
        text = text[len(anchored) :] if text.startswith(anchored) else _decode(tokenizer, [token_id])
        texts.append(piece if token_id in special or "\ufffd" in text else text)
    return texts


def special_ids(tokenizer: PreTrainedTokenizerBase | None, added: AddedTokens) -> frozenset[int]:
    """Returns the ids that are not text: special tokens and added ones.

    <unk> is text that the vocabulary lacks, so it is not special, unless it is also BOS or EOS, as in GPT-2.
    """
    if tokenizer is None:
        return frozenset()
    names = tokenizer.special_tokens_map

    def ids(*kinds: str) -> set[int]:
        return {cast("int", tokenizer.convert_tokens_to_ids(names[kind])) for kind in kinds if kind in names}

    special = set(tokenizer.all_special_ids) - (ids("unk_token") - ids("bos_token", "eos_token"))
    return frozenset(special).union(added.prefix, added.suffix)


def with_whole_offsets(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Returns the tokenizer, or a copy of it whose offsets include the white space of each token where it trims them.

    Byte-level tokenizers may trim the offsets of " the" to those of "the" (RoBERTa's, and the default of the library):
    a token of white space alone then has no character. Token ids are the same.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    post = getattr(backend, "post_processor", None)
    if post is None or b'"trim_offsets":true' not in bytes(post.__getstate__()):
        return tokenizer
    from tokenizers import processors

    whole = copy.deepcopy(tokenizer)
    # it added tokens and trimmed offsets; the first is not needed here
    whole.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])  # pyright: ignore
    return whole


def replace_surrogates(text: str) -> tuple[str, int]:
    """Returns `text` with U+FFFD for each lone surrogate, so that it can be encoded, and their number."""
    return _SURROGATE.subn("\ufffd", text)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Encoding]:
    """Tokenizes texts in one call, without added tokens. RequestError where the tokenizer cannot."""
    offsets = getattr(tokenizer, "is_fast", False)
    try:
        encoded = tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=offsets,
            verbose=False,  # or it warns about every text longer than the model's limit
        )
    except Exception as error:  # `tokenizers` raises bare Exception, for example where a vocabulary lacks <unk>
        raise RequestError(f"the tokenizer cannot encode the texts: {error}") from error
    spans = encoded["offset_mapping"] if offsets else [[(-1, -1)] * len(ids) for ids in encoded["input_ids"]]
    return [_encoding(ids, span) for ids, span in zip(encoded["input_ids"], spans, strict=True)]


def token_of_text(tokenizer: PreTrainedTokenizerBase, vocab: int, text: str, name: str = "tokens") -> int:
    """Returns the id of the token with a text, as `token_texts` gives it: " Monday" with its leading space.

    Of several tokens with one text, the one that the tokenizer writes for it.

    Args:
        tokenizer: The model's.
        vocab: Number of token ids of the model.
        text: Text of the token.
        name: What the caller calls the token, for messages.

    Raises:
        RequestError: No token has the text, or several have it and the tokenizer writes none of them.
    """
    written = encode(tokenizer, [text])[0].ids
    if len(written) == 1 and token_texts(tokenizer, written) == [text]:
        return int(written[0])
    known = token_texts(tokenizer, range(vocab))
    ids = [index for index, token in enumerate(known) if token == text]
    if len(ids) == 1:
        return ids[0]
    if ids:
        raise RequestError(
            f"{name}: {len(ids)} tokens have the text {text!r} ({', '.join(map(str, ids[:5]))}), and the tokenizer "
            "writes none of them; name another token"
        )
    raise RequestError(f"{name}: {text!r} is no single token of this model{nearest(text, known)}")


def same_tokens(tokenizer: PreTrainedTokenizerBase, twin: PreTrainedTokenizerBase) -> bool:
    """Returns True where both have the same special tokens, and the same texts and encodings of a thousand tokens."""
    special = sorted(tokenizer.all_special_ids)
    ids = [*special, *range(0, len(tokenizer), max(1, len(tokenizer) // _COMPARED_TOKENS))]
    texts = token_texts(tokenizer, ids)
    return (
        special == sorted(twin.all_special_ids)
        and texts == token_texts(twin, ids)
        and _decoded(tokenizer, ids) == _decoded(twin, ids)
        and _encoded(tokenizer, texts) == _encoded(twin, texts)
    )


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> list[str]:
    return list(tokenizer.batch_decode([[token_id] for token_id in ids]))


def _encoded(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    samples = [*("«" + text for text in texts), "".join(texts)]
    encodings = (tokenizer(samples, add_special_tokens=add, verbose=False)["input_ids"] for add in (True, False))
    return [list(ids) for encoded in encodings for ids in encoded]


def _encoding(ids: list[int], spans: list[tuple[int, int]]) -> Encoding:
    # fromiter over a flat chain: np.array on a list of pairs is fifteen times slower
    flat = np.fromiter(chain.from_iterable(spans), np.int32, 2 * len(ids)).reshape(-1, 2)
    return Encoding(np.array(ids, np.int32), flat[:, 0].copy(), flat[:, 1].copy())


def _find_added_tokens(tokenizer: PreTrainedTokenizerBase) -> AddedTokens:
    for text in _plain_texts(tokenizer):
        plain = _ids(tokenizer, text)
        full = _ids(tokenizer, text, add_special_tokens=True)
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return AddedTokens(tuple(full[:start]), tuple(full[start + len(plain) :]))
    raise RequestError(
        "the tokens that the tokenizer adds around a text cannot be found; use bos='never', or pass token ids"
    )


def _plain_texts(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Short texts with at least one token: letters, then the first entries of the vocabulary."""
    special = set(tokenizer.all_special_ids)
    first_of_vocabulary = (_decode(tokenizer, [i]) for i in range(min(len(tokenizer), 1000)) if i not in special)
    for text in chain("ae0", first_of_vocabulary):
        if _ids(tokenizer, text):
            yield text


def _anchor(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """An ordinary token, after which others are decoded; none where the vocabulary has no complete one."""
    for text in _plain_texts(tokenizer):
        anchor = _ids(tokenizer, text)[-1]
        if anchor not in tokenizer.all_special_ids and _decode(tokenizer, [anchor]) == text:
            return [anchor]
    return []


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = False) -> list[int]:
    try:
        return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
    except Exception:  # a vocabulary without this letter and without <unk>; see `encode`
        return []


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _decode_all(tokenizer: PreTrainedTokenizerBase, sequences: list[list[int]]) -> list[str]:
    """The text of each sequence: by one call of the library below, where the tokenizer's class adds nothing to it."""
    from transformers import PreTrainedTokenizerFast  # takes seconds

    plain = PreTrainedTokenizerFast
    if (
        isinstance(tokenizer, plain)
        and type(tokenizer)._decode is plain._decode
        and type(tokenizer).decode is plain.decode
    ):
        return list(tokenizer.backend_tokenizer.decode_batch(sequences, skip_special_tokens=False))
    return [_decode(tokenizer, ids) for ids in sequences]
