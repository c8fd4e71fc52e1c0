"""Sites that are added to a finished store: the model runs again over the tokens that the store has."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from workbench.io.errors import RequestError
from workbench.io.progress import progress
from workbench.io.tasks import Begin, Workers, lost_task
from workbench.model.load import Loading, Model
from workbench.model.packing import pack_model, unpack_model
from workbench.recording.planning import RecordingPlan
from workbench.recording.segments import fill
from workbench.sites.settings import Recording, recording
from workbench.store.groups import segment_tables
from workbench.store.growth import add_sites, remove_unlisted, stage_sites, staged_checksum
from workbench.store.layers import ANEW, fixed_sites
from workbench.store.manifest import MANIFEST, Manifest, Segment, SiteRecord, read_manifest
from workbench.store.token_table import read_tokens
from workbench.store.writer import Writer, check_space, explain_full_disk, is_read_only, required_bytes


@dataclass(frozen=True)
class GrowthPlan:
    """Facts that a process with the model needs to write new sites of any segment."""

    store: Path
    manifest: Manifest
    """Manifest of the store, without its segments."""
    sites: tuple[SiteRecord, ...]
    """Sites to add."""
    settings: Recording


def stored_settings(out: Path | None) -> Recording:
    """Returns the settings with which the store at `out` was recorded, for texts=None.

    Raises:
        RequestError: There is no store, no path, or a store to which no site can be added.
    """
    if out is None or not (out / MANIFEST).exists():
        place = "out is missing" if out is None else f"{out} is none"
        raise RequestError(f"texts: None stands for the tokens of the store at out, and {place}; give texts")
    manifest = read_manifest(out)
    if reason := fixed_sites(manifest):
        raise RequestError(f"{out} {reason}, so no site can be added to it; {ANEW}")
    fields = Recording.__dataclass_fields__
    stored = {name: value for name, value in manifest.recording.items() if name in fields}
    lists = {name: tuple(value) for name, value in stored.items() if isinstance(value, list)}
    return recording(replace(Recording(), **(stored | lists)))


def new_sites(plan: RecordingPlan, manifest: Manifest) -> tuple[SiteRecord, ...]:
    """Returns the requested sites that a store does not have."""
    recorded = {site.name for site in manifest.sites}
    return tuple(site for site in plan.sites if site.name not in recorded)


def record_new_sites(plan: RecordingPlan, model: Model, writer: Writer, workers: Workers, show_progress: bool) -> None:
    """Adds the requested sites that the store does not have, all of them or none.

    An interrupted call is resumed by the same one, segment by segment; until its end readers find the store as it was.

    Raises:
        RequestError: A store that is read-only or shared with other processes, or not enough space.
        DataError: The disk is full, or workers died too often over a segment.
    """
    sites, manifest, path = new_sites(plan, writer.manifest), writer.manifest, writer.path
    if not sites:
        return
    added = ", ".join(site.label for site in sites[:3])
    if is_read_only(path):
        raise RequestError(f"{path} is read-only and lacks {added}; make it writable, or choose another out")
    if reason := fixed_sites(manifest):
        raise RequestError(f"{path} {reason}, so {added} cannot be added to it; {ANEW}")
    if workers.shared:
        raise RequestError(f"several processes that share a store cannot add {added} to it; add sites with one")
    with explain_full_disk(path, f"the new sites {added}", manifest.rows):
        remove_unlisted(path, manifest, sites)
        waiting = {segment: staged_checksum(path, manifest, segment, sites) for segment in manifest.segments}
        unwritten = [segment for segment in manifest.segments if waiting[segment] is None]
        rows_left = sum(segment.rows for segment in unwritten)
        check_space(path, required_bytes(sites, rows_left))
        growth = GrowthPlan(path.absolute(), manifest.without_segments, sites, plan.settings)
        with progress(
            "adding sites", manifest.rows, "rows", show=show_progress, initial=manifest.rows - rows_left
        ) as advance:
            _write(growth, model, unwritten, workers, advance)
        checksums = [staged_checksum(path, manifest, segment, sites) for segment in manifest.segments]
        order = list(model.site_map.selectable)
        writer.manifest = add_sites(path, manifest, sites, order, [text for text in checksums if text])


def _write(
    growth: GrowthPlan, model: Model, segments: Sequence[Segment], workers: Workers, advance: Callable[[int], None]
) -> None:
    def on_lost(segment: Segment | None, error: Exception) -> None:
        raise lost_task(f"segment {segment.name if segment else ''} of {growth.store}", error)

    def begin_here(_device: str | None) -> Callable[[Segment], None]:
        return partial(_write_segment, growth, model, advance=advance)

    begin: Begin[Segment, None] = begin_here
    arguments: tuple[Any, ...] = ()
    if workers.remote and segments:
        begin, arguments = begin_growth, (growth, pack_model(model, growth.manifest.model))
    with closing(workers.map(begin, arguments, segments, on_lost)) as answers:
        for segment, _ in answers:
            if workers.remote:
                advance(segment.rows)


def begin_growth(device: str, growth: GrowthPlan, model: Loading | bytes) -> Callable[[Segment], None]:
    """Returns the function that writes new sites of a segment in another process.

    Raises:
        RequestError: The store's folder is not visible from here, or the weights differ from the planned ones.
    """
    if not growth.store.is_dir():
        raise RequestError(
            f"a worker on {socket.gethostname()} finds no {growth.store}; out must be on a disk that all machines share"
        )
    unpacked = unpack_model(model, device, growth.manifest.model)
    return partial(_write_segment, growth, unpacked, advance=lambda _rows: None)


def _write_segment(growth: GrowthPlan, model: Model, segment: Segment, *, advance: Callable[[int], None]) -> None:
    tokens = read_tokens(segment_tables(growth.store, [segment]))
    ids, sequence = (tokens[name].to_numpy() for name in ("token_id", "sequence"))
    lengths = np.diff(np.flatnonzero(np.diff(sequence, prepend=-1, append=-1)))
    sites = model.site_map.select([site.name for site in growth.sites])
    with stage_sites(growth.store, growth.manifest, segment, growth.sites) as writer:
        fill(writer, model, sites, ids, lengths, growth.settings, advance)
