"""What a recording was asked to be: one frozen record, read by the API, the CLI and the manifest alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from workbench.io.errors import RequestError

Dtype = Literal["float16", "bfloat16", "float32"]
BosPolicy = Literal["model", "always", "never"]


@dataclass(frozen=True)
class Recording:
    """Settings of a recording. Together with the model and the texts they fix every byte of the store."""

    sites: tuple[str, ...] | None = None
    """Sites to record: `resid_post`, `resid_post.3`, `resid_post.0:8:2`, TransformerLens names, globs. None:
    resid_post; where an SAE's features are extracted, none."""
    context: int | None = None
    """Longest sequence in tokens, BOS included. None: 256, or the model's limit where that is smaller."""
    dtype: Dtype = "float16"
    """Stored type of every activation. Values beyond its range are stored as its largest and counted."""
    bos: BosPolicy = "model"
    """Whether sequences begin with BOS: as the tokenizer does by itself, always, or never."""
    packed: bool = False
    """Fill each sequence with consecutive documents instead of giving each document its own sequences."""
    max_rows: int | None = None
    """Stop after this many tokens; the last sequence is cut to fit. None: all of the texts."""
    text_column: str = "text"
    """Column that holds the text, in files and datasets with columns."""
    metadata: tuple[str, ...] | None = None
    """Columns kept beside each token. None: all but the text and the spans; (): none."""
    span_column: str | None = "spans"
    """Column with labelled spans of the text, where there is one: each label becomes two columns beside each token.
    None: read no spans."""
    batch_tokens: int | None = None
    """Tokens in one forward pass, padding included. None: on a CPU 2,048, and up to 8,192 for models narrower than
    768; on a GPU 16,384."""
    segment_rows: int | None = None
    """Rows committed at a time. None: as many as make about 256 MiB, at most 65,536."""

    def __post_init__(self) -> None:
        for name in ("context", "max_rows", "batch_tokens", "segment_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name} must be at least 1, not {value}")
        for name, columns in (("text_column", (self.text_column,)), ("metadata", self.metadata or ())):
            if self.span_column in columns:
                raise RequestError(
                    f"{name} names {self.span_column!r}, which is the column of spans; name another in span_column=, "
                    "or pass span_column=None (--span-column None) to read no spans"
                )
        if self.sites is not None and not self.sites:
            raise RequestError("sites is empty; name at least one, for example resid_post")


def recording(*, sites: Any, metadata: Any, dtype: Any, bos: Any, **others: Any) -> Recording:
    """A `Recording` from what a caller may write: one name or any sequence of names, a torch dtype.

    Raises RequestError for a choice there is not.
    """
    asked = {"dtype": str(dtype).removeprefix("torch."), "bos": bos}
    for name, choices in (("dtype", get_args(Dtype)), ("bos", get_args(BosPolicy))):
        if asked[name] not in choices:
            raise RequestError(f"{name} must be one of {', '.join(choices)}, not {asked[name]!r}")
    return Recording(sites=_names(sites), metadata=_names(metadata), **asked, **others)


def _names(names: Any) -> tuple[str, ...] | None:
    return (names,) if isinstance(names, str) else None if names is None else tuple(names)
