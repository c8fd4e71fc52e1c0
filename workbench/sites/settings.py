"""Settings of a recording: one frozen record, which the API, the CLI and the manifest share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, get_args

from workbench.io.checks import check, check_fields, check_types
from workbench.io.errors import RequestError, shown

if TYPE_CHECKING:
    import torch

Dtype = Literal["float16", "bfloat16", "float32"]
BosPolicy = Literal["model", "always", "never"]
UnalignedPairs = Literal["refuse", "drop", "keep"]
Position = int | Literal["last"]


@dataclass(frozen=True)
class Recording:
    """Settings of a recording. Together with the model and the texts they determine every byte of the store."""

    sites: tuple[str, ...] | None = None
    """Sites to record: `resid_post`, `resid_post.3`, `resid_post.0:8:2`, TransformerLens names, globs. None:
    resid_post, or no site at all where features of an SAE are extracted while recording."""
    context: int | None = None
    """Longest sequence in tokens, BOS included. None: 256, or the model's limit where that is smaller."""
    dtype: Dtype = "float16"
    """Stored type of every activation. Values beyond its range are stored as its largest and counted."""
    bos: BosPolicy = "model"
    """When sequences begin with BOS: as the tokenizer does by itself, always, or never."""
    packed: bool = False
    """Fill each sequence with consecutive documents instead of giving each document its own sequences."""
    max_rows: int | None = None
    """Stop after this many tokens; the last sequence is cut to fit. None: all of the texts."""
    text_column: str = "text"
    """Column that holds the text, in files and datasets with columns."""
    metadata: tuple[str, ...] | None = None
    """Columns kept for each token. None: all but the text and the spans; (): none."""
    span_column: str | None = "spans"
    """Column with labelled spans of the text, if there is one: each label becomes two columns of the token table.
    None: read no spans."""
    generation_prompt: bool = False
    """End each chat with the header of the assistant's next message, as for generation."""
    unaligned_pairs: UnalignedPairs = "refuse"
    """Treatment of a (clean, corrupt) pair whose sides have different numbers of tokens: refuse the texts, drop the
    pair with a warning, or keep it."""
    where: str | None = None
    """Rows to store, as an SQL condition over the token table: `is_last`, `token = ' Monday'`. The model sees all
    tokens. None: all rows."""
    keep: tuple[Position, ...] | None = None
    """Positions to store: 0 is the first token of a sequence, -1 or `last` the last one. Beside `where`, both must
    hold. None: all positions."""
    batch_tokens: int | None = None
    """Tokens in one forward pass, padding included. None: on a CPU 2,048, and up to 8,192 for models narrower than
    768; on a GPU 16,384."""
    segment_rows: int | None = None
    """Rows committed at a time. None: as many as make about 256 MiB, at most 65,536."""
    unembed: bool = True
    """Store the final norm and the unembedding, which lenses need, and the embedding and the tokenizer, which probes of
    weights need: vocabulary x d_model values for each table, kept once for all stores of the model in one folder."""

    def __post_init__(self) -> None:
        check_types(self)
        check_fields(self, "context", "max_rows", "batch_tokens", "segment_rows", at_least=1, optional=True)
        _check_choices({"dtype": self.dtype, "bos": self.bos, "unaligned_pairs": self.unaligned_pairs})
        for name, columns in (("text_column", (self.text_column,)), ("metadata", self.metadata or ())):
            if self.span_column in columns:
                raise RequestError(
                    f"{name} names {self.span_column!r}, which is the column of spans; name another in span_column=, "
                    "or pass span_column=None to read no spans"
                )
        object.__setattr__(self, "keep", _positions(self.keep))
        if self.where is not None and not self.where.strip():
            raise RequestError("where is empty; give an SQL condition, for example \"token = ' Monday'\"")
        if self.sites is not None and not self.sites:
            raise RequestError("sites is empty; name at least one, for example resid_post")


class RecordingOptions(TypedDict, total=False):
    """The fields of `Recording` as keyword arguments, in the types that a caller may write."""

    sites: Sequence[str] | str | None
    context: int | None
    dtype: str | torch.dtype
    bos: str
    packed: bool
    max_rows: int | None
    text_column: str
    metadata: Sequence[str] | str | None
    span_column: str | None
    generation_prompt: bool
    unaligned_pairs: str
    where: str | None
    keep: Sequence[int | str] | int | str | None
    batch_tokens: int | None
    segment_rows: int | None
    unembed: bool


def recording(settings: Recording | None = None, **options: Unpack[RecordingOptions]) -> Recording:
    """Returns the settings of a recording: those of `settings`, by default the defaults, with `options` in their place.

    Args:
        settings: Settings to begin with.
        options: Fields of `Recording`; one name stands for a sequence of one, a torch dtype for its name.

    Raises:
        RequestError: A value that is out of range or none of the choices.
    """
    fields: dict[str, Any] = dict(options)
    for name in ("sites", "metadata"):
        if name in fields:
            fields[name] = _names(name, fields[name])
    if "keep" in fields:
        fields["keep"] = _positions(fields["keep"])
    if "dtype" in fields:
        fields["dtype"] = str(fields["dtype"]).removeprefix("torch.")
    _check_choices(fields)
    return replace(settings or Recording(), **fields)


def _names(argument: str, names: Sequence[str] | str | None) -> tuple[str, ...] | None:
    all_names = (names,) if isinstance(names, str) else None if names is None else tuple(names)
    for name in all_names or ():
        if not isinstance(name, str):
            example = "resid_post.3" if argument == "sites" else "domain"
            raise RequestError(f"{argument} must be names, such as {example}, not {shown(name)}")
    return all_names


def _positions(keep: Any) -> tuple[Position, ...] | None:
    """Positions, or a single one, as whole numbers; the last one is -1."""
    if keep is None:
        return None
    several = isinstance(keep, Iterable) and not isinstance(keep, str)
    positions = [-1 if position == "last" else position for position in (keep if several else (keep,))]
    whole = [int(place) for place in positions if isinstance(place, Integral) and not isinstance(place, bool)]
    if not whole or len(whole) < len(positions):
        raise RequestError(f"keep must be 'last' or positions, such as [0, -1], not {shown(keep)}")
    return tuple(whole)


def _check_choices(fields: Mapping[str, Any]) -> None:
    types = (("dtype", Dtype), ("bos", BosPolicy), ("unaligned_pairs", UnalignedPairs))
    for name, choices in ((name, get_args(kind)) for name, kind in types):
        if name in fields:
            check(name, fields[name], one_of=choices)
