"""The future lens by intervention: the model itself is asked what it would say next, given one hidden state of a text.

A state h_T is put in place of a prompt's last position at the same layer, and the model runs on from there. The prompt
is a fixed text, or learned: embeddings trained so that what the model then says is what it said in the text. What is
read is right where it is the model's own top token at T+N in the text; N = 0 is the ordinary next token, T+1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import xarray as xr
from jaxtyping import Float, Int
from plotly.subplots import make_subplots
from torch import Tensor

from workbench.probing import (
    CATEGORIES,
    NEUTRAL,
    TEMPLATE,
    ActivationArray,
    FutureRows,
    Model,
    RequestError,
    Result,
    Site,
    Store,
    Unembed,
    axis_title,
    bigrams,
    blocks,
    clustered_means,
    future_rows,
    integer_step,
    intervals,
    label,
    load_unembed,
    log_probabilities,
    progress,
    provenance,
    recorded_layers,
    recorded_model,
    run_prompted,
    said_tokens,
    token_embeddings,
    usable_device,
)

PROMPTS: tuple[str, ...] = (
    'Hello! Could you please tell me more about "',
    'The multi-tokens present here are "',
    "The concepts in this hidden state listed are: (",
    "This state is describing about the following concept:",
)
"""The fixed prompts of Pal et al. 2023; what their tokenizer puts first, here the model's own does."""

LEARNED = "learned"
REGIMES = ("fed", "blind")

_FEW = 10  # documents, below which an interval over them is not to be trusted
_LOGIT_BYTES = 256 << 20  # of one pass's logits in float32

_READ = ("prompt", "regime", "layer", "horizon")
UNITS = {
    "precision": "share of tokens",
    "surprisal": "nats",
    "zero_precision": "share of tokens",
    "shuffled_precision": "share of tokens",
    "gain": "share of tokens",
    "gain_low": "share of tokens",
    "gain_high": "share of tokens",
    "validation_precision": "share of tokens",
    "bigram_precision": "share of tokens",
    "divergence": "nats",
    "untrained_divergence": "nats",
    "best_prompt": "index on the prompt axis",
    "best_layer": "layer",
    "rows": "tokens",
    "validation_rows": "tokens",
    "training_rows": "tokens",
    "documents": "documents",
}


