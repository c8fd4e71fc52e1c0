"""Checks of the settings of SAELens' autoencoders: what SAELens would drop, or replace by a default, is refused.

SAELens keeps the keys that its class knows and ignores all others, whatever they say, and does not look at types: a
misspelt key, an activation function that it no longer has and `k: "12"` load as another autoencoder.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from workbench.io.errors import DataError, RequestError, nearest, shown

_ABOVE_0 = frozenset({"d_in", "d_sae", "d_out", "k", "n_heads", "n_attn_layers", "bottleneck_factor", "kval_topk"})
_NO_SETTINGS = frozenset({"metadata", "architecture", "dtype", "device"})
_UNDECLARED = ("constant_norm_rescale",)  # a normalisation that SAELens has, and does not declare
_RENAMED = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index", "activation_fn_str": "activation_fn"}

_FORMER = frozenset(
    """
    activation_fn activation_fn_kwargs adam_beta1 adam_beta2 architecture autocast autocast_lm b_dec_init_method
    cached_activations_path checkpoint_path compile_llm compile_sae context_size dataset_path
    dataset_trust_remote_code dead_feature_estimation_method dead_feature_threshold dead_feature_window
    decoder_heuristic_init decoder_heuristic_init_norm decoder_orthogonal_init device dtype eval_batch_size_prompts
    eval_every_n_wandb_logs expansion_factor feature_reinit_scale feature_sampling_method feature_sampling_window
    finetuning_method finetuning_scaling_factor finetuning_tokens from_pretrained_path hook_head_index hook_layer
    hook_name hook_point_layer init_encoder_as_decoder_transpose is_dataset_tokenized jumprelu_bandwidth
    jumprelu_init_threshold l1_coefficient l1_loss_wd_norm l1_warm_up_steps llm_compilation_mode
    log_optimizer_state_to_wandb log_to_wandb log_weights_to_wandb lp_norm lr lr_decay_steps lr_end
    lr_scheduler_name lr_warm_up_steps model_class_name model_from_pretrained_kwargs model_kwargs model_name
    mse_loss_normalization n_batches_in_buffer n_checkpoints n_eval_batches n_restart_cycles neuronpedia_id
    noise_scale normalize_activations normalize_sae_decoder prepend_bos resample_batches run_name
    sae_compilation_mode sae_lens_training_version sae_lens_version scale_sparsity_penalty_by_decoder_norm seed
    seqpos_slice store_batch_size store_batch_size_prompts streaming tokens_per_buffer total_training_steps
    total_training_tokens train_batch_size train_batch_size_tokens training_tokens use_cached_activations
    use_ghost_grads use_sparse_activations verbose wandb_entity wandb_id wandb_log_frequency wandb_project
    """.split()  # noqa: SIM905
)
"""Keys of cfg.json before SAELens 6 that change nothing in how a row is encoded, or are checked one by one."""


def check_settings(config: dict[str, Any], source: Path) -> None:
    """Refuses settings that SAELens would silently drop, misread or replace by a default.

    Args:
        config: Content of cfg.json, as it is in the file.
        source: The file, for messages.

    Raises:
        RequestError: An architecture or an activation function that SAELens cannot encode with.
        DataError: A key that is unknown or missing, or a value of another type or out of range.
    """
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    older = "metadata" not in config  # before SAELens 6 all settings, also of training, were on one level
    if older:
        config = _former(config, source)
    elif not isinstance(config["metadata"], dict):
        raise DataError(f"{source}: metadata is {shown(config['metadata'])}, expected an object")
    architecture = config.get("architecture", "standard" if older else None)
    if not isinstance(architecture, str) or architecture not in SAE_CLASS_REGISTRY:
        training = isinstance(architecture, str) and architecture in SAE_TRAINING_CLASS_REGISTRY
        remedy = "save it with save_inference_model" if training else f"known are {', '.join(SAE_CLASS_REGISTRY)}"
        raise RequestError(f"{source}: SAELens has no inference class for architecture {shown(architecture)}; {remedy}")
    kind = SAE_CLASS_REGISTRY[architecture][1]
    known = _known(architecture)
    if unknown := _unknown(config, known, older):
        close = nearest(unknown[0], known, 1)
        raise DataError(f"{source}: SAELens would ignore {unknown[0]!r}, unknown for a {architecture} SAE{close}")
    if "k" in known and "k" not in config:
        raise DataError(f"{source}: k is missing and SAELens would use 100; add it")
    _check_values(config, kind, source)


def check_metadata(metadata: Mapping[str, Any], source: object) -> None:
    """Refuses what files record of a training where it is of another type, and would fail where it is used.

    Raises:
        DataError: Names the key, what it is, and what is expected.
    """
    for name, (kind, expected) in _METADATA.items():
        value = metadata.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise DataError(f"{source}: metadata.{name} is {shown(value)}, expected {expected}; correct its settings")
    if (number := metadata.get("n_sites")) is not None and number < 1:
        raise DataError(f"{source}: metadata.n_sites is {number}, expected a number from 1 on; correct its settings")
    names = metadata.get("hook_names")
    if names and (len(names) != (metadata.get("n_sites") or 1) or not all(isinstance(site, str) for site in names)):
        raise DataError(
            f"{source}: metadata.hook_names is {shown(names)}, expected as many names as n_sites, "
            f"{metadata.get('n_sites') or 1}; correct its settings"
        )


_METADATA: dict[str, tuple[type | tuple[type, ...], str]] = {
    **dict.fromkeys(("hook_name", "hook_name_out", "model_name"), (str, "a text")),
    **dict.fromkeys(("n_sites", "hook_head_index"), (int, "a whole number")),
    "hook_names": ((list, tuple), "a list of names"),
}


def loaded_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that SAELens must see in place of those in the file.

    SAELens takes a file without its version for one from before SAELens 6, and drops its `metadata`: site and model.
    """
    metadata = config.get("metadata")
    if not isinstance(metadata, dict) or metadata.get("sae_lens_version") or config.get("sae_lens_version"):
        return {}
    return {"metadata": metadata | {"sae_lens_version": version("sae-lens")}}


