"""Train the demo's tokenizer and model: `python -m workbench.experiments.demo_model.train --out DIR [--seed 0]`.

A step takes about a second on one CPU core, and two seeds can be trained at the same time. A stopped run resumes from
its last checkpoint, and the same seed gives the same losses on the same machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaAttention

from workbench.experiments.demo_model.corpus import document
from workbench.experiments.demo_model.tokenizer import train_tokenizer
from workbench.io.errors import RequestError
from workbench.io.progress import progress

RANDOM_REPEATS = "random repeats"
"""Domain of token ids alone: random tokens, repeated. Induction heads form on it."""
PERIODS = (3, 64)
"""Range of the number of those tokens, log-uniform."""

PREVIOUS_HEADS = 2
"""Number of heads of block 0 that attend to the previous token at initialisation."""
COPYING_BLOCKS = slice(1, 3)
"""Blocks whose heads copy the tokens they attend to at initialisation."""
FAR_BLOCKS = slice(2, None)
"""Blocks whose heads prefer distant tokens at initialisation."""
FAR = 0.75
"""Amount that each RoPE pair subtracts there from the attention logit of a token on itself."""


@dataclass(frozen=True)
class Recipe:
    """All settings that determine the weights, on a given machine."""

    seed: int = 0
    steps: int = 3000
    batch: int = 8
    """Sequences per step."""
    context: int = 256
    """Tokens per sequence, including BOS."""
    layers: int = 4
    heads: int = 8
    d_model: int = 256
    d_mlp: int = 576
    learning_rate: float = 1e-3
    """AdamW learning rate after `warmup` steps, decayed to a tenth by a cosine."""
    warmup: int = 100
    weight_decay: float = 0.1
    threads: int = 1
    """CPU threads; another number sums in another order, and the losses diverge."""
    shares: tuple[tuple[str, float], ...] = (
        ("story", 0.16),
        ("facts", 0.08),
        ("lists", 0.22),
        ("copy", 0.14),
        ("backcopy", 0.18),
        (RANDOM_REPEATS, 0.22),
    )
    """Share of each domain in the sequences."""


def read_recipe(training: Path) -> Recipe:
    """Returns the recipe in a `training.json`."""
    known = json.loads(training.read_text())["recipe"]
    return Recipe(**known | {"shares": tuple(map(tuple, known["shares"]))})


def sequences(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, step: int) -> Int[Tensor, "sequence position"]:
    """Returns the token ids of a step. They depend on seed and step alone, so a run can resume at any step."""
    draw = Random(f"{recipe.seed}:{step}")
    domains = draw.choices(*zip(*recipe.shares, strict=True), k=recipe.batch)
    return torch.tensor([_sequence(domain, recipe.context, tokenizer, draw) for domain in domains])


def _sequence(domain: str, context: int, tokenizer: PreTrainedTokenizerFast, draw: Random) -> list[int]:
    if domain == RANDOM_REPEATS:
        period = round(math.exp(draw.uniform(*map(math.log, PERIODS))))
        ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
        return [tokenizer.bos_token_id, *draw.sample(ordinary, period) * (context // period + 1)][:context]
    characters, body = 4 * context, []
    while len(body) < context:
        body = tokenizer(document(domain, draw, characters).text, add_special_tokens=False)["input_ids"]
        characters *= 2
    return [tokenizer.bos_token_id, *body][:context]


def build(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Returns the model before its first step: random weights, embeddings at 1/sqrt(d_model), and three structures.

    - An induction head needs a previous-token head in a lower block: `_attend_to_previous`, in block 0. That block must
      not copy: with tied embeddings its output for the previous token would equal that for the token itself.
    - An induction head must itself copy, as all heads of some later blocks do at initialisation: W_O = W_V^T (mimetic
      initialisation, Trockman & Kolter, arXiv 2305.09828).
    - A copying head can attend to its own token, which changes little, and then needs no sink. The heads of the last
      blocks therefore prefer distant tokens: `_prefer_far`.
    """
    torch.manual_seed(recipe.seed)
    bos = tokenizer.bos_token_id
    assert isinstance(bos, int)  # train_tokenizer sets it
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=recipe.context,
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        attention_bias=True,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    attentions = [module for module in model.modules() if isinstance(module, LlamaAttention)]
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(std=recipe.d_model**-0.5)
        for attention in attentions[COPYING_BLOCKS]:
            value = attention.v_proj.weight.normal_(std=recipe.d_model**-0.5)
            attention.o_proj.weight.copy_(value.T)
        _attend_to_previous(attentions[0], model.model.rotary_emb.inv_freq)
        for attention in attentions[FAR_BLOCKS]:
            _prefer_far(attention)
    return model


