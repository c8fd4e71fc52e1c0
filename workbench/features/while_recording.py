"""Features of sites whose activations are not stored: encoded during the forward passes, segment by segment.

The features of a segment are committed before the segment of the recording. So after a kill every committed row has
features, and those of a segment that is recorded again are discarded. When all rows are recorded, the features are
merged and indexed as in every extraction.

Encoding waits for the passes of its segment, and the next passes wait for it: exact encoding sets the precision of
products, which is torch's for the whole process, so passes beside it would have other values.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from workbench.features.encoding import StoreEncoder
from workbench.features.extract import DTYPES, extract_array, make_features, sae_record, sites_read
from workbench.features.extraction_folder import (
    ExtractionRecord,
    exclusive_turn,
    extraction_record,
    locked_folder,
    partial_path,
    read_folder,
    replace_fingerprint,
    segment_folder,
    target_path,
)
from workbench.features.feature_segments import Span
from workbench.io.checks import check
from workbench.io.errors import DataError, RequestError
from workbench.io.files import explain_full_disk
from workbench.io.tasks import Workers
from workbench.model.load import Model
from workbench.model.unembed import measure_unembed
from workbench.sae.autoencoder import Sae
from workbench.sae.input_rows import Norm, Reading, open_reading
from workbench.sae.saved import SavedSae, save_sae
from workbench.sae.site import OfferedSites, input_reading
from workbench.sae.training import warn_of_other_rows
from workbench.sites.grammar import Site, SiteMap
from workbench.store.manifest import Manifest, SiteRecord
from workbench.store.reader import Store
from workbench.store.staging import PlannedSegment


@dataclass(frozen=True)
class RecordedFeatures:
    """Features to extract while a model is recorded."""

    sae: Sae
    site: str | Sequence[str] | None = None
    """The site to read, or a list of several. None: those that the SAE was trained on."""
    dtype: str = "float32"
    """Stored type of the features' activations: float32, or float16 at half the size."""
    force: bool = False
    """Allow an SAE of another site or model."""

    def __post_init__(self) -> None:
        check("dtype", self.dtype, one_of=DTYPES)

    def of(
        self, model: Model, path: Path, stored: Sequence[Site], record_of: Callable[[Site], SiteRecord]
    ) -> EncodedSites:
        """Returns the sites of the model that the SAE reads, and what is computed of them.

        Args:
            model: The model.
            path: Path of the store.
            stored: Sites that are stored as well; of two names of one site theirs is used.
            record_of: Returns the record of a site in the store.

        Raises:
            RequestError: The model has no such sites, the SAE's files do not record them, or it has another width or,
                unless forced, another site or model.
        """
        offered = model_sites(model, path, stored, record_of)
        reading = input_reading(self.sae, self.site, offered, force=self.force)
        return EncodedSites(self, reading, model.site_map.select([site.name for site in reading.recorded]))


def model_sites(
    model: Model, path: Path, stored: Sequence[Site], record_of: Callable[[Site], SiteRecord]
) -> OfferedSites:
    """Returns the sites of a model that is to be recorded; for the arguments see `RecordedFeatures.of`."""
    sites, stored_names = model.site_map, {site.name for site in stored}

    def first(names: Sequence[str]) -> str | None:
        available = [name for name in names if name in sites.selectable or name in sites.synonyms]
        return next((name for name in available if name in stored_names), next(iter(available), None))

    def record(site: str | tuple[str, int]) -> SiteRecord:
        name = site if isinstance(site, str) else ".".join(map(str, site))
        selected = sites.select([name])
        if len(selected) != 1:
            raise RequestError(f"sae_site {name!r} names {len(selected)} sites; give one, such as resid_post.3")
        return record_of(selected[0])

    @cache
    def final_norm() -> Norm:
        unembed = measure_unembed(model.module, sites.last_block)  # as it is for the store
        return Norm(unembed.norm, unembed.eps)

    return OfferedSites(path, model, first, record, final_norm, ("sae_site", "sae_force"))


