"""Generation: continuations of prompts as token ids that `record` takes, with prompt and generated tokens marked.

    texts = wb.generate(model, ["Once upon a time"], max_new_tokens=40, seed=0)
    texts.texts()                                            # the continuations
    store = wb.record(model, texts, sites=["resid_post"], out="runs/said.acts")
    store.where("generated AND step < 5")

The ids are recorded as they were generated, in one pass without a cache, whose states are those of the generation up to
rounding.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from workbench.corpus.chats import render_chats
from workbench.corpus.document import Document
from workbench.corpus.documents import CONTENT_COLUMNS
from workbench.corpus.layout import Layout, plan_sequences
from workbench.corpus.sources import Texts, read_documents
from workbench.corpus.tokenizer import AddedTokens, added_tokens
from workbench.corpus.values import Plain
from workbench.io.checks import MOST, SEEDS, as_path, check, check_fields, check_types, whole_number
from workbench.io.counted import counted
from workbench.io.errors import RequestError
from workbench.io.progress import progress
from workbench.io.saving import save_text
from workbench.io.torch_state import plain_torch
from workbench.model.forward import generating
from workbench.model.load import Model, check_model, end_tokens
from workbench.sites.settings import BosPolicy, Recording

_ADDED = ("prompt", "sample", "generated", "step", "prompt_tokens", "generation")
"""Columns that a recording of continuations adds, and facts of their file."""
_CONTENTS = CONTENT_COLUMNS.union([Recording.text_column])  # beside token ids, they would be the text
_COLDEST = 1e-6
"""Smallest temperature above 0."""


@dataclass(frozen=True)
class Sampling:
    """Settings of a generation, which the manifest of its recording keeps."""

    max_new_tokens: int
    """Most tokens after the prompt; fewer where the model ends the text."""
    temperature: float = 0.0
    """Divisor of the logits before tokens are drawn. 0: the most probable token at every step."""
    top_p: float = 1.0
    """Smallest set of tokens with this probability that is drawn from."""
    top_k: int | None = None
    """Number of tokens that are drawn from. None: all."""
    seed: int = 0
    """Random seed; a seed gives the same tokens on the same machine in batches of the same size."""

    def __post_init__(self) -> None:
        check_types(self)
        check_fields(self, "max_new_tokens", at_least=1)
        check_fields(self, "temperature", at_least=0, below=math.inf)
        if 0 < self.temperature < _COLDEST:  # logits divided by it are infinite
            raise RequestError(f"temperature is {self.temperature}; give 0 for the most probable token, or more")
        check_fields(self, "top_p", above=0, at_most=1)
        check_fields(self, "seed", at_least=0, below=SEEDS)
        check_fields(self, "top_k", at_least=1, optional=True)


@dataclass(frozen=True)
class Generation:
    """One continuation."""

    prompt: int
    """Number of the prompt, from 0."""
    sample: int
    """Number among the continuations of this prompt."""
    token_ids: tuple[int, ...]
    """Prompt and continuation; the token that ends the text included."""
    prompt_tokens: int
    """Number of ids of the prompt."""
    metadata: Mapping[str, Plain] = field(default_factory=dict, compare=False)
    """Columns of the prompt, which its recording has too."""


@dataclass(frozen=True, repr=False)
class Generations:
    """Continuations of prompts: texts for `record`, which adds columns prompt, sample, generated and step."""

    model: Model
    """The model that generated them."""
    sampling: Sampling
    all: tuple[Generation, ...]
    """In the order of the prompts."""

    def __repr__(self) -> str:
        prompts = counted(len({generation.prompt for generation in self.all}), "prompt")
        return f"{counted(len(self), 'continuation')} of {prompts} by {self.model.name}, {self.sampling}"

    def __len__(self) -> int:
        return len(self.all)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields the documents that `record` reads."""
        for generation in self.all:
            facts = {
                "prompt": generation.prompt,
                "sample": generation.sample,
                "prompt_tokens": generation.prompt_tokens,
            }
            columns = {name: value for name, value in generation.metadata.items() if name not in _CONTENTS}
            yield columns | {"input_ids": list(generation.token_ids), **facts, "generation": asdict(self.sampling)}

    def save(self, path: str | Path) -> Path:
        """Writes a `.jsonl` file that `record` reads; RequestError for another ending."""
        path = as_path("path", path)
        if path.suffix != ".jsonl":
            raise RequestError(f"path {str(path)!r} must end in .jsonl")
        lines = "".join(f"{json.dumps(document, default=str)}\n" for document in self)  # dates as texts
        return save_text(path, lines)

    def texts(self) -> list[str]:
        """Returns the continuations as texts, without prompts and special tokens."""
        if self.model.tokenizer is None:
            raise RequestError(f"model {self.model.name!r} has no tokenizer; read the ids of `all`")
        new = [list(generation.token_ids[generation.prompt_tokens :]) for generation in self.all]
        return [str(self.model.tokenizer.decode(ids, skip_special_tokens=True)) for ids in new]


