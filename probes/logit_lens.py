"""The logit lens: what each layer would say if it were the last (nostalgebraist 2020).

    LogitLens(h_l) = W_U LN_f(h_l) + b_U

with the final norm's statistics taken from h_l itself, and the model's soft-cap, scale and bias applied. At the
last block it is the model's own output. Sub-layer sites (attn_out, mlp_out) can be read the same way, but those
are not distributions the model would ever emit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from workbench.analysis.lens import lens_curves, lens_depth, lens_grid, read_lens, selected_rows
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.results.result import Result, provenance
from workbench.store.reader import Store


@dataclass(frozen=True)
class LogitLens:
    """What each layer would predict, were the model to stop there: top tokens, entropy, KL to the output, loss."""

    name: ClassVar[str] = "logit-lens"
    needs_model: ClassVar[bool] = False
    sources: ClassVar[tuple[str, ...]] = ("nostalgebraist 2020, interpreting GPT: the logit lens",)
    controls: ClassVar[Mapping[str, str]] = {
        "a uniform guess": "has entropy and cross-entropy of ln(vocab) nats",
        "random weights": "the same architecture with random weights has no fall of mean_cross_entropy over layers",
    }

    site: str = "resid_post"
    """Kind of site to read at every layer: resid_post, resid_pre, resid_mid, attn_out, mlp_out."""
    where: str | None = None
    """SQL over the token table: which tokens count. None: all."""
    top_k: int = 5
    """Top tokens kept for each layer and token."""
    detail: int = 10_000
    """Tokens that get their own line in the table, from the first selected on; means are over all selected."""
    device: str = "cpu"
    """Where the unembedding is multiplied: cpu, cuda."""

    def __post_init__(self) -> None:
        for name, least in (("top_k", 1), ("detail", 0)):
            if getattr(self, name) < least:
                raise RequestError(f"{name} must be at least {least}, not {getattr(self, name)}")

    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Reads every layer of `site` that was recorded.

        `data` has, over (layer, row): entropy of the lens in nats (0 to ln vocab; ln vocab is uniform); kl in nats,
        KL(model || lens), js in nats (0 to ln 2) and tv (0 to 1), all 0 at the last block; cross_entropy in nats and
        rank (1 = top) of the token that follows in the text, NaN and 0 where none does; surprise in nats at the model's
        own top token; over (layer, row, top): top_id, top_probability. Over (row): prediction_depth. Over (layer), for
        all selected tokens: their means, agreement with the model's own top token, accuracy on the text, depth_share,
        error_auc, and the tokens counted. A stored fp16 value is off by up to 0.05 %, and what is computed from it
        accordingly.

        Costs layers x rows products with W_U; memory is bounded by a few blocks of logits and 4 bytes a layer and row.
        Raises RequestError where the site or the last block was not recorded, or the store holds no unembedding, or the
        device cannot be used.
        """
        rows = selected_rows(store, self.where)
        data, table = read_lens(store, rows, site=self.site, top_k=self.top_k, detail=self.detail, device=self.device)
        return Result(self.name, data, table, provenance(store, self))

    @staticmethod
    def headline(result: Result) -> str:
        """Where the loss falls, and from which layer on the lens mostly agrees with the model."""
        loss, agreement = result.data["mean_cross_entropy"].to_numpy(), result.data["mean_agreement"].to_numpy()
        layers = result.data["layer"].to_numpy()
        agrees = layers[np.argmax(agreement > 0.5)]
        return (
            f"cross-entropy {loss[0]:.2f} nats at layer {layers[0]}, {loss[-1]:.2f} at layer {layers[-1]}; "
            f"the model's own top token is the lens's on most tokens from layer {agrees}"
        )

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """ "grid": layers by tokens of the first sequence; "by_layer": mean entropy, KL and loss over all tokens;
        "depth": the text, each token coloured by where its prediction is settled."""
        figures = {"by_layer": lens_curves(result)}
        if not len(result.table):
            return figures
        return {"grid": lens_grid(result), **figures, "depth": lens_depth(result)}
