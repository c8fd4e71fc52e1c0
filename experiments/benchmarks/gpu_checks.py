"""Numbers of a device against float64 and against the CPU: encoding of every architecture, bounds, a whole study."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import workbench as wb
from workbench.experiments.benchmarks.measure import Comparison
from workbench.sae.autoencoder import Sae
from workbench.sae.choice import Linear, TopK, linear_form
from workbench.sae.encode import encoder
from workbench.sae.half_screen import make_half_screen
from workbench.sae.load import load_sae
from workbench.sae.precision import full_precision
from workbench.sae.screen import make_screen

ARCHITECTURES = (
    "standard",
    "gated",
    "topk",
    "abstopk",
    "jumprelu",
    "transcoder",
    "jumprelu_transcoder",
    "matching_pursuit",
    "temporal",
)
"""Architectures that are encoded; batchtopk and matryoshka autoencoders are saved as jumprelu."""
_K = 16


def exactness(
    folder: Path, device: torch.device, rows: int, architectures: Sequence[str] = ARCHITECTURES
) -> list[Comparison]:
    """Counts entries that differ from SAELens' `encode` in float64 by more than rounding explains."""
    comparisons = []
    for architecture in architectures:
        sae = load_sae(_save(folder / architecture, architecture), device=device)
        x = torch.randn(rows, sae.d_in, generator=torch.Generator().manual_seed(1))
        expected, doubtful = _encode64(sae, x), _doubtful(sae, x)
        precisions = ("float32", "bfloat16") if linear_form(sae, replaced=False) else (None,)
        for precision in precisions:
            encoded = encoder(sae, precision=precision)(x.to(device))
            values = torch.zeros(expected.shape, dtype=torch.float64)
            counts = encoded.indptr.diff().cpu()
            row = torch.repeat_interleave(torch.arange(rows), counts)
            values[row, encoded.feature.cpu()] = encoded.value.cpu().double()
            wrong = (values - expected).abs() > 1e-4 * expected.abs().max()
            wrong |= (values != 0) != (expected != 0)
            count = float((wrong & ~doubtful).sum())
            subject = f"{architecture}, {precision or 'its own encode'}: wrong entries"
            comparisons.append(
                Comparison(subject, "float64", (count,), (0.0,), "entries", by="difference", at_most=0.0)
            )
    return comparisons


def bounds(device: torch.device, widths: tuple[int, ...], rows: int) -> list[Comparison]:
    """Counts pre-activations above their bounds, and measures the device's accumulation in the same product."""
    comparisons = []
    for width in widths:
        violations, used = 0, 0.0
        for x, weight in _hard_cases(width, rows):
            linear = Linear(weight.to(device), torch.zeros(weight.shape[1], device=device))
            screen, half = make_screen(linear, TopK(1)), make_half_screen(linear, TopK(1))
            assert half is not None
            with full_precision():
                for upper in (screen.bounds(x.to(device)), half.upper(x.to(device))):
                    violations += int((upper.cpu().double() < x.double() @ weight.double()).sum())
            used = max(used, _accumulation_used(x.to(device), weight.to(device)))
        comparisons.append(
            Comparison(
                f"d {width:,}: pre-activations above their bounds",
                "float64",
                (float(violations),),
                (0.0,),
                "values",
                by="difference",
                at_most=0.0,
            )
        )
        allowed = 1.0 if device.type == "cpu" else 4.0
        subject = f"d {width:,}: error of accumulation"
        unit = "times d 2^-24 of the product of the norms"
        comparisons.append(Comparison(subject, "allowed by the bound", (used,), (allowed,), unit, at_most=1.0))
    return comparisons


def equality(folder: Path, device: torch.device, documents: int) -> list[Comparison]:
    """Records, extracts and measures with the embedded model on the device and on the CPU."""
    texts = [document["text"] for document in wb.demo_corpus()[:documents]]
    recorded, metrics = {}, {}
    features: dict[torch.device, Any] = {}  # sparse matrices, whose types leave results of operators open
    for place in dict.fromkeys((torch.device("cpu"), device)):
        model, sae = wb.load_model("demo", device=place, dtype="float32"), wb.load_sae("demo", device=place)
        site = sae.site or "resid_post.0"
        options: dict[str, Any] = {"sites": [site], "dtype": "float32", "context": 64}
        store = wb.record(model, texts, out=folder / f"{place.type}.acts", show_progress=False, **options)
        recorded[place] = store[site][:]
        extracted: Any = wb.extract_features(store, sae, show_progress=False)
        features[place] = extracted[np.arange(store.rows)]
        metrics[place] = wb.sae_metrics(store, sae, model=model)
    cpu, accelerator = torch.device("cpu"), device
    error = float((recorded[cpu] - recorded[accelerator]).abs().max() / recorded[cpu].abs().max())
    moved = abs((features[cpu] != 0).astype(int) - (features[accelerator] != 0).astype(int)).sum() / features[cpu].nnz
    worst = max(
        abs(getattr(metrics[cpu], name) - getattr(metrics[accelerator], name)) for name in ("l0", "explained_variance")
    )
    zero = (0.0,)
    return [
        Comparison("recorded values", "CPU", (error,), zero, "of the largest", by="difference", at_most=1e-4),
        Comparison("features in one alone", "CPU", (float(moved),), zero, "of all", by="difference", at_most=1e-3),
        Comparison("L0 and explained variance", "CPU", (worst,), zero, "", by="difference", at_most=0.01),
    ]


