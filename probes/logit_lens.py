"""The logit lens: the model's unembedding applied to the residual stream of every layer (nostalgebraist 2020).

    LogitLens(h_l) = W_U LN_f(h_l) + b_U

with the final norm's statistics taken from h_l itself, and the model's soft-cap, scale and bias applied. At the last
block it is the model's own output. Sub-layer sites (attn_out, mlp_out) can be read in the same way, but those
distributions are not predictions that the model would ever make.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import xarray as xr

from workbench.probing import (
    LENS_VARIABLES,
    LOST_VARIABLES,
    LayerProbe,
    Model,
    Result,
    Store,
    Variable,
    check,
    counted,
    lens_curves,
    lens_depth,
    lens_grid,
    plain_torch,
    read_lens,
    require_causal,
    selected_rows,
    with_note,
)


@dataclass(frozen=True)
class LogitLens(LayerProbe):
    """Reads every layer through the model's unembedding: top tokens, entropy, KL to the model's output, loss."""

    name: ClassVar[str] = "logit-lens"
    needs_model: ClassVar[bool] = False
    variables: ClassVar[tuple[Variable, ...]] = (*LENS_VARIABLES, *LOST_VARIABLES)
    sources: ClassVar[tuple[str, ...]] = ("nostalgebraist 2020, interpreting GPT: the logit lens",)
    controls: ClassVar[Mapping[str, str]] = {
        "a uniform guess": "has entropy and cross-entropy of ln(vocab) nats",
        "random weights": "the same architecture with random weights: mean_cross_entropy does not fall over layers",
    }

    site: str = "resid_post"
    """Kind of site to read at every layer: resid_post, resid_pre, resid_mid, attn_out, mlp_out."""
    where: str | None = None
    """SQL over the token table: the tokens to read. None: all."""
    top_k: int = 5
    """Top tokens kept for each layer and token."""
    detail: int = 10_000
    """Maximum number of tokens with their own rows in the table, from the first selected one on; means are over all."""
    device: str | None = None
    """Device of the products with W_U: cpu, cuda, cuda:1. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check("top_k", self.top_k, at_least=1)
        check("detail", self.detail, at_least=0)

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Reads every recorded layer of `site`.

        A stored fp16 value is off by up to 0.05 %, and what is computed from it accordingly. Costs layers x rows
        products with W_U; memory is a few blocks of logits and 4 bytes a layer and row.

        Raises:
            RequestError: The site, the last block or the unembedding was not recorded, values are NaN or infinite, the
                model is not causal, or the device cannot be used.
        """
        require_causal(store, self.name)
        _, labels = self.recorded(store, self.site)
        last = f"resid_post.{store.manifest.model.n_layers - 1}"
        rows = self.finite_rows(store, [*labels, last], selected_rows(store, self.where))
        settings = {"layers": self.layers, "top_k": self.top_k, "detail": self.detail, "device": self.device}
        data, table = read_lens(store, rows.rows, site=self.site, **settings)
        return self.result(store, data, table, rows)

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the cross-entropy at the first and last layer and against a uniform guess, and the layer from which
        lens and model agree."""
        return with_note(f"{_cross_entropy(result.data)}; {_agreement(result.data)}.", result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "grid", layers by tokens of the first sequence; "by_layer", mean entropy, KL and loss; "depth"."""
        figures = {"by_layer": lens_curves(result)}
        if not len(result.table):
            return figures
        return {"grid": lens_grid(result), **figures, "depth": lens_depth(result)}


def _cross_entropy(data: xr.Dataset) -> str:
    loss, layers = data["mean_cross_entropy"].to_numpy(), data["layer"].to_numpy()
    if np.isnan(loss).all():
        return "Cross-entropy of the text not measured: no token has a next one"
    text = f"Cross-entropy of the text: {loss[0]:z.2f} nats at layer {layers[0]}"
    if len(layers) > 1:
        text += f", {loss[-1]:z.2f} nats at layer {layers[-1]}"
    if "uniform_cross_entropy" not in data:  # results of earlier versions
        return text
    uniform = float(data["uniform_cross_entropy"])
    above = layers[loss >= uniform]
    where = f"up to layer {above[-1]}" if len(above) else "at no layer"
    if 0 < len(above) < len(layers) and len(above) <= np.flatnonzero(loss >= uniform)[-1]:
        where = f"at {len(above)} of {counted(len(layers), 'layer')}, the last of them layer {above[-1]}"
    elif len(above) == len(layers):
        where = "at every layer"
    return f"{text}; at or above a uniform guess ({uniform:z.2f} nats) {where}"


def _agreement(data: xr.Dataset) -> str:
    """At the last block lens and model are the same by definition, which is no finding."""
    output = data.attrs.get("own_output")  # results of earlier versions have none
    read = data["mean_kl"].to_numpy() > 0 if output is None else np.arange(data.sizes["layer"]) != output
    layers, agreement = data["layer"].to_numpy()[read], data["mean_agreement"].to_numpy()[read]
    if not len(layers):
        return "only the model's own output was recorded"
    most = np.flatnonzero(np.append(True, agreement <= 0.5))[-1]  # the layers after it are all above one half
    if most < len(layers):
        return f"lens and model agree on the top token for more than half of the tokens from layer {layers[most]} on"
    best = int(agreement.argmax())
    before = "" if read.all() else " before the model's own output"
    return (
        f"lens and model agree on the top token for at most {100 * agreement[best]:z.0f} % of the tokens{before} "
        f"(layer {layers[best]})"
    )
