"""Future lens by intervention: the model's own predictions after a prompt that contains one hidden state of a text.

A state h_T of a text replaces the activation at a prompt's last position, at the same layer, and the model runs on from
there. Prompts are fixed texts, or learned: embeddings trained so that the model's output after the prompt matches its
output in the text. A prediction is right if it is the model's own top token at T+N in the text; N = 0 is the ordinary
next token (t+1), N = 1 is t+2. Teacher-forced: the text's tokens T+1 to T+N follow the prompt, as in Pal et al. 2023;
free-running: the model's own predictions follow it, so that the state is its only information about the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from workbench.probing import (
    LEARNED,
    LOST_VARIABLES,
    ActivationArray,
    FutureSplit,
    FutureTask,
    LayerProbe,
    Model,
    Prompted,
    RequestError,
    Result,
    Site,
    Store,
    Variable,
    check_fields,
    choose_layer,
    clustered_ends,
    counted,
    dataset,
    load_future_task,
    load_unembed,
    log_probabilities,
    note_few_documents,
    note_own_output,
    own_output,
    plain_torch,
    points_text,
    precision_table,
    progress,
    prompt_precision,
    prompt_ranks,
    recorded_model,
    regime_name,
    require_causal,
    run_prompted,
    short_prompt,
    token_embeddings,
    usable_device,
    with_interval,
    with_note,
)

PROMPTS: tuple[str, ...] = (
    'Hello! Could you please tell me more about "',
    'The multi-tokens present here are "',
    "The concepts in this hidden state listed are: (",
    "This state is describing about the following concept:",
)
"""Fixed prompts of Pal et al. 2023; the model's own tokenizer adds its special tokens."""

REGIMES = ("teacher-forced", "free-running")

_LOGIT_BYTES = 256 << 20  # of one pass's logits in float32
_READ = ("prompt", "regime", "layer", "horizon")
_K = (*_READ, "k")
_BEST = ("regime", "horizon")
_SHARE = "share of tokens"

VARIABLES = (
    *with_interval(
        Variable("precision", _K, _SHARE, "the model's top token at T+N is among the first k", "zero_precision")
    ),
    Variable("surprisal", _READ, "nats", "mean -ln p of the predicted token under the model at T+N in the text"),
    Variable("zero_precision", _READ, _SHARE, "precision at 1 with zeros in place of the state"),
    *with_interval(Variable("gain", _READ, _SHARE, "precision at 1 minus zero_precision", "0")),
    Variable("shuffled_precision", _READ, _SHARE, "precision at 1 with the states of other tokens", "zero_precision"),
    Variable("validation_precision", _READ, _SHARE, "precision at 1 on the validation tokens"),
    Variable("best_prompt", _BEST, "index on the prompt axis", "prompt with the best validation_precision"),
    Variable("best_layer", _BEST, "layer", "layer with the best validation_precision, at N = 0 before the output"),
    *with_interval(
        Variable("bigram_precision", _BEST, _SHARE, "precision at 1 from the last known token, T or (forced) T+N")
    ),
    Variable("bigram_seen", _BEST, _SHARE, "test tokens whose last known token some training row has"),
    Variable("rows", (), "tokens", "test tokens"),
    Variable("validation_rows", (), "tokens", "tokens that choose prompt, layer and epoch"),
    Variable("training_rows", (), "tokens", "tokens that learned prompts are trained on"),
    Variable("documents", (), "documents", "test documents"),
    Variable("untrained_divergence", ("layer",), "nats", "KL(text || prompted) of the learned prompt before training"),
    Variable("divergence", ("layer",), "nats", "the same after training", "untrained_divergence"),
    *LOST_VARIABLES,
)


