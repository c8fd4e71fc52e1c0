"""Auxiliary losses of TopK autoencoders at equal sparsity: dead features and fit on held-out documents.

One run trains one autoencoder with SAELens' trainer; arms and seeds are a sweep:

    workbench sweep sae-losses --aux-loss none architecture zipf --seed 0 1 2
"""

from __future__ import annotations

from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pandas as pd

import workbench as wb
from workbench.experiments.inputs import Inputs, model_of, record_documents
from workbench.experiments.panels import curves
from workbench.experiments.train_sae import TrainSae, train_sae
from workbench.results.experiment import make_result

NAME = "sae-losses"
_TRAINING, _HELD_OUT = "NOT is_special AND document % 5 <> 0", "NOT is_special AND document % 5 = 0"

_SHARED = (
    *("site", "architecture", "aux_loss", "d_sae", "k", "steps", "batch", "learning_rate"),
    *("dead_feature_window", "seed", "device"),
)
"""Settings of `TrainSae` under the same names."""


@dataclass(frozen=True)
class Config(Inputs):
    """Training of one autoencoder on four fifths of the documents, measured on the others."""

    site: str = "resid_post.0"
    """Site of the autoencoder."""
    architecture: Literal["topk", "batchtopk"] = "topk"
    """Architecture of the autoencoder; its sparsity is that of k, whatever the loss."""
    aux_loss: Literal["architecture", "zipf", "none"] = "architecture"
    """Auxiliary loss: SAELens' aux-k for dead features, that for features below Zipf's law, or none."""
    d_sae: int = 1024
    """Number of features."""
    k: int = 12
    """Active features per token."""
    steps: int = 500
    """Number of training steps."""
    batch: int = 1024
    """Batch size, in tokens."""
    learning_rate: float = 1e-3
    """Adam learning rate."""
    dead_feature_window: int = 100
    """Steps without activation after which a feature counts as dead for aux-k."""
    rows: int = 200_000
    """Maximum number of tokens to record."""
    context: int = 128
    """Maximum tokens per sequence."""


def run(config: Config) -> wb.Result:
    """Returns one line: fit, L0 and loss on held-out documents, dead features there and on the training documents."""
    model = model_of(config.model, config.weights, config.device)
    store = record_documents(config, (config.site,), context=config.context)
    shared = (
        "site",
        "architecture",
        "aux_loss",
        "d_sae",
        "k",
        "steps",
        "batch",
        "learning_rate",
        "dead_feature_window",
    )
    settings = TrainSae(
        **{name: getattr(config, name) for name in shared}, seed=config.seed, device=config.device, where=_TRAINING
    )
    with TemporaryDirectory() as folder:
        train_sae(settings, store).save_inference_model(folder)
        sae = wb.load_sae(folder, device=config.device)
    held_out = wb.sae_metrics(store, sae, model=model, rows=_HELD_OUT)
    training = wb.sae_metrics(store, sae, rows=_TRAINING)
    assert held_out.loss is not None  # a model was given
    line = {
        "held_out_rows": held_out.rows,
        "l0": held_out.l0,
        "explained_variance": held_out.explained_variance,
        "loss_increase": held_out.loss.increase,
        "dead_held_out": held_out.dead_share,
        "dead_training": training.dead_share,
    }
    return make_result(NAME, config, pd.DataFrame([line]), store)


def headline(result: wb.Result) -> str:
    """Returns dead features and explained variance of each loss, averaged over seeds, as a sentence."""
    columns = result.table.groupby("aux_loss", sort=False)[["dead_training", "explained_variance"]]
    means: dict[Any, Any] = pd.DataFrame(columns.mean()).to_dict("index")
    return "; ".join(
        f"{name}: {100 * mean['dead_training']:.1f} % of features dead on the training documents, explained variance "
        f"{mean['explained_variance']:.3f}"
        for name, mean in means.items()
    )


def figures(result: wb.Result) -> dict[str, Any]:
    """Returns "dead", dead features on the training documents, and "fit", explained variance, by L0."""
    shared = {"x": "k", "x_title": "k, active features per token", "colour": "aux_loss", "besides": ("site",)}
    dead = curves(result, y="dead_training", title="Dead features", unit="share of features", **shared)
    fit = curves(result, y="explained_variance", title="Fit on held-out documents", unit="explained variance", **shared)
    return {"dead": dead, "fit": fit}


if __name__ == "__main__":
    from workbench.cli.main import run_experiment

    run_experiment(NAME)
