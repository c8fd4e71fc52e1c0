"""Train the demo's sparse autoencoder: `python -m workbench.experiments.demo_model.sae runs/demo-0`.

SAELens' trainer reads a store: the activations are recorded once, then read in random order from the memory map. BOS is
excluded, since the norm of the sink would dominate the loss. About five minutes on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.sae_trainer import SAETrainer

import workbench as wb
from workbench.experiments.demo_model.corpus import documents
from workbench.experiments.train_sae import batches


@dataclass(frozen=True)
class SaeRecipe:
    """All settings that determine the autoencoder, for a given model and machine."""

    site: str = "resid_post.0"
    d_sae: int = 1024
    k: int = 12
    """Maximum number of active latents per token."""
    documents: int = 600
    """Number of training documents, of about 250 tokens each."""
    seed: int = 0
    steps: int = 1500
    batch: int = 1024
    """Batch size, in tokens."""
    threads: int = 1
    """CPU threads; another number sums in another order."""
    learning_rate: float = 1e-3


def train_sae(recipe: SaeRecipe, model: wb.Model, store: wb.Store) -> TopKTrainingSAE:
    """Trains an SAE on `recipe.site` of `store` by SAELens' trainer."""
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    array = store[recipe.site]
    config = TopKTrainingSAEConfig(
        d_in=array.shape[1],
        d_sae=recipe.d_sae,
        k=recipe.k,
        normalize_activations="expected_average_only_in",
        metadata=SAEMetadata(
            model_name="demo", hook_name=array.name, context_size=model.context_limit, prepend_bos=True
        ),
    )
    sae = TopKTrainingSAE(config)
    rows = store.where("NOT is_special").ids
    _begin_at_the_data(sae, array, rows, recipe.seed)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=recipe.steps * recipe.batch,
            train_batch_size_samples=recipe.batch,
            lr=recipe.learning_rate,
            lr_end=recipe.learning_rate / 10,
            lr_warm_up_steps=100,
            lr_decay_steps=recipe.steps // 4,
            dead_feature_window=300,
            n_batches_for_norm_estimate=50,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae,
        batches(array, rows, recipe),
    )
    return trainer.fit()


@torch.no_grad()
def _begin_at_the_data(sae: TopKTrainingSAE, array: wb.ActivationArray, rows: np.ndarray, seed: int) -> None:
    """Sets the decoder's bias to the mean activation, and each latent to the direction of one activation from it."""
    mean = array[rows[:: max(1, len(rows) // 20_000)]].float().mean(0)
    rows_chosen = np.sort(np.random.default_rng(seed).choice(rows, len(sae.W_dec), replace=False))
    directions = torch.nn.functional.normalize(array[rows_chosen].float() - mean, dim=1)
    sae.b_dec.copy_(mean)
    sae.W_dec.copy_(directions * sae.W_dec.norm(dim=1, keepdim=True))
    sae.W_enc.copy_(directions.T * sae.W_enc.norm(dim=0))


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains the demo's SAE on the model of a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "run", type=Path, help="folder that experiments.demo_model.train wrote; the SAE is saved next to its model"
    )
    for name in ("site", "d_sae", "k", "documents", "seed", "steps"):
        default = getattr(SaeRecipe, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    request = vars(parser.parse_args(arguments))
    run = request.pop("run")
    model, out = wb.load_model(run / "model"), run / "sae"
    recipe = SaeRecipe(**request)
    texts = (document.text for document in documents(recipe.documents, seed=2000 + recipe.seed))
    store = wb.record(model, list(texts), sites=[recipe.site], out=run / "sae.acts")
    train_sae(recipe, model, store).save_inference_model(str(out))
    print(f"topk of {recipe.d_sae} latents on {recipe.site}: {out}")


if __name__ == "__main__":
    main()