@dataclass(frozen=True)
class FuturePrompts:
    """How much of what the model will say past the next token it says itself, when given one hidden state of a text."""

    name: ClassVar[str] = "future-prompts"
    needs_model: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("Pal et al. 2023, Future Lens, arXiv 2311.04897",)
    controls: ClassVar[Mapping[str, str]] = {
        "zero_precision": "zeros in place of the state: what prompt and fed tokens tell by themselves",
        "shuffled_precision": "the states of other tokens",
        "bigram_precision": "what the last token known tells without any state",
    }

    model: str | None = None
    """Directory or hub id of the recorded model, where the name in the store is not enough to load it."""
    site: str = "resid_post"
    """Kind of site whose state is moved, at every recorded layer: resid_post, resid_pre."""
    prompts: tuple[str, ...] = PROMPTS
    """Fixed prompts. The state takes the place of the last token of each."""
    prompt_tokens: int = 10
    """Positions of the learned prompt. 0: none is learned."""
    learned_for: int = 1
    """The horizon N a prompt is trained for, one a layer; it is read at every N."""
    horizons: int = 4
    """N = 0 (the next token) to horizons - 1."""
    where: str | None = None
    """SQL over the token table: which tokens are read from; special ones and a sequence's first never. None: all."""
    held_out: float = 0.25
    """Share of the documents that are tested and not trained on."""
    validation: float = 0.1
    """Share of the documents that choose the prompt, its best state of training, and the layer."""
    row_limit: int = 200
    """Most tested tokens, spread evenly over those there are; half as many choose."""
    training_rows: int = 2000
    """Most tokens a prompt is trained on, spread evenly."""
    epochs: int = 2
    """Passes over them."""
    batch: int = 16
    """Tokens a step."""
    learning_rate: float = 0.1
    """Of AdamW, in units of the root mean square of the model's embeddings; brought to 0 along a line."""
    top_k: int = 10
    """Precision is given at 1 to this many tokens."""
    seed: int = 0
    """Of the choice of documents, what learned prompts begin as, the order of rows, the shuffle and the resamples."""
    device: str = "cpu"
    """Where a model that is loaded runs: cpu, cuda."""

    def __post_init__(self) -> None:
        least = {"prompt_tokens": 0, "learned_for": 0, "horizons": 1, "row_limit": 2, "training_rows": 1, "epochs": 0}
        for name, smallest in (least | {"batch": 1, "top_k": 1, "seed": 0}).items():
            if getattr(self, name) < smallest:
                raise RequestError(f"{name} must be at least {smallest}, not {getattr(self, name)}")
        for name in ("held_out", "validation"):
            if not 0 < getattr(self, name) < 1:
                raise RequestError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        if not self.held_out + self.validation < 1:
            raise RequestError(
                f"held_out {self.held_out} and validation {self.validation} leave no document to train on; "
                "together they must be less than 1"
            )
        if not self.prompts and not self.prompt_tokens:
            raise RequestError("prompts is empty and prompt_tokens is 0: no prompt is left; give one of them")
        if LEARNED in self.prompts or len(set(self.prompts)) < len(self.prompts):
            raise RequestError(f"prompts must differ from each other and from {LEARNED!r}, not {self.prompts}")
        if self.learned_for >= self.horizons:
            raise RequestError(f"learned_for is {self.learned_for} and horizons {self.horizons}; it must be below it")
        if not 0 < self.learning_rate < float("inf"):
            raise RequestError(f"learning_rate must be above 0, not {self.learning_rate}")

    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Asks every prompt at every recorded layer of `site`; `model` is the recorded one, where it is loaded.

        Two regimes: fed, the text's own tokens T+1 to T+N following the prompt, as in the paper; and blind, the
        model's own answers following it, so that the state is all it has. Over (prompt, regime, layer, horizon):
        precision, also over k, the share of tested tokens whose target at T+N, the model's own top token in the text,
        is among the first k it says (0 to 1); zero_precision at 1, with zeros for the state, which is what prompt and
        fed tokens tell without it; shuffled_precision, with the states of other tokens; gain, precision at 1 above
        zero_precision, and its 95 % interval over documents; surprisal, the mean -ln p at T+N in the text of the
        token said; validation_precision. Over (regime, horizon): best_prompt and best_layer, by validation_precision,
        and bigram_precision, what the last token known (T blind, T+N fed) tells, counted on the training documents.
        Over layer: divergence, the mean KL(text || prompted) of the learned prompt on validation tokens at the
        horizon it is trained for, and untrained_divergence, before training. Tokens that do not reach the last horizon
        in their document and sequence are not asked.

        Costs for each layer and prompt 2 + horizons passes, twice over for the floors, over rows x (prompt + horizons)
        tokens; a learned prompt epochs x training_rows forward and backward passes a layer. Raises RequestError where
        the model cannot be loaded or is another, its context is too short, or it has no tokenizer for fixed prompts,
        and as FutureLens does. Source: Pal et al., arXiv 2311.04897.
        """
        device = usable_device(self.device)
        layers, labels = recorded_layers(store, self.site)
        final = store[f"resid_post.{store.manifest.model.n_layers - 1}"]
        model = recorded_model(store, model or self.model, device)
        unembed = load_unembed(store.path, model.device)
        if self.top_k > unembed.vocab:
            raise RequestError(f"top_k is {self.top_k} and the vocabulary has {unembed.vocab}; give at most that")
        fixed = self._fixed(model)
        rows = future_rows(
            store, self.horizons, self.where, held_out=self.held_out, validation=self.validation, seed=self.seed
        )
        longest = max(self.prompt_tokens, *map(len, fixed), 0) + self.horizons
        asked = _Asked(self, store, rows, said_tokens(final, unembed, rows), longest, unembed.vocab)
        names = [*self.prompts, *([LEARNED] if self.prompt_tokens else [])]
        found = _Found(self, names, len(layers), asked)
        trained = []
        with progress("future prompts", len(layers) * len(names), "prompts") as tick:
            for index, name in enumerate(labels):
                (site,) = model.site_map.select([name])
                prompts = list(fixed)
                if self.prompt_tokens:
                    prompt, *divergences = self._learned(model, site, store[name], final, unembed, asked)
                    prompts.append(prompt)
                    trained.append(divergences)
                for number, prompt in enumerate(prompts):
                    found.add((number, index), _Prompted(model, site, prompt, store[name]))
                    tick(1)
        arrays = found.finish(store, final, unembed, rows)
        arrays["best_layer"] = (("regime", "horizon"), np.array(layers)[arrays["best_layer"][1]])
        if trained:
            before, after = np.array(trained).T
            arrays |= {"untrained_divergence": (("layer",), before), "divergence": (("layer",), after)}
        data = xr.Dataset(
            {name: (axes, values, {"units": UNITS[name]}) for name, (axes, values) in arrays.items()},
            coords={
                "prompt": names,
                "regime": list(REGIMES),
                "layer": layers,
                "horizon": np.arange(self.horizons),
                "k": np.arange(1, self.top_k + 1),
            },
        )
        documents = int(data["documents"])
        few = f"intervals over {documents} tested documents, fewer than {_FEW}"
        data.attrs["note"] = few if documents < _FEW else ""
        return Result(self.name, data, _table(data), provenance(store, self))

    def _fixed(self, model: Model) -> list[Float[Tensor, "prompt d_embed"]]:
        """The embeddings of the fixed prompts, with what the tokenizer puts first."""
        if self.prompts and model.tokenizer is None:
            raise RequestError(f"model {model.name!r} has no tokenizer to read prompts with; give prompts=()")
        ids = [torch.tensor(model.tokenizer(text)["input_ids"]) for text in self.prompts]
        longest = max(self.prompt_tokens, *map(len, ids), 0) + self.horizons - 1
        if model.context_limit is not None and longest > model.context_limit:
            raise RequestError(
                f"prompts and horizons make {longest} positions and model {model.name!r} has {model.context_limit}; "
                "shorten the prompts"
            )
        return [token_embeddings(model, tokens) for tokens in ids]

    def _learned(
        self,
        model: Model,
        site: Site,
        states: ActivationArray,
        final: ActivationArray,
        unembed: Unembed,
        asked: _Asked,
    ) -> tuple[Float[Tensor, "prompt d_embed"], float, float]:
        """A prompt trained on KL(text || prompted) at `learned_for`, and its divergence before and after.

        It begins as random tokens, and the best of the states it had after each pass is kept, by validation tokens.
        """
        generator = torch.Generator().manual_seed(self.seed)
        begin = torch.randint(model.vocab, (self.prompt_tokens,), generator=generator)
        prompt = token_embeddings(model, begin).float().requires_grad_(True)
        unit = token_embeddings(model, torch.arange(min(model.vocab, 4096))).float().square().mean().sqrt().item()
        optimizer = torch.optim.AdamW([prompt], lr=self.learning_rate * unit, weight_decay=0.0)
        order = np.random.default_rng(self.seed)
        steps = max(1, self.epochs * -(-len(asked.training) // self.batch))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)

        def divergence(rows: np.ndarray, *, gradients: bool) -> Tensor:
            fed = asked.fed(rows)[:, : self.learned_for]
            logits = run_prompted(model, site, prompt, states[rows], fed, gradients=gradients)[:, -1]
            wanted = log_probabilities(unembed, final[rows + self.learned_for]).to(logits.device).clone()
            return torch.nn.functional.kl_div(logits.log_softmax(-1), wanted, reduction="sum", log_target=True)

        def validated() -> tuple[float, Tensor]:
            total = sum(divergence(part, gradients=False).item() for part in asked.split(asked.validation))
            return total / len(asked.validation), prompt.detach().clone()

        best = before = validated()
        for _ in range(self.epochs):
            shuffled = order.permutation(asked.training)
            for batch in np.split(shuffled, range(self.batch, len(shuffled), self.batch)):
                loss = divergence(np.sort(batch), gradients=True) / len(batch)
                (prompt.grad,) = torch.autograd.grad(loss, [prompt])
                optimizer.step()
                schedule.step()
            best = min(best, validated(), key=lambda one: one[0])
        return best[1], before[0], best[0]

    @staticmethod
    def headline(result: Result) -> str:
        """What the best prompt has the model say of the token past the next, in both regimes, beside zero states."""
        data = result.data
        horizon = min(1, data.sizes["horizon"] - 1)
        parts = []
        for regime in REGIMES:
            at = data.sel(regime=regime, horizon=horizon)
            layer = int(at["best_layer"])
            best = at.isel(prompt=int(at["best_prompt"])).sel(layer=layer)
            prompt = str(best["prompt"].item())
            names = ("zero_precision", "gain_low", "gain_high", "bigram_precision")
            right, zero, low, high, bigram = (
                100 * float(part) for part in (best["precision"][0], *map(best.get, names))
            )
            parts.append(
                f"{regime} {right:.0f} % ({_short(prompt)}, layer {layer}; zero state {zero:.0f} %, "
                f"gain {low:.0f} to {high:.0f} points; bigram {bigram:.0f} %)"
            )
        note = data.attrs["note"]
        return f"N = {horizon}: {', '.join(parts)}" + (f"; {note}" if note else "")

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """ "precision": at 1 by layer, a panel for each regime and horizon; "ranks": of the best prompts by k."""
        return {"precision": _precision(result), "ranks": _ranks(result)}


# ---- asking ---------------------------------------------------------------------------------------------


class _Asked:
    """Tokens to train on, to choose by and to test, all of which reach the last horizon."""

    def __init__(
        self,
        probe: FuturePrompts,
        store: Store,
        rows: FutureRows,
        said: Int[np.ndarray, " row"],
        positions: int,
        vocab: int,
    ) -> None:
        last = probe.horizons - 1
        limits = {"training": probe.training_rows, "validation": probe.row_limit // 2, "tested": probe.row_limit}
        self.training, self.validation, self.tested = (
            _spread(rows.at(part, last), limit) for part, limit in limits.items()
        )
        self.horizons, self.said = probe.horizons, said
        self.size = max(1, _LOGIT_BYTES // (4 * positions * vocab))
        self.ids = store.tokens["token_id"].to_numpy().astype(np.int64)

    def fed(self, rows: Int[np.ndarray, " row"]) -> Int[Tensor, "row fed"]:
        """The text's tokens T+1 to T+N of the last horizon N."""
        return torch.from_numpy(self.ids[rows[:, None] + np.arange(1, self.horizons)])

    def targets(self, rows: Int[np.ndarray, " row"]) -> Int[np.ndarray, "row horizon"]:
        """What the model says at T+N in the text."""
        return self.said[rows[:, None] + np.arange(self.horizons)]

    def split(self, rows: Int[np.ndarray, " row"]) -> list[np.ndarray]:
        """Parts whose logits, over a prompt and what follows it, stay small."""
        return np.split(rows, range(self.size, len(rows), self.size))