@dataclass(frozen=True)
class FuturePrompts(LayerProbe):
    """Can the model itself decode its output at t+2, t+3, ... from one hidden state placed in a prompt?"""

    name: ClassVar[str] = "future-prompts"
    needs_model: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("Pal et al. 2023, Future Lens, arXiv 2311.04897",)
    variables: ClassVar[tuple[Variable, ...]] = VARIABLES
    controls: ClassVar[Mapping[str, str]] = {
        "zero_precision": "zeros in place of the state: information of the prompt and the teacher-forced tokens",
        "shuffled_precision": "the states of other tokens",
        "bigram_precision": "prediction from the last known token alone",
    }

    model: str | None = None
    """Directory or hub id of the recorded model, if the name in the store is not enough to load it."""
    site: str = "resid_post"
    """Kind of site whose state is moved, at every recorded layer: resid_post or resid_pre."""
    prompts: tuple[str, ...] = PROMPTS
    """Fixed prompts. The state replaces the activation at the last token of each."""
    prompt_tokens: int = 10
    """Length of the learned prompt in positions. 0: no learned prompt."""
    learned_for: int = 1
    """Horizon N that the learned prompt of each layer is trained for; it is tested at every N."""
    horizons: int = 4
    """Number of horizons: N = 0 (the next token) to horizons - 1."""
    where: str | None = None
    """SQL condition over the token table that selects the tokens T. None: all. Special tokens and the first token of a
    sequence are always excluded."""
    held_out: float = 0.25
    """Share of the documents used for testing."""
    validation: float = 0.1
    """Share of the documents used to choose the prompt, its best epoch and the layer."""
    row_limit: int = 200
    """Maximum number of test tokens, evenly spaced; half as many validation tokens."""
    training_rows: int = 2000
    """Maximum number of tokens that a prompt is trained on, evenly spaced."""
    epochs: int = 2
    """Training epochs of the learned prompt."""
    batch: int = 16
    """Batch size in tokens."""
    learning_rate: float = 0.1
    """AdamW learning rate in units of the root mean square of the model's embeddings, decayed linearly to 0."""
    top_k: int = 10
    """Largest k of precision at k."""
    seed: int = 0
    """Random seed of the document split, the initial prompt, the order of rows, the shuffle and the bootstrap."""
    device: str | None = None
    """Device of a model that the probe loads: cpu, cuda, cuda:1. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._split()  # checks the settings that it takes
        check_fields(self, "prompt_tokens", "learned_for", "epochs", at_least=0, at_most=10_000)
        check_fields(self, "training_rows", "batch", "top_k", at_least=1)
        check_fields(self, "row_limit", at_least=2)
        check_fields(self, "learning_rate", above=0, below=float("inf"))
        if not self.prompts and not self.prompt_tokens:
            raise RequestError("prompts is empty and prompt_tokens is 0: no prompt is left; give one of them")
        if LEARNED in self.prompts or len(set(self.prompts)) < len(self.prompts):
            raise RequestError(f"prompts must differ from each other and from {LEARNED!r}, not {self.prompts}")
        if self.learned_for >= self.horizons:
            raise RequestError(f"learned_for must be below horizons {self.horizons}, not {self.learned_for}")

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Tests every prompt at every recorded layer of `site`, in both regimes.

        Tokens that do not reach the last horizon in their document and sequence are left out. Costs for each layer and
        prompt one pass over about 25 tokens a tested row; a learned prompt costs epochs x training_rows forward and
        backward passes over 1 + learned_for tokens per layer. SmolLM2-135M: 270 s of one core a layer.

        Args:
            store: Needs the sites at `site`, the last block's resid_post, and the unembedding.
            model: The recorded model. None: it is loaded from the setting `model` or the store's name for it.

        Raises:
            RequestError: The model cannot be loaded, is another one or not causal, has too short a context or no
                tokenizer for fixed prompts; a site is missing or has NaN or infinite values; too few documents are
                selected or none is long enough.
        """
        require_causal(store, self.name)
        device, unembed = usable_device(self.device), load_unembed(store.path)
        layers, labels = self.recorded(store, self.site)
        model = recorded_model(store, model or self.model, device)
        fixed = self._fixed_prompts(model)
        unembed = unembed.to(model.device)
        task = load_future_task(store, self._split(), unembed, self.top_k, probe=self, sites=labels)
        tokens = _select_tokens(self, task, max(self.prompt_tokens, *map(len, fixed), 0) + self.horizons)
        names = [*self.prompts, *([LEARNED] if self.prompt_tokens else [])]
        readings: dict[tuple[int, ...], _Reading] = {}
        divergences = []
        with progress("future prompts", len(layers) * len(names), "prompts") as tick:
            for layer, name in enumerate(labels):
                (site,) = model.site_map.select([name])
                prompts = list(fixed)
                if self.prompt_tokens:
                    prompt, *divergence = _learn_prompt(self, model, site, store[name], tokens)
                    prompts.append(prompt)
                    divergences.append(divergence)
                for number, prompt in enumerate(prompts):
                    prompted = Prompted(model, site, prompt)
                    for index, regime in enumerate(REGIMES):
                        setup = _Setup(prompted, store[name], regime, tokens, self.top_k)
                        readings[number, index, layer] = _test(setup, self.seed)
                    tick(1)
        output = own_output(store, self.site, layers)
        arrays = _arrays(readings, (len(names), len(REGIMES), len(layers)), tokens, self.seed)
        validation = np.moveaxis(arrays["validation_precision"], 1, 0)  # regime, prompt, layer, horizon
        best = [choose_layer(of_regime, output) for of_regime in validation]
        arrays["best_prompt"], best_layer = (np.stack(parts) for parts in zip(*best, strict=True))
        arrays["best_layer"] = np.array(layers)[best_layer]
        if divergences:
            arrays["untrained_divergence"], arrays["divergence"] = np.array(divergences).T
        coords = {"prompt": names, "regime": list(REGIMES), "layer": layers, "horizon": np.arange(self.horizons)}
        coords["k"] = np.arange(1, self.top_k + 1)
        data = dataset(VARIABLES, arrays, coords)
        notes = [note_few_documents(int(data["documents"])), note_own_output(output, layers)]
        return self.result(store, data, _table(data), task.checked, notes)

    def _split(self) -> FutureSplit:
        return FutureSplit(self.horizons, self.where, self.held_out, self.validation, self.seed)

    def _fixed_prompts(self, model: Model) -> list[Float[Tensor, "prompt d_embed"]]:
        """Embeddings of the fixed prompts, with the tokenizer's special tokens."""
        if (tokenizer := model.tokenizer) is None and self.prompts:
            raise RequestError(f"model {model.name!r} has no tokenizer for the prompts; give prompts=()")
        ids = [] if tokenizer is None else [torch.tensor(tokenizer(text)["input_ids"]) for text in self.prompts]
        longest = max(self.prompt_tokens, *map(len, ids), 0) + self.horizons - 1
        if model.context_limit is not None and longest > model.context_limit:
            raise RequestError(
                f"prompts and horizons need {counted(longest, 'position')} and model {model.name!r} has "
                f"{model.context_limit}; "
                "shorten the prompts"
            )
        return [token_embeddings(model, tokens) for tokens in ids]

    @staticmethod
    def headline(result: Result) -> str:
        """Top-1 accuracy at t+2 of the best prompt and layer in both regimes, against zero states and bigrams."""
        data = result.data
        horizon = min(1, data.sizes["horizon"] - 1)
        parts = []
        for regime in data["regime"].to_numpy().tolist():
            at = data.sel(regime=regime, horizon=horizon)
            best = at.isel(prompt=int(at["best_prompt"])).sel(layer=int(at["best_layer"]))
            names = ("zero_precision", "gain", "gain_low", "gain_high", "bigram_precision")
            zero, gain, low, high, bigram = (100 * float(best[name]) for name in names)
            seen_note = f", {100 * float(at['bigram_seen']):z.0f} % of tokens seen" if "bigram_seen" in data else ""
            parts.append(
                f"{regime_name(regime)} {100 * float(best['precision'][0]):z.0f} % (layer {int(at['best_layer'])}, "
                f"prompt {short_prompt(str(best['prompt'].item()))}; zero state {zero:z.0f} %, gain "
                f"{points_text(gain, low, high)}; bigram baseline {bigram:z.0f} %{seen_note})"
            )
        return with_note(f"Top-1 accuracy at t+{horizon + 1}: {', '.join(parts)}.", result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "precision" (top-1 accuracy by layer, regime and horizon) and "ranks" (precision at k)."""
        return {"precision": prompt_precision(result), "ranks": prompt_ranks(result)}


# ---- tokens and prompts ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tokens:
    """Rows to train on, to choose by and to test, all of which reach the last horizon."""

    task: FutureTask
    horizons: int
    training: Int[np.ndarray, " training_row"]
    validation: Int[np.ndarray, " validation_row"]
    test: Int[np.ndarray, " test_row"]
    batch: int
    """Number of rows whose logits, over a prompt and its continuation, fit in memory."""

    def following(self, rows: Int[np.ndarray, " row"]) -> Int[Tensor, "row ahead"]:
        """The text's tokens T+1 to T+N of the last horizon N."""
        return torch.from_numpy(self.task.token[rows[:, None] + np.arange(1, self.horizons)])

    def targets(self, rows: Int[np.ndarray, " row"]) -> Int[np.ndarray, "row horizon"]:
        """The model's top tokens at T+N in the text."""
        return self.task.model_top[rows[:, None] + np.arange(self.horizons)]

    def batches(self, rows: Int[np.ndarray, " row"]) -> list[np.ndarray]:
        return np.split(rows, range(self.batch, len(rows), self.batch))


def _select_tokens(probe: FuturePrompts, task: FutureTask, positions: int) -> _Tokens:
    limits = {"training": probe.training_rows, "validation": probe.row_limit // 2, "test": probe.row_limit}
    parts = {part: _evenly(task.rows.at(part, probe.horizons - 1), limit) for part, limit in limits.items()}
    batch = max(1, _LOGIT_BYTES // (4 * positions * task.unembed.vocab))
    return _Tokens(task, probe.horizons, **parts, batch=batch)


def _evenly(rows: Int[np.ndarray, " row"], limit: int) -> Int[np.ndarray, " chosen_row"]:
    """At most `limit` rows, evenly spaced."""
    return rows if len(rows) <= limit else rows[np.linspace(0, len(rows) - 1, limit).round().astype(int)]


def _learn_prompt(
    probe: FuturePrompts, model: Model, site: Site, states: ActivationArray, tokens: _Tokens
) -> tuple[Float[Tensor, "prompt d_embed"], float, float]:
    """The best epoch of a prompt trained on KL(text || prompted), with its validation divergence before and after."""
    task = tokens.task
    generator = torch.Generator().manual_seed(probe.seed)
    start = torch.randint(model.vocab, (probe.prompt_tokens,), generator=generator)
    prompt = token_embeddings(model, start).float().requires_grad_(True)
    scale = token_embeddings(model, torch.arange(min(model.vocab, 4096))).float().square().mean().sqrt().item()
    optimizer = torch.optim.AdamW([prompt], lr=probe.learning_rate * scale, weight_decay=0.0)
    order = np.random.default_rng(probe.seed)
    steps = max(1, probe.epochs * -(-len(tokens.training) // probe.batch))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)

    def divergence(rows: np.ndarray, *, gradients: bool) -> Tensor:
        forced = tokens.following(rows)[:, : probe.learned_for]
        logits = run_prompted(model, site, prompt, states[rows], forced, gradients=gradients)[:, -1]
        target = log_probabilities(task.unembed, task.final[rows + probe.learned_for]).to(logits.device).clone()
        return torch.nn.functional.kl_div(logits.log_softmax(-1), target, reduction="sum", log_target=True)

    def validate() -> tuple[float, Tensor]:
        total = sum(divergence(part, gradients=False).item() for part in tokens.batches(tokens.validation))
        return total / len(tokens.validation), prompt.detach().clone()

    best = before = validate()
    for _ in range(probe.epochs):
        shuffled = order.permutation(tokens.training)
        for batch in np.split(shuffled, range(probe.batch, len(shuffled), probe.batch)):
            loss = divergence(np.sort(batch), gradients=True) / len(batch)
            (prompt.grad,) = torch.autograd.grad(loss, [prompt])
            optimizer.step()
            schedule.step()
        best = min(best, validate(), key=lambda candidate: candidate[0])
    return best[1], before[0], best[0]


# ---- testing --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reading:
    """Results of one prompt at one layer in one regime."""

    shares: Mapping[str, Float[np.ndarray, "horizon ..."]]
    """Shares of tokens by variable name."""
    top: Int[np.ndarray, "horizon row"]
    """Predicted tokens of the test rows."""
    zero_top: Int[np.ndarray, "horizon row"]
    """The same with zeros for the states."""


@dataclass(frozen=True)
class _Setup:
    """One prompt at one layer in one regime."""

    prompted: Prompted
    states: ActivationArray
    regime: str
    tokens: _Tokens
    k: int

    def predictions(self, rows: np.ndarray, states_of: np.ndarray | None) -> Int[np.ndarray, "row horizon k"]:
        """The top k tokens for `rows` with the states of the rows `states_of`; None: zeros."""
        parts = []
        for part in self.tokens.batches(np.arange(len(rows))):
            states = self.states[rows[part] if states_of is None else states_of[part]]
            states = torch.zeros_like(states) if states_of is None else states
            if self.regime == "teacher-forced":
                parts.append(self.prompted.teacher_forced(states, self.tokens.following(rows[part]), self.k))
            else:  # equal states give equal predictions
                states = states[:1] if states_of is None else states
                predictions = self.prompted.free_running(states, self.tokens.horizons, self.k)
                parts.append(predictions.expand(len(part), -1, -1))
        return torch.cat(parts).numpy()


def _test(setup: _Setup, seed: int) -> _Reading:
    tested, validation = setup.tokens.test, setup.tokens.validation
    targets = setup.tokens.targets(tested)
    partners = np.roll(np.random.default_rng(seed).permutation(len(tested)), 1)
    predictions = setup.predictions(tested, tested)
    zero = setup.predictions(tested, None)[..., 0]
    chosen = setup.predictions(validation, validation)[..., 0]
    hits = (predictions == targets[..., None]).cumsum(-1)
    low, high = clustered_ends(hits, setup.tokens.task.rows.document[tested], seed=seed)
    shares = {
        "precision": hits.mean(0),
        "precision_low": low,
        "precision_high": high,
        "zero_precision": (zero == targets).mean(0),
        "shuffled_precision": (setup.predictions(tested, tested[partners])[..., 0] == targets).mean(0),
        "validation_precision": (chosen == setup.tokens.targets(validation)).mean(0),
    }
    return _Reading(shares, predictions[..., 0].T, zero.T)


def _arrays(
    readings: Mapping[tuple[int, ...], _Reading], shape: tuple[int, int, int], tokens: _Tokens, seed: int
) -> dict[str, np.ndarray]:
    """All variables of the prompts; `shape` counts prompts, regimes and layers."""
    task, tested, horizons = tokens.task, tokens.test, tokens.horizons
    ordered = [readings[at] for at in np.ndindex(shape)]
    arrays = {
        name: np.array([reading.shares[name] for reading in ordered]).reshape(*shape, *values.shape)
        for name, values in ordered[0].shares.items()
    }
    top, zero_top = (
        np.stack(parts) for parts in zip(*((reading.top, reading.zero_top) for reading in ordered), strict=True)
    )
    targets = tokens.targets(tested).T
    flat = (-1, len(tested))
    gain = task.gain((top == targets).reshape(flat), (zero_top == targets).reshape(flat), tested, seed)
    arrays |= {name: values.reshape(*shape, horizons) for name, values in gain.items()}
    surprisal = [task.surprisal(top[:, n], tested, n) for n in range(horizons)]
    arrays["surprisal"] = np.stack(surprisal, axis=-1).reshape(*shape, horizons)
    bigrams = [[task.bigram(tested, n, known=n if forced else 0) for n in range(horizons)] for forced in (True, False)]
    right = np.array([[bigram.prediction == targets[n] for n, bigram in enumerate(part)] for part in bigrams])
    low, high = clustered_ends(np.moveaxis(right, -1, 0), task.rows.document[tested], seed=seed)
    arrays |= {"bigram_precision": right.mean(-1), "bigram_precision_low": low, "bigram_precision_high": high}
    arrays["bigram_seen"] = np.array([[bigram.seen.mean() for bigram in part] for part in bigrams])
    counts = {"rows": tested, "validation_rows": tokens.validation, "training_rows": tokens.training}
    arrays |= {name: np.array(len(rows)) for name, rows in counts.items()}
    arrays["documents"] = np.array(len(np.unique(task.rows.document[tested])))
    return arrays


# ---- table and figures ----------------------------------------------------------------------------------


def _table(data: xr.Dataset) -> pd.DataFrame:
    """One line per prompt, regime, layer and horizon."""
    names = ("surprisal", "zero_precision", "shuffled_precision", "gain", "gain_low", "gain_high")
    bigram = data["bigram_precision"]
    return precision_table(data, (*names, "validation_precision"), _READ, bigram_precision=bigram)
