"""Function vectors: heads whose output carries a task that examples in the prompt show (Todd et al. 2024).

Prompts show a task by examples ("France: Paris", one a line) and end with a question. For head h let m_h be the mean of
its output at the last token over such prompts. Its causal effect is measured on prompts whose examples have shuffled
answers, which show no task:

    effect_h = mean over prompts of P(answer | h's output at the last token <- m_h) - P(answer)

The function vector is v = sum of W_O m_h over the heads of the largest effect. It is added to the residual stream at
the last token of the question alone, without examples, after each block. Controls are vectors of as many other heads of
the same layers, drawn at random. Half of the questions choose heads and layer, the other half are reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from workbench.probes.activation_patching import provenance_of_pairs
from workbench.probing import (
    CATEGORIES,
    NEUTRAL,
    Model,
    PatchPair,
    PromptPairs,
    RequestError,
    Result,
    Store,
    StoreProbe,
    TaskVectors,
    ThemedFigure,
    Variable,
    answers_after,
    check_fields,
    clustered_means,
    colour_limits,
    counted,
    dataset,
    error_bars,
    head_grid,
    head_name,
    integer_step,
    interval_suffix,
    intervals,
    log_axis,
    pairs_of,
    plain_torch,
    provenance,
    questions_alone,
    random_heads,
    recorded_pairs,
    with_interval,
    with_note,
)

_HEAD, _RUN, _VECTOR = ("layer", "head"), ("prompt",), ("vector", "block")
PROMPTS = ("examples", "shuffled", "question")
VECTORS = ("function", "random")

VARIABLES = (
    *with_interval(Variable("effect", _HEAD, "probability", "change of P(answer) in shuffled prompts", "0")),
    *with_interval(Variable("accuracy", _RUN, "share of questions", "answers that are the most probable token", "0")),
    Variable("probability", _RUN, "probability", "mean P(answer)"),
    *with_interval(
        Variable("steered_accuracy", _VECTOR, "share of questions", "question alone, vector added there", "random")
    ),
    *with_interval(Variable("steered_probability", _VECTOR, "probability", "mean P(answer) there", "that of random")),
    Variable("norm", ("vector",), "L2 norm", "norm of the vector"),
    Variable("vector_direction", ("vector", "d_model"), "activation", "the vector; random: the first draw"),
    Variable("chosen_layer", (), "layer", "block after which the choosing half does best"),
)


@dataclass(frozen=True)
class FunctionVectors(StoreProbe):
    """Finds heads that carry a task shown by examples, and adds their summed mean output to questions without any."""

    name: ClassVar[str] = "function-vectors"
    needs_model: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = (
        "Todd et al. 2024, Function vectors in large language models, arXiv 2310.15213",
    )
    variables: ClassVar[tuple[Variable, ...]] = VARIABLES
    controls: ClassVar[Mapping[str, str]] = {
        "random": "vectors of as many other heads of the same layers, mean over draws",
        "question": "the question alone, without a vector",
        "shuffled": "examples with the answers of others: what format and words alone give",
    }

    heads: int = 10
    """Number of heads whose mean outputs make up the vector."""
    scale: float = 1.0
    """Factor of the vector when it is added."""
    draws: int = 3
    """Random sets of heads for the control."""
    where: str | None = None
    """SQL over the token table: pairs with a selected token are used. None: all."""
    model: str | None = None
    """Directory or hub id of the recorded model, if the name in the store is not enough to load it."""
    resamples: int = 1000
    """Resamples of questions for the intervals."""
    seed: int = 0
    """Random seed of the halves, the random heads and the resamples."""
    device: str | None = None
    """Device of a model that the probe loads: cpu, cuda, cuda:1. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "heads", "draws", "resamples", at_least=1, whole=True)
        check_fields(self, "seed", at_least=0, whole=True)
        check_fields(self, "scale", above=0, below=float("inf"))

    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Measures the pairs that a store holds: texts of `wb.prompt_pairs("in-context-...", model).texts()`.

        Costs one pass over half of the prompts for each head, and (1 + draws) passes over the questions for each block.

        Args:
            store: The store; it names the model, the prompts, the answers and the label `question`.
            model: The recorded model. None: it is loaded from the setting `model` or the store's name for it.

        Raises:
            RequestError: The store has no usable pairs or no label `question`, all questions are the same, or the model
                cannot be loaded, is another one, is not causal, has no separate heads or too few of them.
        """
        loaded, pairs, notes = recorded_pairs(store, self.name, model or self.model, self.where, self.device)
        return self._run(loaded, pairs, notes, provenance(store, self))

    def run_pairs(self, model: Model, pairs: PromptPairs) -> Result:
        """Measures pairs of prompts without a store; see `run`.

        Args:
            model: The model.
            pairs: Pairs of a task "in-context-..." of `wb.prompt_pairs`.
        """
        return self._run(model, pairs_of(pairs), [], provenance_of_pairs(self, model, pairs))

    @plain_torch()
    def _run(self, model: Model, pairs: list[PatchPair], notes: list[str], known: dict[str, Any]) -> Result:
        if not model.site_map.causal:
            raise RequestError(f"model {model.name!r} is not causal; function vectors need a causal model")
        choosing, reported = self._halves(pairs)
        task = TaskVectors.make(model, choosing)
        effects = task.effects()
        order = np.argsort(-effects.mean(0), axis=None, kind="stable")[: self.heads]
        best = [(task.layers[index // task.heads], int(index % task.heads)) for index in order.tolist()]
        draw = np.random.default_rng(self.seed)
        control_heads = [random_heads(model, best, draw) for _ in range(self.draws)]
        vectors = torch.stack([task.vector(best), *(task.vector(heads) for heads in control_heads)])
        blocks = list(range(model.site_map.n_layers))
        chosen = self._layer(model, choosing, vectors[0], blocks)
        steered = self._steered(model, reported, vectors, blocks)
        arrays = self._arrays(model, reported, effects, steered)
        arrays |= {
            "norm": vectors[:2].norm(dim=1).numpy(),
            "vector_direction": vectors[:2].numpy(),
            "chosen_layer": np.asarray(chosen),
        }
        coords = {"layer": task.layers, "head": np.arange(task.heads), "prompt": list(PROMPTS), "block": blocks}
        data = dataset(VARIABLES, arrays, coords | {"vector": list(VECTORS)})
        data.attrs |= {
            "heads": ", ".join(head_name(*head) for head in best),
            "choosing": len(choosing),
            "reported": len(reported),
        }
        if model.site_map.n_layers * task.heads < 2 * self.heads:
            notes.append(f"{self.heads} heads are more than half of all")
        data.attrs["note"] = "; ".join(notes)
        return Result(self.name, data, _table(data), known)

    def _halves(self, pairs: Sequence[PatchPair]) -> tuple[list[PatchPair], list[PatchPair]]:
        """Pairs by question: no question is in both halves. RequestError where there is only one."""
        if missing := [pair for pair in pairs if not pair.places.get("question") or not pair.answer]:
            raise RequestError(
                f"{len(missing)} of {counted(len(pairs), 'pair')} have no label 'question' or no answer; "
                "use the pairs of "
                "wb.prompt_pairs('in-context-capitals', model), or label the last line of your prompts"
            )
        questions = sorted({pair.answer for pair in pairs})
        if len(questions) < 2:
            raise RequestError("all pairs have the same answer; half of the answers choose heads, others are reported")
        order = np.random.default_rng(self.seed).permutation(len(questions))
        chosen = {questions[index] for index in order[: (len(questions) + 1) // 2]}
        return [pair for pair in pairs if pair.answer in chosen], [pair for pair in pairs if pair.answer not in chosen]

    def _steered(
        self, model: Model, pairs: Sequence[PatchPair], vectors: Float[Tensor, "vector d_model"], blocks: Sequence[int]
    ) -> np.ndarray:
        """[pair, vector, block, (P, right)] of questions alone."""
        questions = questions_alone(pairs)
        values = [
            [answers_after(model, questions, f"resid_post.{block}", self.scale * vector) for block in blocks]
            for vector in vectors
        ]
        return np.moveaxis(np.array(values), 2, 0)

    def _layer(self, model: Model, pairs: Sequence[PatchPair], vector: Tensor, blocks: Sequence[int]) -> int:
        """The block where the choosing half has the most right answers; of several the one of largest P."""
        values = self._steered(model, pairs, vector[None], blocks)[:, 0].mean(0)
        return blocks[int(np.lexsort((values[:, 0], values[:, 1]))[-1])]

    def _arrays(
        self, model: Model, pairs: Sequence[PatchPair], effects: np.ndarray, steered: np.ndarray
    ) -> dict[str, np.ndarray]:
        shuffled = [replace(pair, clean=pair.corrupt) for pair in pairs]
        plain = np.stack([answers_after(model, part) for part in (pairs, shuffled, questions_alone(pairs))], 1)
        averages = np.stack([steered[:, 0], steered[:, 1:].mean(1)], 1)
        arrays = {"probability": plain[..., 0].mean(0)}
        measured = {"effect": effects, "accuracy": plain[..., 1]}
        measured |= {"steered_accuracy": averages[..., 1], "steered_probability": averages[..., 0]}
        for name, values in measured.items():
            flat = values.reshape(len(values), -1)
            mean, resampled = clustered_means(flat, np.arange(len(flat)), resamples=self.resamples, seed=self.seed)
            low, high = intervals(resampled)
            parts = {"": mean, "_low": low, "_high": high}
            arrays |= {f"{name}{end}": part.reshape(values.shape[1:]) for end, part in parts.items()}
        return arrays

    @staticmethod
    def headline(result: Result) -> str:
        """Returns P(answer) and right answers: question alone, with the vector, with random heads', with examples."""
        data = result.data
        layer, number = int(data["chosen_layer"]), result.provenance["settings"]["heads"]
        shares = {name: 100 * float(data["accuracy"].sel(prompt=name)) for name in PROMPTS}
        chances = {name: float(data["probability"].sel(prompt=name)) for name in PROMPTS}
        at = {name: data.sel(block=layer, vector=name) for name in VECTORS}
        low, high = (float(at["function"][f"steered_probability_{end}"]) for end in ("low", "high"))
        interval = interval_suffix(low, high, ".2g")
        with_vector, with_random = (float(at[name]["steered_probability"]) for name in VECTORS)
        right, chance = (100 * float(at[name]["steered_accuracy"]) for name in VECTORS)
        best = result.table.iloc[0]
        text = (
            f"P(answer) to the question alone {chances['question']:.2g}, with the vector of "
            f"{counted(number, 'head')} after block "
            f"{layer} {with_vector:.2g}{interval}, with random heads {with_random:.2g}, with examples "
            f"{chances['examples']:.2g}; right answers {shares['question']:z.0f} %, {right:z.0f} %, "
            f"{chance:z.0f} %, {shares['examples']:z.0f} % (shuffled examples {shares['shuffled']:z.0f} %); strongest "
            f"head {head_name(int(best['layer']), int(best['head']))}, P(answer) {best['effect']:+z.3f}; "
            f"{counted(data.attrs['reported'], 'question')}, heads and block chosen on {data.attrs['choosing']} others."
        )
        return with_note(text, result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "probability", P(answer) by block; "steering", right answers; "heads", the effect of each head."""
        return {
            "probability": _steering(result, "probability"),
            "steering": _steering(result, "accuracy"),
            "heads": _heads(result),
        }


def _table(data: xr.Dataset) -> pd.DataFrame:
    """A line for each head, the largest effect first."""
    names = ["effect", "effect_low", "effect_high"]
    table = data[names].to_dataframe().reset_index().dropna(subset=["effect"])
    return table.sort_values("effect", ascending=False, kind="stable", ignore_index=True)


# ---- figures --------------------------------------------------------------------------------------------


def _steering(result: Result, measure: str) -> go.Figure:
    data, figure = result.data, ThemedFigure()
    blocks = data["block"].to_numpy()
    for vector, name, colour in (("function", "function vector", CATEGORIES[0]), ("random", "random heads", NEUTRAL)):
        part = data.sel(vector=vector)
        mean, low, high = (part[f"steered_{measure}{end}"].to_numpy() for end in ("", "_low", "_high"))
        figure.add_scatter(
            x=blocks,
            y=mean,
            error_y=error_bars(mean, low, high),
            name=name,
            mode="lines+markers",
            line={"color": colour, "dash": "longdash" if vector == "random" else "solid"},
            hovertemplate="block %{x}: %{y:.3g}",
        )
    for prompt, dash in (("examples", "dash"), ("shuffled", "dashdot"), ("question", "dot")):
        share = float(data[measure].sel(prompt=prompt))
        line = {"dash": dash, "width": 1, "color": NEUTRAL}
        figure.add_scatter(x=blocks, y=np.full(len(blocks), share), name=prompt, mode="lines", line=line)
    text = "right answers" if measure == "accuracy" else "mean P(answer)"
    figure.update_layout(
        title={
            "text": "Function vector added to questions without examples",
            "subtitle": {
                "text": f"{text}, 95 % CI over {counted(data.attrs['reported'], 'question')}; lines: no vector"
            },
        },
        width=820,
        height=480,
        margin={"t": 130},
    )
    figure.update_xaxes(title="block after which the vector is added", dtick=integer_step(blocks.tolist()))
    if measure == "accuracy":
        return figure.update_yaxes(title="share of questions", range=[-0.03, 1.03])
    return figure.update_yaxes(
        title="probability", **log_axis(data[f"steered_{measure}"].to_numpy(), data[measure].to_numpy())
    )


def _heads(result: Result) -> go.Figure:
    data = result.data
    layers, heads = data["layer"].to_numpy().tolist(), data["head"].to_numpy().tolist()
    values = data["effect"].to_numpy()
    hover = [
        [f"<b>{head_name(layer, head)}</b><br>effect {values[row, head]:z.4f}" for head in heads]
        for row, layer in enumerate(layers)
    ]
    return head_grid(
        np.clip(values, 0, None),
        hover=hover,
        layers=layers,
        title="Heads that carry the task",
        subtitle=f"change of P(answer) in prompts with shuffled examples, "
        f"{counted(data.attrs['choosing'], 'question')}",
        unit="probability",
        limits=colour_limits(values),
    )
