"""Verbs that run a model over texts: record, plan."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from workbench.cli.arguments import Parallel, texts_of
from workbench.cli.options import Positional
from workbench.cli.store_verbs import Info
from workbench.cli.terminal import print_plain
from workbench.io.counted import counted
from workbench.io.errors import RequestError
from workbench.io.files import check_writable, check_writable_file
from workbench.io.tasks import dtype_for
from workbench.sites.settings import Recording, recording

if TYPE_CHECKING:
    from workbench.sae.autoencoder import Sae


@dataclass(frozen=True)
class Generate:
    """Continue prompts, and write the token ids to a file that `workbench record` reads, generated tokens marked."""

    model: Positional[str]
    """Local directory, hub id such as gpt2, or demo."""
    prompts: Positional[tuple[str, ...]]
    """Files of prompts (.txt .json .jsonl .csv .tsv .parquet), hf:NAME, or a quoted text."""
    out: Path
    """File to write, NAME.jsonl."""
    max_new_tokens: int = 50
    """Most tokens after each prompt."""
    temperature: float = 0.0
    """Divisor of the logits before tokens are drawn. 0: the most probable token at every step."""
    top_p: float = 1.0
    """Smallest set of tokens with this probability that is drawn from."""
    top_k: int | None = None
    """Number of tokens that are drawn from. Default: all."""
    seed: int = 0
    """Random seed."""
    samples: int = 1
    """Continuations of each prompt."""
    device: str | None = None
    """cpu, cuda, cuda:1. Default: the GPU if there is one."""

    def run(self) -> int:
        """Generates, writes the file, and prints the first continuations."""
        from workbench.model.load import load_model  # seconds: torch, transformers
        from workbench.recording.generation import generate

        if self.out.suffix != ".jsonl":
            raise RequestError(f"--out {str(self.out)!r} must end in .jsonl")
        check_writable_file(self.out)
        if self.out.exists() and any(os.path.exists(source) and self.out.samefile(source) for source in self.prompts):
            raise RequestError(f"--out {str(self.out)!r} is a file of prompts, which would be lost; choose another")
        model = load_model(self.model, device=self.device)
        settings = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        generations = generate(
            model, texts_of(self.prompts), self.max_new_tokens, **settings, seed=self.seed, samples=self.samples
        )
        generations.save(self.out)
        texts = generations.texts() if model.tokenizer is not None else []
        for text in texts[:5]:
            print_plain(repr(text))
        print_plain(f"{counted(len(generations), 'continuation')} in {self.out}; to record: `workbench record`")
        return 0


@dataclass(frozen=True)
class Record:
    """Run a model over texts once and store the activations of chosen sites."""

    after_interrupt = "; committed segments are kept, and the same command resumes"

    model: Positional[str]
    """Local directory, hub id such as gpt2, or demo."""
    text: Positional[tuple[str, ...]]
    """Files (.txt .json .jsonl .csv .tsv .parquet), hf:NAME for a dataset of the hub, or a quoted text."""
    out: Path
    """Store to write. An unfinished recording with the same settings is resumed; a finished one gets the sites that it
    lacks."""
    overwrite: bool = False
    """Record anew, in place of a store at --out, which stays until the new one is complete."""
    recording: Recording = field(default_factory=Recording)
    parallel: Parallel = field(default_factory=Parallel)
    sae: str | None = None
    """SAE whose features are extracted during the recording: a directory written by SAELens, sparsify or
    dictionary_learning, a release known to SAELens, or demo. The activations of its sites are stored only if --sites
    names them."""
    sae_id: str | None = None
    """SAE within a release, or path within a folder of several."""
    sae_site: str | None = None
    """Site that the SAE reads; several with commas between. Default: those it was trained on."""
    sae_dtype: Literal["float32", "float16"] = "float32"
    """Stored type of the feature activations."""
    sae_force: bool = False
    """Use an SAE that was trained on another site or model."""
    interventions: Path | None = None
    """JSON file with records that change the model while it runs: {"records": [{"kind": "zero", "site": "z.3"}]}."""
    gradient_of: str | None = None
    """Metric whose gradient with respect to each site is stored as grad.SITE: a JSON object, such as {"kind":
    "logit_difference", "token": " Mary", "against": " John", "at": -1}, or a file with one. Kinds: log_probability,
    logit_difference, next_token_loss."""
    append: bool | Literal["again"] = False
    """Add the texts to an existing store. again: even if it ends with these texts."""
    tokenizer: str | None = None
    """Directory or hub id of a tokenizer other than the model's."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; auto distributes the model over all devices. Default: the GPU if there is one."""
    model_dtype: Literal["auto", "checkpoint", "float32", "bfloat16", "float16"] = "auto"
    """Type the model computes in; checkpoint: that of the weights; auto: float32 where a CPU has no fast one."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    allow_pickle: bool = False
    """Read pickled weights, which can run code."""

    def run(self) -> int:
        """Records the texts."""
        from workbench.corpus.sources import check_source
        from workbench.model.load import load_model  # seconds: torch
        from workbench.model.location import locate
        from workbench.model.preview import check_config

        if self.sae is None and (self.sae_id or self.sae_site or self.sae_force):
            raise RequestError("--sae-id, --sae-site and --sae-force need --sae; give it too")
        texts = texts_of(self.text)
        check_source(texts)
        check_config(locate(self.model, self.revision), self.recording.sites)
        if self.tokenizer is not None:
            locate(self.tokenizer, kind="tokenizer")
        if not self.out.exists():  # a finished store is given back, also from a read-only disk
            check_writable(self.out)
        workers, device = self.parallel.workers_and_device(self.device)
        sae = self._sae(device)
        model = load_model(
            self.model,
            tokenizer=self.tokenizer,
            device=device,
            dtype=dtype_for(workers, self.model_dtype),
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            allow_pickle=self.allow_pickle,
        )
        from workbench.recording.change_files import read_interventions
        from workbench.recording.record import record
        from workbench.recording.segment_gradients import read_metric

        record(
            model,
            texts,
            out=self.out,
            overwrite=self.overwrite,
            settings=self.recording,
            gradient_of=None if self.gradient_of is None else read_metric(self.gradient_of),
            interventions=() if self.interventions is None else read_interventions(self.interventions),
            sae=sae,
            sae_site=self.sae_site,
            sae_dtype=self.sae_dtype,
            sae_force=self.sae_force,
            append=self.append,
            workers=workers,
        )
        return Info(self.out).run()

    def _sae(self, device: str | None) -> Sae | None:
        if self.sae is None:
            return None
        from workbench.sae.load import load_sae  # seconds: torch, SAELens

        return load_sae(self.sae, self.sae_id, device=None if device == "auto" else device)


@dataclass(frozen=True)
class Add:
    """Add sites to a store: its model runs again over the tokens that it has."""

    after_interrupt = "; finished segments are kept, and the same command resumes"

    store: Positional[Path]
    """Store to add to; until the end readers find it as it was."""
    sites: tuple[str, ...]
    """Sites to add, such as z or attn_out.0:8."""
    model: str | None = None
    """Model of the store: a directory or a hub id. Default: the name that the store has."""
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """Stored type of the new sites. Default: that of the store's recording."""
    parallel: Parallel = field(default_factory=Parallel)
    device: str | None = None
    """cpu, cuda, cuda:1, ...; auto distributes the model over all devices. Default: the GPU if there is one."""

    def run(self) -> int:
        """Adds the sites, and describes the store."""
        from workbench.model.reload import recorded_model  # seconds: torch
        from workbench.recording.new_sites import stored_settings
        from workbench.recording.record import record
        from workbench.store.reader import open_store

        store = open_store(self.store)
        settings = recording(stored_settings(self.store), sites=self.sites)
        settings = settings if self.dtype is None else recording(settings, dtype=self.dtype)
        workers, device = self.parallel.workers_and_device(self.device)
        model = recorded_model(store, self.model, device)
        record(model, None, out=self.store, settings=settings, workers=workers)
        return Info(self.store).run()


