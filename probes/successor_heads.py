"""Successor heads: attention heads that map a token to its successor in an ordered class (Gould et al. 2023).

`M_h = W_U W_O^h W_V^h MLP_0(W_E)`: each token's embedding after the first MLP passes through one head as if the head
attended to it alone, and is read off as logits. The successor score of a head is the share of tokens whose successor
has the largest logit of all tokens of its class: " Tuesday" among the days, for " Monday". This needs weights only; the
store names the model, and its text shows how often each head raises a successor that follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from workbench.probing import (
    CASES,
    CATEGORIES,
    LOST_VARIABLES,
    MONOSPACE,
    NEUTRAL,
    NUMBERS,
    SIGNED,
    SPACES,
    TASKS,
    Chain,
    FiniteRows,
    FirstMlp,
    HeadOutput,
    LayerProbe,
    Model,
    RequestError,
    Result,
    Store,
    ThemedFigure,
    Unembed,
    Variable,
    axis_title,
    check_fields,
    choose_layers,
    colour_bar,
    colour_limits,
    counted,
    dataset,
    digit_readings,
    direct_effects,
    direct_logits,
    error_bars,
    find_chains,
    find_places,
    first_mlp,
    head_grid,
    head_name,
    head_outputs,
    interval_text,
    label,
    load_unembed,
    make_pairs,
    ov_logits,
    plain_torch,
    recorded_model,
    require_causal,
    shares_of_wins,
    shuffled_null,
    strict_argmax,
    usable_device,
    wilson,
    with_interval,
    with_note,
)

_FEW_PLACES = 30
_LEVEL = 0.05  # p over all heads above which a score is no finding
_SHOWN = 3  # heads in the figure of tasks
_HEAD, _TASK = ("layer", "head"), ("task",)
_SHARE, _MEAN = "share of tokens", "mean share over tasks"

VARIABLES = (
    Variable("score", (*_TASK, *_HEAD), _SHARE, "successor has strictly the largest logit of its class", "null_score"),
    Variable("null_score", (*_TASK, *_HEAD), _SHARE, "mean score with successors shuffled within their class"),
    Variable("macro", _HEAD, _MEAN, "mean of score over tasks", "null_macro"),
    Variable("micro", _HEAD, _SHARE, "score over the tokens of all tasks"),
    Variable("tasks_above", _HEAD, "tasks", "tasks whose score is above the threshold"),
    Variable("copying", _HEAD, _MEAN, "tokens whose own logit is strictly the largest of their class"),
    Variable("null_macro", _HEAD, _MEAN, "mean macro score with successors shuffled within their class"),
    Variable("p_value", _HEAD, "probability", "(1 + shuffles with as high a macro score) / (1 + shuffles)", "uniform"),
    Variable("p_family", _HEAD, "probability", "p_value against the best head of each shuffle", "uniform"),
    Variable("listed", _TASK, "words", "words of the task"),
    Variable("members", _TASK, "tokens", "words that are single tokens"),
    Variable("tokens", _TASK, "tokens", "members with a successor, which are scored"),
    Variable("chance", _TASK, _SHARE, "1 / n for a class of n members"),
    Variable("first_mlp_score", _TASK, _SHARE, "score of what heads read, without a head", "chance"),
    Variable("circuit", ("member", "output"), "logits", "logits of the best head in its best class"),
    Variable("member_text", ("member",), "text", "members of that class"),
    Variable("mod10_accuracy", _TASK, _SHARE, "index modulo 10 by a linear map of what heads read", "0.1"),
    Variable(
        "arithmetic",
        _TASK,
        "share of changes",
        "changes of the last digit i to j for which x - k f_i + k f_j gives the best head a successor in j + 1",
        "shuffled_arithmetic",
    ),
    Variable("shuffled_arithmetic", _TASK, "share of changes", "arithmetic with the features f of other digits"),
    Variable("places", (), "tokens", "places in the text where a successor follows within 8 tokens"),
    *with_interval(
        Variable("wins", _HEAD, "share of places", "places in the text where this head raises the successor most")
    ),
    Variable("direct_effect", _HEAD, "logits", "logit that the head gives the successor minus the class's mean", "0"),
    *LOST_VARIABLES,
)


@dataclass(frozen=True)
class SuccessorHeads(LayerProbe):
    """Scores heads that map a token to its successor (numbers, days, letters), in weights and in the recorded text."""

    name: ClassVar[str] = "successor-heads"
    needs_model: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("Gould et al. 2023, Successor heads, arXiv 2312.09230",)
    variables: ClassVar[tuple[Variable, ...]] = VARIABLES
    controls: ClassVar[Mapping[str, str]] = {
        "null_macro": "the same score with the successors shuffled within their class",
        "p_family": "share of shuffles in which the best of all heads scores as high as this one",
        "chance": "1 / n for a class of n members",
        "first_mlp_score": "score of what heads read, without a head: the effect of the first MLP alone",
    }

    model: str | None = None
    """Directory or hub id of the recorded model, if the name in the store is not enough to load it."""
    first_mlp: str = "residual"
    """Input of the heads for each token. residual: its embedding plus the output of the first MLP; mlp: that output
    alone; none: the embedding alone, which is all that heads of layer 0 read."""
    space: str = "with"
    """Members with a leading space, without, or both; each spelling is a class of its own within its task."""
    case: str = "listed"
    """Members as listed (days, months and letters capitalised), in lower case (lower), or both."""
    wrap: bool = False
    """True makes the first day and month the successors of the last."""
    min_members: int = 3
    """Minimum members of a class that are single tokens."""
    min_pairs: int = 5
    """Minimum pairs of a token and its successor in a task; tasks with fewer are left out."""
    threshold: float = 0.5
    """A head succeeds in a task if its score is above this."""
    permutations: int = 1000
    """Shuffles of the successors within their class, for the null. Fewer than 19 give no p of 0.05 or less."""
    seed: int = 0
    """Random seed of the shuffles, splits and the bootstrap."""
    arithmetic: float = 1.0
    """k in x - k f_i + k f_j, where f_i is the mean feature of numbers with last digit i."""
    row_limit: int = 2000
    """Maximum places in the text whose direct effects are compared. 0: none."""
    device: str | None = None
    """Device of a model that the probe loads: cpu, cuda, cuda:1. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (("first_mlp", get_args(FirstMlp)), ("space", tuple(SPACES)), ("case", tuple(CASES))):
            check_fields(self, name, one_of=choices)
        check_fields(self, "min_members", at_least=2)
        check_fields(self, "permutations", "min_pairs", at_least=1)
        check_fields(self, "seed", "row_limit", at_least=0)
        check_fields(self, "threshold", at_least=0, below=1)
        check_fields(self, "arithmetic", above=0, below=float("inf"))

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Scores every head of the recorded model, and counts which head raises successors in the text.

        Costs three passes over the class members and, for each head, products of members x members x d_model; shuffles
        cost permutations x heads x members. The text needs z of all layers and the last resid_post.

        Args:
            store: Names the model; its text is used where z and the last resid_post were recorded.
            model: The recorded model. None: it is loaded from the setting `model` or the store's name for it.

        Raises:
            RequestError: The model cannot be loaded, is another one, has no tokenizer or no heads, or is not causal;
                the store has no unembedding, or NaN or infinite values; no class has enough single tokens.
        """
        require_causal(store, self.name)
        unembed = load_unembed(store.path)
        model = recorded_model(store, model or self.model, usable_device(self.device))
        unembed = unembed.to(model.device)
        spelling = {"space": self.space, "case": self.case, "wrap": self.wrap}
        chains = find_chains(unembed, min_members=self.min_members, min_pairs=self.min_pairs, **spelling)
        ids = torch.tensor(sorted({token for chain in chains for token in chain.ids.tolist()}))
        x, unembed = first_mlp(model, ids, self.first_mlp).to(model.device), unembed.to(model.device)  # pyright: ignore[reportArgumentType]  # checked
        outputs = _equal_heads(model, self.layers)
        classes = _Classes(chains, ids)
        tops = np.stack([classes.tops(logits) for _, logits in ov_logits(model, x, ids, unembed, outputs)])
        bare = classes.tops(direct_logits(unembed, x, ids.to(x.device))[None])[0]
        arrays = _scores(classes, tops, bare, self)
        best = np.unravel_index(arrays["macro"].argmax(), arrays["macro"].shape)
        layer, head = list(outputs)[best[0]], int(best[1])
        head_logits = _OneHead(model, unembed, ids, layer, head)
        chosen = classes.first_of(int(arrays["score"][:, best[0], head].argmax()))
        circuit = classes.of_class(chosen, head_logits(x)[None])[0].cpu().numpy()
        words = [unembed.token(token) for token in chains[chosen].ids.tolist()]
        arrays |= {"circuit": circuit, "member_text": words}
        digits, numbers = digit_readings(chains, classes.tasks, ids, x, self.arithmetic, head_logits, self.seed)
        few = f"digits left out: {numbers} numbers are single tokens, {NUMBERS} are needed"
        digit_note = few if numbers < NUMBERS else ""
        text, rows, text_note = _text(store, outputs, chains, unembed, self)
        coords = {"task": classes.tasks, "layer": list(outputs), "head": np.arange(tops.shape[1])}
        data = dataset(VARIABLES, arrays | digits | text, coords)
        data["circuit"].attrs |= {"task": chains[chosen].task, "layer": layer, "head": head}
        return self.result(store, data, _table(data), rows, [self._missing(classes), digit_note, text_note])

    def _missing(self, classes: _Classes) -> str:
        missing = [task for task in TASKS if task not in classes.tasks]
        few = f"with fewer than {self.min_members} single tokens or {self.min_pairs} pairs of them"
        return f"left out, {few}: {', '.join(missing)}" if missing else ""

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the best head against shuffled successors, or that there is none, and the best head in the text."""
        data, threshold = result.data, result.provenance["settings"]["threshold"]
        layer, head = _best_heads(data)[0]
        at, tasks = data.sel(layer=layer, head=head), data.sizes["task"]
        above = int(at["tasks_above"])
        macro, null, p = (float(at[name]) for name in ("macro", "null_macro", "p_family"))
        numbers = f"macro score {macro:z.2f}, shuffled successors {null:z.2f}, p {p:.2g}"
        numbers += f" over {counted(data['macro'].size, 'head')}"
        certain = f"{head_name(layer, head)} scores above {threshold:g} in {above} of {tasks} classes: {numbers}."
        smallest = 1 / (1 + result.provenance["settings"]["permutations"])
        none = f"Not tested, as p cannot be below {smallest:.2g}" if smallest > _LEVEL else "No successor head"
        text = certain if p <= _LEVEL else f"{none}; best head {head_name(layer, head)}: {numbers}."
        return with_note(f"{text} {_text_finding(data)}".rstrip(), result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "scores" (every head), "tasks" (the best heads), "circuit" (one class) and "ov" (copying, scores)."""
        figures = {"scores": _score_map(result), "tasks": _task_bars(result)}
        return {**figures, "circuit": _circuit_map(result), "ov": _ov_scatter(result)}


# ---- scores ---------------------------------------------------------------------------------------------


def _equal_heads(model: Model, layers: Sequence[int] | None) -> dict[int, HeadOutput]:
    """Head outputs by layer; refused where layers have different numbers of heads, which no array can hold."""
    all_outputs = head_outputs(model)
    chosen = choose_layers(
        [*all_outputs], layers, model.site_map.n_layers, "has no attention heads; layers with heads are"
    )
    outputs = {layer: all_outputs[layer] for layer in chosen}
    numbers = sorted({output.heads for output in outputs.values()})
    if len(numbers) > 1:
        raise RequestError(f"model {model.name!r} has layers with {numbers} heads; equal numbers are needed")
    return outputs


class _Classes:
    """Chains, their tasks and pairs, and the places of their members among the sorted token ids."""

    def __init__(self, chains: Sequence[Chain], ids: Int[Tensor, " token"]) -> None:
        self.chains = chains
        self.tasks = list(dict.fromkeys(chain.task for chain in chains))
        self.pairs = make_pairs(chains, self.tasks)
        self._places = [torch.from_numpy(np.searchsorted(ids.numpy(), chain.ids)) for chain in chains]

    def first_of(self, task: int) -> int:
        """Index of the task's first chain."""
        return next(i for i, chain in enumerate(self.chains) if chain.task == self.tasks[task])

    def of_class(self, chain: int, logits: Float[Tensor, "head token target"]) -> Float[Tensor, "head member output"]:
        places = self._places[chain].to(logits.device)
        return logits[:, places][:, :, places]

    def tops(self, logits: Float[Tensor, "head token target"]) -> Int[np.ndarray, "head pair"]:
        """For each pair's source the member with strictly the largest logit, -1 for ties."""
        tops = [strict_argmax(self.of_class(i, logits))[:, chain.source] for i, chain in enumerate(self.chains)]
        return np.concatenate(tops, axis=1)


def _scores(
    classes: _Classes, tops: Int[np.ndarray, "layer head pair"], bare: Int[np.ndarray, " pair"], probe: SuccessorHeads
) -> dict[str, np.ndarray]:
    """Scores of heads and tasks, with their null."""
    pairs, chains, tasks = classes.pairs, classes.chains, classes.tasks
    hits = tops == pairs.target
    score = pairs.mean(hits)
    macro = score.mean(-1)
    null_score, null_macro, p_value, p_family = shuffled_null(tops, pairs, macro, probe.permutations, probe.seed)
    class_sizes = np.array([len(chains[i].ids) for i in pairs.chain])
    return {
        "score": np.moveaxis(score, -1, 0),
        "null_score": np.moveaxis(null_score, -1, 0),
        "macro": macro,
        "micro": hits.mean(-1),
        "tasks_above": (score > probe.threshold).sum(-1),
        "copying": pairs.mean(tops == pairs.source).mean(-1),
        "null_macro": null_macro,
        "p_value": p_value,
        "p_family": p_family,
        "listed": np.array([len(TASKS[task]) for task in tasks]),
        "members": np.array([sum(len(chain.ids) for chain in chains if chain.task == task) for task in tasks]),
        "tokens": pairs.of_task.sum(0).astype(int),
        "chance": pairs.mean(1 / class_sizes),
        "first_mlp_score": pairs.mean(bare == pairs.target),
    }


@dataclass(frozen=True)
class _OneHead:
    """Logits over the tokens `ids` that one head gives when it attends to one input alone."""

    model: Model
    unembed: Unembed
    ids: Int[Tensor, " token"]
    layer: int
    head: int

    def __call__(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token target"]:
        ((_, logits),) = ov_logits(self.model, x.to(self.model.device), self.ids, self.unembed, [self.layer])
        return logits[self.head]


def _text(
    store: Store, outputs: Mapping[int, HeadOutput], chains: Sequence[Chain], unembed: Unembed, probe: SuccessorHeads
) -> tuple[dict[str, Any], FiniteRows, str]:
    """Effects of the heads on the successor's logit where the text has one, the rows of these places, and a note."""
    recorded = {site.short for site in store.sites}
    needed = [*(f"z.{layer}" for layer in outputs), f"resid_post.{store.manifest.model.n_layers - 1}"]
    missing = [site for site in needed if site not in recorded]
    rows = FiniteRows(np.zeros(0, np.int64), np.zeros(0, np.int64), {})
    if not probe.row_limit:
        return {}, rows, "text left out: row_limit is 0"
    if missing:
        return {}, rows, f"text left out: {missing[0]} was not recorded (record z and resid_post)"
    if any(output.factor is None for output in outputs.values()):
        return {}, rows, "text left out: the model adds more to the stream than head outputs"
    places = find_places(store, chains, probe.row_limit)
    if not len(places.rows):
        return {"places": 0}, rows, "text left out: it contains no successor"
    rows = probe.finite_rows(store, needed, places.rows)
    places = places.at(rows.rows)
    number = len(places.rows)
    effects = direct_effects(store, outputs, chains, unembed, places)
    wins = shares_of_wins(effects, store.tokens.take(places.rows)["document"].to_numpy(), probe.seed)
    few = f"only {number} places in the text" if number < _FEW_PLACES else ""
    first = (
        f"the first {probe.row_limit} of {places.total} places in the text" if places.total > probe.row_limit else ""
    )
    return {**wins, "places": number}, rows, "; ".join(filter(None, [few, first]))


def _text_finding(data: xr.Dataset) -> str:
    """The head that raises successors most often in the text, as a sentence."""
    if "wins" not in data:
        return ""
    best = np.unravel_index(int(data["wins"].to_numpy().argmax()), data["wins"].shape)
    at = data.isel(layer=int(best[0]), head=int(best[1]))
    share, low, high = (100 * float(at[name]) for name in ("wins", "wins_low", "wins_high"))
    return (
        f"In the text {head_name(int(at['layer']), int(at['head']))} raises the successor most of all heads at "
        f"{share:z.0f} % of {int(data['places']):,} places, {interval_text(low, high)}."
    )


# ---- table and figures ----------------------------------------------------------------------------------


def _table(data: xr.Dataset) -> pd.DataFrame:
    """One line per head, the highest macro score first."""
    names = [name for name, variable in data.items() if variable.dims == _HEAD]
    table = data[names].to_dataframe().reset_index()
    for task in data["task"].to_numpy().tolist():
        table[f"score {task}"] = data["score"].sel(task=task).to_numpy().ravel()
    return table.sort_values("macro", ascending=False, kind="stable").reset_index(drop=True)


def _best_heads(data: xr.Dataset) -> list[tuple[int, int]]:
    order = np.argsort(-data["macro"].to_numpy().ravel(), kind="stable")
    layer, head = np.unravel_index(order, data["macro"].shape)
    return [(int(data["layer"][i]), int(h)) for i, h in zip(layer, head, strict=True)]


def _title(result: Result) -> str:
    return f"Successor heads of {label(str(result.provenance['model']), 60)}"


def _score_map(result: Result) -> go.Figure:
    data, threshold = result.data, result.provenance["settings"]["threshold"]
    above, tasks = data["tasks_above"].to_numpy(), data.sizes["task"]
    values = {"score": "macro", "shuffled": "null_macro", "p": "p_value", "p over all heads": "p_family"}
    values |= {"copying": "copying"} | ({"wins in the text": "wins"} if "wins" in data else {})
    hover = [
        [
            f"<b>{head_name(layer, head)}</b><br>above {threshold:g} in {above[i, head]} of {tasks} tasks<br>"
            + "<br>".join(f"{name} {float(data[key][i, head]):.3g}" for name, key in values.items())
            for head in range(data.sizes["head"])
        ]
        for i, layer in enumerate(data["layer"].to_numpy().tolist())
    ]
    return head_grid(
        data["macro"].to_numpy(),
        hover=hover,
        cells=[[str(count) if count else "" for count in row] for row in above.tolist()],
        layers=data["layer"].to_numpy().tolist(),
        title=f"{_title(result)}: successor score",
        subtitle=f"mean over {tasks} tasks; in the cells: number of tasks with a score above {threshold:g}",
        unit="successor score",
        limits=colour_limits(data["macro"].to_numpy()),
    )


def _task_bars(result: Result) -> go.Figure:
    data = result.data
    tasks, number = data["task"].to_numpy().tolist(), data["tokens"].to_numpy()
    figure = ThemedFigure()
    selection = f"the best {min(_SHOWN, data['macro'].size)} of {counted(data['macro'].size, 'head')}"
    for layer, head in _best_heads(data)[:_SHOWN]:
        score = data["score"].sel(layer=layer, head=head).to_numpy()
        low, high = wilson(score, number)
        error = error_bars(score, low, high)
        figure.add_bar(x=tasks, y=score, error_y=error, name=head_name(layer, head), hovertemplate="%{x}: %{y:.3f}")
    layer, head = _best_heads(data)[0]
    levels = {
        f"shuffled successors, {head_name(layer, head)}": data["null_score"].sel(layer=layer, head=head),
        "chance": data["chance"],
        "first MLP without a head": data["first_mlp_score"],
    }
    for (name, level), pattern in zip(levels.items(), ("", "/", "x"), strict=True):
        marker = {"color": NEUTRAL, "pattern": {"shape": pattern, "solidity": 0.4}}
        figure.add_bar(x=tasks, y=level.to_numpy(), name=name, marker=marker, hovertemplate="%{x}: %{y:.3f}")
    figure.update_layout(
        title={
            "text": f"{_title(result)}: score by task",
            "subtitle": {"text": f"{selection}, with 95 % Wilson intervals, and three controls"},
        },
        barmode="group",
        height=480,
        width=max(760, 150 * len(tasks)),
        margin={"t": 110},
        legend={"y": -0.2, "yanchor": "top", "x": 0, "xanchor": "left"},
    )
    ticks = [f"{task}<br>n = {n}" for task, n in zip(tasks, number.tolist(), strict=True)]
    figure.update_xaxes(tickmode="array", tickvals=tasks, ticktext=ticks)
    return figure.update_yaxes(title=axis_title(data["score"].attrs, "successor score"), range=[0, 1.05])


def _circuit_map(result: Result) -> go.Figure:
    values = result.data["circuit"]
    words = [label(str(word)) for word in result.data["member_text"].to_numpy().tolist()]
    places = list(range(len(words)))
    figure = ThemedFigure(
        go.Heatmap(
            z=values.to_numpy(),
            x=places,
            y=places,
            customdata=[[f"{source} → {output}" for output in words] for source in words],
            hovertemplate="%{customdata}: %{z:.3f} logits<extra></extra>",
            colorscale=SIGNED,
            zmid=float(values.mean()),
            colorbar=colour_bar(axis_title(values.attrs)),
        )
    )
    head = head_name(int(values.attrs["layer"]), int(values.attrs["head"]))
    subtitle = f"{head}, task: {values.attrs['task']}; no colour: the mean, {float(values.mean()):.3g} logits"
    title = {"text": f"{_title(result)}: OV circuit", "subtitle": {"text": subtitle}}
    figure.update_layout(title=title, width=640, height=620, margin={"t": 110})
    step = max(1, len(words) // 30)
    ticks = {"tickmode": "array", "tickvals": places[::step], "ticktext": words[::step], "showgrid": False}
    figure.update_xaxes(title="output token", tickangle=-45, tickfont={"family": MONOSPACE}, **ticks)
    return figure.update_yaxes(title="input token", autorange="reversed", tickfont={"family": MONOSPACE}, **ticks)


def _ov_scatter(result: Result) -> go.Figure:
    """Copying score against successor score, a point per head, with shuffled successors for comparison."""
    data = result.data
    copying, macro, null = (data[name].to_numpy().ravel() for name in ("copying", "macro", "null_macro"))
    names = [
        head_name(layer, head) for layer in data["layer"].to_numpy().tolist() for head in range(data.sizes["head"])
    ]
    best = int(np.argmax(macro))
    figure = ThemedFigure()
    for name, score, marker in (
        ("shuffled successors", null, {"color": NEUTRAL, "size": 5}),
        ("successors", macro, {"color": CATEGORIES[0], "size": 7}),
    ):
        hover = "%{customdata}: copying %{x:.3f}, %{y:.3f}"
        figure.add_scatter(
            x=copying, y=score, name=name, mode="markers", marker=marker, customdata=names, hovertemplate=hover
        )
    at_best = {"x": copying[[best]], "y": macro[[best]], "text": [names[best]]}
    figure.add_scatter(**at_best, mode="text", textposition="middle right", showlegend=False)
    title = {"text": f"{_title(result)}: OV circuits", "subtitle": {"text": "one point per head, mean over tasks"}}
    figure.update_layout(title=title, width=640, height=560, margin={"t": 110})
    figure.update_xaxes(title=axis_title(data["copying"].attrs, "copying score"), range=[-0.03, 1.1], dtick=0.2)
    return figure.update_yaxes(title=axis_title(data["macro"].attrs, "successor score"), range=[-0.03, 1.05])
