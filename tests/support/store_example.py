"""Small stores for tests, with the NumPy arrays that they must return."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from workbench.io.files import sha256_bytes
from workbench.io.parse import to_json
from workbench.sites.settings import Recording
from workbench.store.manifest import ModelRecord, Part, SiteRecord, read_manifest, write_manifest
from workbench.store.writer import Writer, open_writer

MODEL = ModelRecord(
    name="demo",
    architecture="GPT2LMHeadModel",
    fingerprint="a1" * 32,
    config_fingerprint="b2" * 32,
    tokenizer_fingerprint="c3" * 32,
    dtype="float32",
    revision=None,
    n_layers=2,
    d_model=3,
    vocab=40,
    adapter=None,
    causal=True,
)
HALF = SiteRecord("blocks.0.hook_resid_post", "resid_post.0", ("row", "d_model"), (3,), "float16")
SINGLE = SiteRecord("blocks.1.hook_resid_post", "resid_post.1", ("row", "d_model"), (3,), "float32")
BRAIN = SiteRecord("blocks.1.attn.hook_pattern", "pattern.1", ("row", "head", "key"), (2, 4), "bfloat16")
SITES = (HALF, SINGLE, BRAIN)
WORDS = (" Monday", "it's", 'say "hi"', "a\0b", "🙂", "", "%", "日")
BITS = {"float16": np.uint16, "bfloat16": np.uint16, "float32": np.uint32}


def values(site: SiteRecord, first_row: int, rows: int) -> np.ndarray:
    """Finite activations that differ between sites, rows and columns; bfloat16 as its bits."""
    size = int(np.prod(site.shape))
    numbers = np.arange(first_row * size, (first_row + rows) * size, dtype=np.float32)
    numbers = ((numbers * 37 + len(site.name) * 11) % 251 - 125) / 8  # 8 bits: exact in bfloat16
    numbers = numbers.reshape(rows, *site.shape)
    return (numbers.view(np.uint32) >> 16).astype(np.uint16) if site.dtype == "bfloat16" else numbers.astype(site.dtype)


def as_numpy(tensor) -> np.ndarray:
    """Returns a tensor's values in the form of `values`."""
    import torch

    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def token_table(lengths: Sequence[int], first_row: int = 0, first_sequence: int = 0) -> pa.Table:
    """Returns the token table of sequences of these lengths, with a metadata column `source`."""
    rows = sum(lengths)
    row = np.arange(first_row, first_row + rows)
    sequence = np.repeat(np.arange(first_sequence, first_sequence + len(lengths)), lengths)
    position = np.concatenate([np.arange(n) for n in lengths]) if lengths else np.empty(0)
    ids = row * 7 % 40
    words = pa.array([WORDS[i % len(WORDS)] for i in ids], pa.string())
    offsets = [None if p == 0 else int(p) * 3 for p in position]
    return pa.table(
        {
            "row": row,
            "sequence": sequence,
            "position": pa.array(position, pa.int32()),
            "document": sequence // 2,
            "token_id": pa.array(ids, pa.int32()),
            "token": words.dictionary_encode(),
            "char_start": pa.array(offsets, pa.int32()),
            "char_end": pa.array(offsets, pa.int32()),
            "is_special": position == 0,
            "source": pa.array([("wiki", "web")[s % 2] for s in sequence], pa.string()).dictionary_encode(),
        }
    )


def part_of(segments: Sequence[Sequence[int]], documents: int = 1) -> Part:
    """Returns the part whose segments have sequences of these lengths."""
    return Part(sum(map(sum, segments)), sum(map(len, segments)), documents, 0, 0)


@contextmanager
def writing(path: Path, **changed) -> Iterator[Writer]:
    """Yields `open_writer` with the example's settings, some of them changed."""
    settings = {
        "model": MODEL,
        "sites": SITES,
        "recording": Recording(context=8, dtype="float16"),
        "tokens_added": {"prefix": [1], "suffix": []},
        "environment": {"torch": "2.13.0"},
        "unembed": None,
        "unembed_reason": "the model has none",
    }
    with open_writer(path, **{**settings, **changed}) as writer:
        yield writer


def write_segment(writer: Writer, lengths: Sequence[int]) -> None:
    """Commits the next segment, of sequences of these lengths; each site in two pieces, the last one first."""
    first_row, first_sequence = writer.manifest.rows, sum(segment.sequences for segment in writer.manifest.segments)
    rows, tokens = sum(lengths), token_table(lengths, first_row, first_sequence)
    with writer.segment(rows, len(lengths), digest(first_row, lengths), tokens) as segment:
        for site in writer.manifest.sites:
            stored, cut = values(site, first_row, rows), rows // 2
            segment.write(site.name, cut, stored[cut:])
            segment.write(site.name, 0, stored[:cut])


def digest(first_row: int, lengths: Sequence[int]) -> str:
    """Stands for the digest of a segment's token ids and lengths."""
    return sha256_bytes(repr((first_row, list(lengths))).encode())


def write_store(path: Path, segments: Sequence[Sequence[int]], *, append: bool = False, **changed) -> Path:
    """Records, resumes or appends a part with these segments; returns `path`."""
    with writing(path, **changed) as writer:
        committed = writer.begin(part_of(segments), append=append)
        first_row = writer.manifest.rows - sum(map(sum, segments[:committed]))
        for index, lengths in enumerate(segments[:committed]):
            writer.check(index, digest(first_row + sum(map(sum, segments[:index])), lengths))
        for lengths in segments[committed:]:
            write_segment(writer, lengths)
    return path


def contents(path: Path) -> dict[str, bytes]:
    """Returns the bytes of every file under `path` by relative name."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def seal(path: Path) -> None:
    """Records the present bytes of every file of a store, as if they had been written so."""
    manifest, segments = read_manifest(path), []
    for segment in manifest.segments:
        record = path / "segments" / segment.name / "segment.json"
        listed = json.loads(record.read_text())
        for name in listed["files"]:
            data = (record.parent / name).read_bytes()
            listed["files"][name] = {"bytes": len(data), "sha256": sha256_bytes(data)}
        record.write_text(to_json(listed))
        segments.append(replace(segment, checksum=sha256_bytes(record.read_bytes())))
    unembed = path / "unembed.safetensors"
    checksum = sha256_bytes(unembed.read_bytes()) if unembed.exists() else None
    write_manifest(path, replace(manifest, segments=tuple(segments), unembed=checksum))
