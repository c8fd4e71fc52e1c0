"""Patchscopes: a hidden state of one text, put into a prompt of its own, and what the model says after it.

Ghandeharioun et al. 2024 (arXiv 2401.06102) put one state at the end of a few-shot prompt; Chen et al. 2024 (SelfIE,
arXiv 2403.10949) put it at several placeholders of an instruction. Both are one operation: positions of a target prompt
whose activation at a site becomes the state, and the model's own output after the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from workbench.corpus.tokenizer import added_tokens, encode, token_of_text, token_texts, with_whole_offsets
from workbench.io.checks import MOST, SEEDS, whole_number
from workbench.io.counted import counted
from workbench.io.errors import RequestError, shown
from workbench.io.torch_state import plain_torch
from workbench.model.forward import generating, run
from workbench.model.intervene import intervene
from workbench.model.load import Model, batch_tokens, end_tokens
from workbench.model.reload import recorded_model
from workbench.model.row_changes import changeable_place
from workbench.model.row_records import Set
from workbench.store.reader import Rows

IDENTITY_PROMPT = "cat->cat; 1124->1124; hello->hello; ?"
"""Prompt whose last token is replaced; the model repeats what it takes the state for."""

_LOGIT_BYTES = 128 << 20


@dataclass(frozen=True)
class TargetPrompt:
    """A prompt, and the positions at which a state takes the place of the activation."""

    text: str
    ids: tuple[int, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Patchscope:
    """Result of `patchscope`."""

    prompt: TargetPrompt
    source: str
    """Site that the states were read from."""
    into: str
    """Site of the prompt that they were put into."""
    table: pd.DataFrame
    """Columns row (-1: no state), token, kind ("row"; "random": a random state of the same norm; "none": the prompt as
    it is), top_token_1, top_probability_1, ..., log_probability of each of the asked tokens, and text, what the model
    generates."""


def target_prompt(model: Model, text: str, placeholder: str | None = None, new_tokens: int = 0) -> TargetPrompt:
    """Returns a prompt with the tokens of every occurrence of `placeholder`; None: its last token.

    Raises:
        RequestError: The model has no tokenizer, the prompt is empty, does not contain the placeholder, or leaves no
            room for new tokens in the model's context.
    """
    if model.tokenizer is None:
        raise RequestError(f"model {model.name!r} has no tokenizer, which a prompt needs")
    prefix = added_tokens(model.tokenizer, "model").prefix
    encoding = encode(with_whole_offsets(model.tokenizer), [text])[0]
    if not len(encoding.ids):
        raise RequestError("prompt is empty; give a text")
    if placeholder is None:
        inside = [len(encoding.ids) - 1]
    else:
        starts = [at for at in range(len(text)) if placeholder and text.startswith(placeholder, at)]
        ends = [(at, at + len(placeholder)) for at in starts]
        start, stop = encoding.char_start, encoding.char_end
        inside = [n for n in range(len(start)) if any(start[n] < end and stop[n] > first for first, end in ends)]
    if not inside:
        raise RequestError(f"placeholder {placeholder!r} is not in the prompt {text!r}; name a part of it")
    ids = (*prefix, *(int(id) for id in encoding.ids))
    if model.context_limit is not None and len(ids) + new_tokens > model.context_limit:
        after = f" and {new_tokens} new ones" if new_tokens else ""
        raise RequestError(
            f"prompt has {counted(len(ids), 'token')}{after}, and the context of model {model.name!r} "
            f"{model.context_limit}; "
            "give a shorter one"
        )
    return TargetPrompt(text, ids, tuple(len(prefix) + index for index in inside))


@plain_torch()
def read_states(
    model: Model, prompt: TargetPrompt, site: str, states: Float[Tensor, "row ..."]
) -> Float64[Tensor, "row vocab"]:
    """Returns ln P of every token after a prompt with each of the states at its placeholders, in float64.

    Costs one pass over row x prompt tokens.

    Args:
        model: The model.
        prompt: The prompt.
        site: Site whose activation becomes the state; one that `Set` can change.
        states: States of the site's shape.
    """
    length = len(prompt.ids)
    step = max(1, min(batch_tokens(model), _LOGIT_BYTES // (4 * model.vocab)) // length)
    parts = []
    for part in states.split(step):
        ids = torch.tensor([prompt.ids]).expand(len(part), -1)
        with intervene(model, Set(site, part, at=prompt.positions)):
            logits = run(model.module, ids, torch.ones_like(ids)).logits[:, -1]
        parts.append(logits.cpu().double().log_softmax(-1))
    return torch.cat(parts)


@plain_torch()
def patchscope(
    rows: Rows,
    site: str,
    prompt: str = IDENTITY_PROMPT,
    *,
    placeholder: str | None = None,
    into: str | None = None,
    tokens: Sequence[str] = (),
    top_k: int = 5,
    new_tokens: int = 0,
    model: Model | None = None,
    seed: int = 0,
    device: str | None = None,
) -> Patchscope:
    """Asks the model what it reads in recorded states: each is put into a prompt, and the model runs on from there.

    Beside each row stands a random state of the same norm, and once the prompt without any state: what both say is the
    prompt's, not the row's. Costs 2 passes over row x prompt tokens, and twice the generation.

    Args:
        rows: Rows of a store, such as `store.where("token = ' Monday'")[:20]`.
        site: Recorded site of the states, such as "resid_post.12".
        prompt: The target prompt.
        placeholder: Part of the prompt whose tokens, at every occurrence, take the state. None: its last token.
        into: Site of the prompt that takes the state. None: the same as `site`.
        tokens: Texts of tokens, with their leading space, whose log-probability is returned.
        top_k: Most probable tokens to return.
        new_tokens: Tokens to generate, greedily.
        model: The recorded model. None: it is loaded by the name that the store records.
        seed: Random seed of the random states.
        device: Device of a model that is loaded here. None: the GPU if there is one.

    Raises:
        RequestError: No row or one that is not finite, another model, a site that was not recorded, cannot be changed
            or has another shape, a placeholder that is not in the prompt, a prompt too long, or a token that is none.
    """
    top_k, seed = whole_number("top_k", top_k, at_least=1), whole_number("seed", seed, at_least=0, below=SEEDS)
    new_tokens = whole_number("new_tokens", new_tokens, at_least=0, at_most=MOST)
    _check_rows(rows)
    model = recorded_model(rows.store, model, device)
    target = target_prompt(model, prompt, placeholder, new_tokens)
    into = site if into is None else into
    states = _states(rows, model, site, into)
    if top_k > model.vocab:
        raise RequestError(f"top_k is {top_k} and the vocabulary has {model.vocab}; give at most that")
    assert model.tokenizer is not None  # target_prompt refuses it
    named_tokens = [tokens] if isinstance(tokens, str) else tokens
    token_ids = {text: token_of_text(model.tokenizer, model.vocab, text) for text in named_tokens}
    texts, lines = token_texts(model.tokenizer, rows.tokens["token_id"].to_numpy()), []
    for kind, values in (("row", states), ("random", random_states(states, seed))):
        logs = read_states(model, target, into, values)
        continuations = _generate(model, target, into, values, new_tokens)
        for number, row in enumerate(rows.ids.tolist()):
            cell = {"row": row, "token": texts[number], "kind": kind}
            lines.append(cell | _answer(model, logs[number], token_ids, top_k) | {"text": continuations[number]})
    continuations = _generate(model, target, into, None, new_tokens)
    lines.append({"row": -1, "token": "", "kind": "none"} | _answer(model, _plain(model, target), token_ids, top_k))
    lines[-1]["text"] = continuations[0]
    return Patchscope(target, site, into, pd.DataFrame(lines))


def _check_rows(rows: object) -> None:
    if not isinstance(rows, Rows):
        raise RequestError(f"rows must be rows of a store, such as store.where('position = 5'), not {shown(rows)}")
    if not len(rows):
        raise RequestError("rows: none is selected; choose others")


def _states(rows: Rows, model: Model, site: str, into: str) -> Float[Tensor, "row ..."]:
    """The states of the rows, if another site can take them."""
    states = rows[site].float()
    if lost_rows := int((~states.isfinite().flatten(1).all(1)).sum()):
        raise RequestError(f"rows: {lost_rows} of {len(rows)} have a NaN or infinite value at {site}; choose others")
    if (shape := changeable_place(model, into).shape) != tuple(states.shape[1:]):
        raise RequestError(f"into: a row of {into} has the shape {shape}, and one of {site} {tuple(states.shape[1:])}")
    return states


def _plain(model: Model, prompt: TargetPrompt) -> Float64[Tensor, " vocab"]:
    """Log-probabilities after the prompt as it is."""
    ids = torch.tensor([prompt.ids])
    return run(model.module, ids, torch.ones_like(ids)).logits[0, -1].cpu().double().log_softmax(-1)


def random_states(states: Float[Tensor, "row ..."], seed: int) -> Float[Tensor, "row ..."]:
    """Returns random states with the norm of each row."""
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(states.shape, generator=generator, device="cpu").flatten(1)
    norms = states.flatten(1).float().cpu().norm(dim=1, keepdim=True)
    return (noise * norms / noise.norm(dim=1, keepdim=True)).reshape(states.shape)


def first_token(model: Model, text: str) -> int:
    """Returns the id of the first token of a text. RequestError if the model has no tokenizer, or the text no token."""
    if model.tokenizer is None:
        raise RequestError(f"model {model.name!r} has no tokenizer, which words need")
    ids = encode(model.tokenizer, [text])[0].ids
    if not len(ids):
        raise RequestError(f"{text!r} has no token")
    return int(ids[0])


def _answer(model: Model, log: Float64[Tensor, " vocab"], token_ids: dict[str, int], top_k: int) -> dict[str, Any]:
    """Columns of one line: the most probable tokens, and the asked ones."""
    values, ids = log.topk(top_k)
    names = token_texts(model.tokenizer, ids.tolist())
    line: dict[str, Any] = {}
    for place, (name, value) in enumerate(zip(names, values.tolist(), strict=True), start=1):
        line |= {f"top_token_{place}": name, f"top_probability_{place}": float(np.exp(value))}
    return line | {f"log_probability{text}": float(log[index]) for text, index in token_ids.items()}


def _generate(
    model: Model, prompt: TargetPrompt, site: str, states: Float[Tensor, "row ..."] | None, new_tokens: int
) -> list[str]:
    """Greedy continuations of the prompt with each state, as texts; of the plain prompt for None."""
    rows = 1 if states is None else len(states)
    if not new_tokens:
        return [""] * rows
    texts, ends = [], end_tokens(model)
    for part in torch.arange(rows).split(16):
        ids = torch.tensor([prompt.ids]).expand(len(part), -1).to(model.device)
        settings: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": ends or None}
        settings |= {"attention_mask": torch.ones_like(ids), "pad_token_id": (ends or [0])[0]}
        with generating(model.module):
            if states is None:
                sequences = model.module.generate(input_ids=ids, **settings)  # pyright: ignore[reportCallIssue]
            else:
                with intervene(model, Set(site, states[part], at=prompt.positions)):
                    sequences = model.module.generate(input_ids=ids, **settings)  # pyright: ignore[reportCallIssue]
        assert model.tokenizer is not None
        new = sequences[:, ids.shape[1] :].cpu()
        texts += [model.tokenizer.decode(continuation.tolist(), skip_special_tokens=True) for continuation in new]
    return texts
