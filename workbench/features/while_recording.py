"""Features of a site whose activations are not stored: encoded during the forward passes, segment by segment.

The features of a segment are committed before the segment of the recording. So after a kill every committed row has
features, and those of a segment that is recorded again are discarded. When all rows are recorded, the features are
merged and indexed as in every extraction.

Encoding waits for the passes of its segment, and the next passes wait for it: exact encoding sets the precision of
products, which is torch's for the whole process, so passes beside it would have other values.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from workbench.features.encoding import StoreEncoder
from workbench.features.extract import DTYPES, extract_features, make_features, sae_record
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
from workbench.features.records import SiteFeatures
from workbench.io.checks import check
from workbench.io.errors import DataError, RequestError
from workbench.io.tasks import Workers
from workbench.model.load import Model
from workbench.sae.autoencoder import Sae
from workbench.sae.saved import SavedSae, save_sae
from workbench.sae.site import check_fit, reads_special, site_names
from workbench.sites.grammar import Site, SiteMap, full_name
from workbench.store.manifest import Manifest, SiteRecord
from workbench.store.reader import ActivationArray, Store
from workbench.store.staging import PlannedSegment


@dataclass(frozen=True)
class RecordedFeatures:
    """Features to extract while a model is recorded."""

    sae: Sae
    site: str | None = None
    """The site to read. None: the one that the SAE was trained on."""
    dtype: str = "float32"
    """Stored type of the features' activations: float32, or float16 at half the size."""
    force: bool = False
    """Allow an SAE of another site or model."""

    def __post_init__(self) -> None:
        check("dtype", self.dtype, one_of=DTYPES)

    def select_site(self, sites: SiteMap, stored: Sequence[Site] = ()) -> Site:
        """Returns the site to read among a model's sites; of two names of the same site the one in `stored`.

        Raises:
            RequestError: The model has no such site, or the SAE's files do not record its site.
        """
        if special := reads_special(self.sae):
            raise RequestError(
                f"sae: SAE {self.sae.name!r} reads {special}, which is not possible while recording; record the sites, "
                "then extract its features"
            )
        names = (full_name(self.site),) if self.site else ()
        if not names:
            if self.sae.site is None:
                raise RequestError(
                    f"sae_site: the files of SAE {self.sae.name!r} do not record its site; give sae_site="
                )
            names = site_names(full_name(self.sae.site))
        available = [name for name in names if name in sites.recordable or name in sites.synonyms]
        available = [site.name for site in stored if site.name in available] or available
        selected = sites.select(available[:1] or [self.site or names[0]])
        if len(selected) != 1:
            raise RequestError(f"sae_site {self.site!r} names {len(selected)} sites; give one, such as resid_post.3")
        return selected[0]

    def at(self, site: Site, record: SiteRecord, model: Model, out: Path) -> EncodedSite:
        """Returns the encoded site.

        Args:
            site: The site of the model.
            record: Its record in the store.
            model: The model.
            out: Path of the store.

        Raises:
            RequestError: The SAE has another width or, unless forced, another site or model.
        """
        names = ("sae_site", "sae_force")
        check_fit(self.sae, record, model, out, force=self.force, arguments=names, trained_on=self.sae.site)
        return EncodedSite(self, site, record)


@dataclass(frozen=True)
class EncodedSite:
    """A site of a recording whose features are extracted. Create it with `RecordedFeatures.at`."""

    features: RecordedFeatures
    site: Site
    record: SiteRecord

    @property
    def label(self) -> str:
        """Description for the manifest of a store that has the features in place of the site's activations."""
        sae = self.features.sae
        return f"{self.record.label} by {sae.name} ({sae.fingerprint()[:12]})"

    def pack(self, path: Path) -> PackedEncodedSite:
        """Returns what other processes need to encode the site; saves the SAE beside the features of the store."""
        features = self.features
        folder = partial_path(self._target(path))
        return PackedEncodedSite(save_sae(features.sae, folder), self.record, features.dtype, features.force)

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

    def encoder(self, path: Path, manifest: Manifest) -> Callable[[int, Tensor, Sequence[int]], None]:
        """Returns the function that encodes the rows of a segment and commits their features.

        It takes the number of the segment's first row, its rows and the lengths of its sequences, and raises DataError
        with the row if that, or its features, are not finite.
        """
        encoding = self._encoding(Store(path.absolute(), manifest), show_progress=False)
        segments = segment_folder(self._target(path))

        def write(first: int, rows: Float[Tensor, "row ..."], lengths: Sequence[int]) -> None:
            finite = rows.isfinite().flatten(1).all(1)
            if not finite.all():
                row = first + int((~finite).nonzero()[0])
                raise DataError(
                    f"row {row} of {self.record.label} is not finite in the model's forward pass; load the model in "
                    "another dtype"
                )
            segments.write((first, first + len(rows)), encoding.encode_rows(first, rows, lengths))

        return write

    def finish(self, store: Store, workers: Workers | None = None, show_progress: bool = True) -> None:
        """Merges and indexes the features of a complete recording, or extracts them if the store has the site."""
        settings, target = self.features, self._target(store.path)
        shared = workers is not None and workers.shared
        if any(site.name == self.record.name for site in store.sites):
            extract_features(
                store,
                settings.sae,
                self.record.name,
                dtype=settings.dtype,
                force=settings.force,
                workers=None if shared else workers,  # the other processes of the recording may have ended
                show_progress=show_progress,
            )
            return
        planned, request = self._planned(store.manifest), self._request(store.manifest.fingerprint, store.rows)
        with exclusive_turn(target, shared):
            started = replace_fingerprint(target, planned.store_fingerprint, request.store_fingerprint)
        if store.rows and not started:
            raise self._without_features(store.path, store.rows)
        make_features(self._encoding(store, show_progress), target, request, workers)

    def _encoding(self, store: Store, show_progress: bool) -> StoreEncoder:
        """The encoding of an array that is not stored: only rows in memory can be encoded."""
        return StoreEncoder(ActivationArray(store, self.record), self.features.sae, show_progress=show_progress)

    def _target(self, store: Path) -> Path:
        return target_path(store.absolute(), self.record, self.features.sae.name)

    def _planned(self, manifest: Manifest) -> ExtractionRecord:
        """The request while the store is recorded, with the fingerprint of the planned store."""
        return self._request(manifest.without_segments.fingerprint, manifest.planned_rows)

    def _request(self, fingerprint: str, rows: int) -> ExtractionRecord:
        sae = sae_record(self.features.sae, None)
        reads = (SiteFeatures(self.record.name, 0, self.features.sae.d_sae),)
        return extraction_record(sae, self.record.name, reads, fingerprint, rows, self.features.dtype)

    def _without_features(self, store: Path, rows: int) -> RequestError:
        return RequestError(
            f"{store} has {rows:,} rows that were recorded without features of SAE {self.features.sae.name!r} and "
            f"without {self.record.label}; choose another out"
        )


@dataclass(frozen=True)
class PackedEncodedSite:
    """An `EncodedSite` sent to other processes, with its SAE saved in files."""

    sae: SavedSae
    record: SiteRecord
    dtype: str
    force: bool

    def unpack(self, device: str, sites: SiteMap) -> EncodedSite:
        """Returns the site with its SAE on `device`, for a model with these sites."""
        features = RecordedFeatures(self.sae.load(device), self.record.name, self.dtype, self.force)
        return EncodedSite(features, features.select_site(sites), self.record)


def _span(segment: PlannedSegment) -> Span:
    return segment.first_row, segment.first_row + segment.rows
