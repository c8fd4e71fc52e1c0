"""Models: an unmodified Hugging Face causal LM, its tokenizer, and the map of its sites."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workbench import embedded
from workbench.io.errors import RequestError, nearest
from workbench.sites.grammar import SiteMap

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
_HUB_ID = re.compile(r"(?=.{1,96}$)(?!.*(?:--|\.\.))\w(?:[\w.-]*\w)?(?:/\w(?:[\w.-]*\w)?)?", re.ASCII)
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_MARKS = {
    "model": ("config.json",),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json"),
}
"""Files one of which a directory must hold to be a model, or a tokenizer."""


@dataclass(frozen=True)
class Loading:
    """What `load_model` was asked for, device aside: another process can load the same model with it."""

    source: str | Path
    tokenizer: str | Path | PreTrainedTokenizerBase | None
    dtype: str | torch.dtype
    revision: str | None
    trust_remote_code: bool
    allow_pickle: bool

    def load(self, device: str | torch.device | None) -> Model:
        """The model, on that device."""
        return load_model(**{field.name: getattr(self, field.name) for field in fields(self)}, device=device)


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
    loading: Loading | None = None
    """How `load_model` came by it; None: the module was given."""

    @cached_property
    def site_map(self) -> SiteMap:
        """Every recordable site with its shape. Costs one forward pass over 2 x 7 tokens, once."""
        from workbench.model.discovery import find_sites

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
        Raises RequestError for an architecture TransformerLens has no adapter for.
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
            raise RequestError(f"model {self.name!r} gets no TransformerBridge: {_first_line(error)}") from error

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
    """Loads a causal LM from a local directory or a hub id, or takes a Hugging Face module as it is.

    `"demo"` is the model that ships with the package.

    `device`: "cpu", "cuda:1", ...; "auto" spreads a large model over all devices; None: the GPU if there is
    one. `dtype`: "auto" keeps the checkpoint's. A directory is read without touching the network, and so is a
    hub id already in the local cache. Only safetensors weights are read unless `allow_pickle`; the
    repository's own code runs only if `trust_remote_code`. Attention stays what transformers chooses (SDPA).
    Without a tokenizer only lists of token ids can be recorded.

    Raises RequestError: no such directory or hub id, pickled weights, remote code, an unreadable checkpoint or
    one that lacks some of the model's weights, a device that cannot be used.
    """
    if not isinstance(source, str | Path):
        if not hasattr(source, "get_input_embeddings") or not hasattr(source, "config"):
            raise RequestError(
                f"model must be a directory, a hub id or a transformers PreTrainedModel, not {type(source).__name__}"
            )
        for name, value in (("device", device), ("dtype", dtype), ("revision", revision)):
            if value not in (None, "auto"):
                raise RequestError(f"{name}={value!r} is for a model that is loaded; a module stays as it is given")
        source = getattr(source, "_orig_mod", source)  # torch.compile's wrapper: hooks would break its graphs anyway
        return Model(source, _given_tokenizer(tokenizer, trust_remote_code), _module_name(source))
    location = locate(source, revision)
    if revision is not None and not location.hub:
        raise RequestError(f"revision={revision!r} is for a hub id; the directory {str(source)!r} is what it is")
    options = {"revision": revision, "trust_remote_code": trust_remote_code, "local_files_only": location.local}
    module = _load_module(location, device, dtype, allow_pickle, options)
    loading = Loading(source, tokenizer, dtype, revision, trust_remote_code, allow_pickle)
    own = _own_tokenizer(location, options) if tokenizer is None else _given_tokenizer(tokenizer, trust_remote_code)
    return Model(module, own, location.name, revision, loading)


def batch_tokens(model: Model) -> int:
    """On a CPU as many tokens as its caches hold the activations of, measured at 768 x 2,048; a GPU wants more."""
    return max(2048, min(8192, 768 * 2048 // model.d_model)) if model.device.type == "cpu" else 16_384


def usable_device(device: str | torch.device) -> torch.device:
    """The device of that name. Raises RequestError where it is unknown or cannot be used on this machine."""
    import torch

    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises each of them
        raise RequestError(f"device {str(device)!r} cannot be used here: {_first_line(error)}") from error


# ---- where a model is -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Location:
    """Where a model or tokenizer is: in a directory, which may be the hub's cache of it, or on the hub."""

    path: str
    """Directory, or hub id where it is yet to be fetched."""
    name: str
    local: bool
    """Whether it is read without the network."""
    hub: bool
    """Whether `name` is a hub id."""


