"""Over-squashing: how soon a repeated token no longer changes the last state, in float32 and in bfloat16.

Two inputs differ by one more repetition of the last token, x_n = (.., b) and x*_{n+1} = (.., b, b) (Barbero 2024). As n
grows their last states approach each other,

    d(n) = |y_n - y*_{n+1}|        at every block, and after the final norm

until the number format cannot tell them apart: then the model cannot count. Tokens before b are b itself (`constant`),
random ones (`random`), or b with another token at every third place (`separated`), which keeps the inputs apart. Where
patterns were recorded, `rollout` is the influence of each position on the last token by attention alone, the last row
of the product over layers of (A + I) / 2, A the mean over heads.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.probing import (
    CATEGORIES,
    LOST_VARIABLES,
    NEUTRAL,
    Model,
    RequestError,
    Result,
    Store,
    StoreProbe,
    ThemedFigure,
    Unembed,
    Variable,
    capture,
    check,
    check_fields,
    counted,
    dataset,
    in_dtype,
    label,
    layers_of,
    load_unembed,
    log_axis,
    plain_torch,
    progress,
    recorded_model,
    require_causal,
    select_sequences,
    single_tokens,
    usable_device,
    with_note,
)

KINDS = ("constant", "random", "separated")
_DIGITS = "0123456789"
_LAST, _LAYERS = ("dtype", "kind", "length"), ("dtype", "kind", "length", "layer")
_MEAN = "mean over draws"
_VARIABLES: tuple[Variable, ...] = (
    Variable("distance_inf", _LAYERS, "largest coordinate", f"of y_n - y*_n+1 after each block, {_MEAN}", "floor"),
    Variable("distance_l2", _LAYERS, "L2 norm", f"of y_n - y*_n+1 after each block, {_MEAN}", "0"),
    Variable("relative", _LAYERS, "1", f"distance_l2 divided by |y_n|, {_MEAN}", "0"),
    Variable("final_inf", _LAST, "largest coordinate", f"of the difference after the final norm, {_MEAN}", "floor"),
    Variable("floor", _LAST, "largest coordinate", "spacing of the number format at the largest coordinate of y_n"),
    Variable("below_floor", _LAST, "share of draws", "difference after the final norm is at most the spacing"),
    Variable("agreement", _LAST, "share of draws", "both inputs have the same top-1 token"),
    Variable("rollout", ("position",), "share of influence", "of each position on the last token, by attention alone"),
    Variable("uniform_rollout", ("position",), "share of influence", "the same if every head attended uniformly"),
    Variable("draws", (), "inputs", "pairs of inputs of each kind and length"),
    *LOST_VARIABLES,
)


@dataclass(frozen=True)
class OverSquashing(StoreProbe):
    """Measures how close the last states of inputs come that differ by one more repetition of the last token."""

    name: ClassVar[str] = "over-squashing"
    needs_model: ClassVar[bool] = True
    variables: ClassVar[tuple[Variable, ...]] = _VARIABLES
    sources: ClassVar[tuple[str, ...]] = (
        "Barbero et al. 2024, Transformers need glasses!, arXiv 2406.04267",
        "Abnar and Zuidema 2020, Quantifying attention flow in transformers, arXiv 2005.00928",
    )
    controls: ClassVar[Mapping[str, str]] = {
        "separated": "another token at every third place, which keeps the inputs apart",
        "floor": "spacing of the number format: a difference below it is none",
        "uniform_rollout": "the influence that uniform attention would give",
        "random weights": "the same architecture with random weights",
    }

    kinds: tuple[str, ...] = KINDS
    """Tokens before the repeated one. constant: the same; random: digits at random; separated: the same with another
    token at every third place."""
    longest: int = 128
    """Longest input; lengths are 4, 8, 16, ... up to it, tokens that the recording put first included."""
    draws: int = 4
    """Inputs of each kind and length."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Types that the model computes in; it is copied to those that are not its own."""
    tokens: tuple[str, ...] = ()
    """Texts of single tokens: the repeated ones, two or more. None: digits, or the store's most frequent tokens."""
    separator: str = ","
    """Text of the token at every third place."""
    rollout: int = 64
    """First tokens of each recorded sequence whose influence is measured."""
    model: str | None = None
    """Directory or hub id of the recorded model, if the name in the store is not enough to load it."""
    seed: int = 0
    """Random seed of the drawn tokens."""
    device: str | None = None
    """Device of a model that the probe loads: cpu, cuda, cuda:1. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "draws", at_least=1, whole=True)
        check_fields(self, "longest", at_least=4, whole=True)
        check_fields(self, "rollout", at_least=2, whole=True)
        check_fields(self, "seed", at_least=0, whole=True)
        for name, known in (("kinds", KINDS), ("dtypes", ("float32", "bfloat16", "float16"))):
            if not getattr(self, name):
                raise RequestError(f"{name} is empty; name one or more of {', '.join(known)}")
            for value in getattr(self, name):
                check(name, value, one_of=known)

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Runs the model on pairs of made-up inputs; reads the recorded patterns, if there are any.

        Costs passes over 4 x longest tokens for each type, kind and draw, and a copy of the model for each type that is
        not its own.

        Args:
            store: Names the model, its vocabulary and its first tokens; has `pattern` for the rollout.
            model: The recorded model. None: it is loaded from the setting `model` or the store's name for it.

        Raises:
            RequestError: The model is not causal, cannot be loaded or is another one, the store has no unembedding, or
                a token is none of the vocabulary.
        """
        require_causal(store, self.name)
        loaded = recorded_model(store, model or self.model, usable_device(self.device))
        unembed = load_unembed(store.path, loaded.device)
        inputs, notes = _Inputs.choose(self, store, unembed)
        limit = min(self.longest, (loaded.context_limit or self.longest) - 1)
        lengths = [2**power for power in range(2, 31) if len(inputs.prefix) + 1 < 2**power <= limit]
        if not lengths:
            raise RequestError(f"longest {self.longest} leaves no length: the model takes {limit + 1} tokens")
        work = _Pairs(loaded, unembed, inputs, lengths, self)
        arrays = work.measure()
        arrays["draws"] = np.asarray(self.draws)
        coords: dict[str, Any] = {"dtype": list(self.dtypes), "kind": list(self.kinds), "length": lengths}
        coords["layer"] = list(range(loaded.site_map.n_layers))
        patterns, rows = _patterns(store, self.rollout)
        checked = self.finite_rows(store, patterns, rows)
        if not patterns:
            notes.append(
                "rollout not computed: it needs pattern at every layer, and sequences of "
                f"{counted(self.rollout, 'token')}"
            )
        else:
            arrays["rollout"] = _rollout(store, patterns, rows[~np.isin(rows, checked.left_out).any(1)])
            coords["position"] = np.arange(self.rollout)
            arrays["uniform_rollout"] = uniform_rollout(self.rollout, loaded.site_map.n_layers)
        data = dataset(_VARIABLES, arrays, coords)
        names = [name for name in arrays if data[name].dims == _LAST]
        table = data[names].to_dataframe().reset_index()
        return self.result(store, data, table, checked, notes)

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the length from which most inputs cannot be told apart, in each type, and the last distances."""
        data, parts = result.data, []
        length = int(data["length"][-1])
        for dtype in data["dtype"].to_numpy().tolist():
            texts = []
            for kind in data["kind"].to_numpy().tolist():
                cell = data.sel(dtype=dtype, kind=kind)
                below = cell["below_floor"].to_numpy() > 0.5
                stays = below[::-1].cumprod()[::-1].astype(bool)
                onset = f"from {counted(cell['length'][stays.argmax()], 'token')} on" if stays.any() else "at no length"
                texts.append(f"for {kind} inputs {onset} (distance {float(cell['final_inf'][-1]):.2g})")
            parts.append(f"in {dtype}: {', '.join(texts)}")
        text = (
            "Two inputs that differ by one repetition of the last token have last states closer than the spacing of "
            f"the number format, {'; '.join(parts)}. Distances are those at {counted(length, 'token')}"
        )
        if "rollout" in data:
            first, uniform = (float(data[name][0]) for name in ("rollout", "uniform_rollout"))
            text += f". By attention alone the first token has {first:z.2f} of the influence (uniform: {uniform:z.2f})"
        return with_note(f"{text}.", result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "distance" by length for each kind and type, and "rollout", the influence of each position."""
        figures = {"distance": _distance(result)}
        return {**figures, "rollout": _rollout_figure(result)} if "rollout" in result.data else figures


