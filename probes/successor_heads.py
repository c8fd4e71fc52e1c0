"""Successor heads: heads that turn a token into the one that comes after it, whatever it counts (Gould et al. 2023).

`M_h = W_U W_O^h W_V^h MLP_0(W_E)`: each token's embedding after the first MLP is put through one head as if the head
attended to it alone, and read off as logits. The successor score of a head is the share of tokens for which the
successor has the largest logit of all tokens of its class: " Tuesday" among the days, for " Monday". This needs weights
only; the store names the model, and its text shows whether the heads do it where it matters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import xarray as xr
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from workbench.probing import (
    CATEGORIES,
    MONOSPACE,
    NEUTRAL,
    SIGNED,
    TEMPLATE,
    FirstMlp,
    Model,
    RequestError,
    Result,
    Store,
    Unembed,
    axis_title,
    clustered_means,
    colour_bar,
    direct_logits,
    first_mlp,
    head_grid,
    head_outputs,
    intervals,
    label,
    load_unembed,
    nearest,
    next_tokens,
    ov_logits,
    provenance,
    recorded_model,
    usable_device,
    written,
)

SPACES: Mapping[str, tuple[str, ...]] = {"with": (" ",), "without": ("",), "both": (" ", "")}
CASES: Mapping[str, tuple[Callable[[str], str], ...]] = {
    "listed": (str,),
    "lower": (str.lower,),
    "both": (str, str.lower),
}
_WORDS = {
    "number words": "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty",
    "ordinals": "first second third fourth fifth sixth seventh eighth ninth tenth",
    "days": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "day prefixes": "Mon Tue Wed Thu Fri Sat Sun",
    "months": "January February March April May June July August September October November December",
    "month prefixes": "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec",
    "letters": "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
}
TASKS: Mapping[str, tuple[str, ...]] = {
    "numbers": tuple(map(str, range(1, 201))),
    **{task: tuple(words.split()) for task, words in _WORDS.items()},
}
"""The eight tasks, each a class of words in their order."""

CYCLIC = frozenset({"days", "day prefixes", "months", "month prefixes"})
"""Where the first can be said to follow the last."""

_WINDOW = 8  # tokens back in which the text may name the member that its next token succeeds
_PLACES = 256  # in one block of writes of all heads
_RIDGE, _SPLITS, _NUMBERS = 0.1, 10, 50
_SHOWN = 3  # heads in the figure of tasks


@dataclass(frozen=True)
class SuccessorHeads:
    """Which heads map a token to its successor: numbers, days, months, letters, in weights and in the recorded text."""

    name: ClassVar[str] = "successor-heads"
    needs_model: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = ("Gould et al. 2023, Successor heads, arXiv 2312.09230",)
    controls: ClassVar[Mapping[str, str]] = {
        "null_macro": "the same score with the successors shuffled within their class",
        "p_family": "share of shuffles in which the best of all heads scores as high as this one",
        "chance": "1 / n for a class of n members",
        "first_mlp_score": "what heads read, scored without a head: how much the first MLP does by itself",
    }

    model: str | None = None
    """Directory or hub id of the recorded model, where the name in the store is not enough to load it."""
    first_mlp: str = "residual"
    """What heads read of each token. residual: its embedding and what the first MLP adds to it; mlp: the latter alone;
    none: the embedding alone, which is all that heads of layer 0 see."""
    space: str = "with"
    """Members with a leading space, without it, or both; each spelling is a class of its own within its task."""
    case: str = "listed"
    """Members as listed (days, months and letters capitalised), in lower case (lower), or both."""
    wrap: bool = False
    """Whether the first day and month are the successors of the last."""
    min_members: int = 3
    """Classes with fewer members that are single tokens are left out."""
    threshold: float = 0.5
    """A head succeeds in a task where its score is above this."""
    permutations: int = 1000
    """Shuffles of the successors within their class, for the null."""
    seed: int = 0
    """Of shuffles, splits and resamples."""
    arithmetic: float = 1.0
    """k in x - k f_i + k f_j, where f_i is what the numbers that end in i have in common."""
    row_limit: int = 2000
    """Places in the text, from the first on, in which direct effects are compared. 0: none."""
    device: str = "cpu"
    """Where a model that is loaded runs: cpu, cuda."""

    def __post_init__(self) -> None:
        for name, choices in (("first_mlp", get_args(FirstMlp)), ("space", SPACES), ("case", CASES)):
            value = getattr(self, name)
            if value not in choices:
                close = nearest(str(value), choices)
                raise RequestError(f"{name} must be one of {', '.join(choices)}, not {value!r}{close}")
        for name, least in (("min_members", 2), ("permutations", 1), ("seed", 0), ("row_limit", 0)):
            if getattr(self, name) < least:
                raise RequestError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not 0 <= self.threshold < 1:
            raise RequestError(f"threshold must be at least 0 and below 1, not {self.threshold}")
        if not 0 < self.arithmetic < float("inf"):
            raise RequestError(f"arithmetic must be above 0, not {self.arithmetic}")

    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Scores every head of the model that `store` was recorded from; `model` is that model, where it is loaded.

        `data` has, over (task, layer, head): score, the share of tokens whose successor has strictly the largest logit
        of its class, ties being failures (0 to 1; `chance` is 1/n for a class of n), and null_score, its mean over
        shuffles. Over (layer, head): macro and micro, the means over tasks and over tokens; tasks_above the threshold;
        copying, the share of tokens whose own logit is the largest; null_macro; p_value, the share of shuffles with as
        high a macro ((1 + count) / (1 + permutations); 1 is the trivial value), and p_family, the same for the best
        head of each shuffle. Over task: words listed, members that are single tokens, tokens scored, chance,
        first_mlp_score (what heads read, read without a head), mod10_accuracy, and arithmetic, the share of changes of
        last digit i to j for which x - k f_i + k f_j makes the best head raise a member that ends in j + 1 most, beside
        shuffled_arithmetic, with the features f dealt to digits anew. Over (member, output): logits of the
        best head in its best class. With `z` and the last `resid_post` recorded, over (layer, head): wins, the share of
        places in the text where the next token is the successor of the nearest class member up to 8 tokens back and
        this head raises it most, with its 95 % interval over documents (wins_low, wins_high), and direct_effect, the
        logit it gives the successor above the class's mean.

        Costs three passes over the class members and, for each head, products of members x members x d_model; shuffles
        cost permutations x heads x members. Raises RequestError where the model cannot be loaded or is another one,
        has no tokenizer or no heads, the store holds no unembedding, or no class has enough single tokens.
        """
        device = usable_device(self.device)
        model = recorded_model(store, model or self.model, device)
        unembed = load_unembed(store.path, model.device)
        chains = self._chains(unembed)
        ids = torch.tensor(sorted({token for chain in chains for token in chain.ids.tolist()}))
        x = first_mlp(model, ids, self.first_mlp)
        x, unembed = x.to(model.device), unembed.to(model.device)
        heads = _Heads(model)
        tops = _Tops(chains, ids)
        for layer, logits in ov_logits(model, x, ids, unembed):
            tops.add(layer, logits)
        bare = _Tops(chains, ids)
        bare.add(0, direct_logits(unembed, x, ids.to(x.device))[None])
        data, pairs = _scores(tops, bare, heads.layers, self)
        notes = _missing(chains, self)
        best_layer, best_head = np.unravel_index(data["macro"].to_numpy().argmax(), data["macro"].shape)
        best = int(best_layer), int(best_head)
        data = data.merge(_circuit(model, x, ids, unembed, pairs, chains, best, heads.layers, data))
        read = _OneHead(model, unembed, ids, heads.layers[best[0]], best[1])
        data, said = _mod_10(data, chains, ids, x, read, self)
        notes += said
        data, said = _behaviour(data, store, heads, chains, unembed, self)
        notes += said
        if notes:
            data.attrs["note"] = "; ".join(notes)
        return Result(self.name, data, _table(data), provenance(store, self))

    def _chains(self, unembed: Unembed) -> list[Chain]:
        """Each spelling of each task that has enough single tokens."""
        if unembed.tokens is None:
            raise RequestError("the recorded model has no tokenizer, so that no word is known to be one of its tokens")
        known = {text: token for token, text in enumerate(unembed.tokens)}  # bytes come first, and give way
        chains: dict[tuple, Chain] = {}
        for task, words in TASKS.items():
            for space in SPACES[self.space]:
                for case in CASES[self.case]:
                    found = [(i, known[t]) for i, word in enumerate(words) if (t := space + case(word)) in known]
                    chain = _chain(task, found, len(words), self.wrap and task in CYCLIC)
                    if len(chain.ids) >= self.min_members and len(chain.source):
                        chains.setdefault((task, *chain.ids.tolist()), chain)  # "one" has no other case
        if not chains:
            raise RequestError(
                f"no class has {self.min_members} members that are single tokens of this model (space={self.space!r}, "
                f"case={self.case!r}); try space='both', case='both' or a lower min_members"
            )
        return list(chains.values())

    @staticmethod
    def headline(result: Result) -> str:
        """The best head, in how many classes it succeeds, and what shuffled successors give it."""
        data, threshold = result.data, result.provenance["settings"]["threshold"]
        layer, head = _best_heads(data)[0]
        at = data.sel(layer=layer, head=head)
        above, tasks = int(at["tasks_above"]), data.sizes["task"]
        macro, null, p = (float(at[name]) for name in ("macro", "null_macro", "p_family"))
        numbers = f"macro {macro:.2f}, shuffled {null:.2f}, p {p:.2g} over {data['macro'].size} heads"
        text = (
            f"head {layer}.{head} scores above {threshold:g} in {above} of {tasks} classes ({numbers})"
            if above
            else f"no head scores above {threshold:g} in {_best_tasks(data)}; best is {layer}.{head} ({numbers})"
        )
        return f"{text}; {data.attrs['note']}" if "note" in data.attrs else text

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """ "scores": macro score of every head; "tasks": the best heads by task; "circuit": one class's logits;
        "ov": how much every head's OV circuit copies and how much it succeeds."""
        figures = {"scores": _score_map(result), "tasks": _task_bars(result)}
        return {**figures, "circuit": _circuit_map(result), "ov": _ov_scatter(result)}


