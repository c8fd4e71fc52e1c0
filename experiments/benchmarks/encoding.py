"""Encoding of rows into sparse features, against SAELens' `encode` made sparse and the matrix product alone."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import workbench as wb
from workbench.experiments.benchmarks.measure import Comparison, paired_until, peak_memory, per_second
from workbench.experiments.benchmarks.random_store import random_store
from workbench.io.torch_state import fast_bfloat16
from workbench.sae.autoencoder import Sae
from workbench.sae.encode import encoder
from workbench.sae.load import load_sae
from workbench.store.manifest import SiteRecord

_SITE = "blocks.0.hook_resid_post"

Work = Callable[[], Any]


@dataclass(frozen=True)
class Encoding:
    """Random rows, encoder columns of norm 1; the jumprelu's threshold gives as many active features as the topk has.
    Products use `threads` threads. Rates are rows per second of processor time, all threads, so that other work on the
    machine counts less (on a GPU: per second on the clock); each side runs beside its reference in turn, until the 95 %
    interval of the median ratio is `width` of it wide, extractions `extractions` times. An extraction prepares the
    encoder, reads stored float16 rows, encodes, writes segments, merges and indexes; SAELens reads the first 2,048 of
    the same rows in blocks of 1,024, and its features stay in memory.
    Without fast bfloat16, the product in that type is measured on 4 rows, and its targets are out of reach: everything
    is computed in float32, no faster than that product. ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 limits torch
    to what such a CPU has.

    Tried for such CPUs and not kept: selection by products of whole numbers up to 90 (FBGEMM's int8; beyond that pairs
    of products saturate in 16 bits on AVX2), with the same bound. Its product takes 340 to 370 µs a row on one core
    where float32 takes 600, but its bounds are ten times as wide as bfloat16's: about 200 features for 32 must be
    computed again, 384 for all rows of a topk to be settled. torch is giving up the types that it needs, and rows with
    a few far larger dimensions widen its bounds.
    """

    d_in: tuple[int, ...] = (768, 2304, 4096, 576)
    d_sae: tuple[int, ...] = (24_576, 16_384, 16_384, 49_152)
    k: tuple[int, ...] = (32, 32, 64, 32)
    rows: int = 1_024
    stored_rows: int = 16_384
    threads: int = 1
    width: float = 0.08
    repeats: int = 15
    extractions: int = 3

    def run(self, folder: Path) -> list[Comparison]:
        """Times encoding against SAELens and against products alone, in memory and from a store."""
        comparisons = []
        for shape in zip(self.d_in, self.d_sae, self.k, strict=True):
            for architecture in ("topk", "jumprelu"):
                sae, x = make_autoencoder(folder / architecture, architecture, *shape, self.rows)
                subject = f"{architecture} {shape[0]:,} to {shape[1]:,}"
                with _threads(self.threads):
                    comparisons += self._in_memory(subject, sae, x)
                    comparisons.append(self._from_a_store(subject, folder, sae))
                if architecture == "topk" and shape[0] == self.d_in[0] and sae.device.type == "cpu":
                    comparisons.append(self._memory(architecture, shape))
        return comparisons

    def _in_memory(self, subject: str, sae: Sae, x: torch.Tensor) -> list[Comparison]:
        fast, cuda = fast_bfloat16(sae.device), sae.device.type == "cuda"
        weight, low, pre = sae.module.W_enc, sae.module.W_enc.bfloat16(), x.new_empty(self.rows, sae.d_sae)
        few = x[: self.rows if fast else 4].bfloat16()
        encode, reference = partial(encoder(sae), x), partial(sparse, sae, x)
        float32 = partial(encoder(sae, precision="float32"), x)
        _check_equal(encode(), reference())
        narrow = 0.7 if sae.d_sae > 20_000 else 0.55
        lines: tuple[tuple[str, Work, Work, int, float | None], ...] = (
            ("SAELens' encode, made sparse", encode, reference, self.rows, 8.0 if cuda else 1.3),
            (
                "the bfloat16 product alone",
                encode,
                partial(torch.mm, few, low),
                len(few),
                0.6 if cuda else narrow if fast else None,
            ),
            (
                "float32 path, the float32 product alone",
                float32,
                partial(torch.mm, x, weight, out=pre),
                self.rows,
                None if cuda else 0.85,
            ),
        )
        return [
            self._paired(subject, name, sae, (work, self.rows), (baseline, rows), least, self.repeats)
            for name, work, baseline, rows, least in lines
        ]

    def _paired(
        self,
        subject: str,
        name: str,
        sae: Sae,
        first: tuple[Work, int],
        second: tuple[Work, int],
        least: float | None,
        most: int,
    ) -> Comparison:
        """Compares two works, each with its number of rows, in at most this many turns."""
        clock = time.perf_counter if sae.device.type == "cuda" else time.process_time
        sides = [per_second(rows, _synchronised(sae, work), clock) for work, rows in (first, second)]
        for side in sides:
            side()  # the first call prepares
        pairs = paired_until(self.width, most, *sides)
        return Comparison(subject, name, *pairs, "rows/s", at_least=least, paired=True)

    def _from_a_store(self, subject: str, folder: Path, sae: Sae) -> Comparison:
        path = folder / "rows.acts"
        with tempfile.TemporaryDirectory(dir=folder) as out:
            store = _row_store(path, self.stored_rows, sae.d_in)
            rows, parts, few = store[_SITE], [], min(self.stored_rows, 2048)

            def extract() -> None:
                target = Path(out) / "features"
                shutil.rmtree(target, ignore_errors=True)
                wb.extract_features(store, sae, _SITE, out=target, force=True, show_progress=False)

            def encode_part() -> None:
                parts.clear()
                for first in range(0, few, 1024):
                    parts.append(sparse(sae, rows[first : first + 1024].to(sae.device).float()))

            least = 8.0 if sae.device.type == "cuda" else 1.3
            works, name = ((extract, self.stored_rows), (encode_part, few)), f"{subject}, whole extraction"
            line = self._paired(name, "SAELens' encode", sae, *works, least, self.extractions)
        shutil.rmtree(path)
        return line

    def _memory(self, architecture: str, shape: tuple[int, int, int]) -> Comparison:
        sizes = {"architecture": architecture, "d_in": shape[0], "d_sae": shape[1], "k": shape[2], "rows": self.rows}
        rise, reference_rise = (peak_memory(encoding, side=side, **sizes).rise for side in ("workbench", "reference"))
        subject = f"{architecture}, memory beyond the weights, {self.rows:,} rows"
        return Comparison(subject, "SAELens' encode", (rise,), (reference_rise,), "MB", at_most=0.25)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _row_store(path: Path, rows: int, d_in: int) -> wb.Store:
    """Writes a store of random float16 rows at one site."""
    site, random = SiteRecord(_SITE, "resid_post.0", ("row", "d_model"), (d_in,), "float16"), np.random.default_rng(0)

    def draw(_: SiteRecord, size: int) -> np.ndarray:
        return random.normal(size=(size, d_in)).astype(np.float16)

    return random_store(path, rows, [site], draw, block=1024)


def make_autoencoder(
    folder: Path,
    architecture: str,
    d_in: int,
    d_sae: int,
    k: int,
    rows: int,
    device: torch.device | None = None,
) -> tuple[Sae, torch.Tensor]:
    """Returns an autoencoder, saved and loaded, and random rows on its device. None: the GPU if there is one."""
    from sae_lens.registry import get_sae_class

    kind, config = get_sae_class(architecture)
    torch.manual_seed(0)
    options: dict[str, Any] = {"k": k} if architecture == "topk" else {}
    module = kind(config(d_in=d_in, d_sae=d_sae, **options))
    weight = torch.randn(d_in, d_sae)
    module.W_enc.data = weight / weight.norm(dim=0)
    if architecture == "jumprelu":
        threshold = float(torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - k / d_sae)))
        module.get_parameter("threshold").data.fill_(threshold)
    module.save_model(folder)
    sae = load_sae(folder, device=device)
    return sae, torch.randn(rows, d_in).to(sae.device)


def sparse(sae: Sae, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns SAELens' activations as row pointers, features and values."""
    with torch.no_grad():
        activations = sae.module.encode(x)
        row, feature = activations.nonzero().unbind(1)
        indptr = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
        torch.cumsum(torch.bincount(row, minlength=len(x)), 0, out=indptr[1:])
        return indptr, feature, activations[row, feature]


