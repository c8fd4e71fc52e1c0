"""Constants of SAELens' autoencoders that its loader does not apply, folded into the weights.

Activations may be normalised by a number or a whitening in training. A finished SAE has it in its weights; a checkpoint
has it in a file of its own. SAELens 3 to 5 could give each feature a factor that its decoder multiplies by.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from workbench.io.errors import RequestError
from workbench.sae.conversion import number, read_object, read_tensors, take

if TYPE_CHECKING:
    from sae_lens import SAE

SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
"""Files of a checkpoint."""

UNFOLDED = ("expected_average_only_in", "covariance_whitening")
"""Normalisations whose constants are not in the settings; SAELens then leaves inputs unnormalised."""


def folded(module: SAE[Any], folder: Path) -> SAE[Any]:
    """Returns a module with the constants of its normalisation in the weights, where `folder` has them.

    Raises:
        DataError: A file of constants that is damaged, or has others.
    """
    path, way = folder / SCALER, module.cfg.normalize_activations
    if way not in UNFOLDED or not path.is_file():
        return module
    if way == "expected_average_only_in":
        factor = number(path, "scaling_factor", read_object(path).get("scaling_factor"))
        module.fold_activation_norm_scaling_factor(factor)
        return module
    whitening = folder / WHITENING
    tensors = read_tensors(whitening)
    mean, matrix, inverse = (take(tensors, name, whitening) for name in ("mean", "matrix", "inverse_matrix"))
    module.fold_activation_whitening(mean, matrix, inverse)
    return module


def scaled(settings: dict[str, Any], weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Returns weights of SAELens 3 to 5 with the factors of features in the decoder, and notes it in the settings.

    Raises:
        RequestError: The settings contradict the factors.
    """
    factor = weights.pop("scaling_factor")
    if not bool((factor == 1).all()):
        if not settings.get("finetuning_scaling_factor"):
            raise RequestError(
                f"{folder} has a scaling_factor, but finetuning_scaling_factor is not true in its cfg.json; set it to "
                "multiply the decoder, or remove the tensor"
            )
        weights["W_dec"] = weights["W_dec"] * factor[:, None]
    settings["finetuning_scaling_factor"] = False
    return weights