# ---- classes --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """One spelling of one task: its members that are single tokens, in order, and which follows which."""

    task: str
    ids: Int[np.ndarray, " member"]
    index: Int[np.ndarray, " member"]
    """Place in the task's list, from 1."""
    source: Int[np.ndarray, " pair"]
    target: Int[np.ndarray, " pair"]
    """Members by their place here: the one at `target` succeeds the one at `source`."""


def _chain(task: str, found: Sequence[tuple[int, int]], listed: int, wrap: bool) -> Chain:
    place = {index: member for member, (index, _) in enumerate(found)}
    following = {listed - 1: 0} if wrap else {}
    pairs = [
        (member, place[after])
        for index, member in place.items()
        if (after := following.get(index, index + 1)) in place and after != index
    ]
    source, target = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    index, ids = (np.array(part, dtype=np.int64) for part in (list(place), [token for _, token in found]))
    return Chain(task, ids, index + 1, source, target)


def _missing(chains: Sequence[Chain], settings: SuccessorHeads) -> list[str]:
    present = {chain.task for chain in chains}
    left = [task for task in TASKS if task not in present]
    return [f"left out, with fewer than {settings.min_members} single tokens: {', '.join(left)}"] if left else []


# ---- scores ---------------------------------------------------------------------------------------------