def locate(source: str | Path, revision: str | None = None, kind: Literal["model", "tokenizer"] = "model") -> Location:
    """Tells a directory from a hub id, quickly and without loading anything; "demo" is the embedded model's.

    Raises RequestError for a path that is not there, a directory that holds no `kind`, and a hub id when the
    hub cannot be reached.
    """
    text = str(source)
    path = Path(text).expanduser()
    marks = _MARKS[kind]
    if not text:
        raise RequestError(f"{kind} is an empty string; give a directory or a hub id")
    if text == embedded.NAME:
        return Location(str(embedded.MODEL), text, local=True, hub=False)
    if os.path.isdir(path):
        if not any((path / name).is_file() for name in marks):
            inside = ", ".join(sorted(os.listdir(path))[:5]) or "nothing"
            raise RequestError(
                f"{kind} {text!r} is a directory without {marks[0]} (it holds {inside}); "
                "give the folder that save_pretrained wrote"
            )
        return Location(str(path), path.resolve().name, local=True, hub=False)
    if os.path.exists(path):
        raise RequestError(f"{kind} {text!r} is a file; give the folder that holds {marks[0]}")
    inside_folder = "/" in text and os.path.isdir(path.parent)  # models/typo beside a folder models is no hub id
    if isinstance(source, Path) or not _HUB_ID.fullmatch(text) or inside_folder:
        parent = next(folder for folder in path.absolute().parents if os.path.isdir(folder))
        wanted = path.absolute().relative_to(parent).parts[0]
        close = nearest(wanted, folders(parent))
        raise RequestError(f"{kind} {text!r}: no such directory ({parent.name}/ has no {wanted!r}{close})")
    return _locate_on_hub(text, revision, kind)


def _locate_on_hub(name: str, revision: str | None, kind: str) -> Location:
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    snapshot = _snapshot(name, revision, kind)
    if snapshot is not None:
        return Location(str(snapshot), name, local=True, hub=True)
    here = nearest(name, folders(Path.cwd()))
    if HF_HUB_OFFLINE:
        raise RequestError(
            f"{kind} {name!r} is no directory here, and not in the local hub cache (HF_HUB_OFFLINE is set){here}"
        )
    try:
        HfApi().model_info(name, revision=revision, timeout=1.5)
    except Exception as error:
        told = getattr(getattr(error, "response", None), "status_code", None)
        found = f"the hub answers {told}" if told else "the hub cannot be reached"
        raise RequestError(
            f"{kind} {name!r} is no directory here, and {found}; check the name or give a path{here}"
        ) from error
    return Location(name, name, local=False, hub=True)


def _snapshot(name: str, revision: str | None, kind: str) -> Path | None:
    """The folder in the hub's cache that holds all of it: a config alone is there after AutoConfig, and a download
    may have stopped between two parts of the weights."""
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(name, mark, revision=revision) for mark in _MARKS[kind])
    folder = next((Path(path).parent for path in found if isinstance(path, str)), None)
    if folder is None or kind == "tokenizer":
        return folder
    parts = {
        part for index in folder.glob("*.index.json") for part in json.loads(index.read_text())["weight_map"].values()
    }
    whole = all((folder / part).is_file() for part in parts)
    return folder if whole and (parts or any((folder / weights).is_file() for weights in _WEIGHTS)) else None


def folders(parent: Path) -> list[str]:
    """Names of the folders in `parent` that a user may have meant."""
    children = os.scandir(parent) if os.access(parent, os.R_OK) else ()
    return [child.name for child in children if child.is_dir() and not child.name.startswith(".")]


# ---- loading --------------------------------------------------------------------------------------------


