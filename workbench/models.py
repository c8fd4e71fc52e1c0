"""Models: an unmodified Hugging Face causal LM, its tokenizer, and the map of its sites."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import RequestError, nearest
from workbench.sites import SiteMap

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_CONTEXT_FIELDS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True, eq=False)
class Model:
    """A Hugging Face module as it is, with its tokenizer and where it came from.

    Nothing is wrapped or patched: the module can be compiled, quantised, sharded or adapted with PEFT before
    it comes here, and is the same object afterwards.
    """

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    revision: str | None = None

    @cached_property
    def site_map(self) -> SiteMap:
        """Every recordable site with its shape. Costs one forward pass over 2 x 7 tokens, once."""
        from workbench.sitemap import find_sites

        return find_sites(self.module)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, in the order of the forward pass; short names where there are any."""
        return tuple(site.short or name for name, site in self.site_map.sites.items())

    @property
    def architecture(self) -> str:
        return type(self.module).__name__

    @property
    def device(self) -> torch.device:
        """Where token ids go in; a sharded model has others too."""
        return self.module.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    @property
    def vocab(self) -> int:
        """Rows of the embedding: token ids are below this."""
        return self.module.get_input_embeddings().weight.shape[0]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        widths = (site.shape[-1] for site in self.site_map.sites.values() if site.axes == ("d_model",))
        return next(widths, self.module.get_input_embeddings().weight.shape[1])

    @property
    def context_limit(self) -> int | None:
        """The most positions the model was built for, in tokens; None where its config does not say."""
        config = self.module.config.get_text_config(decoder=True)
        limits = (getattr(config, name, None) for name in _CONTEXT_FIELDS)
        return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)

    def fingerprint(self) -> str:
        """sha256 over every parameter and saved buffer: name, dtype, shape and bytes. About 1 s a gigabyte."""
        return _weights_fingerprint(self.module)

    def config_fingerprint(self) -> str:
        """sha256 of the config, without the fields that say where and by what it was saved."""
        config = self.module.config.to_diff_dict()
        for name in ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"):
            config.pop(name, None)
        return _sha256(json.dumps(config, sort_keys=True, default=str))

    def tokenizer_fingerprint(self) -> str | None:
        """sha256 of the tokenizer's whole definition; None without one."""
        if self.tokenizer is None:
            return None
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            return _sha256(_without_batching(backend.to_str()))
        return _sha256(json.dumps([self.tokenizer.get_vocab(), self.tokenizer.special_tokens_map], sort_keys=True))

    def bridge(self) -> Any:
        """A TransformerBridge of a copy of this model, for interventions in TransformerLens' style.

        The bridge rewrites its module in place and attends eagerly, so it gets its own copy: memory doubles.
        """
        from transformer_lens.model_bridge import TransformerBridge

        if self.tokenizer is None:
            raise RequestError(f"model {self.name!r} has no tokenizer and TransformerBridge needs one; pass tokenizer=")
        module = copy.deepcopy(self.module)
        module.config.architectures = module.config.architectures or [self.architecture]
        return TransformerBridge.boot_transformers(self.name, hf_model=module, tokenizer=self.tokenizer)

    def __repr__(self) -> str:
        sizes = f"{sum(part.numel() for part in self.module.parameters()):,} parameters"
        return f"Model({self.name!r}, {self.architecture}, {sizes}, {self.dtype}, {self.device})"


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
    """Loads a causal LM from a local directory, a hub id, or takes a Hugging Face module as it is.

    `device`: "cpu", "cuda:1", ...; "auto" spreads a large model over all devices; None: the GPU if there is
    one. `dtype`: "auto" keeps the checkpoint's. A directory is read without touching the network, and so is a
    hub id already in the local cache. Only safetensors weights are read unless `allow_pickle`; the
    repository's own code runs only if `trust_remote_code`. Attention stays what transformers chooses (SDPA).
    Without a tokenizer only lists of token ids can be recorded.

    Raises RequestError: no such directory or hub id, pickled weights, remote code, an unreadable checkpoint.
    """
    if not isinstance(source, str | Path):
        if not hasattr(source, "get_input_embeddings") or not hasattr(source, "config"):
            raise RequestError(
                f"model must be a directory, a hub id or a transformers PreTrainedModel, not {type(source).__name__}"
            )
        name = getattr(source.config, "_name_or_path", "") or type(source).__name__
        return Model(source, _load_tokenizer(tokenizer, {}), name)
    location = locate(source)
    options = {"revision": revision, "trust_remote_code": trust_remote_code, "local_files_only": location.local}
    module = _load_module(location, device, dtype, allow_pickle, options)
    if tokenizer is None:
        tokenizer = _own_tokenizer(location, options)
    return Model(module, _load_tokenizer(tokenizer, options), location.name, revision)