def encoding(side: str, architecture: str, d_in: int, d_sae: int, k: int, rows: int) -> Callable[[], Any]:
    """Returns the work of one side, for `peak_memory`."""
    with tempfile.TemporaryDirectory() as folder:
        sae, x = make_autoencoder(Path(folder), architecture, d_in, d_sae, k, rows)
    work = partial(encoder(sae), x) if side == "workbench" else partial(sparse, sae, x)
    if side == "workbench":
        encoder(sae)(x[:64])
    else:
        sparse(sae, x[:64])
    return work


def _synchronised(sae: Sae, work: Callable[[], Any]) -> Callable[[], Any]:
    """Returns the work with a wait for the accelerator."""

    def synchronised() -> None:
        work()
        if sae.device.type == "cuda":
            torch.cuda.synchronize(sae.device)

    return synchronised


def _check_equal(entries: Any, reference: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    keys = _keys(*reference[:2])
    differing = len(np.setxor1d(_keys(entries.indptr, entries.feature), keys)) / max(1, len(keys))
    if differing > 1e-4:  # pre-activations closer than float32 resolves may lie on either side
        raise RuntimeError(f"{differing:.1%} of the features are not SAELens'")


def _keys(indptr: torch.Tensor, feature: torch.Tensor) -> np.ndarray:
    """One number for each pair of row and feature."""
    row = torch.repeat_interleave(torch.arange(len(indptr) - 1, device=indptr.device), indptr.diff())
    return (row * (1 << 32) + feature).cpu().numpy()


FULL = Encoding()
QUICK = Encoding(d_in=(64,), d_sae=(512,), k=(8,), rows=256, stored_rows=512, repeats=1, extractions=1)
