"""The final norm at a fixed scale: then each logit is a sum over what the parts of the model added to the stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from workbench.io.checks import check
from workbench.io.counted import counted
from workbench.io.errors import RequestError, nearest

if TYPE_CHECKING:
    from workbench.model.unembed import Unembed


def read_directions(
    unembed: Unembed, stream: Float[Tensor, "*row d_model"], w: Float[Tensor, "*#row d_model"]
) -> Float64[Tensor, "*row d_model"]:
    """Returns u such that x . u is the contribution of a part x of the stream to w . logits, at the stream's own scale.

    For an RMS norm u = m (w * g) / s with the gain g, the scale s of the row, and the model's factor m of its logits;
    for a layer norm u is centred, which is the same as centring x. Computed in float64.

    Args:
        unembed: Final norm and unembedding.
        stream: Last residual stream, which sets the scale.
        w: Combination of rows of W_U, such as w_a - w_b for a logit difference.
    """
    stream, u = stream.double(), unembed.scale * w.double() * unembed.gain.double()
    if unembed.norm == "layer":
        stream, u = stream - stream.mean(-1, keepdim=True), u - u.mean(-1, keepdim=True)
    if unembed.norm == "none":
        return u.expand(stream.shape)
    return u * torch.rsqrt(stream.square().mean(-1, keepdim=True) + unembed.eps)


def norm_bias(unembed: Unembed, w: Float[Tensor, "*row d_model"]) -> Float64[Tensor, " *row"]:
    """Returns the contribution of the final norm's bias, which is 0 for a norm without one."""
    return unembed.scale * (w.double() @ unembed.shift.double())


def frozen_logits(
    unembed: Unembed, stream: Float[Tensor, "row d_model"], x: Float[Tensor, "row d_model"]
) -> Float64[Tensor, "row vocab"]:
    """Returns the logits of `x` with the scale that the final norm has for `stream`, soft-cap included, in float64."""
    stream, x = stream.double().cpu(), x.double().cpu()
    if unembed.norm == "layer":
        stream, x = stream - stream.mean(-1, keepdim=True), x - x.mean(-1, keepdim=True)
    if unembed.norm != "none":
        x = x * torch.rsqrt(stream.square().mean(-1, keepdim=True) + unembed.eps)
    normed = x * unembed.gain.double().cpu() + unembed.shift.double().cpu()
    logits = normed @ unembed.weight.double().cpu().T
    if unembed.bias is not None:
        logits = logits + unembed.bias.double().cpu()
    logits = unembed.scale * logits
    return logits if unembed.softcap is None else unembed.softcap * torch.tanh(logits / unembed.softcap)


def token_id(unembed: Unembed, token: str | int, name: str = "tokens") -> int:
    """Returns the id of a token, given as text or as id.

    Args:
        unembed: Unembedding, which has the texts of the vocabulary.
        token: Text or id.
        name: What the caller calls the token.

    Raises:
        RequestError: No or several tokens have this text, or there is no such id.
    """
    if isinstance(token, int | np.integer):
        check(name, token, at_least=0, at_most=unembed.vocab - 1, whole=True)
        return int(token)
    texts = vocabulary_texts(unembed)
    matches = [index for index, text in enumerate(texts) if text == token]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise RequestError(
            f"{name}: {counted(len(matches), 'token')} have this text: {', '.join(map(str, matches[:5]))}; give the id"
        )
    close = nearest(token, texts) if unembed.tokens else "; the model has no tokenizer, so id 7 is the token '7'"
    raise RequestError(f"{name}: {token!r} is no single token{close}")


def vocabulary_texts(unembed: Unembed) -> Sequence[str]:
    """Returns the text of every token of the vocabulary; without a tokenizer its id, as in a store's token table."""
    return unembed.tokens or tuple(map(str, range(unembed.vocab)))


def single_tokens(texts: Iterable[str]) -> dict[str, int]:
    """Returns the id of each text that exactly one token has, given the texts of the vocabulary in order."""
    texts = list(texts)
    counts = Counter(texts)
    return {text: index for index, text in enumerate(texts) if counts[text] == 1}


def ids_of_values(values: Iterable[Any], by_text: Mapping[str, int]) -> Int64[np.ndarray, " value"]:
    """Returns the token that each value of a column names, by `single_tokens`; -1 for none, and for a missing value."""
    return np.array([-1 if pd.isna(value) else by_text.get(str(value), -1) for value in values], np.int64)


def token_ids(unembed: Unembed, tokens: Sequence[str | int]) -> list[int]:
    """Returns the ids of tokens, each of them given as text or as id; see `token_id`."""
    if not tokens:
        raise RequestError("tokens is empty; name one or more, or leave it out")
    return [token_id(unembed, token) for token in tokens]