class _Heads:
    """Layers with heads, and how each writes; refused where their numbers differ, which no array could hold."""

    def __init__(self, model: Model) -> None:
        self.outputs = head_outputs(model)
        self.layers = list(self.outputs)
        numbers = sorted({output.heads for output in self.outputs.values()})
        if len(numbers) > 1:
            raise RequestError(f"model {model.name!r} has layers with {numbers} heads; they must be as many in each")


class _Tops:
    """Of each pair's source, for every head: the member with strictly the largest logit, -1 where there is none."""

    def __init__(self, chains: Sequence[Chain], ids: Int[Tensor, " token"]) -> None:
        self.chains = chains
        self.places = [torch.from_numpy(np.searchsorted(ids.numpy(), chain.ids)) for chain in chains]
        self.layers: list[np.ndarray] = []

    def add(self, layer: int, logits: Float[Tensor, "head token target"]) -> None:
        found = [strict_argmax(self.of_class(i, logits))[:, chain.source] for i, chain in enumerate(self.chains)]
        self.layers.append(np.concatenate(found, axis=1))

    def of_class(self, chain: int, logits: Float[Tensor, "head token target"]) -> Float[Tensor, "head member output"]:
        places = self.places[chain].to(logits.device)
        return logits[:, places][:, :, places]

    def stacked(self) -> Int[np.ndarray, "layer head pair"]:
        return np.stack(self.layers)


def strict_argmax(logits: Float[Tensor, "head member output"]) -> Int[np.ndarray, "head member"]:
    """Where the largest logit is; -1 where it is not the only one so large, or is no number."""
    top = logits.topk(2, dim=-1)
    found = torch.where(top.values[..., 0] > top.values[..., 1], top.indices[..., 0], -1)
    return found.cpu().numpy()


@dataclass(frozen=True)
class _Pairs:
    """All pairs of all chains, one after another."""

    chain: Int[np.ndarray, " pair"]
    source: Int[np.ndarray, " pair"]
    target: Int[np.ndarray, " pair"]
    of_task: Float[np.ndarray, "pair task"]
    """1 where a pair is of a task."""

    def mean(self, values: Shaped[np.ndarray, "*head pair"]) -> Float[np.ndarray, "*head task"]:
        """Mean over each task's pairs. Sums of 0 and 1 are exact, so that half of them is not above 0.5."""
        return values @ self.of_task / self.of_task.sum(0)


def _pairs(chains: Sequence[Chain], tasks: Sequence[str]) -> _Pairs:
    chain = np.repeat(np.arange(len(chains)), [len(part.source) for part in chains])
    task = np.array([tasks.index(chains[i].task) for i in chain])
    of_task = (task[:, None] == np.arange(len(tasks))).astype(float)
    source, target = (np.concatenate([getattr(part, name) for part in chains]) for name in ("source", "target"))
    return _Pairs(chain, source, target, of_task)


