"""Features of a site whose activations are not stored: encoded while the model runs, segment by segment.

The rows of a segment are encoded, and their features committed, before the recorder finishes the segment. So after a
kill there are features of every row that is not recorded again, and those of a segment that is are removed. When all
rows are there the features are merged and indexed as ever.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from workbench.features import extract
from workbench.features.feature_segments import Span, commit, discard, joined, missing
from workbench.io import files
from workbench.io.errors import DataError, RequestError
from workbench.io.parse import to_json
from workbench.io.tasks import Workers
from workbench.sae.encode import NotFinite
from workbench.sae.load import Sae
from workbench.sae.saved import SavedSae, save_sae
from workbench.sae.site import check_fit, not_finite, site_names
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
    """Stored type of the features' activations: float32, or float16 in half the bytes."""
    force: bool = False
    """Use an SAE of another site or model."""

    def __post_init__(self) -> None:
        extract.check_dtype(self.dtype)

    def tap(self, sites: SiteMap, stored: Sequence[Site] = ()) -> Site:
        """The site to read, of a model that has it; of its two names the one that is among `stored`.

        Raises RequestError where the model has none, or the SAE does not say where it was trained.
        """
        wanted = (full_name(self.site),) if self.site else ()
        if not wanted:
            if self.sae.site is None:
                raise RequestError(f"sae_site: SAE {self.sae.name!r} does not say where it was trained; give sae_site=")
            wanted = site_names(full_name(self.sae.site))
        known = [name for name in wanted if name in sites.recordable or name in sites.synonyms]
        known = [site.name for site in stored if site.name in known] or known
        found = sites.select(known[:1] or [self.site or wanted[0]])
        if len(found) != 1:
            raise RequestError(f"sae_site {self.site!r} names {len(found)} sites; give one, such as resid_post.3")
        return found[0]

    def of(self, tap: Site, site: SiteRecord, model: str, out: Path) -> EncodedSite:
        """What encodes `site`, which is at `tap` of the model with this name.

        Raises RequestError where the SAE is of another width or, unless forced, of another site or model.
        """
        check_fit(self.sae, site, model, out, force=self.force, arguments=("sae_site", "sae_force"))
        return EncodedSite(self, tap, site)


