"""Effect of a shift of nouns along axes between opposite words on the next word."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int

from workbench.analysis.poles import NOUNS
from workbench.analysis.weights_probe import Vocabulary, require_rows
from workbench.io.errors import RequestError
from workbench.model.forward import run
from workbench.model.intervene import intervene
from workbench.model.load import Model
from workbench.model.row_records import Add


def axis_effects(
    model: Model,
    vocabulary: Vocabulary,
    pairs: Sequence[Int[np.ndarray, "_ 2"]],
    directions: Float[np.ndarray, "axis d"],
    strength: float,
) -> Float[np.ndarray, "axis other_axis"]:
    """Returns how a shift of nouns along an axis changes the log-odds of another axis's poles as the next word.

    In "This is a NOUN. It is very", the noun's embedding moves by `strength` times its norm; half the difference
    between a shift up and one down, the mean over nouns and pairs, in nats. Costs 2 passes over 100 tokens an axis.

    Raises:
        RequestError: Fewer than three of the nouns are single tokens, or the tokenizer cannot write the prompt.
    """
    words = {vocabulary.texts[id]: int(id) for id in np.flatnonzero(vocabulary.ordinary)[::-1]}
    nouns = [words[" " + noun] for noun in NOUNS if " " + noun in words]
    tokenizer = vocabulary.tokenizer
    before = list(tokenizer("This is a")["input_ids"])
    after = list(tokenizer(". It is very", add_special_tokens=False)["input_ids"])
    if len(nouns) < 3 or not before or not after:
        number = len(nouns)
        raise RequestError(f"{number} of the nouns of the prompt are single tokens; the effect needs 3; set strength=0")
    end = model.tokenizer.eos_token_id if model.tokenizer is not None else None
    before = before[:-1] if before[-1] == end and len(before) > 1 else before  # T5-like tokenizers end every text
    require_rows(model, [*before, *after], "set strength=0")
    ids = torch.tensor([[*before, noun, *after] for noun in nouns])
    odds = []
    for direction in directions:
        effects = []
        for sign in (1.0, -1.0):
            step = torch.tensor(direction, dtype=torch.float32)
            with intervene(model, Add("embed", step, scale=sign * strength, unit="norm", at=len(before))):
                logits = run(model.module, ids, torch.ones_like(ids)).logits[:, -1].double().cpu().numpy()
            effects.append([(logits[:, poles[:, 0]] - logits[:, poles[:, 1]]).mean() for poles in pairs])
        odds.append((np.array(effects[0]) - np.array(effects[1])) / 2)
    return np.stack(odds)
