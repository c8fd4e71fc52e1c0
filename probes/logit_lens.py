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

from workbench.probing import (
    LENS_VARIABLES,
    Model,
    Result,
    Store,
    Variable,
    check,
    lens_curves,
    lens_depth,
    lens_grid,
    provenance,
    read_lens,
    require_causal,
    selected_rows,
)


@dataclass(frozen=True)
class LogitLens:
    """Reads every layer through the model's unembedding: top tokens, entropy, KL to the model's output, loss."""

    name: ClassVar[str] = "logit-lens"
    needs_model: ClassVar[bool] = False
    variables: ClassVar[tuple[Variable, ...]] = LENS_VARIABLES
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
    device: str = "cpu"
    """Device of the products with W_U: cpu, cuda."""

    def __post_init__(self) -> None:
        check("top_k", self.top_k, at_least=1)
        check("detail", self.detail, at_least=0)

    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Reads every recorded layer of `site`.

        A stored fp16 value is off by up to 0.05 %, and what is computed from it accordingly. Costs layers x rows
        products with W_U; memory is a few blocks of logits and 4 bytes a layer and row.

        Raises:
            RequestError: The site, the last block or the unembedding was not recorded, or the device cannot be used.
        """
        require_causal(store, self.name)
        rows = selected_rows(store, self.where)
        data, table = read_lens(store, rows, site=self.site, top_k=self.top_k, detail=self.detail, device=self.device)
        return Result(self.name, data, table, provenance(store, self))

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the cross-entropy at the first and last layer, and the layer from which lens and model agree."""
        loss, agreement = result.data["mean_cross_entropy"].to_numpy(), result.data["mean_agreement"].to_numpy()
        layers = result.data["layer"].to_numpy()
        agree = layers[np.argmax(agreement > 0.5)]
        return (
            f"Cross-entropy of the text: {loss[0]:.2f} nats at layer {layers[0]}, {loss[-1]:.2f} nats at layer "
            f"{layers[-1]}; lens and model agree on the top token for more "
            f"than half of the tokens from layer {agree} on."
        )

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "grid", layers by tokens of the first sequence; "by_layer", mean entropy, KL and loss; "depth"."""
        figures = {"by_layer": lens_curves(result)}
        if not len(result.table):
            return figures
        return {"grid": lens_grid(result), **figures, "depth": lens_depth(result)}
