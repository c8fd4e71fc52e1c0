"""Encoding and recording on a GPU: exactness, bounds, equality with the CPU, throughput, profile, memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import workbench as wb
from workbench.experiments.benchmarks import gpu_checks
from workbench.experiments.benchmarks.encoding import make_autoencoder, sparse
from workbench.experiments.benchmarks.measure import Comparison, interleaved, per_second
from workbench.experiments.benchmarks.models import gpt2, record, token_ids
from workbench.io.torch_state import usable_device
from workbench.sae.autoencoder import Sae
from workbench.sae.encode import encoder


@dataclass(frozen=True)
class Gpu:
    """One GPU against float64, against the CPU, and against SAELens on the same GPU.

    Exactness: entries whose value or place differs from SAELens' `encode` in float64 by more than rounding in float32
    explains, for small random autoencoders of each architecture. Bounds: pre-activations in float64 above their upper
    bound, for random rows, rows of one sign, and rows with a few large values; and the error of the device's own
    accumulation as a share of what the bound allows for it. Throughput: random rows, encoder columns of norm 1, the
    jumprelu with as many active features as the topk; a shape is d_in x d_sae x k. Recording: a GPT-2 shape in
    bfloat16, resid_post of every layer. The profile lists the operations with the most time of their own.
    """

    device: str = "cuda"
    shapes: tuple[str, ...] = ("768x24576x32", "2304x16384x32", "4096x16384x64", "576x49152x32")
    rows: int = 16_384
    widths: tuple[int, ...] = (768, 4_096, 16_384)
    checked_rows: int = 256
    documents: int = 40
    layers: int = 12
    sequences: int = 128
    context: int = 512
    repeats: int = 5

    def run(self, folder: Path) -> list[Comparison]:
        """Checks numbers first, then measures."""
        device = usable_device(self.device)
        comparisons = gpu_checks.exactness(folder, device, self.checked_rows)
        comparisons += gpu_checks.bounds(device, self.widths, self.checked_rows)
        comparisons += gpu_checks.equality(folder, device, self.documents)
        for shape in self.shapes:
            for architecture in ("topk", "jumprelu"):
                d_in, d_sae, k = map(int, shape.split("x"))
                sae, x = make_autoencoder(folder / "sae", architecture, d_in, d_sae, k, self.rows, device=device)
                comparisons += self._encoding(f"{architecture} {shape}", sae, x)
                shutil.rmtree(folder / "sae")
        return comparisons + self._recording(folder, device)

    def _encoding(self, subject: str, sae: Sae, x: Tensor) -> list[Comparison]:
        """Throughput, time of the operations, and memory of one autoencoder."""
        encode, device = encoder(sae), sae.device
        sides = {
            "workbench": partial(encode, x),
            "SAELens' encode, made sparse": partial(sparse, sae, x),
            "the same with TF32": partial(_with_tf32, partial(sparse, sae, x)),
            "the float32 product alone": partial(torch.mm, x, sae.module.W_enc),
            "the bfloat16 product alone": partial(torch.mm, x.bfloat16(), sae.module.W_enc.bfloat16()),
        }
        for work in sides.values():
            work()
        speeds = interleaved(
            self.repeats, {name: per_second(len(x), synchronised(device, work)) for name, work in sides.items()}
        )
        encoder_speed = speeds.pop("workbench")
        targets = {"the same with TF32": 8.0, "the bfloat16 product alone": 0.6}
        comparisons = [
            Comparison(subject, name, encoder_speed, speed, "rows/s", at_least=targets.get(name))
            for name, speed in speeds.items()
        ]
        unsettled = float(encode(x).unsettled)
        comparisons.append(
            Comparison(f"{subject}, rows in float32", "all rows", (unsettled,), (float(len(x)),), "rows", at_most=0.01)
        )
        return comparisons + _operations(subject, encode, x) + _memory(subject, encode, sae, x)

    def _recording(self, folder: Path, device: torch.device) -> list[Comparison]:
        """Speed of a recording and of the bare body of the model."""
        module = gpt2(self.layers)
        torch.nn.Module.to(module, device=device, dtype=torch.bfloat16)  # the `to` of transformers states no types
        model, ids, out = wb.load_model(module), token_ids(self.sequences, self.context), folder / "recorded.acts"
        batch = min(self.sequences, max(1, 16_384 // self.context))

        def body() -> None:
            with torch.inference_mode():
                for rows in torch.from_numpy(ids).split(batch):
                    moved = rows.to(device)
                    module.transformer(input_ids=moved, attention_mask=torch.ones_like(moved), use_cache=False)

        def recording_rate() -> float:
            shutil.rmtree(out, ignore_errors=True)
            return record(model, ids, out, sites=["resid_post"], batch_tokens=batch * self.context)[0].clock

        synchronised(device, body)()
        recording_rate()
        sides = {"workbench": recording_rate, "body": per_second(ids.size, synchronised(device, body))}
        speeds = interleaved(self.repeats, sides)
        subject, name = f"recording, {self.layers} resid_post sites", "the model's body alone"
        return [Comparison(subject, name, speeds["workbench"], speeds["body"], "rows/s", at_least=0.9)]


def synchronised(device: torch.device, work: Callable[[], Any]) -> Callable[[], None]:
    """Returns the work with a wait for the GPU at its end."""

    def waited() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return waited


def _with_tf32(work: Callable[[], Any]) -> Any:
    """Float32 products with 10 bits of the factors' mantissas, which SAELens' users may allow."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return work()
    finally:
        torch.set_float32_matmul_precision(before)


def _operations(subject: str, encode: Callable[[Tensor], Any], x: Tensor, most: int = 5) -> list[Comparison]:
    """The operations of one encoding with the most time of their own."""
    cuda = x.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        synchronised(x.device, partial(encode, x))()
    time_of = (lambda event: event.self_device_time_total) if cuda else (lambda event: event.self_cpu_time_total)
    operations = [(event.key, time_of(event) / 1000) for event in profiler.key_averages()]
    operations = sorted(operations, key=lambda pair: -pair[1])
    total = sum(milliseconds for _, milliseconds in operations)
    return [
        Comparison(
            f"{subject}, {name.replace('|', '/')[:60]}",
            "all operations of one encoding",
            (milliseconds,),
            (total,),
            "ms",
        )
        for name, milliseconds in operations[:most]
        if milliseconds
    ]


def _memory(subject: str, encode: Callable[[Tensor], Any], sae: Sae, x: Tensor) -> list[Comparison]:
    """Peak memory on the GPU beyond what is loaded."""
    if x.device.type != "cuda":
        return []

    def peak(work: Callable[[], Any]) -> float:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)
        work()
        return (torch.cuda.max_memory_allocated(x.device) - before) / 1e6

    encoder_peak, saelens_peak = peak(partial(encode, x)), peak(partial(sparse, sae, x))
    return [
        Comparison(f"{subject}, peak memory", "SAELens' encode, made sparse", (encoder_peak,), (saelens_peak,), "MB")
    ]


FULL = Gpu()
QUICK = Gpu(
    device="cpu",
    shapes=("64x512x8",),
    rows=256,
    widths=(64, 2_048),
    checked_rows=24,
    documents=4,
    layers=1,
    sequences=4,
    context=32,
    repeats=1,
)
