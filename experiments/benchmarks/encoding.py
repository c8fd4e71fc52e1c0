"""Encoding of rows into sparse features, against SAELens' `encode` made sparse and the matrix product alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from workbench.experiments.benchmarks.measure import Comparison, interleaved, peak_memory, per_second
from workbench.io.torch_state import fast_bfloat16
from workbench.sae.autoencoder import Sae
from workbench.sae.encode import encoder
from workbench.sae.load import load_sae


@dataclass(frozen=True)
class Encoding:
    """Random rows, encoder columns of norm 1; the jumprelu's threshold gives as many active features as the topk has.
    Without fast bfloat16, the product in that type is measured on 4 rows, and the targets, set for a CPU that has it,
    are out of reach: everything is computed in float32, no faster than that product.

    Tried for such CPUs and not kept: selection by products of whole numbers up to 90 (FBGEMM's int8; beyond that pairs
    of products saturate in 16 bits on AVX2), with the same bound. Its product takes 340 to 370 µs a row on one core
    where float32 takes 600, but its bounds are ten times as wide as bfloat16's: about 200 features for 32 must be
    computed again, 384 for all rows of a topk to be settled. In all 715 µs a row against 748 (topk, a fifth of the rows
    not settled); jumprelu, whose threshold is known, adds up to about 390 against 520. torch is giving up the types
    that it needs, and rows with a few far larger dimensions widen its bounds.
    """

    d_in: int = 768
    d_sae: int = 24_576
    k: int = 32
    rows: int = 1_024
    repeats: int = 5

    def run(self, folder: Path) -> list[Comparison]:
        """Times encoding against SAELens and against the matrix product alone."""
        comparisons = []
        for architecture in ("topk", "jumprelu"):
            sae, x = make_autoencoder(folder / architecture, architecture, self.d_in, self.d_sae, self.k, self.rows)
            weight, low, pre = sae.module.W_enc, sae.module.W_enc.bfloat16(), x.new_empty(self.rows, self.d_sae)
            few = x[: self.rows if fast_bfloat16(sae.device) else 4].bfloat16()
            ours, theirs = partial(encoder(sae), x), partial(sparse, sae, x)
            _check_same(ours(), theirs())
            speeds = interleaved(
                self.repeats,
                {
                    "workbench": per_second(self.rows, _synchronised(sae, ours)),
                    "reference": per_second(self.rows, _synchronised(sae, theirs)),
                    "float32": per_second(self.rows, _synchronised(sae, partial(torch.mm, x, weight, out=pre))),
                    "bfloat16": per_second(len(few), _synchronised(sae, partial(torch.mm, few, low))),
                },
            )
            cuda = sae.device.type == "cuda"
            target = 8.0 if cuda else 2.2 if architecture == "topk" else 3.0
            for side, name, least in (
                ("reference", "SAELens' encode, made sparse", target),
                ("float32", "the float32 product alone", None),
                ("bfloat16", "the bfloat16 product alone", 0.6 if cuda else 0.55),
            ):
                comparisons.append(
                    Comparison(architecture, name, speeds["workbench"], speeds[side], "rows/s", at_least=least)
                )
            if not cuda:
                shape = {"architecture": architecture, "d_in": self.d_in, "d_sae": self.d_sae, "k": self.k}
                rise, reference_rise = (
                    peak_memory(encoding, side=side, rows=self.rows, **shape).rise
                    for side in ("workbench", "reference")
                )
                subject = f"{architecture}, memory beyond the weights, {self.rows:,} rows"
                comparisons.append(
                    Comparison(subject, "SAELens' encode", (rise,), (reference_rise,), "MB", at_most=0.25)
                )
        return comparisons


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


def _check_same(ours: Any, theirs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    indptr, feature, value = theirs
    same_shape = len(value) == len(ours.value) and torch.equal(ours.indptr, indptr)
    differing = 1.0 if not same_shape else float((ours.feature != feature).float().mean())
    if differing > 1e-4:  # pre-activations closer than float32 resolves may rank either way
        raise RuntimeError(f"{differing:.1%} of the features are not SAELens'")


FULL = Encoding()
QUICK = Encoding(d_in=64, d_sae=512, k=8, rows=256, repeats=2)