# ---- inputs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Inputs:
    """Tokens that inputs are made of."""

    prefix: tuple[int, ...]
    repeated: tuple[int, ...]
    separator: int

    @classmethod
    def choose(cls, probe: OverSquashing, store: Store, unembed: Unembed) -> tuple[_Inputs, list[str]]:
        known = single_tokens(unembed.tokens or ())
        prefix = tuple(int(token) for token in store.manifest.tokens_added.get("prefix", ()))
        special = store.tokens["is_special"].to_numpy()
        ids = store.tokens["token_id"].to_numpy()[~special].tolist()
        usual = [token for token, _ in Counter(ids).most_common(11)]
        texts, notes = probe.tokens or tuple(_DIGITS), []
        if missing := [text for text in texts if text not in known]:
            if probe.tokens:
                raise RequestError(f"tokens: {missing[0]!r} is no single token of the vocabulary; name others")
            notes.append("digits are no single tokens here: the store's most frequent tokens were repeated")
            repeated = tuple(usual[:-1] or usual)
        else:
            repeated = tuple(known[text] for text in texts)
        if len(set(repeated)) < 2:
            raise RequestError("tokens: name two or more, since random inputs need different ones")
        separator = known.get(probe.separator)
        if separator is None:
            separator = next((token for token in usual[::-1] if token not in repeated), repeated[-1])
            notes.append(f"{probe.separator!r} is no single token here: {unembed.token(separator)!r} separates")
        return cls(prefix, repeated, separator), notes

    def draw(self, kind: str, length: int, number: int, seed: int) -> Int[np.ndarray, "draw position"]:
        """x*_{n+1} of each draw; without its last token it is x_n of `length` tokens."""
        draw = np.random.default_rng([seed, length])
        last = np.array([self.repeated[index % len(self.repeated)] for index in range(number)])[:, None]
        rest = np.repeat(last, length - len(self.prefix) - 1, 1)
        if kind == "random":
            rest = draw.choice(self.repeated, rest.shape)
        elif kind == "separated":
            rest[:, ::-1][:, 1::3] = self.separator
        prefix = np.tile(np.array(self.prefix, dtype=np.int64), (number, 1)).reshape(number, -1)
        return np.concatenate([prefix, rest, last, last], 1)