def _scores(tops: _Tops, bare: _Tops, layers: list[int], settings: SuccessorHeads) -> tuple[xr.Dataset, _Pairs]:
    chains = tops.chains
    tasks = list(dict.fromkeys(chain.task for chain in chains))
    pairs, found = _pairs(chains, tasks), tops.stacked()
    right = found == pairs.target
    score = pairs.mean(right)
    macro = score.mean(-1)
    null_score, null_macro, p_value, p_family = shuffled_null(found, pairs, macro, settings.permutations, settings.seed)
    members = np.array([len(chains[i].ids) for i in pairs.chain])
    over, share = ("task", "layer", "head"), {"units": "share of tokens"}
    by_head: dict[str, tuple[np.ndarray, str]] = {
        "macro": (macro, "mean share over tasks"),
        "micro": (right.mean(-1), "share of tokens"),
        "tasks_above": ((score > settings.threshold).sum(-1), "tasks"),
        "copying": (pairs.mean(found == pairs.source).mean(-1), "mean share over tasks"),
        "null_macro": (null_macro, "mean share over tasks"),
        "p_value": (p_value, "probability"),
        "p_family": (p_family, "probability"),
    }
    by_task: dict[str, tuple[Any, str]] = {
        "listed": ([len(TASKS[task]) for task in tasks], "words"),
        "members": ([sum(len(chain.ids) for chain in chains if chain.task == task) for task in tasks], "tokens"),
        "tokens": (pairs.of_task.sum(0).astype(int), "tokens"),
        "chance": (pairs.mean(1 / members), "share of tokens"),
        "first_mlp_score": (pairs.mean(bare.stacked()[0, 0] == pairs.target), "share of tokens"),
    }
    data = xr.Dataset(
        {
            "score": (over, np.moveaxis(score, -1, 0), share),
            "null_score": (over, np.moveaxis(null_score, -1, 0), share),
            **{name: (over[1:], values, {"units": unit}) for name, (values, unit) in by_head.items()},
            **{name: (over[:1], values, {"units": unit}) for name, (values, unit) in by_task.items()},
        },
        coords={"task": tasks, "layer": layers, "head": np.arange(found.shape[1])},
    )
    return data, pairs


