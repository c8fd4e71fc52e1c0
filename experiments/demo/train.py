"""Train the demo's tokenizer and model: `python -m experiments.demo.train --out runs/demo-0 [--seed 0]`.

Two CPU cores need about a second a step. A run that was stopped goes on from its last checkpoint, and the same seed
gives the same losses on the same machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from random import Random

import torch
from jaxtyping import Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from experiments.demo.corpus import document
from experiments.demo.tokenizer import train_tokenizer
from workbench.errors import RequestError
from workbench.progress import progress

RANDOM_REPEATS = "random repeats"
"""A domain of token ids alone: 3 to 64 random tokens in short phrases, said over and over, in order or in any order.

Induction heads form on it. The shortest lead there: attention spread over a few tokens teaches a head to copy, and only
a head that copies has something to gain from looking for the right place."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, besides the machine."""

    seed: int = 0
    steps: int = 1800
    batch: int = 16
    """Sequences a step."""
    context: int = 256
    """Tokens of a sequence, BOS included."""
    layers: int = 4
    heads: int = 8
    d_model: int = 256
    d_mlp: int = 576
    learning_rate: float = 2e-3
    """Reached after `warmup` steps, kept, and brought down to a tenth over the last fifth of the steps."""
    warmup: int = 100
    weight_decay: float = 0.1
    threads: int = 2
    """CPU threads: with another number sums are made in another order, and the losses drift apart."""
    shares: tuple[tuple[str, float], ...] = (
        ("story", 0.14),
        ("facts", 0.07),
        ("lists", 0.15),
        ("copy", 0.12),
        ("backcopy", 0.14),
        (RANDOM_REPEATS, 0.38),
    )
    """Domain to its share of the sequences."""


def read_recipe(training: Path) -> Recipe:
    """The recipe in a `training.json`."""
    known = json.loads(training.read_text())["recipe"]
    return Recipe(**known | {"shares": tuple(map(tuple, known["shares"]))})


def sequences(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, step: int) -> Int[Tensor, "sequence position"]:
    """The token ids of a step. They depend on seed and step alone, so that a run can be taken up anywhere."""
    draw = Random(f"{recipe.seed}:{step}")
    domains = draw.choices(*zip(*recipe.shares, strict=True), k=recipe.batch)
    return torch.tensor([_sequence(domain, recipe.context, tokenizer, draw) for domain in domains])


def _sequence(domain: str, context: int, tokenizer: PreTrainedTokenizerFast, draw: Random) -> list[int]:
    if domain == RANDOM_REPEATS:
        words = _random_tokens(tokenizer, draw, count=round(math.exp(draw.uniform(math.log(3), math.log(64)))))
        length = draw.randint(2, 8)
        phrases = [words[first : first + length] for first in range(0, len(words), length)]
        reordered = draw.random() < 0.5
        body = []
        while len(body) < context:
            body += chain.from_iterable(draw.sample(phrases, len(phrases)) if reordered else phrases)
    else:
        characters, body = 4 * context, []
        while len(body) < context:
            body = tokenizer(document(domain, draw, characters).text, add_special_tokens=False)["input_ids"]
            characters *= 2
    return [tokenizer.bos_token_id, *body][:context]


def _random_tokens(tokenizer: PreTrainedTokenizerFast, draw: Random, count: int) -> list[int]:
    """Different tokens, by Zipf's law over a fixed random order of the vocabulary.

    Circuits form on the frequent ones and the rare ones join them; with equal chances nothing forms for a long time.
    """
    ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    Random("frequencies").shuffle(ordinary)
    keys = [draw.random() ** rank for rank in range(1, len(ordinary) + 1)]  # weighted, without replacement
    return [ordinary[place] for place in sorted(range(len(keys)), key=keys.__getitem__, reverse=True)[:count]]


def build(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The model before its first step."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=recipe.context,
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # heads begin by copying, OV = W_V^T W_V; mimetic initialisation, Trockman & Kolter 2023
        for block in model.model.layers:
            value = block.self_attn.v_proj.weight.normal_(std=recipe.d_model**-0.5)
            block.self_attn.o_proj.weight.copy_(value.T)
    return model


def train(recipe: Recipe, out: Path, *, checkpoint_steps: int = 100) -> list[float]:
    """Train and write `out`/model and `out`/training.json; gives the loss of every step, in nats a token.

    Takes up a run of the same recipe that was stopped. Raises RequestError where `out` holds one of another.
    """
    torch.set_num_threads(recipe.threads)
    tokenizer = train_tokenizer(seed=0)
    model = build(recipe, tokenizer).train()
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    others = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    checkpoint = out / "checkpoint.safetensors"
    curve = _resume(checkpoint, recipe, model, optimizer) if checkpoint.exists() else []
    out.mkdir(parents=True, exist_ok=True)
    with progress("training", recipe.steps, "steps", done=len(curve)) as done:
        for step in range(len(curve), recipe.steps):
            ids = sequences(recipe, tokenizer, step)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _rate(step, recipe)
            loss = model(ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            curve.append(loss.item())
            done(1)
            if (step + 1) % checkpoint_steps == 0:
                _checkpoint(checkpoint, recipe, model, optimizer, curve)
    _save(model, tokenizer, out / "model")
    (out / "training.json").write_text(
        json.dumps({"recipe": asdict(recipe), "loss": [round(nats, 5) for nats in curve]})
    )
    return curve


def _rate(step: int, recipe: Recipe) -> float:
    """Share of the full learning rate."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    left = (recipe.steps - step) / (recipe.steps / 5)
    return 0.1 + 0.9 * min(1.0, left)


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Weights in fp16, to be loaded as fp32: half the bytes, and no slow half-precision products on a CPU."""
    copy.deepcopy(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")


def _checkpoint(path: Path, recipe: Recipe, model: nn.Module, optimizer: Optimizer, curve: list[float]) -> None:
    """Weights and the optimizer's moments; the random state needs none, since a step's texts follow from its number."""
    tensors = {f"weight.{name}": weight for name, weight in model.named_parameters()}
    for name, weight in model.named_parameters():
        tensors |= {f"{moment}.{name}": value for moment, value in optimizer.state[weight].items()}
    fresh = path.with_suffix(".partial")
    save_file(tensors, fresh, {"recipe": json.dumps(asdict(recipe)), "loss": json.dumps(curve)})
    fresh.replace(path)


def _resume(path: Path, recipe: Recipe, model: nn.Module, optimizer: Optimizer) -> list[float]:
    """Put back what `_checkpoint` wrote; gives the losses until then."""
    with safe_open(path, "pt") as file, torch.no_grad():
        known, asked = json.loads(file.metadata()["recipe"]), json.loads(json.dumps(asdict(recipe)))
        if differs := [name for name in {**asked, **known} if known.get(name) != asked.get(name)]:
            raise RequestError(
                f"out {str(path.parent)!r} holds a run with another {', '.join(differs)}; choose another folder"
            )
        for name, weight in model.named_parameters():
            weight.copy_(file.get_tensor(f"weight.{name}"))
            moments = ("step", "exp_avg", "exp_avg_sq")
            optimizer.state[weight] = {moment: file.get_tensor(f"{moment}.{name}") for moment in moments}
        return json.loads(file.metadata()["loss"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    for name in ("seed", "steps", "learning_rate", "weight_decay", "heads", "threads"):
        default = getattr(Recipe, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    asked = vars(parser.parse_args(arguments))
    out = asked.pop("out")
    train(Recipe(**asked), out)


if __name__ == "__main__":
    main()
