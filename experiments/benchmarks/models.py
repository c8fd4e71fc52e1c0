"""Inputs of the benchmarks: GPT-2 shapes with random weights, token ids, the folder with trained models."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import workbench as wb

SHARED = Path(__file__).parents[3] / "shared"
"""Trained models and corpora, beside the checkout."""


def gpt2(layers: int = 12, positions: int = 1024) -> GPT2LMHeadModel:
    """Returns a GPT-2 of 768 dimensions, 12 heads and 50,257 tokens: random weights, float32, on the CPU."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_positions=positions, architectures=["GPT2LMHeadModel"])
    return GPT2LMHeadModel(config).eval()


def token_ids(sequences: int, context: int, vocab: int = 50257) -> Int64[np.ndarray, "sequence position"]:
    """Returns random token ids, the same at each call."""
    return np.random.default_rng(0).integers(0, vocab, (sequences, context))


def tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of two tokens, for libraries that require one."""
    words = Tokenizer(WordLevel({"<s>": 0, "?": 1}, unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<s>", unk_token="?")


@dataclass(frozen=True)
class Rate:
    """Rows per second."""

    clock: float
    processor: float
    """Of processor time, all threads."""


def record(
    model: wb.Model, ids: Int64[np.ndarray, "sequence position"], out: Path, **settings: Any
) -> tuple[Rate, Rate]:
    """Records `ids` with `wb.record`.

    Returns:
        The rate from the first forward pass to the committed store, the limit for a long recording; and the rate of the
        whole call, with planning, the fingerprint of the weights and the stored unembedding.
    """
    passes: list[tuple[float, float]] = []

    def clocks() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def note(_module, _args, arguments):
        if arguments["input_ids"].numel() > 22:  # smaller are the passes that look for sites, identity and unembedding
            passes.append(clocks())

    def rate(since: tuple[float, float]) -> Rate:
        return Rate(*(ids.size / (stop - start) for stop, start in zip(end, since, strict=True)))

    handle = model.module.register_forward_pre_hook(note, with_kwargs=True)
    began = clocks()
    try:
        wb.record(model, ids.tolist(), out=out, context=ids.shape[1], show_progress=False, **settings)
    finally:
        handle.remove()
    end = clocks()
    return rate(passes[0]), rate(began)


def forward(module: torch.nn.Module, ids: Int64[np.ndarray, "sequence position"], batch: int) -> None:
    """Runs `module` over `ids`, `batch` sequences at a time, and discards the output."""
    with torch.inference_mode():
        for rows in torch.from_numpy(ids).split(batch):
            module(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False)
