"""Prompts that ask a model to repeat one token, and the probability that it does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.analysis.weights_probe import require_rows
from workbench.corpus.tokenizer import added_tokens
from workbench.io.counted import counted
from workbench.io.errors import RequestError
from workbench.io.progress import progress
from workbench.io.torch_state import plain_torch
from workbench.model.forward import generating
from workbench.model.load import Model, batch_tokens, end_tokens

_WORDS = "river apple seven garden house yellow winter paper stone music window horse salt bridge cloud spoon letter "
_WORDS += "forest button island"
_REPEATS, _POSITIONS, _LEAST = 50, 3, 4
_HOLE = None


@plain_torch()
def repetition_probabilities(model: Model, tokens: Int[np.ndarray, " token"]) -> dict[str, Float[np.ndarray, " token"]]:
    """Returns, for each of three prompts, the largest probability of each token at the next 3 positions.

    "copy": twenty pairs of equal quoted words, then the token in quotes; "explain": a question about the token whose
    answer begins to quote it; "repeat": the token 50 times. The model continues greedily. Prompts are put together from
    token ids, so that the token is not tokenized anew. Costs a pass over about 220 positions for each token and two
    more positions with the model's cache.

    Args:
        model: A model with a tokenizer.
        tokens: Token ids.

    Raises:
        RequestError: The model does not generate text, the tokenizer cannot write the prompts in its vocabulary, or its
            context is too short for them.
    """
    if not hasattr(model.module, "generate") or not model.site_map.causal:
        raise RequestError(
            f"model {model.name!r} does not generate text, which verifies tokens; set tested=0 for the list alone"
        )
    templates, values = _templates(model), {}
    with progress("under-trained tokens", len(tokens) * len(templates), "prompts") as tick:
        for name, template in templates.items():
            ids, values[name] = _filled(template, tokens), np.empty(len(tokens))
            size = max(1, batch_tokens(model) // ids.shape[1])
            for start in range(0, len(tokens), size):
                part = slice(start, start + size)
                values[name][part] = _largest(model, ids[part], tokens[part])
                tick(len(ids[part]))
    return values


def _templates(model: Model) -> dict[str, list[int | None]]:
    """Ids of each prompt; None stands for the token."""
    prefix = list(added_tokens(model.tokenizer, "model").prefix)
    pairs = [f'"{word}" "{word}"\n' for word in _WORDS.split()]
    limit = (model.context_limit or 10**9) - _POSITIONS
    ask = [*_ids(model, '\n"'), _HOLE, *_ids(model, '" "')]
    copy = [*prefix, *_ids(model, "".join(pairs)[:-1]), *ask]
    while len(copy) > limit and len(pairs) > _LEAST:
        pairs = pairs[1:]
        copy = [*prefix, *_ids(model, "".join(pairs)[:-1]), *ask]
    question = 'Question: What does the text "', '" mean?\nAnswer: The text "'
    explain = [*prefix, *_ids(model, question[0]), _HOLE, *_ids(model, question[1])]
    repeat = [*prefix, *[_HOLE] * min(_REPEATS, limit - len(prefix))]
    templates = {"copy": copy, "explain": explain, "repeat": repeat}
    if longest := [len(template) for template in templates.values() if len(template) > limit]:
        raise RequestError(
            f"the prompts of the verification have up to {counted(max(longest), 'token')}, and the context of model "
            f"{model.name!r} is {limit + _POSITIONS}; set tested=0"
        )
    require_rows(model, (id for template in templates.values() for id in template if id is not None), "set tested=0")
    return templates


def _ids(model: Model, text: str) -> list[int]:
    ids = list(model.tokenizer(text, add_special_tokens=False)["input_ids"]) if model.tokenizer else []
    if not ids:
        raise RequestError(f"the tokenizer of model {model.name!r} cannot write {text!r}; set tested=0")
    return ids


def _filled(template: Sequence[int | None], tokens: Int[np.ndarray, " token"]) -> Int[Tensor, "token position"]:
    ids = torch.tensor([0 if id is _HOLE else id for id in template]).repeat(len(tokens), 1)
    ids[:, [id is _HOLE for id in template]] = torch.as_tensor(tokens)[:, None]
    return ids


def _largest(model: Model, ids: Tensor, tokens: Int[np.ndarray, " token"]) -> Float[np.ndarray, " token"]:
    """Largest probability of each token over the positions that are generated."""
    ends = end_tokens(model)
    with generating(model.module):
        output = model.module.generate(  # pyright: ignore[reportCallIssue]
            input_ids=ids.to(model.device),
            attention_mask=torch.ones_like(ids).to(model.device),
            max_new_tokens=_POSITIONS,
            min_new_tokens=_POSITIONS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=ends or None,
            pad_token_id=(ends or [0])[0],
        )
    index = torch.as_tensor(tokens)[:, None]
    logs = [step.float().cpu().log_softmax(-1).gather(1, index)[:, 0] for step in output.logits]
    return torch.stack(logs).max(0).values.double().exp().numpy()
