"""Neurons: how often each is active, what its output does to the logits, and at which tokens it is strongest.

For neuron n with output w_n = W_out[n] and tokens' directions u_t (rows of W_U times the gain of the final norm), the
cosines c_t = cos(w_n, u_t) over the vocabulary have moments. A prediction neuron raises a few tokens: kurtosis above
10, skew above 0. A suppression neuron lowers a few: kurtosis above 10, skew below 0. An entropy neuron hardly changes
the logits themselves, though its output is large: the variance of c_t is below a tenth of that of random directions,
and the norm of w_n above the layer's median; it acts through the final norm. Random directions are the control of all
three. A neuron is dead if it is not active at any token: not above `threshold`, and in gated MLPs, whose neurons take
both signs, not beyond it in either direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
import xarray as xr

from workbench.probing import (
    CATEGORIES,
    LOST_VARIABLES,
    NEUTRAL,
    LayerProbe,
    Model,
    NeuronActivity,
    RequestError,
    Result,
    Store,
    ThemedFigure,
    Variable,
    check_fields,
    counted,
    dataset,
    extreme_tokens,
    integer_step,
    label,
    layer_neurons,
    load_unembed,
    log_axis,
    mlp_outputs,
    model_label,
    neuron_activity,
    plain_torch,
    recorded_model,
    selected_rows,
    usable_device,
    vocabulary_moments,
    with_note,
    with_progress,
)

_NEURON, _LAYER = ("layer", "neuron"), ("layer",)
_KURTOSIS, _QUIET = 10.0, 0.1
_SHARE = "share of neurons"
KINDS = ("prediction", "suppression", "entropy")

VARIABLES = (
    Variable("kurtosis", _NEURON, "1", "kurtosis over tokens of cos(W_out, direction of the token in W_U)", "3"),
    Variable("skew", _NEURON, "1", "skew of the same cosines", "0"),
    Variable("logit_variance", _NEURON, "1", "variance of the same cosines / that of random directions", "1"),
    Variable("norm", _NEURON, "L2 norm", "norm of W_out"),
    Variable("rate", _NEURON, "share of tokens", "tokens at which the neuron is active"),
    Variable("mean", _NEURON, "activation", "mean over all tokens"),
    Variable("largest", _NEURON, "activation", "activation farthest from 0, with its sign"),
    Variable("top_row", (*_NEURON, "rank"), "row", "rows of the largest activations, by size if gated; -1: none"),
    *(
        Variable(name, _LAYER, _SHARE, meaning, f"random_{name}")
        for name, meaning in (
            ("prediction", "kurtosis above 10, skew above 0"),
            ("suppression", "kurtosis above 10, skew below 0"),
            ("entropy", "logit_variance below 0.1, norm above the layer's median"),
        )
    ),
    *(Variable(f"random_{name}", (), _SHARE, f"{name} among random directions") for name in KINDS),
    Variable("dead", _LAYER, _SHARE, "neurons active at no token"),
    Variable("rows", (), "tokens", "tokens that were read"),
)


@dataclass(frozen=True)
class Neurons(LayerProbe):
    """Describes neurons of MLPs: prediction, suppression, entropy and dead neurons, and their strongest tokens."""

    name: ClassVar[str] = "neurons"
    needs_model: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = (
        "Gurnee et al. 2024, Universal neurons in GPT-2 language models, arXiv 2401.12181",
        "Stolfo et al. 2024, Confidence regulation neurons in language models, arXiv 2406.16254",
        "Voita et al. 2023, Neurons in large language models: dead, n-gram, positional, arXiv 2309.04827",
    )
    variables: ClassVar[tuple[Variable, ...]] = (*VARIABLES, *LOST_VARIABLES)
    controls: ClassVar[Mapping[str, str]] = {
        "random_prediction": "random directions that pass for prediction neurons",
        "random_suppression": "random directions that pass for suppression neurons",
        "random_entropy": "random directions that pass for entropy neurons",
    }

    where: str | None = None
    """SQL over the token table: tokens at which activations are read. None: all."""
    threshold: float = 0.0
    """Activation beyond which a neuron is active."""
    top: int = 5
    """Number of rows of the largest activations that are kept for each neuron."""
    detail: int = 5
    """Neurons of each kind and layer in the table, the clearest first."""
    tokens: int = 5
    """Tokens that a neuron of the table raises most, and that it lowers most."""
    random: int = 1024
    """Number of random directions for the control."""
    model: str | None = None
    """Directory or hub id of the recorded model, if the name in the store is not enough to load it."""
    seed: int = 0
    """Random seed of the control's directions."""
    device: str | None = None
    """Device of products with W_U: cpu, cuda, cuda:1. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "threshold", at_least=0)
        check_fields(self, "top", "detail", "tokens", at_least=1, at_most=1000, whole=True)
        check_fields(self, "random", at_least=2, whole=True)
        check_fields(self, "seed", at_least=0, whole=True)

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Reads `mlp_post`, and W_out from the model.

        Costs one pass over the activations, and 2 x neurons x d_model x vocab operations; memory is blocks of 64 MiB
        and a few numbers for each neuron.

        Args:
            store: The recorded activations, with the unembedding.
            model: The recorded model. None: it is loaded from the setting `model` or the store's name for it.

        Raises:
            RequestError: mlp_post was not recorded, the store has no unembedding, values are NaN or infinite, or the
                model cannot be loaded, is another one, or has no single set of neurons there.
        """
        layers, labels = layer_neurons(store, self.layers)
        rows = self.finite_rows(store, labels, selected_rows(store, self.where))
        loaded = recorded_model(store, model or self.model, usable_device(self.device))
        unembed, outputs = load_unembed(store.path, loaded.device), mlp_outputs(loaded)
        if missing := [layer for layer in layers if layer not in outputs]:
            raise RequestError(f"layers: layer {missing[0]} of {loaded.name!r} has no single set of neurons")
        gated = any(site.startswith("mlp_pre_linear.") for site in loaded.sites)
        draw = torch.Generator("cpu").manual_seed(self.seed)
        chance = torch.randn(self.random, loaded.d_model, generator=draw, device="cpu")
        control = vocabulary_moments(chance, unembed)
        parts, weights = [], {}
        for layer, site in with_progress([*zip(layers, labels, strict=True)], "neurons", "layers"):
            weights[layer] = outputs[layer].directions()[0]
            moments = vocabulary_moments(weights[layer], unembed)
            activity = neuron_activity(store[site], rows.rows, self.top, self.threshold, gated)
            parts.append(_measures(moments, control, weights[layer], activity))
        arrays = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
        arrays |= _shares(arrays)
        same_norm = {"kurtosis": control.kurtosis, "skew": control.skew}
        variance = (control.variance / control.variance.mean()).numpy()
        drawn = _kinds({**{k: v.numpy() for k, v in same_norm.items()}, "logit_variance": variance})
        arrays |= {f"random_{kind}": np.asarray(drawn[kind].mean()) for kind in KINDS}
        arrays["rows"] = np.asarray(len(rows.rows))
        shape = arrays["top_row"].shape
        coords = {"layer": layers, "neuron": np.arange(shape[1]), "rank": np.arange(1, shape[2] + 1)}
        data = dataset(self.variables, arrays, coords)
        notes = ["gated MLPs: neurons are active in either direction, so few are dead"] if gated else []
        return self.result(store, data, _table(self, store, data, weights, unembed), rows, notes)

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the layers with most prediction and suppression neurons beside chance, and the dead share."""
        data, parts = result.data, []
        for kind in KINDS:
            at = int(data[kind].to_numpy().argmax())
            most = 100 * float(data[kind][at])
            where = f", most at layer {int(data['layer'][at])} with {most:.2g} %" if most else ""
            parts.append(
                f"{kind} {100 * float(data[kind].mean()):.2g} % of neurons (random directions "
                f"{100 * float(data[f'random_{kind}']):.2g} %){where}"
            )
        text = "; ".join(parts)
        dead = 100 * float(data["dead"].mean())
        text = f"{text[0].upper()}{text[1:]}; {dead:.2g} % active at none of {counted(data['rows'], 'token')}."
        return with_note(text, result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "layers", shares of each kind by layer, and "neurons", kurtosis and skew of single neurons."""
        return {"layers": _layers(result), "neurons": _neurons(result)}