@plain_torch()
def generate(
    model: Model,
    prompts: Texts,
    max_new_tokens: int = 50,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    samples: int = 1,
    batch_size: int = 16,
    bos: BosPolicy = "model",
    show_progress: bool = True,
) -> Generations:
    """Continues prompts with the model's own `generate`, and returns token ids that `record` takes as they are.

    Interventions of an enclosing `wb.intervene` act on it. The model's own generation settings (penalties, forced
    tokens) are not used, beside the tokens that end a text.

    Args:
        model: A causal model.
        prompts: Texts of every kind that `record` reads; chats end with the header of the assistant's next message.
        max_new_tokens: Most tokens after each prompt.
        temperature: Divisor of the logits before tokens are drawn. 0: the most probable token at every step.
        top_p: Smallest set of tokens with this probability that is drawn from.
        top_k: Number of tokens that are drawn from. None: all.
        seed: Random seed.
        samples: Continuations of each prompt.
        batch_size: Sequences in a pass, padded on the left; models whose tokens a batch changes (RWKV) get one alone.
        bos: Policy of BOS tokens, as of `record`.
        show_progress: Show progress.

    Raises:
        RequestError: A model that is not causal, several samples at temperature 0, no prompt, or one that is too long.
    """
    check_model(model)
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    check("bos", bos, one_of=get_args(BosPolicy))
    samples = whole_number("samples", samples, at_least=1, at_most=MOST)
    batch_size = whole_number("batch_size", batch_size, at_least=1)
    if not model.site_map.causal:
        raise RequestError(f"model {model.name!r} is not causal; it does not generate")
    if samples > 1 and not sampling.temperature:
        raise RequestError(f"samples is {samples}, and temperature 0 gives the same each time; raise the temperature")
    documents, generations = _prompt_documents(model, prompts), list[Generation]()
    ids = [prompt_ids for prompt_ids in _prompt_ids(model, documents, bos, max_new_tokens) for _ in range(samples)]
    batch_size = batch_size if len(ids) == 1 or batch_size == 1 or model.generates_in_batches else 1
    with (
        torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []),
        progress("generating", len(ids), "texts", show=show_progress) as advance,
    ):
        torch.manual_seed(seed)
        for first in range(0, len(ids), batch_size):
            part = ids[first : first + batch_size]
            for number, tokens in enumerate(_continued(model, part, sampling), first):
                prompt, sample = divmod(number, samples)
                all_ids, columns = (*ids[number], *tokens), documents[prompt].metadata
                generations.append(Generation(prompt, sample, all_ids, len(ids[number]), columns))
            advance(len(part))
    return Generations(model, sampling, tuple(generations))


def _prompt_documents(model: Model, prompts: Texts) -> list[Document]:
    """The prompts as texts or token ids. RequestError for none, an empty one, or a column that the recording adds."""
    try:
        documents = list(render_chats(read_documents(prompts), model.tokenizer, generation_prompt=True))
    except RequestError as error:
        raise RequestError(re.sub(r"^texts\b", "prompts", str(error))) from None
    if not documents:
        raise RequestError("prompts: there are none; give one or more")
    empty = [d.index for d in documents if not len(d.text if d.text is not None else d.token_ids)]  # pyright: ignore[reportArgumentType]
    if empty:
        raise RequestError(
            f"prompts: {counted(len(empty), 'prompt')} without a token, the first is prompt {empty[0]}; leave them out"
        )
    for name in _ADDED:
        if any(name in document.metadata and document.generation is None for document in documents):
            raise RequestError(f"prompts: a column cannot be called {name!r}, which recordings of them add; rename it")
    return documents


def _prompt_ids(model: Model, documents: Sequence[Document], bos: BosPolicy, new: int) -> list[tuple[int, ...]]:
    """Token ids of every prompt, as `record` reads them, without the token that ends a text."""
    added = AddedTokens(added_tokens(model.tokenizer, bos).prefix)
    room = (model.context_limit or (1 << 20)) - new
    if room < 1:
        raise RequestError(
            f"max_new_tokens is {new}, and the context of model {model.name!r} {model.context_limit}; lower it"
        )
    with tempfile.TemporaryDirectory(prefix="workbench-prompts-") as folder:
        longest = room + 1  # one more than there is room for: a longer prompt is cut there, and seen
        planned = plan_sequences(documents, model.tokenizer, Layout(longest, added, vocab=model.vocab), Path(folder))
        if planned.skipped_documents:
            raise RequestError(
                f"prompts: {counted(planned.skipped_documents, 'prompt')} without a token; leave them out"
            )
        if (most := int(planned.lengths.max())) > room:
            raise RequestError(
                f"prompts: one has {most:,} tokens or more, and the model's context leaves room for {room:,} before "
                f"{new:,} new ones; shorten it, or lower max_new_tokens"
            )
        ends = np.asarray(planned.starts).tolist()
        return [tuple(planned.token_ids[first:last].tolist()) for first, last in itertools.pairwise(ends)]


def _continued(model: Model, prompts: Sequence[tuple[int, ...]], sampling: Sampling) -> list[list[int]]:
    """New token ids of each prompt, up to the one that ends its text."""
    longest, ends = max(map(len, prompts)), end_tokens(model)
    padding = ends[0] if ends else 0
    ids = torch.tensor([[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    drawn = bool(sampling.temperature)
    chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or 0}
    config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=drawn,
        eos_token_id=ends or None,
        pad_token_id=padding,
        **(chosen if drawn else {}),
    )
    with generating(model.module):
        output: Tensor = model.module.generate(input_ids=ids, attention_mask=mask, generation_config=config)  # pyright: ignore[reportCallIssue, reportAssignmentType]
    rows = output[:, longest:].tolist()
    return [row[: next((at for at, token in enumerate(row, 1) if token in ends), len(row))] for row in rows]
