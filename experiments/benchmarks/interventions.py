"""Passes of a model that interventions change, against the same passes of the model as it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import workbench as wb
from workbench.experiments.benchmarks.measure import Comparison, paired_until, per_second
from workbench.experiments.benchmarks.models import gpt2
from workbench.model.forward import run, trial_ids
from workbench.model.intervene import Intervention
from workbench.model.load import Model


@dataclass(frozen=True)
class Interventions:
    """Tokens per second of processor time (of all threads) of a pass with a kind of record, the preparation of the
    record included, beside a plain pass in the same turn; repeated until the 95 % interval of the median ratio is
    `width` of it wide. The model is a directory or a hub id; gpt2 is a random model of that shape."""

    model: str = "models/smollm2-135m"
    batch: int = 4
    positions: int = 64
    width: float = 0.05
    repeats: int = 60
    kinds: str = "all"
    """Part of the names of the records that are timed."""

    def run(self, folder: Path) -> list[Comparison]:
        """Times passes with each kind of record against plain passes."""
        model = wb.load_model(gpt2(layers=2) if self.model == "gpt2" else self.model)
        ids = trial_ids(model.module, self.batch, self.positions, seed=0)
        mask = torch.ones_like(ids)
        layer = model.site_map.n_layers // 2
        sites = [f"{kind}.{layer}" for kind in ("resid_post", "z", "rot_q", "rot_k") if _has(model, f"{kind}.{layer}")]
        store = wb.record(
            model,
            ids.tolist(),
            sites=sites,
            out=folder / "donors.acts",
            dtype="float32",
            context=self.positions,
            show_progress=False,
        )

        def timed(records: tuple[Intervention, ...]) -> Callable[[], None]:
            def once() -> None:
                if not records:
                    run(model.module, ids, mask)
                    return
                with applied:
                    run(model.module, ids, mask)

            applied = _Reopened(model, records)
            return once

        plain = per_second(ids.numel(), timed(()), time.process_time)
        plain()
        comparisons = []
        for name, records in _records(model, store, layer).items():
            if self.kinds != "all" and self.kinds not in name:
                continue
            changed = per_second(ids.numel(), timed(records), time.process_time)
            changed()
            values, references = paired_until(self.width, self.repeats, changed, plain)
            comparisons.append(
                Comparison(name, f"the plain pass, {len(values)} repeats", values, references, "tokens/s", paired=True)
            )
        return comparisons


class _Reopened:
    """A context that applies records anew each time it is entered."""

    def __init__(self, model: Model, records: tuple[Intervention, ...]) -> None:
        self.model, self.records = model, records

    def __enter__(self) -> None:
        self._run = wb.intervene(self.model, *self.records)
        self._run.__enter__()

    def __exit__(self, *error: object) -> None:
        self._run.__exit__(*error)  # pyright: ignore[reportArgumentType]


def _has(model: Model, site: str) -> bool:
    return site in model.sites


def _records(model: Model, store: wb.Store, layer: int) -> dict[str, tuple[Intervention, ...]]:
    """Records by the line of the table; those without a layer in their name act on all layers."""
    layers = range(model.site_map.n_layers)
    direction = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    kinds: dict[str, tuple[Intervention, ...]] = {
        "Add, all layers": tuple(wb.Add(f"resid_post.{block}", direction) for block in layers),
        "Project, all layers": tuple(wb.Project(f"resid_post.{block}", direction) for block in layers),
        "Zero a head, all layers": tuple(wb.Zero(f"z.{block}", head=0) for block in layers),
        "Set one row, all layers": tuple(wb.Set(f"resid_post.{block}", direction, at=3) for block in layers),
        "Mean, one layer": (wb.Mean(f"z.{layer}", store, head=0),),
        "Resample, one layer": (wb.Resample(f"resid_post.{layer}", store, seed=0),),
        "Patch one row, one layer": (wb.Patch(f"resid_post.{layer}", store, at=3),),
        "ScaleAttention, all layers": tuple(wb.ScaleAttention(block, None, 0, 0.5) for block in layers),
        "RedistributeAttention, all layers": tuple(wb.RedistributeAttention(block, None, 0, 0.5) for block in layers),
        "SkipBlock, one layer": (wb.SkipBlock(layer),),
        "SwapBlocks": (wb.SwapBlocks(layer - 1, layer),),
        "EmbedTokens, one position": (wb.EmbedTokens(3, 5),),
    }
    if _has(model, f"rot_q.{layer}"):
        kinds["FreezePattern, one layer"] = (wb.FreezePattern(layer, None, store),)
    return kinds


FULL = Interventions()
QUICK = Interventions("gpt2", 1, 8, repeats=1)