@dataclass(frozen=True)
class Plan:
    """Estimate disk, memory and time of a recording from a short measurement."""

    model: Positional[str]
    """Local directory, hub id such as gpt2, or demo."""
    text: Positional[tuple[str, ...]] = ()
    """Texts to sample, as for `record`. Default: random tokens in sequences as long as the context."""
    rows: float | None = None
    """Number of tokens to record, for example 1e8. Default: --max-rows."""
    workers: int = 1
    """Number of workers, each as fast as the process that measures."""
    seconds: float = 10.0
    """Approximate duration of the measurement."""
    recording: Recording = field(default_factory=Recording)
    device: str | None = None
    """cpu, cuda, cuda:1, ... Default: the GPU if there is one."""
    model_dtype: Literal["auto", "checkpoint", "float32", "bfloat16", "float16"] = "auto"
    """Type the model computes in; checkpoint: that of the weights; auto: float32 where a CPU has no fast one."""

    def run(self) -> int:
        """Prints the estimate of a recording."""
        from workbench.corpus.sources import check_source
        from workbench.model.load import load_model  # seconds: torch
        from workbench.model.location import locate
        from workbench.model.preview import check_config
        from workbench.recording.estimate import plan

        texts = texts_of(self.text) if self.text else None
        if texts is not None:
            check_source(texts)
        check_config(locate(self.model), self.recording.sites)
        rows = self.recording.max_rows if self.rows is None else self.rows
        if rows is None:
            raise RequestError("--rows is missing; give the number of tokens to record, for example --rows 1e8")
        model = load_model(self.model, device=self.device, dtype=self.model_dtype)
        estimate = plan(model, texts, rows=rows, settings=self.recording, workers=self.workers, seconds=self.seconds)
        print_plain(str(estimate))
        return 0
