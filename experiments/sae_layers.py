"""Fit of sparse autoencoders by layer: L0, explained variance, dead features, loss recovered.

One run is one autoencoder; those of all layers are a sweep over `sae_id`, or over directories in `sae`.

    python -m workbench.experiments.sae_layers --model gpt2 --sae gpt2-small-res-jb --sae-id blocks.5.hook_resid_pre
    workbench sweep sae-layers --model gpt2 --sae gpt2-small-res-jb --sae-id blocks.{0..11}.hook_resid_pre
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

import workbench as wb
from workbench.embedded import NAME as DEMO
from workbench.experiments.inputs import Inputs, model_of, record_documents
from workbench.experiments.panels import curves
from workbench.io.errors import RequestError
from workbench.results.experiment import make_result

NAME = "sae-layers"
_OF_PREDICTIONS = ("loss_clean", "loss_spliced", "loss_recovered", "kl_spliced", "kl_score")


@dataclass(frozen=True)
class Config(Inputs):
    """Fit of one autoencoder to the site it was trained on."""

    sae: str = DEMO
    """A directory that SAELens wrote, a release of its list, or demo."""
    sae_id: str | None = None
    """Id of the SAE in a release or a directory of several."""
    site: str | None = None
    """Site to read. None: the one that the SAE was trained on."""
    spliced: bool = True
    """Run the model again with the reconstruction in place of the activations, for the loss recovered."""
    context: int = 128
    """Maximum tokens per sequence."""


def run(config: Config) -> wb.Result:
    """Returns one line: the site, its layer, and `sae_metrics` on tokens that are not special."""
    sae = wb.load_sae(config.sae, config.sae_id, device=config.device)
    site = config.site or sae.site
    if site is None:
        raise RequestError(f"SAE {sae.name!r} does not name its site; give site, such as resid_post.3")
    model = model_of(config.model, config.weights, config.device)
    (record,) = model.site_map.select([site])
    store = record_documents(config, (record.name,), context=config.context)
    options = {"model": model if config.spliced else None, "force": config.weights == "random"}
    metrics = wb.sae_metrics(store, sae, record.name, **options)
    line = {
        "layer": -1 if record.layer is None else record.layer,
        "read": record.short or record.name,
        "d_sae": sae.d_sae,
        "rows_counted": metrics.rows,
        "l0": metrics.l0,
        "explained_variance": metrics.explained_variance,
        "cosine": metrics.cosine,
        "dead_share": metrics.dead_share,
        **{name: metrics.intervals[name].mean if metrics.loss else np.nan for name in _OF_PREDICTIONS},
    }
    return make_result(NAME, config, pd.DataFrame([line]), store)


def headline(result: wb.Result) -> str:
    """Returns the metrics of the SAE with the largest explained variance as a sentence."""
    best = result.table.loc[result.table["explained_variance"].idxmax()]
    return f"L0 {best['l0']:.1f}, explained variance {best['explained_variance']:.3f} at {best['read']}" + (
        "" if np.isnan(best["loss_recovered"]) else f", loss recovered {best['loss_recovered']:.3f}"
    )


def figures(result: wb.Result) -> dict[str, Any]:
    """Returns "fit", explained variance, loss recovered and dead share, and "l0", active features, by layer."""
    names = {
        "explained_variance": "explained variance",
        "loss_recovered": "loss recovered",
        "dead_share": "dead features",
    }
    columns = [name for name in result.table.columns if name not in names]
    long = result.table.melt(id_vars=columns, value_vars=list(names), var_name="what", value_name="share")
    long = long.assign(what=[names[name] for name in long["what"]]).dropna(subset=["share"])
    long_result = wb.Result(result.probe, result.data, long, result.provenance)
    shared = {"x": "layer", "x_title": "layer", "besides": ("sae", "sae_id", "site")}
    fit = curves(long_result, y="share", colour="what", title="Fit of sparse autoencoders", unit="share", **shared)
    l0 = curves(result, y="l0", title="Active features", unit="L0, active features per token", **shared)
    return {"fit": fit, "l0": l0}


if __name__ == "__main__":
    from workbench.cli.main import run_experiment

    run_experiment(NAME)
