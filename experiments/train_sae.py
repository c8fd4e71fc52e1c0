"""Train a sparse autoencoder on a site of a store:
`python -m workbench.experiments.train_sae runs/gpt2.acts --site resid_post.7 --out runs/sae`.

SAELens' trainer reads the memory map in random order: the model does not run again, and any number of autoencoders can
be trained on one recording. `workbench features --sae` and SAELens read the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from math import inf, prod
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import SAEMetadata, TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

import workbench as wb
from workbench.cli.arguments import parse
from workbench.cli.options import Positional
from workbench.cli.process import run_command
from workbench.io.checks import check, check_fields
from workbench.io.files import check_new_folder
from workbench.io.torch_state import usable_device
from workbench.sae.zipf_loss import with_zipf_loss

Architecture = Literal["standard", "gated", "topk", "abstopk", "batchtopk", "jumprelu", "matching_pursuit"]
_SOME_ARCHITECTURES = ("k", "l1_coefficient", "l0_coefficient")
_MEAN_ROWS = 20_000


@dataclass(frozen=True)
class TrainSae:
    """All settings that determine the autoencoder, for a given store and machine."""

    site: str
    """Site of the store, such as resid_post.7; heads are flattened."""
    architecture: Architecture = "topk"
    """Architecture, by SAELens' name. batchtopk is saved as jumprelu."""
    d_sae: int = 8192
    """Number of features."""
    k: int | None = None
    """Active features per token, of topk, abstopk and batchtopk. None: SAELens' default."""
    l1_coefficient: float | None = None
    """Weight of the sparsity loss, of standard and gated. None: SAELens' default."""
    l0_coefficient: float | None = None
    """Weight of the sparsity loss, of jumprelu. None: SAELens' default."""
    aux_loss: Literal["architecture", "zipf", "none"] = "architecture"
    """Auxiliary loss against dead features, of topk and batchtopk. architecture: SAELens' aux-k, for features that were
    inactive for dead_feature_window steps; zipf: for features less than half as frequent as Zipf's law expects."""
    dead_feature_window: int = 1000
    """Steps without activation after which a feature counts as dead for the architecture's auxiliary loss."""
    where: str = "NOT is_special"
    """SQL that selects the training tokens. BOS is excluded: the norm of the sink would dominate the loss."""
    steps: int = 20_000
    """Number of training steps."""
    batch: int = 4096
    """Batch size, in tokens."""
    learning_rate: float = 3e-4
    """Adam learning rate, with a warm-up of 100 steps (or a tenth), decayed to a tenth in the last quarter."""
    checkpoints: int = 0
    """Number of checkpoints, with SAELens' trainer state, under OUT/checkpoints."""
    seed: int = 0
    """Random seed, of the weights and of the order of tokens."""
    device: str | None = None
    """Device: cpu, cuda, cuda:1. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        check_fields(self, "d_sae", "steps", "batch", "dead_feature_window", at_least=1, whole=True)
        check("k", self.k, at_least=1, at_most=self.d_sae, whole=True, optional=True)
        check("learning_rate", self.learning_rate, above=0, below=inf)
        check("checkpoints", self.checkpoints, at_least=0, whole=True)
        check_fields(self, "l1_coefficient", "l0_coefficient", at_least=0, below=inf, optional=True)


@runtime_checkable
class _Draw(Protocol):
    @property
    def batch(self) -> int: ...

    @property
    def seed(self) -> int: ...


def train_sae(settings: TrainSae, store: wb.Store, checkpoint_path: Path | None = None) -> TrainingSAE:
    """Trains an autoencoder on a site of `store` by SAELens' trainer.

    The same settings give the same weights on one machine. Inputs are scaled to an average norm of √d_in during
    training, and the scale is folded into the weights at the end.
    The decoder's bias starts as the mean activation.

    Args:
        settings: the settings.
        store: the store with the site.
        checkpoint_path: folder of the checkpoints; None: no checkpoints.

    Returns:
        The trained autoencoder; `save_inference_model` writes it.

    Raises:
        RequestError: for a site that was not recorded, a setting that the architecture does not have, or fewer tokens
            than a batch.
    """
    device = usable_device(settings.device)
    array, rows = store[settings.site], store.where(settings.where).ids
    if len(rows) < settings.batch:
        raise wb.RequestError(f"batch is {settings.batch} and {settings.where!r} selects {len(rows)} tokens; give less")
    torch.manual_seed(settings.seed)
    manifest = store.manifest
    kind, config = get_sae_training_class(settings.architecture)
    kind = with_zipf_loss(kind) if settings.aux_loss == "zipf" else kind
    sae = kind(
        config(
            d_in=prod(array.shape[1:]),
            d_sae=settings.d_sae,
            device=str(device),
            normalize_activations="expected_average_only_in",
            metadata=SAEMetadata(
                model_name=manifest.model.name,
                hook_name=array.name,
                context_size=manifest.recording["context"],
                prepend_bos=bool(manifest.tokens_added["prefix"]),
            ),
            **_architecture_settings(settings, config),
        )
    )
    trainer = SAETrainer(_trainer_config(settings, checkpoint_path), sae, batches(array, rows, settings))
    begin_at_mean(trainer, array, rows)
    trained = trainer.fit()
    if bad := [name for name, part in trained.named_parameters() if not bool(part.isfinite().all())]:
        raise wb.DataError(
            f"training of {settings.site} ended in {bad[0]} that is not finite; give a smaller learning_rate, or a "
            "where that leaves out rows with NaN or infinite values"
        )
    return trained


@torch.no_grad()
def begin_at_mean(trainer: SAETrainer[Any, Any], array: wb.ActivationArray, rows: Int64[np.ndarray, " row"]) -> None:
    """Measures the factor that scales inputs, and sets the decoder's bias to the mean of the scaled activations.

    Args:
        trainer: a trainer that has not started.
        array: the site.
        rows: the training rows.

    Raises:
        DataError: rows that are zero, NaN or infinite.
    """
    sample = array[rows[:: max(1, len(rows) // _MEAN_ROWS)]].float().flatten(1)
    if not 0 < float(norm := sample.norm(dim=1).mean()) < inf:
        raise wb.DataError(
            f"the rows of {array.site.label} have the mean norm {float(norm):g}, by which inputs are divided; give a "
            "where that leaves out rows with NaN or infinite values"
        )
    scaler, batches_for_norm = trainer.activation_scaler, trainer.cfg.n_batches_for_norm_estimate
    scaler.estimate_scaling_factor(sample.shape[1], trainer.data_provider, batches_for_norm)
    trainer.sae.b_dec.copy_(scaler.scale(sample.mean(0)))


def _trainer_config(settings: TrainSae, checkpoint_path: Path | None) -> SAETrainerConfig:
    return SAETrainerConfig(
        total_training_samples=settings.steps * settings.batch,
        train_batch_size_samples=settings.batch,
        lr=settings.learning_rate,
        lr_end=settings.learning_rate / 10,
        lr_warm_up_steps=min(100, settings.steps // 10),
        lr_decay_steps=settings.steps // 4,
        device=str(usable_device(settings.device)),
        n_checkpoints=settings.checkpoints if checkpoint_path else 0,
        checkpoint_path=None if checkpoint_path is None else str(checkpoint_path),
        n_batches_for_norm_estimate=50,
        dead_feature_window=settings.dead_feature_window,
        logger=LoggingConfig(log_to_wandb=False),
    )


def batches(
    array: wb.ActivationArray, rows: Int64[np.ndarray, " selected"], draw: _Draw
) -> Iterator[Float[Tensor, "row d_in"]]:
    """Yields batches of `rows` in random order, without end; each row once per epoch, except the last partial batch."""
    random = np.random.default_rng(draw.seed)
    while True:
        order = random.permutation(rows)
        for first in range(0, len(order) - draw.batch + 1, draw.batch):
            yield array[np.sort(order[first : first + draw.batch])].float().flatten(1)


def _architecture_settings(settings: TrainSae, config: type) -> dict[str, Any]:
    """Returns the settings that only some architectures have."""
    options = {name: getattr(settings, name) for name in _SOME_ARCHITECTURES if getattr(settings, name) is not None}
    options |= {"aux_loss_coefficient": 0.0} if settings.aux_loss == "none" else {}
    known = {field.name for field in fields(config)}
    if strange := sorted(options.keys() - known):
        name = strange[0].removesuffix("_coefficient") if strange[0].startswith("aux_loss") else strange[0]
        raise wb.RequestError(f"{name} is not a setting of a {settings.architecture} SAE; leave it out")
    return options


@dataclass(frozen=True)
class _Command:
    """Train a sparse autoencoder on a site of a store, with SAELens' trainer."""

    store: Positional[Path]
    """Store to train on."""
    out: Path
    """Folder for cfg.json and sae_weights.safetensors."""
    settings: TrainSae

    def run(self) -> int:
        """Trains the SAE and saves it."""
        settings = self.settings
        check_new_folder(self.out)
        sae = train_sae(settings, wb.open_store(self.store), self.out / "checkpoints")
        sae.save_inference_model(str(self.out))
        print(f"{settings.architecture} of {settings.d_sae:,} features on {settings.site}: {self.out}")
        return 0


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains an SAE from the command line, saves it, and exits the process."""
    run_command(lambda words: parse(_Command, "python -m workbench.experiments.train_sae", words), arguments)


if __name__ == "__main__":
    main()