# ---- distances ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pairs:
    """Runs of pairs of inputs in each type."""

    model: Model
    unembed: Unembed
    inputs: _Inputs
    lengths: Sequence[int]
    probe: OverSquashing

    def measure(self) -> dict[str, np.ndarray]:
        sizes = (len(self.probe.dtypes), len(self.probe.kinds), len(self.lengths))
        layers = self.model.site_map.n_layers
        arrays = {variable.name: np.full(sizes, np.nan) for variable in _VARIABLES if variable.dims == _LAST}
        arrays |= {
            variable.name: np.full((*sizes, layers), np.nan) for variable in _VARIABLES if variable.dims == _LAYERS
        }
        with progress("over-squashing", int(np.prod(sizes)), "pairs of inputs") as tick:
            for number, dtype in enumerate(self.probe.dtypes):
                kind = getattr(torch, dtype)
                module = self.model.module
                if self.model.dtype != kind:
                    module = in_dtype(copy.deepcopy(module), kind)
                for place in np.ndindex(sizes[1:]):
                    ids = self.inputs.draw(
                        self.probe.kinds[place[0]], self.lengths[place[1]], self.probe.draws, self.probe.seed
                    )
                    values = self._pair(module, torch.from_numpy(ids).to(torch.int64), kind)
                    for name, value in values.items():
                        arrays[name][number, *place] = value
                    tick(1)
        return arrays

    def _pair(self, module: nn.Module, ids: Int[Tensor, "draw position"], dtype: torch.dtype) -> dict[str, Any]:
        shorter, longer = (_last_states(self.model, module, part) for part in (ids[:, :-1], ids))
        difference = (shorter - longer).abs().double()
        size = difference.norm(dim=2)
        normed = [self._final(part[-1], dtype) for part in (shorter, longer)]
        final = (normed[0] - normed[1]).abs().amax(1)
        floor = spacing(normed[0].abs().amax(1), dtype)
        top = [self.unembed(part[-1].float()).argmax(1) for part in (shorter, longer)]
        return {
            "distance_inf": difference.amax(2).mean(1).cpu().numpy(),
            "distance_l2": size.mean(1).cpu().numpy(),
            "relative": (size / shorter.double().norm(dim=2).clamp(min=1e-30)).mean(1).cpu().numpy(),
            "final_inf": float(final.mean()),
            "floor": float(floor.mean()),
            "below_floor": float((final <= floor).double().mean()),
            "agreement": float((top[0] == top[1]).double().mean()),
        }

    def _final(self, state: Float[Tensor, "draw d_model"], dtype: torch.dtype) -> Float[Tensor, "draw d_model"]:
        """The normed state, rounded to the type of the model, in float64."""
        return self.unembed.normed(state.float()).to(dtype).double()


def _last_states(
    model: Model, module: nn.Module, ids: Int[Tensor, "draw position"]
) -> Float[Tensor, "layer draw d_model"]:
    """States of the last token after each block, on the device of the unembedding."""
    sites = model.site_map.select(["resid_post"])
    states: dict[str, Tensor] = {}
    capture(
        module, sites, ids, torch.ones_like(ids), lambda site, x, _first: states.update({site.name: x[:, -1].clone()})
    )
    return torch.stack([states[site.name].to(model.device) for site in sites])


