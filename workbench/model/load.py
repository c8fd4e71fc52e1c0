"""Models: an unmodified Hugging Face causal LM, its tokenizer, and the map of its sites."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from workbench.io.checks import check_kind
from workbench.io.errors import RequestError, first_line
from workbench.io.torch_state import plain_torch
from workbench.model.adapter import base_location, merge
from workbench.model.checkpoint import load_checkpoint, quietly
from workbench.model.fingerprint import config_fingerprint, tokenizer_fingerprint, weights_fingerprint
from workbench.model.gguf import check_file
from workbench.model.location import Location, locate
from workbench.sites.grammar import SiteMap

if TYPE_CHECKING:
    import torch
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from workbench.store.identity import Identity

_CONTEXT_FIELDS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
)


@dataclass(frozen=True)
class Loading:
    """Arguments of `load_model` without the device: another process can load the same model with them."""

    source: str | Path
    tokenizer: str | Path | PreTrainedTokenizerBase | None
    dtype: str | torch.dtype
    revision: str | None
    trust_remote_code: bool
    allow_pickle: bool

    def load(self, device: str | torch.device | None) -> Model:
        """Loads the model on `device`."""
        return load_model(**{field.name: getattr(self, field.name) for field in fields(self)}, device=device)


@dataclass(frozen=True, eq=False)
class Model:
    """A Hugging Face module as it is, with its tokenizer and its name.

    Nothing is wrapped or patched: the module may be compiled, quantised, sharded or adapted with PEFT, and stays the
    same object.
    """

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    revision: str | None = None
    loading: Loading | None = None
    """Arguments with which it was loaded; None: the module was given."""

    @cached_property
    def site_map(self) -> SiteMap:
        """All recordable sites with their shapes. Costs two forward passes, over 2 x 7 and 2 x 11 tokens, once."""
        from workbench.model.discovery import find_sites

        return find_sites(self.module)

    @cached_property
    def generates_in_batches(self) -> bool:
        """True if it generates in a padded batch what it does from each prompt alone. Costs a few short passes."""
        from workbench.model.padded_batch import generates_in_batches

        return generates_in_batches(self.module)

    @cached_property
    def continues_from_cache(self) -> bool:
        """True if tokens behind kept keys and values get the logits of a whole pass. Costs a few short passes."""
        from workbench.model.kept_keys import continues_from_cache

        return continues_from_cache(self.module)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, in the order of the forward pass; short names where there are any."""
        return tuple(site.short or name for name, site in self.site_map.sites.items())

    @property
    def architecture(self) -> str:
        """Name of the module's class, such as LlamaForCausalLM."""
        return type(self.module).__name__

    @property
    def _embedding(self) -> torch.Tensor:
        return cast("torch.nn.Embedding", self.module.get_input_embeddings()).weight

    @property
    def device(self) -> torch.device:
        """Device that takes the token ids; a sharded model has others, too."""
        from workbench.model.forward import input_device  # takes seconds: torch

        return input_device(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """Type in which the model computes."""
        return self.module.dtype

    @property
    def vocab(self) -> int:
        """Number of rows of the embedding: token ids are below it."""
        return self._embedding.shape[0]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        widths = (site.shape[-1] for site in self.site_map.sites.values() if site.axes == ("d_model",))
        return next((width for width in widths if width is not None), self._embedding.shape[1])

    @property
    def context_limit(self) -> int | None:
        """Largest number of tokens the model was built for; None if its config does not state it."""
        config = self.module.config.get_text_config(decoder=True)
        limits = (getattr(config, name, None) for name in _CONTEXT_FIELDS)
        return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)

    def fingerprint(self) -> str:
        """Returns the SHA-256 of every parameter and saved buffer. Costs about 1 s a gigabyte."""
        return weights_fingerprint(self.module)

    def identity(self) -> Identity:
        """Returns what decides the model's activations now, hooks and adapters included.

        Costs a checksum of the weights, about 1 s a gigabyte, and a forward pass over 16 tokens.
        """
        from workbench.model.behaviour import TOKENS, measure_identity  # takes seconds: torch

        return measure_identity(self.module, self.site_map.last_block, min(TOKENS, self.context_limit or TOKENS))

    def config_fingerprint(self) -> str:
        """Returns the SHA-256 of the config, without the fields that name the place it was saved in."""
        return config_fingerprint(self.module.config)

    def tokenizer_fingerprint(self) -> str | None:
        """Returns the SHA-256 of the tokenizer's definition; None without a tokenizer."""
        return None if self.tokenizer is None else tokenizer_fingerprint(self.tokenizer)

    def bridge(self) -> TransformerBridge:
        """Returns a TransformerBridge of a copy of this model, for interventions in TransformerLens' style.

        The bridge rewrites its module in place and attends eagerly, so it has a copy of its own: memory doubles.

        Raises:
            RequestError: TransformerLens has no adapter for the architecture.
        """
        # not boot_transformers: for a model that also sees images it installs torchvision, and with it another torch
        from transformer_lens.model_bridge.sources import build_bridge_from_module
        from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config

        module, tokenizer = copy.deepcopy(self.module), copy.deepcopy(self.tokenizer)
        config = copy.deepcopy(module.config)
        config.architectures = config.architectures or [self.architecture]
        if tokenizer is not None:  # or it would be loaded anew, by its path or from the hub
            tokenizer.init_kwargs |= {"add_bos_token": True, "name_or_path": tokenizer.name_or_path}
        try:
            architecture = determine_architecture_from_hf_config(config)
            return build_bridge_from_module(
                module, architecture, hf_config=config, tokenizer=tokenizer, model_name=self.name
            )
        except Exception as error:  # adapters raise whatever the module lacks
            raise RequestError(f"model {self.name!r} gets no TransformerBridge: {first_line(error)}") from error

    def __repr__(self) -> str:
        sizes = f"{sum(part.numel() for part in self.module.parameters()):,} parameters"
        return f"Model({self.name!r}, {self.architecture}, {sizes}, {self.dtype}, {self.device})"