def ignored_settings(config: Mapping[str, Any]) -> list[str]:
    """Returns the keys of a `cfg.json` that SAELens knows for no SAE of its architecture, and drops."""
    from sae_lens.registry import SAE_CLASS_REGISTRY

    older = "metadata" not in config
    architecture = config.get("architecture", "standard")
    if not isinstance(architecture, str) or architecture not in SAE_CLASS_REGISTRY:
        return []  # which SAELens refuses
    return _unknown({_RENAMED.get(key, key): value for key, value in config.items()}, _known(architecture), older)


def _known(architecture: str) -> set[str]:
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    registries = (SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY)
    kinds = [registry[architecture][1] for registry in registries if architecture in registry]
    return {"architecture", "metadata"} | {field.name for kind in kinds for field in dataclasses.fields(kind)}


def _unknown(config: Mapping[str, Any], known: set[str], older: bool) -> list[str]:
    return sorted(config.keys() - known - (_former_keys() if older else set()))


def _former(config: dict[str, Any], source: Path) -> dict[str, Any]:
    """Settings of a file from before SAELens 6 under today's names; refuses activations that would become ReLU."""
    config = {_RENAMED.get(key, key): value for key, value in config.items()}
    activation, options = config.get("activation_fn", "relu"), config.get("activation_fn_kwargs") or {}
    if not isinstance(options, dict) or activation not in ("relu", "topk"):
        wrong = activation if activation not in ("relu", "topk") else options
        raise RequestError(f"{source}: activation_fn {shown(wrong)} is not supported; SAELens would encode with ReLU")
    if activation == "topk":
        config |= {"architecture": "topk", "k": options.get("k")}
    if isinstance(config.get("normalize_activations"), bool):
        config["normalize_activations"] = "expected_average_only_in" if config["normalize_activations"] else "none"
    return {key: value for key, value in config.items() if value is not None or key == "k"}


def _former_keys() -> set[str]:
    from sae_lens.config import LanguageModelSAERunnerConfig
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

    kinds = [LanguageModelSAERunnerConfig, *(config for _, config in SAE_TRAINING_CLASS_REGISTRY.values())]
    return {field.name for kind in kinds for field in dataclasses.fields(kind)} | _FORMER


def _check_values(config: Mapping[str, Any], kind: type, source: Path) -> None:
    """Refuses a setting of another type than its class declares, and sizes below 1."""
    hints = typing.get_type_hints(kind)
    for name, value in config.items():
        if name not in hints or name in _NO_SETTINGS:
            continue
        if name in _ABOVE_0 and not (value is None and name == "kval_topk"):
            check_count(source, name, value)
        elif not _fits(value, hints[name]):
            raise DataError(f"{source}: {name} is {shown(value)}, expected {_expected(hints[name])}")
    for name in ("d_in", "d_sae"):
        check_count(source, name, config.get(name))


def check_count(source: Path, name: str, value: object) -> int:
    """Returns `value`; DataError where it is no whole number above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 48:
        raise DataError(f"{source}: {name} is {shown(value)}, expected a whole number above 0")
    return value


def _fits(value: object, hint: Any) -> bool:
    if typing.get_origin(hint) is typing.Literal:
        return isinstance(value, str) and value in (*typing.get_args(hint), *_UNDECLARED)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is hint


def _expected(hint: Any) -> str:
    choices: Collection[Any] = typing.get_args(hint)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return " or ".join(names.get(choice, repr(choice)) for choice in choices or (hint,))