def spacing(size: Float[Tensor, " draw"], dtype: torch.dtype) -> Float[Tensor, " draw"]:
    """Returns the distance of neighbouring numbers of a type at positive numbers of this size."""
    return torch.exp2(torch.floor(torch.log2(size.double().clamp(min=1e-30)))) * torch.finfo(dtype).eps


# ---- rollout --------------------------------------------------------------------------------------------


def _patterns(store: Store, length: int) -> tuple[list[str], Int[np.ndarray, "sequence position"]]:
    """Sites of the patterns of all layers, and rows of the sequences that are long enough; none where either lacks."""
    empty = np.zeros((0, length), np.int64)
    if layers_of(store, "pattern") != list(range(store.manifest.model.n_layers)) or store.manifest.chosen:
        return [], empty
    lengths = np.unique(store.tokens["sequence"].to_numpy(), return_counts=True)[1]
    if lengths.max(initial=0) < length:
        return [], empty
    return [f"pattern.{layer}" for layer in layers_of(store, "pattern")], select_sequences(store, length).rows


def _rollout(
    store: Store, patterns: list[str], sequences: Int[np.ndarray, "sequence position"]
) -> Float[np.ndarray, " position"]:
    """Mean over sequences of the last row of the product over layers of (A + I) / 2."""
    length = sequences.shape[1]
    total = np.zeros(length)
    for rows in sequences:
        row = np.eye(length)[-1]
        for name in reversed(patterns):
            pattern = store[name][rows][..., :length].double().mean(1).numpy()
            row = (row @ pattern + row) / 2
        total += row
    return total / len(sequences)


def uniform_rollout(length: int, layers: int) -> Float[np.ndarray, " position"]:
    """Returns the rollout of causal attention that is uniform over visible positions."""
    pattern = np.tril(np.ones((length, length))) / np.arange(1, length + 1)[:, None]
    row = np.eye(length)[-1]
    for _ in range(layers):
        row = (row @ pattern + row) / 2
    return row


# ---- figures --------------------------------------------------------------------------------------------


def _distance(result: Result) -> Any:
    data, figure = result.data, ThemedFigure()
    dashes = ("solid", "dash", "dot")
    for colour, kind in zip(CATEGORIES, data["kind"].to_numpy().tolist(), strict=False):
        for dash, dtype in zip(dashes, data["dtype"].to_numpy().tolist(), strict=False):
            cell: xr.Dataset = data.sel(kind=kind, dtype=dtype)
            distance = np.where(cell["final_inf"] > 0, cell["final_inf"], np.nan)  # an exact 0 has no logarithm
            figure.add_scatter(
                x=data["length"].to_numpy(),
                y=distance,
                name=f"{kind}, {dtype}",
                mode="lines+markers",
                line={"color": colour, "dash": dash},
                hovertemplate="%{x} tokens: %{y:.3g}",
            )
    for dash, dtype in zip(dashes, data["dtype"].to_numpy().tolist(), strict=False):
        figure.add_scatter(
            x=data["length"].to_numpy(),
            y=data["floor"].sel(dtype=dtype).mean("kind").to_numpy(),
            name=f"spacing of {dtype}",
            mode="lines",
            line={"color": NEUTRAL, "dash": dash},
        )
    figure.update_layout(
        title={
            "text": f"Distance of last states, one repetition apart, in {label(str(result.provenance['model']), 60)}",
            "subtitle": {"text": f"largest coordinate after the final norm; mean of {int(data['draws'])} inputs"},
        },
        legend={"orientation": "v", "x": 1.02, "xanchor": "left", "y": 1, "yanchor": "top"},
        height=480,
        width=900,
    )
    figure.update_xaxes(title="tokens of the input", type="log", dtick=np.log10(2))
    return figure.update_yaxes(title="distance", **log_axis(data["final_inf"].to_numpy(), data["floor"].to_numpy()))


def _rollout_figure(result: Result) -> Any:
    data = result.data
    figure = ThemedFigure()
    for name, words, line in (
        ("rollout", "recorded attention", {"color": CATEGORIES[0]}),
        ("uniform_rollout", "uniform attention", {"color": NEUTRAL, "dash": "dash"}),
    ):
        figure.add_scatter(x=data["position"], y=data[name], name=words, mode="lines", line=line)
    figure.update_traces(hovertemplate="position %{x}: %{y:.4f}")
    figure.update_layout(
        title={"text": f"Influence on the last token by attention in {label(str(result.provenance['model']), 60)}"},
        height=420,
        width=760,
    )
    figure.update_xaxes(title="position")
    return figure.update_yaxes(
        title="share of influence", **log_axis(*(data[name].to_numpy() for name in ("rollout", "uniform_rollout")))
    )