@dataclass(frozen=True)
class EncodedSite:
    """A site of a recording, and the features to extract from it. Made by `RecordedFeatures.of`."""

    features: RecordedFeatures
    tap: Site
    site: SiteRecord

    @property
    def label(self) -> str:
        """What the manifest says of a store that has these features in place of the site's activations."""
        sae = self.features.sae
        return f"{self.site.label} by {sae.name} ({sae.fingerprint()[:12]})"

    def pack(self, path: Path) -> PackedEncodedSite:
        """Returns what other processes need to encode the site; saves the SAE beside the features of the store."""
        features = self.features
        return PackedEncodedSite(save_sae(features.sae, self.folder(path)), self.site, features.dtype, features.force)

    @contextmanager
    def opened(
        self,
        path: Path,
        manifest: Manifest,
        own: Sequence[PlannedSegment],
        left: Sequence[PlannedSegment],
        shared: bool,
    ) -> Iterator[None]:
        """Hold the features of a store that is being recorded at `path`, begun or resumed.

        Of the segments `own` of this process those that are `left` will be written, and lose the features that a crash
        may have left of them. Raises RequestError where the others have none.
        """
        target, partial = self._target(path), self.folder(path)
        segments = partial / extract.SEGMENTS
        beyond = (manifest.planned_rows, sys.maxsize)  # of other texts, which came to nothing
        with files.locked(partial, shared=shared):
            try:
                with extract.turn(target, shared):
                    discard(segments, [*map(_span, left), beyond])
                    extract.begin(partial, target, self._planned(manifest), shared)
                    chosen = set(left)
                    finished = [_span(segment) for segment in own if segment not in chosen]
                    if lacking := sum(stop - first for first, stop in missing(segments, finished)):
                        raise self._lacking(path, lacking)
                yield
            except BaseException:
                if not shared:
                    extract.remove_if_empty(partial)
                raise

    def encoder(self, path: Path, manifest: Manifest) -> Callable[[int, Tensor, Sequence[int]], None]:
        """What takes the number of a segment's first row, its rows and the lengths of its sequences, encodes the rows
        and commits their features; it raises DataError, with the row, where they or their features are not finite."""
        made = self._made(Store(path.absolute(), manifest), show_progress=False)
        segments = self.folder(path) / extract.SEGMENTS

        def write(first: int, rows: Float[Tensor, "row ..."], lengths: Sequence[int]) -> None:
            finite = rows.isfinite().flatten(1).all(1)
            if not finite.all():
                row = first + int((~finite).nonzero()[0])
                raise DataError(
                    f"row {row} of {self.site.label} came not finite from the model; one loaded in another dtype may "
                    "not have such rows"
                )
            sequential = self.features.sae.sequential
            step, parts = len(rows) if sequential else extract.BLOCKS * made.encoder.block_rows, []
            for at in range(0, len(rows), step):
                try:
                    found = made.encoder(rows[at : at + step], lengths if sequential else None)
                except NotFinite as error:
                    raise not_finite(made.array, self.features.sae, first + at + error.row, error.features) from None
                parts.append(made.on_the_host(found))
            commit(segments, (first, first + len(rows)), joined(parts))

        return write

    def finish(self, store: Store, workers: Workers | None = None, show_progress: bool = True) -> None:
        """Merge and index the features of a complete recording, or extract them from it where it has the site."""
        asked, target = self.features, self._target(store.path)
        shared = workers is not None and workers.shared
        if any(site.name == self.site.name for site in store.sites):
            extract.extract_features(
                store,
                asked.sae,
                self.site.name,
                dtype=asked.dtype,
                force=asked.force,
                workers=None if shared else workers,  # those that share the recording may have ended
                show_progress=show_progress,
            )
            return
        planned, state = self._planned(store.manifest), self._state(store.manifest.fingerprint, store.rows)
        partial = self.folder(store.path)
        source = partial / extract.STATE
        with extract.turn(target, shared):
            if source.is_file():
                begun = extract.read_state(partial)
                if begun.store_fingerprint == planned.store_fingerprint:
                    begun = replace(begun, store_fingerprint=state.store_fingerprint)
                    files.replace_file(source, to_json(begun).encode())
            elif store.rows and not any((folder / extract.RECORD).is_file() for folder in (target, partial)):
                raise self._lacking(store.path, store.rows)
        extract.finish(self._made(store, show_progress), target, state, workers)

    def folder(self, store: Path) -> Path:
        """Where the features of a store at this path are made."""
        return extract.partial_of(self._target(store))

    def _made(self, store: Store, show_progress: bool) -> extract.Extraction:
        """What an extraction from an array does, of one that only passes: there are no rows to read."""
        array = ActivationArray(store, self.site)
        return extract.Extraction(array, self.features.sae, show_progress=show_progress)

    def _target(self, store: Path) -> Path:
        return extract.target_of(store.absolute(), self.site, self.features.sae.name)

    def _planned(self, manifest: Manifest) -> extract.State:
        """The state while the store is recorded: in place of its fingerprint that of what is planned."""
        return self._state(replace(manifest, segments=()).fingerprint, manifest.planned_rows)

    def _state(self, fingerprint: str, rows: int) -> extract.State:
        record = extract.sae_record(self.features.sae, None)
        return extract.asked_state(record, self.site.name, fingerprint, rows, self.features.dtype)

    def _lacking(self, store: Path, rows: int) -> RequestError:
        return RequestError(
            f"{store} has {rows:,} rows that were recorded without features of SAE {self.features.sae.name!r} and "
            f"without {self.site.label}; choose another out"
        )


@dataclass(frozen=True)
class PackedEncodedSite:
    """An `EncodedSite` on its way to other processes: its SAE is saved in files."""

    sae: SavedSae
    site: SiteRecord
    dtype: str
    force: bool

    def unpack(self, device: str, sites: SiteMap) -> EncodedSite:
        """Returns the site with its SAE on `device`, for a model with these sites."""
        features = RecordedFeatures(self.sae.load(device), self.site.name, self.dtype, self.force)
        return EncodedSite(features, features.tap(sites), self.site)


def _span(segment: PlannedSegment) -> Span:
    return segment.first_row, segment.first_row + segment.rows
