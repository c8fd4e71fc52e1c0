"""Residual cross-entropy: how early a model settles on its own prediction, and whether that shows its errors.

For a token with the model's top-1 prediction y (arXiv 2412.05768), read by the logit lens at every layer l,

    CE_l = -log p_l(y)        area = mean_l CE_l / CE_0        settle depth = first l with CE_m <= ln 2 for all m >= l

The hypothesis of iterative inference is that CE_l falls with l; `rising` is the share of tokens on which it does not.
As a detector of wrong predictions each is worth reading only where it does better than the last layer's own CE, which
needs no lens: -log of the probability that the model gives to its top token. Area and settle depth are our choices: the
paper's rate of convergence is not defined.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Bool, Float, Int

from workbench.probing import (
    CATEGORIES,
    LOST_VARIABLES,
    NEUTRAL,
    Band,
    LayerProbe,
    Model,
    RequestError,
    Result,
    Store,
    Variable,
    axis_title,
    blocks,
    check_fields,
    clustered_auc,
    clustered_ends,
    counted,
    dataset,
    interval_suffix,
    intervals,
    label,
    layer_bands,
    load_unembed,
    next_tokens,
    plain_torch,
    recorded_ends,
    require_causal,
    selected_rows,
    usable_device,
    with_interval,
    with_note,
    with_progress,
)

_LAYER, _ROW, _DEPTH = ("layer",), ("row",), ("statistic",)
_FEW = 10
_AUC = "area under the ROC curve"
_VARIABLES: tuple[Variable, ...] = (
    Variable("cross_entropy", _LAYER, "nats", "mean -log p_l(y), y the model's own top-1 token", "ln(vocab)"),
    *with_interval(
        Variable("cross_entropy_right", _LAYER, "nats", "the same over tokens that the model predicts right")
    ),
    *with_interval(
        Variable("cross_entropy_wrong", _LAYER, "nats", "the same over tokens that the model predicts wrongly")
    ),
    Variable(
        "rising", _LAYER, "share of tokens", "tokens whose cross-entropy is larger than at the layer before", "0.5"
    ),
    *with_interval(Variable("auc", _LAYER, _AUC, "of the cross-entropy as a detector of wrong predictions", "0.5")),
    *with_interval(Variable("auc_gain", _LAYER, _AUC, "auc less that of the model's own output", "0")),
    *with_interval(Variable("depth_auc", _DEPTH, _AUC, "of area and settle_depth as detectors", "0.5")),
    *with_interval(Variable("depth_gain", _DEPTH, _AUC, "depth_auc less that of the model's own output", "0")),
    Variable("output_auc", (), _AUC, "of the last layer's own cross-entropy, which needs no lens", "0.5"),
    Variable("area", _ROW, "1", "mean over layers of the cross-entropy / that of the first layer"),
    Variable("settle_depth", _ROW, "index on the layer axis", "first layer from which on cross-entropy is <= ln 2"),
    Variable("right", _ROW, "1 = right", "the model's top-1 token follows in the text; -1: no token follows"),
    Variable("wrong_share", (), "share of tokens", "tokens that the model predicts wrongly"),
    Variable("falling_share", (), "share of tokens", "tokens whose cross-entropy rises at no layer"),
    Variable("rows", (), "tokens", "tokens that means are over"),
    Variable("rows_with_next", (), "tokens", "those of them that a token follows: what detectors are tried on"),
    *LOST_VARIABLES,
)


@dataclass(frozen=True)
class ResidualUncertainty(LayerProbe):
    """Measures how early the model settles on its prediction, and if that detects errors better than its output."""

    name: ClassVar[str] = "residual-uncertainty"
    needs_model: ClassVar[bool] = False
    variables: ClassVar[tuple[Variable, ...]] = _VARIABLES
    sources: ClassVar[tuple[str, ...]] = ("2024, Uncovering uncertainty in transformer inference, arXiv 2412.05768",)
    controls: ClassVar[Mapping[str, str]] = {
        "output_auc": "the last layer's own cross-entropy, which needs no lens",
        "random weights": "the same architecture with random weights: detectors near 0.5",
    }

    where: str | None = "NOT is_special"
    """SQL over the token table: the tokens to read. None: all."""
    detail: int = 10_000
    """Maximum number of tokens with their own rows in table and data, from the first selected one on."""
    resamples: int = 200
    """Resamples of documents for the intervals."""
    seed: int = 0
    """Random seed of the bootstrap."""
    device: str | None = None
    """Device of the products with W_U: cpu, cuda, cuda:1. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "resamples", at_least=1)
        check_fields(self, "seed", "detail", at_least=0)

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Reads `resid_post` at the chosen layers and the last. Costs layers x rows products with W_U.

        Raises:
            RequestError: Fewer than two layers, the last block or the unembedding were not recorded, values are NaN or
                infinite, the model is not causal, or the device cannot be used.
        """
        require_causal(store, self.name)
        layers, labels = self.recorded(store, "resid_post")
        store.require(f"resid_post.{(last := store.manifest.model.n_layers - 1)}")
        if layers[-1] != last:  # the model's own output is always read
            layers, labels = [*layers, last], [*labels, f"resid_post.{last}"]
        if len(layers) < 2:
            raise RequestError("a trajectory needs resid_post at two layers or more; record resid_post")
        rows = self.finite_rows(store, labels, selected_rows(store, self.where))
        surprise, right = _trajectories(store, labels, rows.rows, self.device)
        area, settled = _depths(surprise)
        known = right >= 0
        arrays: dict[str, Any] = _means(surprise, right)
        documents = store.tokens["document"].to_numpy()[rows.rows]
        for name, group in (("right", right == 1), ("wrong", right == 0)):
            resampling = {"resamples": self.resamples, "seed": self.seed}
            low, high = clustered_ends(surprise[:, group].T, documents[group], **resampling)
            arrays |= {f"cross_entropy_{name}_low": low, f"cross_entropy_{name}_high": high}
        scores = np.concatenate([surprise, [area, settled]])[:, known]
        arrays |= _detectors(self, scores, right[known] == 0, documents[known])
        detail = slice(0, self.detail)
        arrays |= {"area": area[detail], "settle_depth": settled[detail].astype(np.int32), "right": right[detail]}
        coords = {"layer": layers, "row": rows.rows[detail], "statistic": ["area", "settle_depth"]}
        data = dataset(_VARIABLES, {name: np.asarray(array) for name, array in arrays.items()}, coords)
        table = _table(data, store)
        number = len(np.unique(documents[known]))
        few = f"intervals over {counted(number, 'document')}, fewer than 10" if number < _FEW else ""
        rare = min(int((right == 0).sum()), int((right == 1).sum()))
        rare_note = f"only {counted(rare, 'token')} of the rarer kind, right or wrong: AUCs are uncertain"
        rare_note = rare_note if rare < 10 * _FEW else ""
        return self.result(store, data, table, rows, [few, rare_note])

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the fall of the cross-entropy, and the detectors beside the model's own output."""
        data, layers = result.data, result.data["layer"].to_numpy()
        loss = data["cross_entropy"].to_numpy()
        text = (
            f"Residual cross-entropy: {loss[0]:z.2f} nats at layer {layers[0]}, {loss[-1]:z.2f} at layer {layers[-1]}; "
            f"it falls at every layer on {100 * float(data['falling_share']):z.0f} % of tokens. "
        )
        wrong, output_auc = 100 * float(data["wrong_share"]), float(data["output_auc"])
        if np.isnan(output_auc):
            reason = "no token has a next one" if np.isnan(wrong) else f"the model errs on {wrong:z.0f} % of the tokens"
            return with_note(f"{text}Detectors of errors not compared: {reason}.", result)
        text += f"The model errs on {wrong:z.0f} %; AUC of detectors: own output {output_auc:z.3f}"
        for name in data["statistic"].to_numpy().tolist():
            detector = data.sel(statistic=name)
            interval = _interval(*(float(detector[f"depth_gain{end}"]) for end in ("", "_low", "_high")))
            text += f", {name.replace('_', ' ')} {float(detector['depth_auc']):z.3f} ({interval})"
        earlier = data.isel(layer=slice(0, -1))
        best = earlier.isel(layer=int(np.nan_to_num(earlier["auc"].to_numpy(), nan=-1).argmax()))
        interval = _interval(*(float(best[f"auc_gain{end}"]) for end in ("", "_low", "_high")))
        text += f", best earlier layer {int(best['layer'])} {float(best['auc']):z.3f} ({interval})"
        gained = [
            ((part[f"{name}_low"] > 0.5) & (part[f"{gain}_low"] > 0)).any().item()
            for part, name, gain in ((data, "depth_auc", "depth_gain"), (earlier, "auc", "auc_gain"))
        ]
        decided = bool(data["depth_gain_low"].notnull().any())
        none = "" if any(gained) or not decided else ". Nothing before the output detects errors better than the output"
        return with_note(f"{text}{none}.", result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "trajectory", the cross-entropy of right and wrong predictions, and "detection", AUC by layer."""
        return {"trajectory": _trajectory(result), "detection": _detection(result)}


def _interval(gain: float, low: float, high: float) -> str:
    return f"{gain:+z.3f}{interval_suffix(low, high, '.3f')}"


# ---- readings -------------------------------------------------------------------------------------------


def _trajectories(
    store: Store, labels: list[str], rows: Int[np.ndarray, " row"], device: str | None
) -> tuple[Float[np.ndarray, "layer row"], Int[np.ndarray, " row"]]:
    """Cross-entropy of the model's own top-1 token at every layer; and 1 right, 0 wrong, -1 no next token."""
    unembed = load_unembed(store.path, usable_device(device))
    targets = next_tokens(store)[rows]
    surprise, right = np.zeros((len(labels), len(rows)), np.float32), np.zeros(len(rows), np.int8)
    for block in with_progress([*blocks(len(rows), unembed.vocab)], "residual cross-entropy", "blocks"):
        final = unembed(store[labels[-1]][rows[block]].to(unembed.weight.device))
        best = final.argmax(1, keepdim=True)
        for index, name in enumerate(labels):
            last = index == len(labels) - 1
            logits = final if last else unembed(store[name][rows[block]].to(unembed.weight.device))
            surprise[index, block] = (logits.logsumexp(1) - logits.gather(1, best)[:, 0]).cpu().numpy()
        hits = best[:, 0].cpu().numpy() == targets[block]
        right[block] = np.where(targets[block] < 0, -1, hits)
    return np.maximum(surprise, 0), right


def _depths(surprise: Float[np.ndarray, "layer row"]) -> tuple[np.ndarray, np.ndarray]:
    """Area and settle depth of each token; the number of layers for one that never settles."""
    first = np.maximum(surprise[0], np.finfo(np.float32).tiny).astype(float)
    settled = (surprise <= math.log(2))[::-1].cumprod(0).sum(0)
    return surprise.astype(float).mean(0) / first, (len(surprise) - settled).astype(float)


def _means(surprise: Float[np.ndarray, "layer row"], right: Int[np.ndarray, " row"]) -> dict[str, Any]:
    rises = np.diff(surprise, axis=0) > 0
    groups = {"": np.ones(len(right), bool), "_right": right == 1, "_wrong": right == 0}
    empty = np.full(len(surprise), np.nan)
    means = {
        f"cross_entropy{name}": surprise[:, mask].mean(1, dtype=float) if mask.any() else empty
        for name, mask in groups.items()
    }
    known = int((right >= 0).sum())
    means |= {"rising": np.array([np.nan, *rises.mean(1)]), "falling_share": 1 - rises.any(0).mean()}
    means["wrong_share"] = (right == 0).sum() / known if known else np.nan
    return means | {"rows": len(right), "rows_with_next": known}


def _detectors(
    probe: ResidualUncertainty,
    scores: Float[np.ndarray, "statistic row"],
    wrong: Bool[np.ndarray, " row"],
    documents: Int[np.ndarray, " row"],
) -> dict[str, Any]:
    """AUC of each layer and of the two depths, and how much better they are than the last layer."""
    area, resampled = clustered_auc(scores, wrong, documents, resamples=probe.resamples, seed=probe.seed)
    (low, high), last = intervals(resampled.T), len(scores) - 3
    gain = area - area[last]
    gain_low, gain_high = intervals((resampled - resampled[last]).T)
    arrays: dict[str, Any] = {"output_auc": area[last]}
    for name, part in (("auc", slice(0, last + 1)), ("depth", slice(last + 1, None))):
        first, second = (name, "auc_gain") if name == "auc" else ("depth_auc", "depth_gain")
        arrays |= {first: area[part], f"{first}_low": low[part], f"{first}_high": high[part]}
        arrays |= {second: gain[part], f"{second}_low": gain_low[part], f"{second}_high": gain_high[part]}
    return arrays


def _table(data: Any, store: Store) -> pd.DataFrame:
    """A line for each kept token."""
    tokens = store.tokens.take(data["row"].to_numpy())
    columns = {name: tokens[name].to_numpy() for name in ("row", "sequence", "position", "document")}
    columns["token"] = np.array(tokens["token"].to_pylist(), dtype=object)
    return pd.DataFrame(columns | {name: data[name].to_numpy() for name in ("area", "settle_depth", "right")})


# ---- figures --------------------------------------------------------------------------------------------


def _trajectory(result: Result) -> go.Figure:
    data, share = result.data, 100 * float(result.data["wrong_share"])
    curves = {"predicted right": "cross_entropy_right", "predicted wrongly": "cross_entropy_wrong"}
    bands = [
        Band(name, data[variable].to_numpy(), recorded_ends(data, variable), colour)
        for (name, variable), colour in zip(curves.items(), CATEGORIES, strict=False)
    ]
    drawn = any(band.ends is not None for band in bands)
    bands.append(Band("ln 2: settled", math.log(2), None, NEUTRAL, "dash"))
    figure = layer_bands(
        bands,
        layers=data["layer"].to_numpy().tolist(),
        title=f"Residual cross-entropy of {label(str(result.provenance['model']), 60)}",
        subtitle="cross-entropy against the model's own top token; "
        f"{counted(data['rows_with_next'], 'token')}, {share:z.0f} % wrong" + "; bands: 95 % CI over documents" * drawn,
        unit=axis_title(data["cross_entropy"].attrs),
    )
    return figure.update_yaxes(rangemode="tozero")


def _detection(result: Result) -> go.Figure:
    data, layers = result.data, result.data["layer"].to_numpy()
    auc, low, high = (data[f"auc{end}"].to_numpy() for end in ("", "_low", "_high"))
    bands = [Band("cross-entropy", auc, (low, high), CATEGORIES[0])]
    for number, name in enumerate(data["statistic"].to_numpy().tolist(), 1):
        detector = data.sel(statistic=name)
        value, *ends = (float(detector[f"depth_auc{end}"]) for end in ("", "_low", "_high"))
        bands.append(Band(name.replace("_", " "), value, (ends[0], ends[1]), CATEGORIES[number], "dash"))
    bands.append(Band("own output", float(data["output_auc"]), None, NEUTRAL, "dot"))
    return layer_bands(
        bands,
        layers=layers.tolist(),
        title=f"Detection of errors of {label(str(result.provenance['model']), 60)}",
        subtitle=f"{counted(data['rows_with_next'], 'token')}; bands: 95 % CI over documents; 0.5: no information",
        unit=_AUC,
    )