def _save(folder: Path, architecture: str, d_in: int = 128, d_sae: int = 1_024) -> Path:
    """A random autoencoder of an architecture, as SAELens saves it."""
    from sae_lens.registry import get_sae_class

    kind, config = get_sae_class(architecture)
    options: dict[str, Any] = {"k": _K} if "topk" in architecture else {}
    if "transcoder" in architecture:
        options = {"d_out": d_in, "apply_b_dec_to_input": False}
    if architecture == "temporal":
        options = {"n_heads": 2, "bottleneck_factor": 8, "kval_topk": _K}
    if architecture == "matching_pursuit":
        options = {"max_iterations": 8}
    torch.manual_seed(0)
    module = kind(config(d_in=d_in, d_sae=d_sae, **options))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn_like(parameter) / math.sqrt(d_in if parameter.ndim > 1 else 100))
            if name == "threshold":
                parameter.fill_(2.0)
        if architecture == "matching_pursuit":
            module.W_dec.div_(module.W_dec.norm(dim=1, keepdim=True))
    module.save_model(folder)
    return folder


def _encode64(sae: Sae, x: Tensor) -> Tensor:
    """SAELens' own activations in float64, on the CPU."""
    module: Any = copy.deepcopy(sae.module).cpu().double()
    module.dtype = module.cfg.dtype = torch.float64
    module.cfg.device = "cpu"
    with torch.no_grad():
        rows = x.double()
        return module.encode(rows[None])[0] if sae.sequential else module.encode(rows)


def _doubtful(sae: Sae, x: Tensor) -> Tensor:
    """Features whose pre-activation in float64 is closer to what decides on it than float32 resolves."""
    form = linear_form(sae, replaced=False)
    if form is None:
        return torch.zeros(len(x), sae.d_sae, dtype=torch.bool)
    linear, choice = form
    rows = sae.encoder_input(x.to(sae.device)).cpu().double()
    weight = linear.weight.detach().cpu().double()
    pre = rows @ weight + linear.bias.detach().cpu().double()
    pre = pre if linear.scale is None else pre * linear.scale.detach().cpu().double()
    if isinstance(choice, TopK):
        size = pre.abs() if type(choice).__name__ == "AbsTopK" else pre
        border = size.topk(choice.k, dim=1).values[:, -1:]
        distance = torch.minimum((size - border).abs(), size.abs())
        return (distance < _rounding(rows, weight)) & (size != border)
    threshold = choice.threshold.detach().cpu().double()
    return (pre - threshold).abs() < _rounding(rows, weight)


def _rounding(rows: Tensor, weight: Tensor) -> Tensor:
    """Error of a pre-activation in float32, at most."""
    return 4 * (rows.shape[1] + 8) * 2**-24 * rows.norm(dim=1)[:, None] * (1 + weight.norm(dim=0))


def _hard_cases(width: int, rows: int) -> list[tuple[Tensor, Tensor]]:
    """Rows and weights whose sums lose most: random, of one sign, a few far larger values, falling by powers of 2."""
    generator = torch.Generator().manual_seed(width)
    x, weight = torch.randn(rows, width, generator=generator), torch.randn(width, 64, generator=generator)
    massive = x.clone()
    massive[:, ::97] *= 1000
    falling = x.abs() * torch.exp2(-torch.arange(width) / width * 40)
    return [(x, weight), (x.abs(), weight.abs()), (massive, weight), (falling, weight.abs()), (x * 1e-6, weight * 1e4)]


def _accumulation_used(x: Tensor, weight: Tensor) -> float:
    """The largest error of the device's bfloat16 product with a float32 result, in d 2^-24 times the norms' product."""
    low, lower = x.bfloat16(), weight.bfloat16()
    with full_precision():
        if x.device.type == "cuda":
            product = torch.mm(low, lower, out_dtype=torch.float32)
        else:  # products of 8 bits are exact in float32
            product = low.float() @ lower.float()
    exact = low.cpu().double() @ lower.cpu().double()
    allowed = x.shape[1] * 2**-24 * low.cpu().double().norm(dim=1)[:, None] * lower.cpu().double().norm(dim=0)
    return float(((product.cpu().double() - exact).abs() / allowed).max())