def _load_module(location: Location, device: Any, dtype: Any, allow_pickle: bool, options: dict) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    _check_dtype(dtype)
    where = {"device_map": "auto"} if device == "auto" else {}
    if not where:
        device = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if location.local and not allow_pickle:
        _refuse_pickles(location)
    with quietly():
        try:
            module, found = AutoModelForCausalLM.from_pretrained(
                location.path,
                dtype=dtype,
                use_safetensors=None if allow_pickle else True,
                ignore_mismatched_sizes=True,  # refused below, by name
                output_loading_info=True,
                **where,
                **options,
            )
        except Exception as error:  # config, hub, safetensors and pickle readers each raise their own kinds
            if not options["trust_remote_code"] and "trust_remote_code" in str(error):
                raise RequestError(
                    f"model {location.name!r} needs code of its own repository, which is not run unasked; "
                    "pass trust_remote_code=True if you trust its author"
                ) from error
            raise RequestError(f"model {location.name!r} cannot be loaded: {_first_line(error)}") from error
    _refuse_random(location, module, found)
    return module if where else module.to(device)


def _check_dtype(dtype: Any) -> None:
    import torch

    known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not (isinstance(known, torch.dtype) and known.is_floating_point):
        raise RequestError(f"dtype must be auto, float32, bfloat16 or float16, not {str(dtype)!r}")


def _refuse_random(location: Location, module: PreTrainedModel, found: dict) -> None:
    """transformers fills what a checkpoint lacks with random numbers, and says so in a log that nobody reads."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    misfits = {name: f" ({tuple(has)} there, {tuple(wants)} here)" for name, has, wants in found["mismatched_keys"]}
    misfits |= {name: "" for name in found["missing_keys"] if name in parameters}
    if misfits:
        first = min(misfits)
        raise RequestError(
            f"model {location.name!r}: its checkpoint does not fit its config.json, {len(misfits)} of "
            f"{len(parameters)} weights are missing or of another shape: {first}{misfits[first]}, ..."
        )


def _refuse_pickles(location: Location) -> None:
    path = Path(location.path)
    pickled = [name for name in _PICKLED if (path / name).exists()]
    if pickled and not list(path.glob("*.safetensors")):
        raise RequestError(
            f"model {location.name!r} has only pickled weights ({pickled[0]}), which can run code when read; "
            "convert them to safetensors or pass allow_pickle=True if you trust their author"
        )


def _own_tokenizer(location: Location, options: dict) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved beside the model; None where a directory has none."""
    folder = Path(location.path)
    if location.local and not any(folder.glob("*token*")) and not any(folder.glob("vocab*")):
        if not location.hub:
            return None
        location = locate(location.name, options["revision"], "tokenizer")  # of this the cache had the weights only
        options = options | {"local_files_only": location.local}
    return _load_tokenizer(location.path, options)


def _given_tokenizer(tokenizer: Any, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """Another tokenizer than the model's: its place and revision have nothing to do with the model's."""
    if tokenizer is None or hasattr(tokenizer, "convert_ids_to_tokens"):
        return tokenizer
    if not isinstance(tokenizer, str | Path):
        raise RequestError(
            f"tokenizer must be a directory, a hub id or a transformers tokenizer, not {type(tokenizer).__name__}"
        )
    location = locate(tokenizer, kind="tokenizer")
    return _load_tokenizer(location.path, {"trust_remote_code": trust_remote_code, "local_files_only": location.local})


def _load_tokenizer(path: str, options: dict) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with quietly():
        try:
            return AutoTokenizer.from_pretrained(path, **options)
        except Exception as error:  # as above: each reader raises its own kinds
            raise RequestError(f"tokenizer {path!r} cannot be loaded: {_first_line(error)}") from error


def _module_name(module: PreTrainedModel) -> str:
    """What a module calls itself: a hub id, or the name, not the path, of the directory it came from."""
    name = getattr(module.config, "_name_or_path", "") or type(module).__name__
    return Path(name).resolve().name if os.path.isdir(name) or os.path.isabs(name) else name


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
