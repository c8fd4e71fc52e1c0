"""Findings of every probe on one model, with their costs, kept in a folder so that an interrupted run goes on."""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import workbench as wb
from workbench.demo.run import BLOCK_ROWS, HEAD_SITES, SITES, block_sites
from workbench.experiments.benchmarks.measure import with_peak
from workbench.experiments.demo_model.made_of import fingerprint
from workbench.io.errors import WorkbenchError
from workbench.results.registry import find_probe, installed_probes

REPEATS = 60
"""Sequences of random tokens that repeat, for induction heads."""
OTHER_INPUTS = ("activation-patching", "attribution-patching", "edge-attribution", "function-vectors", "path-patching")
OTHER_INPUTS += ("head-ablation", "representation-hijacking", "semantic-axes", "steering")
"""Probes of pairs of prompts, of words that a small vocabulary lacks, or of heads or a direction; see their pages."""
KEPT = "findings.json"


@dataclass(frozen=True)
class Subject:
    """A model, its texts, and how much of them is read."""

    title: str
    model: wb.Model
    texts: Sequence[Any]
    rows: int
    """Maximum number of tokens to record."""
    settings: Mapping[str, Mapping[str, Any]]
    """Settings of each probe that differ from its defaults."""


@dataclass(frozen=True)
class Finding:
    """Finding of a probe on a model, or the reason why it was not run."""

    headline: str
    rows: int = 0
    """Tokens of the store that it ran on; 0: it was not run."""
    seconds: float = 0.0
    """Processor time of all threads, loading of the model and recording not counted."""
    megabytes: float = 0.0
    """Resident memory that it added at most, read pages of the store among it (10^6 bytes)."""


def probes_of_texts() -> list[str]:
    """Returns the names of the installed probes that need a model and texts alone."""
    return [name for name in installed_probes() if name not in OTHER_INPUTS]


def findings(subject: Subject, folder: Path, probes: Sequence[str] | None = None) -> dict[str, Finding]:
    """Returns what every probe finds. Linux only.

    A finding kept in `folder` is taken from there where the model, the number of rows, the settings and the source of
    the probe are still the same.

    Args:
        subject: The model and its texts.
        folder: Folder for the recordings and the findings.
        probes: Names of the probes. None: every installed one that needs texts alone.
    """
    findings_by_key = _stored_findings(folder)
    stores: list[wb.Store] = []
    lines = {}
    for name in probes_of_texts() if probes is None else probes:
        settings = subject.settings.get(name, {})
        key = _key(subject, name, settings)
        if key not in findings_by_key:
            stores = stores or _recorded(subject, folder)
            findings_by_key[key] = asdict(_finding(name, settings, subject.model, stores))
            (folder / KEPT).write_text(json.dumps(findings_by_key, indent=1), encoding="utf-8")
        lines[name] = Finding(**findings_by_key[key])
    return lines


def _stored_findings(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / KEPT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _key(subject: Subject, name: str, settings: Mapping[str, Any]) -> str:
    """Probe, and a digest of everything its headline depends on but the modules it imports."""
    source = Path(inspect.getfile(find_probe(name)))
    about = [subject.model.fingerprint(), subject.rows, sorted(settings.items()), fingerprint([source])]
    return f"{name} {hashlib.sha256(repr(about).encode()).hexdigest()[:16]}"


def _recorded(subject: Subject, folder: Path) -> list[wb.Store]:
    """The stores that probes are tried on, in order."""
    model, options = subject.model, {"max_rows": subject.rows, "show_progress": False}
    fewer = {**options, "max_rows": min(subject.rows, BLOCK_ROWS)}
    repeats = wb.random_repeats(model.tokenizer or range(model.vocab), sequences=REPEATS)
    heads = (*HEAD_SITES, "v", "mlp_post")
    return [
        wb.record(model, subject.texts, out=folder / "rows.acts", sites=SITES, **options),
        wb.record(model, subject.texts, out=folder / "heads.acts", sites=heads, context=64, **options),
        wb.record(model, repeats, out=folder / "repeats.acts", sites=["pattern", "resid_post"], show_progress=False),
        wb.record(model, subject.texts, out=folder / "blocks.acts", sites=block_sites(model), context=64, **fewer),
    ]


def _finding(name: str, settings: Mapping[str, Any], model: wb.Model, stores: Sequence[wb.Store]) -> Finding:
    probe, refused = find_probe(name)(**settings), []
    for store in stores:
        began = time.process_time()
        try:
            result, memory = with_peak(lambda store=store: probe.run(store, model=model))
        except WorkbenchError as error:
            refused.append(str(error).replace(f"{store.path.parent}/", ""))
            continue
        return Finding(result.headline(), len(store), round(time.process_time() - began, 2), round(memory.rise, 1))
    reasons = [reason for reason in refused if "is not recorded" not in reason]  # by a store that is meant for it
    return Finding(f"not run: {(reasons or refused)[0]}")
