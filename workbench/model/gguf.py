"""GGUF files: models of llama.cpp, whose blocks of quantised numbers become plain weights when they are loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.io.errors import RequestError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SUFFIX = ".gguf"
_PART = re.compile(r"-(\d{5})-of-(\d{5})$")
_TOKENIZER = "tokenizer.ggml.model"


def the_file(folder: Path) -> str | None:
    """Returns the name of the only GGUF file of a folder; None if it has none.

    Raises:
        RequestError: It has several.
    """
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() == SUFFIX)
    if len(names) > 1:
        listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise RequestError(f"model {str(folder)!r} holds {len(names)} GGUF files ({listed}); name one of them")
    return names[0] if names else None


def check_file(path: Path) -> bool:
    """Checks that a GGUF file can be read as a model; returns True if it holds a tokenizer. Costs about 1 s.

    Raises:
        RequestError: The package gguf is missing, or the file is damaged, one part of several, or of an architecture
            that transformers does not read from GGUF.
    """
    if (part := _PART.search(path.stem)) and int(part[2]) > 1:
        raise RequestError(
            f"model {str(path)!r} is part {int(part[1])} of {int(part[2])} of a split GGUF file; "
            "join the parts with llama-gguf-split --merge, and give that file"
        )
    try:
        from gguf import GGUFReader
    except ImportError:
        raise RequestError(
            f"model {str(path)!r} is a GGUF file, which the package gguf reads: pip install 'interp-workbench[gguf]'"
        ) from None
    try:
        fields = GGUFReader(path).fields
        architecture = fields["general.architecture"].contents()
    except Exception as error:  # numpy's and struct's, wherever the bytes end
        raise RequestError(
            f"model {str(path)!r} is no GGUF file, or a damaged one ({first_line(error)}); fetch it again"
        ) from error
    _check_architecture(path, str(architecture))
    return _TOKENIZER in fields


def _check_architecture(path: Path, architecture: str) -> None:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    plain = {name.replace("_", "").replace("-", "") for name in GGUF_SUPPORTED_ARCHITECTURES}
    if architecture.replace("_", "").replace("-", "") not in plain:
        raise RequestError(
            f"model {str(path)!r} is of the architecture {architecture!r}, which transformers does not read from GGUF; "
            "give the folder of safetensors that it was made from"
        )


def weight_options(dtype: Any) -> Mapping[str, Any]:
    """Returns the arguments of `from_pretrained` that turn blocks of quantised numbers into plain weights.

    "auto" and "checkpoint" are float32, which holds each dequantised number exactly.
    """
    import transformers

    plain = {"dtype": "float32" if dtype in ("auto", "checkpoint") else dtype}
    config = getattr(transformers, "GgufConfig", None)  # older versions always dequantise
    return plain if config is None else plain | {"quantization_config": config(dequantize=True)}


def make_plain(module: PreTrainedModel) -> None:
    """Removes what the loading left in the config: the weights are plain ones now."""
    vars(module.config).pop("quantization_config", None)


def unread_names(unexpected: Iterable[str]) -> list[str]:
    """Returns the tensors of a GGUF file that the module does not use, without those that hold no weights."""
    return [name for name in unexpected if not name.endswith("rope_freqs.weight")]