def _spread(rows: Int[np.ndarray, " row"], limit: int) -> Int[np.ndarray, " kept"]:
    """At most `limit` of them, evenly."""
    return rows if len(rows) <= limit else rows[np.linspace(0, len(rows) - 1, limit).round().astype(int)]


@dataclass(frozen=True)
class _Prompted:
    """One prompt at one layer."""

    model: Model
    site: Site
    prompt: Float[Tensor, "prompt d_embed"]
    states: ActivationArray

    def fed(self, states: Float[Tensor, "row d_model"], fed: Int[Tensor, "row fed"], k: int) -> Int[Tensor, "row n k"]:
        """The first k answers at every horizon, the true tokens between given."""
        return run_prompted(self.model, self.site, self.prompt, states, fed).topk(k, dim=-1).indices.cpu()

    def blind(self, states: Float[Tensor, "row d_model"], horizons: int, k: int) -> Int[Tensor, "row n k"]:
        """The same, the model's own answers between."""
        answers = torch.zeros(len(states), 0, k, dtype=torch.long)
        for _ in range(horizons):
            answers = torch.cat([answers, self.fed(states, answers[..., 0], k)[:, -1:]], dim=1)
        return answers


class _Found:
    """What every prompt at every layer makes the model say of the tested tokens."""

    def __init__(self, probe: FuturePrompts, prompts: Sequence[str], layers: int, asked: _Asked) -> None:
        self.probe, self.asked = probe, asked
        shape = (len(prompts), len(REGIMES), layers, probe.horizons)
        self.precision = np.zeros((*shape, probe.top_k))
        self.shares = {name: np.zeros(shape) for name in ("shuffled_precision", "validation_precision")}
        self.said = np.zeros((*shape, len(asked.tested)), np.int64)
        self.said_of_zero = np.zeros_like(self.said)

    def add(self, at: tuple[int, int], prompted: _Prompted) -> None:
        """Ask one prompt at one layer; `at` is (prompt, layer) as indices."""
        asked, (prompt, layer) = self.asked, at
        tested, validation = asked.tested, asked.validation
        targets = asked.targets(tested)
        other = np.roll(np.random.default_rng(self.probe.seed).permutation(len(tested)), 1)
        for regime, name in enumerate(REGIMES):
            place = prompt, regime, layer
            answers = self._answers(prompted, name, tested, tested)
            self.precision[place] = (answers == targets[..., None]).cumsum(-1).mean(0)
            self.said[place] = answers[..., 0].T
            self.said_of_zero[place] = self._answers(prompted, name, tested, None)[..., 0].T
            shuffled = self._answers(prompted, name, tested, tested[other])[..., 0]
            chosen = self._answers(prompted, name, validation, validation)[..., 0]
            self.shares["shuffled_precision"][place] = (shuffled == targets).mean(0)
            self.shares["validation_precision"][place] = (chosen == asked.targets(validation)).mean(0)

    def _answers(
        self, prompted: _Prompted, regime: str, rows: np.ndarray, states_of: np.ndarray | None
    ) -> Int[np.ndarray, "row horizon k"]:
        """What is said of `rows` with the states of `states_of`; None: zeros."""
        k, answers = self.probe.top_k, []
        for part in self.asked.split(np.arange(len(rows))):
            states = prompted.states[rows[part] if states_of is None else states_of[part]]
            states = torch.zeros_like(states) if states_of is None else states
            if regime == "fed":
                answers.append(prompted.fed(states, self.asked.fed(rows[part]), k))
            elif states_of is None:  # nothing tells one row from another
                answers.append(prompted.blind(states[:1], self.probe.horizons, k).expand(len(part), -1, -1))
            else:
                answers.append(prompted.blind(states, self.probe.horizons, k))
        return torch.cat(answers).numpy()

    def finish(
        self, store: Store, final: ActivationArray, unembed: Unembed, rows: FutureRows
    ) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        """All variables over prompts, regimes and horizons, each with its axes; `best_layer` still an index."""
        asked, tested = self.asked, self.asked.tested
        targets = asked.targets(tested)
        document = rows.document[tested]
        right, right_of_zero = self.said == targets.T, self.said_of_zero == targets.T
        above = (right.astype(float) - right_of_zero).reshape(-1, len(tested))
        gain, drawn = clustered_means(above.T, document, seed=self.probe.seed)
        if len(np.unique(document)) < 2:
            drawn[:] = np.nan  # of one document every draw is the same: no interval
        low, high = intervals(drawn)
        shape = self.said.shape[:-1]
        read = {
            "surprisal": self._surprisal(final, unembed),
            "zero_precision": right_of_zero.mean(-1),
            "gain": gain.reshape(shape),
            "gain_low": low.reshape(shape),
            "gain_high": high.reshape(shape),
            **self.shares,
        }
        chosen = np.moveaxis(self.shares["validation_precision"], 2, 1)  # prompt, layer, regime, horizon
        best = chosen.reshape(-1, *chosen.shape[2:]).argmax(0)
        prompt, layer = np.unravel_index(best, chosen.shape[:2])
        by_regime = ("regime", "horizon")
        return {
            "precision": ((*_READ, "k"), self.precision),
            **{name: (_READ, values) for name, values in read.items()},
            "best_prompt": (by_regime, prompt),
            "best_layer": (by_regime, layer),
            "bigram_precision": (by_regime, self._bigrams(rows, targets)),
            "rows": ((), np.array(len(tested))),
            "validation_rows": ((), np.array(len(asked.validation))),
            "training_rows": ((), np.array(len(asked.training))),
            "documents": ((), np.array(len(np.unique(document)))),
        }

    def _bigrams(
        self, rows: FutureRows, targets: Int[np.ndarray, "row horizon"]
    ) -> Float[np.ndarray, "regime horizon"]:
        """What the last token that is known tells: the one at T+N where it is fed, the one at T where it is not."""
        asked, found = self.asked, np.zeros((len(REGIMES), self.probe.horizons))
        for horizon in range(self.probe.horizons):
            training = rows.at("training", horizon)
            for regime, known in enumerate((horizon, 0)):
                said, _ = bigrams(
                    asked.ids[training + known], asked.said[training + horizon], asked.ids[asked.tested + known]
                )
                found[regime, horizon] = (said == targets[:, horizon]).mean()
        return found

    def _surprisal(self, final: ActivationArray, unembed: Unembed) -> Float[np.ndarray, "prompt regime layer horizon"]:
        """Mean -ln p, in the text, of what was said."""
        tested, total = self.asked.tested, np.zeros(self.said.shape[:-1])
        for horizon in range(self.probe.horizons):
            said = self.said[..., horizon, :].reshape(-1, len(tested))
            for part in blocks(len(tested), unembed.vocab):
                log = log_probabilities(unembed, final[tested[part] + horizon])
                asked = torch.from_numpy(said[:, part].T.copy()).to(log.device)
                sums = log.gather(1, asked).double().sum(0).cpu().numpy()
                total[..., horizon] -= sums.reshape(total.shape[:-1])
        return total / len(tested)