# ---- where a model is -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Location:
    """A local directory or a hub id; `local` when it can be read without the network."""

    path: str
    name: str
    local: bool


def locate(source: str | Path) -> Location:
    """Tells a directory from a hub id, quickly and without loading anything.

    Raises RequestError for a path that is not there, a directory that holds no model, and a hub id when the
    hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            inside = ", ".join(sorted(child.name for child in path.iterdir())[:5]) or "nothing"
            raise RequestError(
                f"model {str(source)!r} is a directory without config.json (it holds {inside}); "
                "give the folder that save_pretrained wrote"
            )
        return Location(str(path), path.resolve().name, local=True)
    text = str(source)
    if path.exists():
        raise RequestError(f"model {text!r} is a file; give the folder that holds config.json and model.safetensors")
    inside_folder = "/" in text and path.parent.is_dir()  # models/typo beside a folder models is no hub id
    if isinstance(source, Path) or not _HUB_ID.fullmatch(text) or text.startswith(".") or inside_folder:
        parent = next(folder for folder in path.absolute().parents if folder.is_dir())
        wanted = path.absolute().relative_to(parent).parts[0]
        close = nearest(wanted, (child.name for child in parent.iterdir() if child.is_dir()))
        raise RequestError(f"model {text!r}: no such directory ({parent.name}/ has no {wanted!r}{close})")
    return _locate_on_hub(text)


def _locate_on_hub(name: str) -> Location:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return Location(name, name, local=True)
    here = nearest(name, (child.name for child in Path.cwd().iterdir() if child.is_dir()))
    if HF_HUB_OFFLINE:
        raise RequestError(
            f"model {name!r} is no directory here, and not in the local hub cache (HF_HUB_OFFLINE is set){here}"
        )
    try:
        HfApi().model_info(name, timeout=1.5)
    except Exception as error:
        told = getattr(getattr(error, "response", None), "status_code", None)
        found = f"the hub answers {told}" if told else "the hub cannot be reached"
        raise RequestError(
            f"model {name!r} is no directory here, and {found}; check the name or give a path{here}"
        ) from error
    return Location(name, name, local=False)


# ---- loading --------------------------------------------------------------------------------------------


def _load_module(location: Location, device: Any, dtype: Any, allow_pickle: bool, options: dict) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    if location.local and not allow_pickle:
        _refuse_pickles(location)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    where = {"device_map": "auto"} if device == "auto" else {}
    with quietly():
        try:
            module = AutoModelForCausalLM.from_pretrained(
                location.path, dtype=dtype, use_safetensors=None if allow_pickle else True, **where, **options
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise RequestError(f"model {location.name!r} cannot be loaded: {_first_line(error)}") from error
    return module if where else module.to(device)


def _refuse_pickles(location: Location) -> None:
    path = Path(location.path)
    pickled = [name for name in _PICKLED if (path / name).exists()]
    if pickled and not list(path.glob("*.safetensors")):
        raise RequestError(
            f"model {location.name!r} has only pickled weights ({pickled[0]}), which can run code when read; "
            "convert them to safetensors or pass allow_pickle=True if you trust their author"
        )


def _own_tokenizer(location: Location, options: dict) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved beside the model; None where there is none."""
    folder = Path(location.path)
    if folder.is_dir() and not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
        return None
    return _load_tokenizer(location.path, options)


def _load_tokenizer(tokenizer: Any, options: dict) -> PreTrainedTokenizerBase | None:
    if tokenizer is None or not isinstance(tokenizer, str | Path):
        return tokenizer
    from transformers import AutoTokenizer

    with quietly():
        try:
            return AutoTokenizer.from_pretrained(str(tokenizer), **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise RequestError(f"tokenizer {str(tokenizer)!r} cannot be loaded: {_first_line(error)}") from error


@contextmanager
def quietly() -> Iterator[None]:
    """Inside, transformers shows no progress bars or advice: what matters is said by our own errors."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# ---- fingerprints ---------------------------------------------------------------------------------------


def _weights_fingerprint(module: PreTrainedModel) -> str:
    import torch

    digest = hashlib.sha256()
    saved = module.state_dict(keep_vars=True)
    seen: set[int] = set()
    for name, tensor in sorted(saved.items()):
        if not isinstance(tensor, torch.Tensor) or id(tensor) in seen:  # tied weights count once
            continue
        seen.add(id(tensor))
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data = tensor.detach().contiguous().flatten().view(torch.uint8)
        for piece in data.split(1 << 28):
            digest.update(piece.cpu().numpy())
    return digest.hexdigest()


def _without_batching(definition: str) -> str:
    """Padding and truncation are set by whoever calls a tokenizer last; they are no part of what it is."""
    parts = json.loads(definition)
    return json.dumps({**parts, "padding": None, "truncation": None}, sort_keys=True)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