def _attend_to_previous(
    attention: LlamaAttention, frequencies: Float[Tensor, " frequency"], size: float = 5.0, used: int = 4
) -> None:
    """Sets biases of the first heads' queries and keys that match best where the key is one position before the query.

    RoPE turns the pair (i, i + d_head / 2) by position x frequency i. The key's pairs point along the first axis, the
    query's are turned back by one position; `used` of the highest frequencies tell neighbours apart.
    """
    query, key = torch.zeros(attention.head_dim), torch.zeros(attention.head_dim)
    fast, second = frequencies[:used], attention.head_dim // 2
    key[:used] = size
    query[:used] = size * fast.cos()
    query[second : second + used] = -size * fast.sin()
    heads = PREVIOUS_HEADS * attention.head_dim
    attention.q_proj.bias[:heads] = query.repeat(PREVIOUS_HEADS)
    attention.k_proj.bias[:heads] = key.repeat(PREVIOUS_HEADS)


def _prefer_far(attention: LlamaAttention) -> None:
    """Sets biases of queries and keys that subtract FAR x cos(distance x frequency) from the logit, for each RoPE pair:
    most from the token itself and its neighbours."""
    size = (FAR * attention.head_dim**0.5) ** 0.5
    for bias, sign in ((attention.q_proj.bias, -1), (attention.k_proj.bias, 1)):
        bias.view(-1, 2, attention.head_dim // 2)[:, 0] = sign * size


def train(recipe: Recipe, out: Path, *, checkpoint_steps: int = 100, snapshots: int = 10) -> list[float]:
    """Trains, writes `out`/model and `out`/training.json, and returns the loss of every step, in nats per token.

    Takes up a run of the same recipe that was stopped. Raises RequestError where `out` holds one of another.

    Args:
        recipe: What decides the weights.
        out: Folder of the run.
        checkpoint_steps: Steps after which the state of the run is saved again.
        snapshots: Number of models in folders `out`/step-N, after equal numbers of steps; the last is the result.
            `out`/step-0 is the model before its first step.
    """
    torch.set_num_threads(recipe.threads)
    tokenizer = train_tokenizer(seed=0)
    model = build(recipe, tokenizer).train()
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.975),
        fused=True,
    )
    checkpoint = out / "checkpoint.safetensors"
    curve = _resume(checkpoint, recipe, model, optimizer) if checkpoint.exists() else []
    out.mkdir(parents=True, exist_ok=True)
    if not curve:
        _save(model, tokenizer, out / "step-0")
    with progress("training", recipe.steps, "steps", initial=len(curve)) as tick:
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
            tick(1)
            if (step + 1) % checkpoint_steps == 0:
                _checkpoint(checkpoint, recipe, model, optimizer, curve)
            if (step + 1) * snapshots // recipe.steps > step * snapshots // recipe.steps:
                _save(model, tokenizer, out / f"step-{step + 1}")
    _save(model, tokenizer, out / "model")
    (out / "training.json").write_text(
        json.dumps({"recipe": asdict(recipe), "loss": [round(nats, 5) for nats in curve]})
    )
    return curve


def _rate(step: int, recipe: Recipe) -> float:
    """Returns the share of the full learning rate."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    decay = (step - recipe.warmup) / (recipe.steps - recipe.warmup)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * decay)) / 2


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves weights in fp16, to be loaded as fp32: half the bytes, and no slow half-precision products on a CPU."""
    copy.deepcopy(model).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")


def _checkpoint(path: Path, recipe: Recipe, model: nn.Module, optimizer: Optimizer, curve: list[float]) -> None:
    """Saves weights and the optimizer's moments; no random state, since a step's number determines its texts."""
    tensors: dict[str, Tensor] = {f"weight.{name}": weight for name, weight in model.named_parameters()}
    for name, weight in model.named_parameters():
        tensors |= {f"{moment}.{name}": value for moment, value in optimizer.state[weight].items()}
    fresh = path.with_suffix(".partial")
    save_file(tensors, fresh, {"recipe": json.dumps(asdict(recipe)), "loss": json.dumps(curve)})
    fresh.replace(path)


def _resume(path: Path, recipe: Recipe, model: nn.Module, optimizer: Optimizer) -> list[float]:
    """Restores what `_checkpoint` wrote and returns the losses until then."""
    with safe_open(path, "pt") as file, torch.no_grad():
        known, request = json.loads(file.metadata()["recipe"]), json.loads(json.dumps(asdict(recipe)))
        if differs := [name for name in {**request, **known} if known.get(name) != request.get(name)]:
            raise RequestError(
                f"out {str(path.parent)!r} holds a run with another {', '.join(differs)}; choose another folder"
            )
        for name, weight in model.named_parameters():
            weight.copy_(file.get_tensor(f"weight.{name}"))
            moments = ("step", "exp_avg", "exp_avg_sq")
            optimizer.state[weight] = {moment: file.get_tensor(f"{moment}.{name}") for moment in moments}
        return json.loads(file.metadata()["loss"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains the demo's model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    for name in ("seed", "steps", "batch", "learning_rate", "weight_decay", "heads", "threads"):
        default = getattr(Recipe, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    request = vars(parser.parse_args(arguments))
    out = request.pop("out")
    train(Recipe(**request), out)


if __name__ == "__main__":
    main()