def check_model(model: object) -> None:
    """Refuses what is no loaded model, such as a name or a module of transformers."""
    check_kind("model", model, Model, "a loaded model, such as wb.load_model('demo')")


@plain_torch()
def load_model(
    source: str | Path | PreTrainedModel,
    *,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Model:
    """Loads a causal LM from a local directory, a GGUF file or a hub id, or takes a Hugging Face module as it is.

    A directory holds a model, one GGUF file, or an adapter of PEFT, which is merged into the base that it names. A
    GGUF file is dequantised, to float32 where `dtype` names no other; needs the extra [gguf], an adapter [peft].
    A checkpoint without language-model head (its architecture is LlamaModel, ...) is loaded without one.

    A directory, and a hub id that is in the local cache, is read without the network. Attention stays what transformers
    chooses (SDPA).

    Args:
        source: A directory, a GGUF file, a hub id, a transformers module, "demo" for the embedded model, or "planted"
            for the one whose weights are set by hand.
        tokenizer: Another tokenizer: a directory, a hub id, an object. None: the model's own. Without a tokenizer only
            lists of token ids can be recorded.
        device: "cpu", "cuda:1", ...; "auto" spreads a large model over all devices. None: the GPU if there is one.
        dtype: Type in which the model computes. "checkpoint": that of the weights. "auto": the same, but on a CPU
            float32 in place of float16, which overflows, and of bfloat16 where the CPU has no instructions for it.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run code that comes with the model.
        allow_pickle: Read pickled weights, which can run code, and not safetensors alone.

    Returns:
        The model in the mode and state in which transformers or the caller made it.

    Raises:
        RequestError: No such directory or hub id, pickled weights, remote code, an unreadable checkpoint or one that
            lacks weights, a device that cannot be used.
    """
    if not isinstance(source, str | Path):
        module = _given_module(source, device, dtype, revision)
        return Model(module, _given_tokenizer(tokenizer, trust_remote_code), _module_name(module))
    location = locate(source, revision)
    if location.file:
        check_file(Path(location.path, location.file))
    if revision is not None and not location.hub:
        raise RequestError(
            f"revision={revision!r} applies to a hub id only; leave it out for the directory {str(source)!r}"
        )
    base = base_location(location) or location
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    module = load_checkpoint(base, device, dtype, allow_pickle, _read_options(base, options))
    if base is not location:
        module = merge(module, location, allow_pickle)
    loaded_dtype = module.dtype if dtype == "auto" else dtype  # "auto" may be another one in another process
    loading = Loading(source, tokenizer, loaded_dtype, revision, trust_remote_code, allow_pickle)
    if tokenizer is None:
        saved = location if base is location or _has_tokenizer(location) else base
        return Model(module, _saved_tokenizer(saved, options), location.name, revision, loading)
    return Model(module, _given_tokenizer(tokenizer, trust_remote_code), location.name, revision, loading)


def end_tokens(model: Model) -> list[int]:
    """Returns the ids of the tokens that end a text; none for a model without."""
    config = getattr(model.module, "generation_config", None) or model.module.config
    ends = config.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [int(ends)]


def batch_tokens(model: Model) -> int:
    """Returns the default tokens of a forward pass: on a CPU as many as fit its caches (measured at width 768)."""
    return max(2048, min(8192, 768 * 2048 // model.d_model)) if model.device.type == "cpu" else 16_384


# ---- loading --------------------------------------------------------------------------------------------


def _given_module(
    source: PreTrainedModel, device: str | torch.device | None, dtype: str | torch.dtype, revision: str | None
) -> PreTrainedModel:
    """A module as the caller made it; what is for loading is refused."""
    if not hasattr(source, "get_input_embeddings") or not hasattr(source, "config"):
        raise RequestError(
            f"model must be a directory, a hub id or a transformers PreTrainedModel, not {type(source).__name__}"
        )
    if getattr(source.config, "is_encoder_decoder", False):
        raise RequestError(
            f"model {type(source).__name__} is an encoder-decoder; give a causal language model, which has one stack "
            "of blocks, or its encoder alone"
        )
    for name, value in (("device", device), ("dtype", dtype), ("revision", revision)):
        if value not in (None, "auto"):
            raise RequestError(f"{name}={value!r} is for a model that is loaded; a module stays as it is given")
    return getattr(source, "_orig_mod", source)  # of torch.compile: hooks break its graphs


def _read_options(location: Location, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of transformers' readers for what is at a location."""
    return {**options, "local_files_only": location.local} | ({"gguf_file": location.file} if location.file else {})


def _has_tokenizer(location: Location) -> bool:
    folder = Path(location.path)
    return any(folder.glob("*token*")) or any(folder.glob("vocab*"))


def _saved_tokenizer(location: Location, options: Mapping[str, Any]) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with the model; None if a directory or file has none."""
    if location.file:
        return _load_tokenizer(location, options) if check_file(Path(location.path, location.file)) else None
    if location.local and not location.built and not _has_tokenizer(location):
        if not location.hub:
            return None
        location = locate(location.name, options["revision"], "tokenizer")  # the cache had the weights only
    return _load_tokenizer(location, options)


def _given_tokenizer(
    tokenizer: str | Path | PreTrainedTokenizerBase | None, trust_remote_code: bool
) -> PreTrainedTokenizerBase | None:
    """A tokenizer other than the model's: the model's revision does not apply to it."""
    if not isinstance(tokenizer, str | Path):
        if tokenizer is None or hasattr(tokenizer, "convert_ids_to_tokens"):
            return tokenizer
        raise RequestError(
            f"tokenizer must be a directory, a hub id or a transformers tokenizer, not {type(tokenizer).__name__}"
        )
    location = locate(tokenizer, kind="tokenizer")
    return _load_tokenizer(location, {"trust_remote_code": trust_remote_code})


def _load_tokenizer(location: Location, options: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    from workbench.embedded.planted import planted_tokenizer

    path = location.path
    if location.built:
        return planted_tokenizer()
    with quietly(f"tokenizer {path!r}"):
        try:
            return AutoTokenizer.from_pretrained(path, **_read_options(location, options))
        except Exception as error:  # as above: each reader raises its own kinds
            raise RequestError(f"tokenizer {path!r} cannot be loaded: {first_line(error)}") from error


def _module_name(module: PreTrainedModel) -> str:
    """The hub id of a module, or the name of the directory it was loaded from, without its path."""
    name = getattr(module.config, "_name_or_path", "") or type(module).__name__
    return Path(name).resolve().name if os.path.isdir(name) or os.path.isabs(name) else name