def shuffled_null(
    found: Int[np.ndarray, "layer head pair"],
    pairs: _Pairs,
    macro: Float[np.ndarray, "layer head"],
    permutations: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(mean score by task, mean macro, p, p over all heads) where a class's successors are dealt to its tokens anew.

    All heads share a shuffle, so that the best of them has a null too. p is (1 + shuffles as high) / (1 + shuffles).
    """
    draw = np.random.default_rng(seed)
    score, total = np.zeros((*macro.shape, pairs.of_task.shape[1])), np.zeros(macro.shape)
    higher, best_higher = np.zeros(macro.shape, int), np.zeros(macro.shape, int)
    reached = macro - 1e-9  # sums in another order differ in their last bit
    for _ in range(permutations):
        order = np.lexsort((draw.random(len(pairs.chain)), pairs.chain))  # chains are in order: each keeps its places
        shuffled = pairs.mean(found == pairs.target[order])
        null = shuffled.mean(-1)
        score, total = score + shuffled, total + null
        higher += null >= reached
        best_higher += null.max() >= reached
    p_value, p_family = ((1 + count) / (1 + permutations) for count in (higher, best_higher))
    return score / permutations, total / permutations, p_value, p_family


def _circuit(
    model: Model,
    x: Float[Tensor, "token d_model"],
    ids: Int[Tensor, " token"],
    unembed: Unembed,
    pairs: _Pairs,
    chains: Sequence[Chain],
    best: tuple[int, int],
    layers: list[int],
    data: xr.Dataset,
) -> xr.Dataset:
    """Logits of the best head over the class it does best in."""
    task = str(data["task"][int(data["score"].to_numpy()[:, best[0], best[1]].argmax())].item())
    chosen = next(i for i, chain in enumerate(chains) if chain.task == task)
    tops = _Tops(chains, ids)
    logits = next(part for layer, part in ov_logits(model, x, ids, unembed) if layer == layers[best[0]])
    values = tops.of_class(chosen, logits)[best[1]].cpu().numpy()
    words = [unembed.token(token) for token in chains[chosen].ids.tolist()]
    attrs = {"units": "logits", "task": task, "layer": layers[best[0]], "head": best[1]}
    return xr.Dataset(
        {"circuit": (("member", "output"), values, attrs), "member_text": (("member",), words, {"units": "text"})}
    )


# ---- index modulo 10 ------------------------------------------------------------------------------------


Read = Callable[[Float[Tensor, "token d_model"]], Float[Tensor, "token target"]]
"""From what a head reads to the logits it gives the class members."""


@dataclass(frozen=True)
class _OneHead:
    """The logits over the tokens `ids` that one head gives where it attends only to what it is given."""

    model: Model
    unembed: Unembed
    ids: Int[Tensor, " token"]
    layer: int
    head: int

    def __call__(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token target"]:
        layers = ov_logits(self.model, x.to(self.model.device), self.ids, self.unembed)
        return next(logits for layer, logits in layers if layer == self.layer)[self.head]


def _mod_10(
    data: xr.Dataset,
    chains: Sequence[Chain],
    ids: Tensor,
    x: Float[Tensor, "token d_model"],
    read: Read,
    settings: SuccessorHeads,
) -> tuple[xr.Dataset, list[str]]:
    """How well a linear map of what heads read, fitted on numbers, gives the index modulo 10: of numbers held out, and
    of the other tasks, none of which it has seen. And whether changing the last digit there changes the successor."""
    values = x.double().cpu().numpy()
    tasks = data["task"].to_numpy().tolist()
    of_task = {task: [chain for chain in chains if chain.task == task] for task in tasks}
    tokens = {
        task: values[np.searchsorted(ids.numpy(), np.concatenate([chain.ids for chain in own]))]
        for task, own in of_task.items()
    }
    index = {task: np.concatenate([chain.index for chain in own]) for task, own in of_task.items()}
    known = len(tokens.get("numbers", ()))
    accuracy, moved, shuffled = (np.full(len(tasks), np.nan) for _ in range(3))
    if known >= _NUMBERS:
        numbers = tokens["numbers"], index["numbers"]
        features = digit_features(numbers[0], numbers[1] % 10)
        dealt = features[np.random.default_rng(settings.seed).permutation(10)]
        for i, task in enumerate(tasks):
            right = ridge(numbers[0], numbers[1] % 10, tokens[task]) == index[task] % 10
            accuracy[i] = held_out(*numbers, settings.seed) if task == "numbers" else right.mean()
            moved[i], shuffled[i] = (
                arithmetic(of_task[task], ids, x, settings.arithmetic * steps, read) for steps in (features, dealt)
            )
    notes = [] if known >= _NUMBERS else [f"modulo 10 left out: {known} numbers are single tokens, {_NUMBERS} needed"]
    told = "index modulo 10 by a linear map of what heads read; chance 0.1"
    return data.assign(
        mod10_accuracy=(("task",), accuracy, {"units": "share of tokens", "long_name": told}),
        arithmetic=(("task",), moved, {"units": "share of changes"}),
        shuffled_arithmetic=(("task",), shuffled, {"units": "share of changes"}),
    ), notes


def digit_features(
    x: Float[np.ndarray, "token d_model"], digit: Int[np.ndarray, " token"]
) -> Float[np.ndarray, "digit d_model"]:
    """Mean of the tokens of each last digit, less the mean of all ten; a digit with no token has that of all."""
    means = np.array([x[digit == i].mean(0) if (digit == i).any() else x.mean(0) for i in range(10)])
    return means - means.mean(0)


def arithmetic(
    chains: Sequence[Chain],
    ids: Int[Tensor, " token"],
    x: Float[Tensor, "token d_model"],
    features: Float[np.ndarray, "digit d_model"],
    read: Read,
) -> float:
    """Share of members of index i and digits j != i for which x - f_i + f_j makes a member that ends in j + 1 the
    strict maximum of its class; j that no member's successor could follow are left out. NaN where none is left."""
    right = []
    steps = torch.from_numpy(features).to(x)
    for chain in chains:
        places = torch.from_numpy(np.searchsorted(ids.numpy(), chain.ids))
        member, j = np.meshgrid(np.arange(len(chain.ids)), np.arange(10), indexing="ij")
        i, wanted = chain.index[member] % 10, (j + 1) % 10
        possible = (i != j) & np.isin(wanted, chain.index % 10)
        member, j, i, wanted = (part[possible] for part in (member, j, i, wanted))
        if not len(member):
            continue
        logits = read(x[places[member]] - steps[i] + steps[j])[:, places]
        top = strict_argmax(logits[None])[0]
        right.append((top >= 0) & (chain.index[top] % 10 == wanted))
    return float(np.concatenate(right).mean()) if right else float("nan")


def held_out(x: Float[np.ndarray, "token d_model"], index: Int[np.ndarray, " token"], seed: int) -> float:
    """Mean accuracy of `ridge` on a tenth of the numbers, held out in every spelling, over 10 splits."""
    draw, right = np.random.default_rng(seed), []
    for _ in range(_SPLITS):
        numbers = draw.permutation(np.unique(index))
        test = np.isin(index, numbers[: max(1, len(numbers) // 10)])
        right.append((ridge(x[~test], index[~test] % 10, x[test]) == index[test] % 10).mean())
    return float(np.mean(right))


def ridge(
    x: Float[np.ndarray, "token d_model"], digit: Int[np.ndarray, " token"], asked: Float[np.ndarray, "other d_model"]
) -> Int[np.ndarray, " other"]:
    """The digit a linear map gives to each row of `asked`: least squares to one-hot digits, with a penalty of a tenth
    of the mean squared length of a centred token. Closed form, so it has nothing to converge."""
    mean = x.mean(0)
    kernel = (x - mean) @ (x - mean).T
    penalty = _RIDGE * np.trace(kernel) / len(x)
    hot = np.eye(10)[digit]
    weights = np.linalg.solve(kernel + penalty * np.eye(len(x)), hot - hot.mean(0))
    return ((asked - mean) @ (x - mean).T @ weights + hot.mean(0)).argmax(1)


# ---- the recorded text ----------------------------------------------------------------------------------


def successions(
    token_ids: Int[np.ndarray, " row"],
    following: Int[np.ndarray, " row"],
    start: Int[np.ndarray, " row"],
    chain: Chain,
) -> tuple[Int[np.ndarray, " place"], Int[np.ndarray, " place"]]:
    """(rows, members that follow) where the next token succeeds the nearest member of the class up to 8 tokens back.

    `start`: the first row that belongs to the same text; -1 in `following`: no token follows.
    """
    size = int(max(token_ids.max(initial=0), chain.ids.max())) + 2
    member_of, successor = np.full(size, -1), np.full(len(chain.ids) + 1, -2)  # the last: of no member
    member_of[chain.ids] = np.arange(len(chain.ids))
    successor[chain.source] = chain.ids[chain.target]
    rows = np.arange(len(token_ids))
    nearest_member = np.full(len(rows), -1)
    for back in range(_WINDOW):
        there = rows - back
        member = np.where(there >= start, member_of[token_ids[np.maximum(there, 0)]], -1)
        nearest_member = np.where(nearest_member < 0, member, nearest_member)
    places = np.flatnonzero(successor[nearest_member] == following)
    return places, member_of[following[places]]


def _behaviour(
    data: xr.Dataset, store: Store, heads: _Heads, chains: Sequence[Chain], unembed: Unembed, settings: SuccessorHeads
) -> tuple[xr.Dataset, list[str]]:
    """Which head raises the successor most where the text has one, if what that takes was recorded."""
    recorded = {site.short for site in store.sites}
    wanted = [*(f"z.{layer}" for layer in heads.layers), f"resid_post.{store.manifest.model.n_layers - 1}"]
    lacking = [site for site in wanted if site not in recorded]
    reason = (
        "row_limit is 0"
        if not settings.row_limit
        else f"{lacking[0]} is not recorded (record z and resid_post)"
        if lacking
        else "a norm stands behind attention, so that heads do not add up"
        if any(output.norm is not None for output in heads.outputs.values())
        else None
    )
    if reason:
        return data, [f"text left out: {reason}"]
    rows, chain, member, found = _places(store, chains, settings.row_limit)
    if not len(rows):
        return data.assign(places=((), 0, {"units": "tokens"})), ["text left out: no successor follows in it"]
    effects = _direct_effects(store, heads, chains, unembed, rows, chain, member)
    flat = effects.reshape(len(rows), -1)
    top = np.sort(flat, axis=1)[:, -2:]
    wins = (flat == top[:, 1:]) & (top[:, 1:] > top[:, :1]) if flat.shape[1] > 1 else np.ones_like(flat, bool)
    documents = store.tokens.take(rows)["document"].to_numpy()
    share, drawn = clustered_means(wins.astype(float), documents, seed=settings.seed)
    low, high = intervals(drawn)
    arrays = {
        "wins": (share, "share of places"),
        "wins_low": (low, "share of places"),
        "wins_high": (high, "share of places"),
        "direct_effect": (flat.mean(0), "logits"),
    }
    shape = effects.shape[1:]
    data = data.assign(
        {name: (("layer", "head"), part.reshape(shape), {"units": unit}) for name, (part, unit) in arrays.items()}
    )
    data = data.assign(places=((), len(rows), {"units": "tokens"}))
    few = [f"only {len(rows)} places in the text"] if len(rows) < 30 else []
    return data, [*few, *([f"the first {len(rows)} of {found} places in the text"] if found > len(rows) else [])]


def _places(store: Store, chains: Sequence[Chain], limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(row, chain, member that follows) of the first `limit` places, and how many there are."""
    tokens = store.tokens
    ids, sequence, document = (tokens[name].to_numpy() for name in ("token_id", "sequence", "document"))
    fresh = np.ones(len(ids), bool)
    fresh[1:] = (sequence[1:] != sequence[:-1]) | (document[1:] != document[:-1])
    start = np.maximum.accumulate(np.where(fresh, np.arange(len(ids)), 0))
    following = next_tokens(store)
    found = [successions(ids.astype(np.int64), following, start, chain) for chain in chains]
    rows, member = (np.concatenate(part) for part in zip(*found, strict=True))
    chain = np.repeat(np.arange(len(chains)), [len(part) for part, _ in found])
    _, first = np.unique(rows, return_index=True)  # " May" is a month and its prefix: one place
    kept = first[:limit]
    return rows[kept], chain[kept], member[kept], len(first)


def _direct_effects(
    store: Store,
    heads: _Heads,
    chains: Sequence[Chain],
    unembed: Unembed,
    rows: Int[np.ndarray, " place"],
    chain: Int[np.ndarray, " place"],
    member: Int[np.ndarray, " place"],
) -> Float[np.ndarray, "place layer head"]:
    """Logit that each head's recorded write gives the successor, less its mean over the class."""
    device = unembed.weight.device
    n_heads = next(iter(heads.outputs.values())).heads
    effects = np.zeros((len(rows), len(heads.layers), n_heads))
    final = store["resid_post", store.manifest.model.n_layers - 1]
    for number, own in enumerate(chains):
        of_chain = np.flatnonzero(chain == number)
        targets = torch.from_numpy(own.ids).to(device)
        for places in np.split(of_chain, range(_PLACES, len(of_chain), _PLACES)):
            stream = final[rows[places]].to(device)[:, None] if len(places) else None
            for i, (layer, output) in enumerate(heads.outputs.items()) if len(places) else ():
                writes = written(output, store["z", layer][rows[places]]).to(device)
                logits = direct_logits(unembed, writes, targets, stream)
                at = torch.from_numpy(member[places]).to(device)[:, None, None].expand(-1, n_heads, 1)
                effects[places, i] = (logits.gather(2, at)[..., 0] - logits.mean(-1)).cpu().numpy()
    return effects


# ---- table and figures ----------------------------------------------------------------------------------


def _table(data: xr.Dataset) -> pd.DataFrame:
    """One line for each head, the highest macro score first."""
    names = [name for name, variable in data.items() if variable.dims == ("layer", "head")]
    table = data[names].to_dataframe().reset_index()
    for task in data["task"].to_numpy().tolist():
        table[f"score {task}"] = data["score"].sel(task=task).to_numpy().ravel()
    return table.sort_values("macro", ascending=False, kind="stable").reset_index(drop=True)


def _best_heads(data: xr.Dataset) -> list[tuple[int, int]]:
    order = np.argsort(-data["macro"].to_numpy().ravel(), kind="stable")
    layer, head = np.unravel_index(order, data["macro"].shape)
    return [(int(data["layer"][i]), int(h)) for i, h in zip(layer, head, strict=True)]


def _best_tasks(data: xr.Dataset) -> str:
    most = int(data["tasks_above"].max())
    return f"any of {data.sizes['task']} classes" if not most else f"more than {most} of {data.sizes['task']} classes"


def _title(result: Result) -> str:
    return f"Successor heads of {label(str(result.provenance['model']), 60)}"


def _score_map(result: Result) -> go.Figure:
    data, threshold = result.data, result.provenance["settings"]["threshold"]
    above = data["tasks_above"].to_numpy()
    told = {"score": "macro", "shuffled": "null_macro", "p of this head": "p_value", "p over all heads": "p_family"}
    told |= {"copying": "copying"} | ({"wins in the text": "wins"} if "wins" in data else {})
    hover = [
        [
            f"<b>head {layer}.{head}</b><br>above {threshold:g} in {above[i, head]} of {data.sizes['task']} tasks<br>"
            + "<br>".join(f"{name} {float(data[key][i, head]):.3g}" for name, key in told.items())
            for head in range(data.sizes["head"])
        ]
        for i, layer in enumerate(data["layer"].to_numpy().tolist())
    ]
    return head_grid(
        data["macro"].to_numpy(),
        hover=hover,
        cells=[[str(count) if count else "" for count in row] for row in above.tolist()],
        layers=data["layer"].to_numpy().tolist(),
        title=_title(result),
        subtitle=f"successor score; in a cell the tasks, of {data.sizes['task']}, above {threshold:g}",
        unit="share of tokens, mean over tasks",
    )


def wilson(share: Float[np.ndarray, " task"], number: Int[np.ndarray, " task"]) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % interval of a share of `number` tokens, as (low, high)."""
    z = 1.96
    middle = (share + z**2 / (2 * number)) / (1 + z**2 / number)
    half = z / (1 + z**2 / number) * np.sqrt(share * (1 - share) / number + z**2 / (4 * number**2))
    return middle - half, middle + half


def _task_bars(result: Result) -> go.Figure:
    data = result.data
    tasks = data["task"].to_numpy().tolist()
    figure = go.Figure()
    for layer, head in _best_heads(data)[:_SHOWN]:
        score = data["score"].sel(layer=layer, head=head).to_numpy()
        low, high = wilson(score, data["tokens"].to_numpy())
        error = {"array": high - score, "arrayminus": score - low, "thickness": 1, "width": 3}
        figure.add_bar(x=tasks, y=score, error_y=error, name=f"head {layer}.{head}", hovertemplate="%{x}: %{y:.3f}")
    layer, head = _best_heads(data)[0]
    levels = {
        f"shuffled successors, {layer}.{head}": data["null_score"].sel(layer=layer, head=head),
        "chance": data["chance"],
        "without a head": data["first_mlp_score"],
    }
    colours = CATEGORIES[_SHOWN : _SHOWN + len(levels)]
    for (name, level), colour, symbol in zip(levels.items(), colours, ("diamond", "line-ew-open", "x"), strict=True):
        marker = {"symbol": symbol, "size": 11, "color": colour, "line": {"width": 2, "color": colour}}
        figure.add_scatter(x=tasks, y=level.to_numpy(), mode="markers", name=name, marker=marker)
    figure.update_layout(
        template=TEMPLATE,
        title={"text": _title(result), "subtitle": {"text": "by task, with 95 % intervals (Wilson) over its tokens"}},
        barmode="group",
        height=460,
        width=max(760, 120 * len(tasks)),
        legend={"y": -0.2, "yanchor": "top", "x": 0, "xanchor": "left"},
    )
    figure.update_xaxes(
        tickmode="array",
        tickvals=tasks,
        ticktext=[f"{task}<br>n = {n}" for task, n in zip(tasks, data["tokens"].to_numpy().tolist(), strict=True)],
    )
    figure.update_yaxes(title=axis_title(data["score"].attrs), range=[0, 1.05])
    return figure


def _circuit_map(result: Result) -> go.Figure:
    values = result.data["circuit"]
    words = [label(str(word)) for word in result.data["member_text"].to_numpy().tolist()]
    places = list(range(len(words)))
    figure = go.Figure(
        go.Heatmap(
            z=values.to_numpy(),
            x=places,
            y=places,
            customdata=[[f"{read} → {written}" for written in words] for read in words],
            hovertemplate="%{customdata}: %{z:.3f} logits<extra></extra>",
            colorscale=SIGNED,
            zmid=float(values.mean()),
            colorbar=colour_bar(axis_title(values.attrs)),
        )
    )
    head = f"{values.attrs['layer']}.{values.attrs['head']}"
    figure.update_layout(
        template=TEMPLATE,
        title={"text": f"{_title(result)}: head {head}, {values.attrs['task']}"},
        width=640,
        height=600,
    )
    step = max(1, len(words) // 30)
    ticks = {"tickmode": "array", "tickvals": places[::step], "ticktext": words[::step], "showgrid": False}
    figure.update_xaxes(title="token that is raised", tickangle=-45, tickfont={"family": MONOSPACE}, **ticks)
    figure.update_yaxes(title="token attended to", autorange="reversed", tickfont={"family": MONOSPACE}, **ticks)
    return figure


def _ov_scatter(result: Result) -> go.Figure:
    """Every head a point: how much its OV circuit copies, how much it succeeds, and what shuffled successors give."""
    data = result.data
    copying, macro, null = (data[name].to_numpy().ravel() for name in ("copying", "macro", "null_macro"))
    names = [f"{layer}.{head}" for layer in data["layer"].to_numpy().tolist() for head in range(data.sizes["head"])]
    best = int(np.argmax(macro))
    figure = go.Figure()
    for name, score, colour, size in (
        ("shuffled successors", null, NEUTRAL, 5),
        ("successors", macro, CATEGORIES[0], 7),
    ):
        figure.add_scatter(
            x=copying,
            y=score,
            name=name,
            mode="markers",
            marker={"color": colour, "size": size},
            customdata=names,
            hovertemplate="head %{customdata}: copying %{x:.3f}, %{y:.3f}",
        )
    figure.add_scatter(
        x=copying[[best]],
        y=macro[[best]],
        mode="text",
        text=[names[best]],
        textposition="middle right",
        showlegend=False,
    )
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": f"{_title(result)}: OV circuits",
            "subtitle": {"text": "a point for each head, a mean over tasks"},
        },
        width=640,
        height=560,
        margin={"t": 110},
    )
    figure.update_xaxes(title=f"copying ({axis_title(data['copying'].attrs)})", range=[-0.03, 1.1], dtick=0.2)
    return figure.update_yaxes(title=f"successor score ({axis_title(data['macro'].attrs)})", range=[-0.03, 1.05])