@dataclass(frozen=True)
class EncodedSites:
    """Sites of a recording whose features are extracted. Create them with `RecordedFeatures.of`."""

    features: RecordedFeatures
    reading: Reading
    """What is computed of the sites, and their records in the store."""
    sites: tuple[Site, ...]

    @property
    def label(self) -> str:
        """Description for the manifest of a store that has the features in place of the sites' activations."""
        sae = self.features.sae
        return f"{self.reading.site.label} by {sae.name} ({sae.fingerprint()[:12]})"

    def pack(self, path: Path) -> PackedEncodedSites:
        """Returns what other processes need to encode the sites; saves the SAE beside the features of the store."""
        features = self.features
        folder = partial_path(self._target(path))
        return PackedEncodedSites(save_sae(features.sae, folder), self.reading, features.dtype)

    @contextmanager
    def locked(
        self,
        path: Path,
        manifest: Manifest,
        share: Sequence[PlannedSegment],
        unwritten: Sequence[PlannedSegment],
        shared: bool,
    ) -> Iterator[None]:
        """Starts or resumes the features of a store that is being recorded, and locks their folder for the block.

        Args:
            path: Path of the store.
            manifest: Manifest of the store, started or resumed.
            share: Segments that this process is responsible for.
            unwritten: Those of them that it will write; features that a crash may have left of them are discarded.
            shared: Other processes record the same store.

        Raises:
            RequestError: A segment of `share` was recorded without features.
        """
        target, request = self._target(path), self._planned(manifest)
        beyond = (manifest.planned_rows, sys.maxsize)  # of other texts, whose recording was abandoned
        with locked_folder(target, shared):
            with exclusive_turn(target, shared):
                segments = segment_folder(target)
                segments.discard([*map(_span, unwritten), beyond])
                read_folder(target, request).begin(shared)
                to_write = set(unwritten)
                recorded = [_span(segment) for segment in share if segment not in to_write]
                if lacking := sum(stop - first for first, stop in segments.missing_spans(recorded)):
                    raise self._without_features(path, lacking)
            yield

    def encoder(
        self, path: Path, manifest: Manifest
    ) -> Callable[[int, Mapping[str, Float[Tensor, "row ..."]], Sequence[int]], None]:
        """Returns the function that encodes the rows of a segment and commits their features.

        It takes the number of the segment's first row, its rows by name of their site and the lengths of its sequences,
        and raises DataError with the row if that, or its features, are not finite.
        """
        encoding = self._encoding(Store(path.absolute(), manifest), show_progress=False)
        segments = segment_folder(self._target(path))

        def write(first: int, values: Mapping[str, Tensor], lengths: Sequence[int]) -> None:
            for site in self.reading.recorded:
                _check_finite(site, first, values[site.name])

            def read(rows: slice) -> Float[Tensor, "row ..."]:
                return self.reading.rows(lambda site: values[site.name][rows])

            span = first, first + len(values[self.reading.recorded[0].name])
            segments.write(span, encoding.encode_rows(span, read, lengths))

        return write

    def finish(self, store: Store, workers: Workers | None = None, show_progress: bool = True) -> None:
        """Merges and indexes the features of a complete recording, or extracts them if the store has the sites."""
        settings, target = self.features, self._target(store.path)
        warn_of_other_rows(settings.sae, store)
        encoding = self._encoding(store, show_progress)
        shared = workers is not None and workers.shared
        stored = {site.name for site in store.sites}
        if all(site.name in stored for site in self.reading.recorded):
            extraction_workers = None if shared else workers  # the other processes of the recording may have ended
            extract_array(encoding, settings.dtype, extraction_workers)
            return
        planned, request = self._planned(store.manifest), self._request(store.manifest.fingerprint, store.rows)
        explained = explain_full_disk(f"features {target}", "run the same command to resume", "what is committed stays")
        with exclusive_turn(target, shared), explained:
            started = replace_fingerprint(target, planned.store_fingerprint, request.store_fingerprint)
        if store.rows and not started:
            raise self._without_features(store.path, store.rows)
        make_features(encoding, target, request, workers)

    def _encoding(self, store: Store, show_progress: bool) -> StoreEncoder:
        """The encoding of an array that is not stored: only rows in memory can be encoded."""
        return StoreEncoder(open_reading(store, self.reading), self.features.sae, show_progress=show_progress)

    def _target(self, store: Path) -> Path:
        return target_path(store.absolute(), self.reading.site, self.features.sae.name)

    def _planned(self, manifest: Manifest) -> ExtractionRecord:
        """The request while the store is recorded, with the fingerprint of the planned store."""
        return self._request(manifest.without_segments.fingerprint, manifest.planned_rows)

    def _request(self, fingerprint: str, rows: int) -> ExtractionRecord:
        sae, name = self.features.sae, self.reading.site.name
        reads = sites_read(self.reading, sae)
        return extraction_record(sae_record(sae, None), name, reads, fingerprint, rows, self.features.dtype)

    def _without_features(self, store: Path, rows: int) -> RequestError:
        return RequestError(
            f"{store} has {rows:,} rows that were recorded without features of SAE {self.features.sae.name!r} and "
            f"without {self.reading.site.label}; choose another out"
        )


@dataclass(frozen=True)
class PackedEncodedSites:
    """`EncodedSites` sent to other processes, with their SAE saved in files."""

    sae: SavedSae
    reading: Reading
    dtype: str

    def unpack(self, device: str, sites: SiteMap) -> EncodedSites:
        """Returns the sites with their SAE on `device`, for a model with these sites."""
        features = RecordedFeatures(self.sae.load(device), dtype=self.dtype)
        return EncodedSites(features, self.reading, sites.select([site.name for site in self.reading.recorded]))


def _check_finite(site: SiteRecord, first: int, rows: Float[Tensor, "row ..."]) -> None:
    finite = rows.isfinite().flatten(1).all(1)
    if not finite.all():
        row = first + int((~finite).nonzero()[0])
        raise DataError(
            f"row {row} of {site.label} is not finite in the model's forward pass; load the model in another dtype"
        )


def _span(segment: PlannedSegment) -> Span:
    return segment.first_row, segment.first_row + segment.rows