# ---- table and figures ----------------------------------------------------------------------------------


def _table(data: xr.Dataset) -> pd.DataFrame:
    """One line for each prompt, regime, layer and horizon."""
    names = ("surprisal", "zero_precision", "shuffled_precision", "gain", "gain_low", "gain_high")
    wide = data[[*names, "validation_precision"]].assign(
        {f"precision_{k}": data["precision"].sel(k=k, drop=True) for k in sorted({1, data.sizes["k"]})}
        | {"bigram_precision": data["bigram_precision"]}
    )
    return wide.to_dataframe(dim_order=list(_READ)).reset_index()


def _title(result: Result, told: str) -> str:
    return f"Prompts for the future of {label(str(result.provenance['model']), 60)}: {told}"


def _short(prompt: str) -> str:
    return prompt if prompt == LEARNED else label(prompt, 28)


def _precision(result: Result) -> go.Figure:
    """Precision at 1 by layer: a row for each regime, a column for each horizon, dotted with zeros for the state."""
    data = result.data
    prompts, horizons = data["prompt"].to_numpy().tolist(), data["horizon"].to_numpy().tolist()
    titles = [f"{regime}, N = {horizon}" for regime in REGIMES for horizon in horizons]
    figure = make_subplots(
        len(REGIMES), len(horizons), shared_yaxes=True, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.09
    )
    layers = data["layer"].to_numpy()
    for row, regime in enumerate(REGIMES, start=1):
        for column, horizon in enumerate(horizons, start=1):
            one, at = data.sel(regime=regime, horizon=horizon), {"row": row, "col": column}
            for number, prompt in enumerate(prompts):
                line = {"color": CATEGORIES[number % len(CATEGORIES)]}
                shown = {"legendgroup": prompt, "showlegend": row == column == 1}
                values = one["precision"].sel(prompt=prompt, k=1).to_numpy()
                figure.add_scatter(
                    x=layers, y=values, name=_short(prompt), mode="lines+markers", line=line, **shown, **at
                )
                figure.add_scatter(
                    x=layers,
                    y=one["zero_precision"].sel(prompt=prompt).to_numpy(),
                    name=f"{_short(prompt)}, zero state",
                    mode="lines",
                    line={**line, "dash": "dot", "width": 1},
                    **{**shown, "showlegend": False},
                    **at,
                )
            bigram = np.full(len(layers), float(one["bigram_precision"]))
            shown = {"legendgroup": "bigram", "showlegend": row == column == 1}
            line = {"color": NEUTRAL, "dash": "dash"}
            figure.add_scatter(x=layers, y=bigram, name="bigram", mode="lines", line=line, **shown, **at)
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": _title(result, "precision at 1"),
            "subtitle": {
                "text": "fed: given the text's tokens up to T+N; blind: the state alone; dotted: zeros for the state"
            },
        },
        margin={"t": 110},
        legend={"y": -0.14, "yanchor": "top"},
        height=640,
        width=max(640, 140 + 260 * len(horizons)),
    )
    figure.update_xaxes(dtick=integer_step(layers))
    figure.update_xaxes(title="layer", row=len(REGIMES))
    figure.update_yaxes(rangemode="tozero")
    return figure.update_yaxes(title=axis_title(data["precision"].attrs), col=1)


def _ranks(result: Result) -> go.Figure:
    """Precision at k of the best prompt and layer of each regime and horizon."""
    data = result.data
    figure = go.Figure()
    for regime, dash in zip(REGIMES, ("solid", "dash"), strict=True):
        for horizon in data["horizon"].to_numpy().tolist():
            at = data.sel(regime=regime, horizon=horizon)
            best = at.isel(prompt=int(at["best_prompt"])).sel(layer=int(at["best_layer"]))
            figure.add_scatter(
                x=data["k"].to_numpy(),
                y=best["precision"].to_numpy(),
                name=f"{regime}, N = {horizon}: {_short(str(best['prompt'].item()))}, layer {int(at['best_layer'])}",
                mode="lines+markers",
                line={"color": CATEGORIES[horizon % len(CATEGORIES)], "dash": dash},
            )
    figure.update_layout(
        template=TEMPLATE,
        title={"text": _title(result, "precision at k")},
        legend={"y": -0.22, "yanchor": "top"},
        height=480 + 12 * len(figure.data),
        width=860,
    )
    figure.update_xaxes(title="k", dtick=1)
    return figure.update_yaxes(title=axis_title(data["precision"].attrs), rangemode="tozero")
