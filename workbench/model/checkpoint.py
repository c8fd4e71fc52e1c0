"""Loading of checkpoints: by which class, in which dtype, and what transformers says of it that changes the model."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from workbench.io.errors import RequestError, first_line
from workbench.io.log import PROGRESS
from workbench.io.torch_state import fast_bfloat16, usable_device
from workbench.model.gguf import make_plain, unread_names, weight_options
from workbench.model.location import Location
from workbench.model.module_names import auto_class
from workbench.model.preview import check_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_LOG = logging.getLogger(__name__)

_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_HARMLESS = re.compile(
    "deprecat|LOAD REPORT|fast path|naive|kernel|loss_type|allocator|[Gg]enerat|meta device|fast tokenizer|"
    "Special tokens have been added|legacy"
)
"""Warnings of transformers that change no activation: speed, generation, memory, the names of its arguments; and its
report of missing weights, which are refused here."""


def load_checkpoint(
    location: Location,
    device: str | torch.device | None,
    dtype: str | torch.dtype,
    allow_pickle: bool,
    options: Mapping[str, Any],
) -> PreTrainedModel:
    """Loads the module of a checkpoint; the arguments are those of `load_model`.

    Raises:
        RequestError: As `load_model`.
    """

    _check_dtype(dtype)
    check_config(location)
    where = {"device_map": "auto"} if device == "auto" else {}
    if not where:
        device = usable_device(device)
    if location.built:
        return _planted(device, dtype)
    if location.local and not location.file and not allow_pickle:
        _refuse_pickles(location)
    weights = weight_options(dtype) if location.file else {"dtype": "auto" if dtype == "checkpoint" else dtype}
    with quietly(f"model {location.name!r}"):
        try:
            loaded = auto_class(location, options).from_pretrained(
                location.path,
                use_safetensors=None if allow_pickle else True,
                ignore_mismatched_sizes=True,  # refused below, by name
                output_loading_info=True,
                **weights,
                **where,
                **options,
            )
        except Exception as error:  # config, hub, safetensors and pickle readers each raise their own kinds
            if not options["trust_remote_code"] and "trust_remote_code" in str(error):
                raise RequestError(
                    f"model {location.name!r} needs code from its repository, which is not run by default; "
                    "pass trust_remote_code=True if you trust its author"
                ) from error
            if "AutoModelForCausalLM" in str(error):  # transformers lists every class that would do
                raise RequestError(
                    f"model {location.name!r} cannot be loaded: transformers has no causal language model of its type"
                ) from error
            raise RequestError(f"model {location.name!r} cannot be loaded: {first_line(error)}") from error
    module, report = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    if location.file:
        make_plain(module)
        report = {**report, "unexpected_keys": unread_names(report["unexpected_keys"])}
    _refuse_without_tokens(location, module)
    _refuse_random(location, module, report)
    _warn_of_unused(location, module, report)
    if not where:
        module.to(device)  # pyright: ignore[reportArgumentType]  # transformers decorates it without types
    if dtype == "auto":
        _make_fast_on_cpu(location, module)
    return module


def _planted(device: str | torch.device | None, dtype: str | torch.dtype) -> PreTrainedModel:
    """The planted model, which code builds; "auto" is one device here."""
    import torch  # takes seconds

    from workbench.embedded.planted import planted_module
    from workbench.model.in_dtype import in_dtype

    module = planted_module()
    if dtype not in ("auto", "checkpoint"):
        in_dtype(module, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        module.config.dtype = module.dtype
    return module.to(usable_device(None if device == "auto" else device))  # pyright: ignore[reportArgumentType]  # transformers decorates it without types


def _make_fast_on_cpu(location: Location, module: PreTrainedModel) -> None:
    """Converts half precision that a CPU computes slowly, and in float16 with overflows, to float32."""
    import torch  # takes seconds

    saved, quantized = module.dtype, getattr(module, "hf_quantizer", None) is not None
    devices = {tensor.device.type for tensor in module.parameters()}
    fast = saved == torch.bfloat16 and fast_bfloat16(torch.device("cpu"))
    if devices != {"cpu"} or quantized or saved not in (torch.float16, torch.bfloat16) or fast:
        return
    module.float()
    module.config.dtype = torch.float32
    name = str(saved).removeprefix("torch.")
    reason = "overflows and is slow on a CPU" if saved == torch.float16 else "is slow on this CPU"
    PROGRESS.info(
        f"model {location.name!r} computes in float32: its checkpoint's {name} {reason}; dtype={name!r} keeps it"
    )


def _warn_of_unused(location: Location, module: PreTrainedModel, report: Mapping[str, Any]) -> None:
    unused = sorted(report["unexpected_keys"])
    if unused:
        _LOG.warning(
            f"model {location.name!r}: {len(unused)} tensors of its checkpoint have no place in "
            f"{type(module).__name__} and are not used: {', '.join(unused[:3])}{', ...' if len(unused) > 3 else ''}"
        )


def _check_dtype(dtype: str | torch.dtype) -> None:
    import torch  # takes seconds

    value = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype not in ("auto", "checkpoint") and not (isinstance(value, torch.dtype) and value.is_floating_point):
        raise RequestError(f"dtype must be auto, checkpoint, float32, bfloat16 or float16, not {str(dtype)!r}")


def _refuse_without_tokens(location: Location, module: PreTrainedModel) -> None:
    """Refuses a model of images or sounds: a checkpoint without a language-model head can be of any kind."""
    try:
        embedding = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = None
    if getattr(embedding, "weight", None) is None:
        raise RequestError(f"model {location.name!r} is no language model: {type(module).__name__} embeds no tokens")


def _refuse_random(location: Location, module: PreTrainedModel, report: Mapping[str, Any]) -> None:
    """Refuses a checkpoint that lacks weights: transformers would fill them with random numbers."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    misfits = {name: f" ({tuple(has)} there, {tuple(wants)} here)" for name, has, wants in report["mismatched_keys"]}
    misfits |= {name: "" for name in report["missing_keys"] if name in parameters}
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


# ---- what transformers says -----------------------------------------------------------------------------


@contextmanager
def quietly(subject: str = "transformers") -> Iterator[None]:
    """Hides progress bars and advice of transformers inside the block, and repeats its warnings as ours, in lines.

    Args:
        subject: What is loaded, for the warnings. Those that change no activation are left out.
    """
    from transformers.utils import logging as library  # takes seconds

    logger = logging.getLogger("transformers")
    bars, level, handlers, propagates = (
        library.is_progress_bar_enabled(),
        library.get_verbosity(),
        logger.handlers,
        logger.propagate,
    )
    heard = _Heard(logging.WARNING)
    library.disable_progress_bar()
    library.set_verbosity_warning()
    logger.handlers, logger.propagate = [heard], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagates
        library.set_verbosity(level)
        if bars:
            library.enable_progress_bar()
    for message in dict.fromkeys(heard.messages):
        _LOG.warning(f"{subject}: transformers warns: {message}")


class _Heard(logging.Handler):
    """Collects messages that say that a model or tokenizer may not be what was saved."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = " ".join(record.getMessage().split())
        if not _HARMLESS.search(message):
            self.messages.append(message if len(message) <= 300 else f"{message[:297]}...")