# ---- measures -------------------------------------------------------------------------------------------


def _measures(moments: Any, control: Any, weights: torch.Tensor, activity: NeuronActivity) -> dict[str, np.ndarray]:
    variance = control.variance.mean()
    return {
        "kurtosis": moments.kurtosis.numpy(),
        "skew": moments.skew.numpy(),
        "logit_variance": (moments.variance / variance).numpy(),
        "norm": weights.float().norm(dim=1).cpu().numpy(),
        "rate": activity.rate,
        "mean": activity.mean,
        "largest": activity.largest,
        "top_row": activity.rows,
    }


def _kinds(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A mask of the neurons of each kind. Without "norm", as of random directions, it does not count."""
    extreme = arrays["kurtosis"] > _KURTOSIS  # False for NaN: an output of 0, or one that W_U does not read
    quiet = arrays["logit_variance"] < _QUIET
    if "norm" in arrays:
        quiet = quiet & (arrays["norm"] > np.median(arrays["norm"], axis=-1, keepdims=True))
    return {
        "prediction": extreme & (arrays["skew"] > 0),
        "suppression": extreme & (arrays["skew"] < 0),
        "entropy": quiet,
    }


def _shares(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    shares = {kind: mask.mean(-1) for kind, mask in _kinds(arrays).items()}
    return {**shares, "dead": (arrays["rate"] == 0).mean(-1)}


def _table(
    probe: Neurons, store: Store, data: xr.Dataset, weights: Mapping[int, torch.Tensor], unembed: Any
) -> pd.DataFrame:
    """The clearest neurons of each kind and layer, with the tokens that they raise and lower and are strongest at."""
    names = ("kurtosis", "skew", "logit_variance", "norm", "rate", "mean", "largest")
    tokens, lines = store.tokens["token"], []
    for index, layer in enumerate(data["layer"].to_numpy().tolist()):
        measures = {name: data[name].to_numpy()[index] for name in names}
        for kind, mask in _kinds(measures).items():
            order = measures["logit_variance"] if kind == "entropy" else -measures["kurtosis"]
            for neuron in [n for n in np.argsort(order, kind="stable").tolist() if mask[n]][: probe.detail]:
                direction = weights[layer][neuron].to(unembed.weight.device)
                extremes = extreme_tokens(unembed.weight.float() @ (direction * unembed.gain), unembed, probe.tokens)
                raised, lowered = extremes["token"].head(probe.tokens), extremes["token"].tail(probe.tokens)[::-1]
                top = [row for row in data["top_row"].to_numpy()[index, neuron].tolist() if row >= 0]
                lines.append(
                    {
                        "layer": layer,
                        "neuron": neuron,
                        "kind": kind,
                        **{name: float(measures[name][neuron]) for name in names},
                        "raises": " ".join(map(repr, raised)),
                        "lowers": " ".join(map(repr, lowered)),
                        "strongest_at": " ".join(map(repr, tokens.take(top).to_pylist())),
                    }
                )
    columns = ["layer", "neuron", "kind", *names, "raises", "lowers", "strongest_at"]
    return pd.DataFrame(lines, columns=columns)


# ---- figures --------------------------------------------------------------------------------------------


def _layers(result: Result) -> go.Figure:
    data, layers = result.data, result.data["layer"].to_numpy()
    figure = ThemedFigure()
    for kind, colour in zip((*KINDS, "dead"), CATEGORIES, strict=False):
        figure.add_scatter(x=layers, y=data[kind], name=kind, mode="lines+markers", line={"color": colour})
    chance = max(float(data[f"random_{kind}"]) for kind in KINDS)
    figure.update_traces(hovertemplate="layer %{x}: %{y:.4f}")
    figure.update_layout(
        title={
            "text": f"Neurons of {model_label(result)}",
            "subtitle": {
                "text": f"share of neurons of each layer; of random directions at most {chance:.2g}; dead: active at "
                f"none of {counted(data['rows'], 'token')}"
            },
        },
        width=760,
        height=460,
        margin={"t": 110},
    )
    figure.update_xaxes(title="layer", dtick=integer_step(layers.tolist()))
    return figure.update_yaxes(title="share of neurons", rangemode="tozero")


def _neurons(result: Result) -> go.Figure:
    table, figure = result.table, ThemedFigure()
    for kind, colour in zip(KINDS, CATEGORIES, strict=False):
        part = table.loc[(table["kind"] == kind) & table["kurtosis"].notna()]
        figure.add_scatter(
            x=part["skew"],
            y=part["kurtosis"],
            name=kind,
            mode="markers",
            marker={"color": colour, "size": 7},
            text=[_hover(line) for line in part.to_dict("records")],
            hovertemplate="%{text}<extra></extra>",
        )
    figure.add_hline(y=_KURTOSIS, line={"dash": "dot", "width": 1, "color": NEUTRAL})
    figure.update_layout(
        title={
            "text": f"Clearest neurons of {model_label(result)}",
            "subtitle": {"text": "kurtosis and skew over the vocabulary of cos(W_out, W_U); dotted: kurtosis 10"},
        },
        width=760,
        height=480,
        margin={"t": 110},
    )
    figure.update_xaxes(title="skew")
    return figure.update_yaxes(title="kurtosis", **log_axis(table["kurtosis"].to_numpy(float), np.array([_KURTOSIS])))


def _hover(line: Mapping[str, Any]) -> str:
    lines = [f"<b>L{line['layer']}N{line['neuron']}</b>"]
    for name in ("raises", "lowers", "strongest_at"):
        lines.append(f"{name.replace('_', ' ')}: {label(str(line[name]), 80)}")
    return "<br>".join(lines)
