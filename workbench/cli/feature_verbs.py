"""Verbs of sparse features: features, labels, metrics, top."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from workbench.cli.arguments import Parallel
from workbench.cli.options import Positional
from workbench.cli.terminal import print_frame, print_plain
from workbench.io.errors import RequestError
from workbench.io.files import check_new_folder, check_writable

if TYPE_CHECKING:
    from workbench.features.feature_store import Features as FeatureStore
    from workbench.sae.autoencoder import Sae
    from workbench.store.reader import Store


@dataclass(frozen=True)
class Features:
    """Extract the sparse features of a store with an SAE."""

    after_interrupt = "; encoded rows are kept, and the same command resumes"

    store: Positional[Path]
    """Store to read."""
    sae: str
    """Folder or file of an autoencoder (docs/features.md lists the formats), a release known to SAELens, demo, or
    neurons: those of the MLP at --site mlp_post.N, as a dictionary."""
    sae_id: str | None = None
    """SAE within a release, or path within a folder of several."""
    site: str | None = None
    """Site that the SAE reads; of several, with commas between. Default: those it was trained on."""
    name: str | None = None
    """Name of the folder under the store's features/. Default: the site and the name of the SAE."""
    out: Path | None = None
    """Folder to write instead, outside the store."""
    dtype: Literal["float32", "float16"] = "float32"
    """Stored type of the feature activations."""
    sparsity: Literal["sae", "topk", "mutual-choice", "feature-choice"] = "sae"
    """Pre-activations to keep: those of the SAE's activation function, or the k largest of each row, of all rows, or of
    each feature."""
    k: int | None = None
    """Mean number of active features per row (token); required unless --sparsity is sae."""
    device: str | None = None
    """cpu, cuda, cuda:1, ... Default: the GPU if there is one."""
    index_memory: int = 256
    """Megabytes of memory in which the index by feature is built."""
    force: bool = False
    """Use an SAE that was trained on another site or model."""
    model: str | None = None
    """Folder or hub id of the recorded model, for --sae neurons. Default: the name in the store."""
    parallel: Parallel = field(default_factory=Parallel)

    def run(self) -> int:
        """Extracts the features of an SAE from a store."""
        from workbench.store.manifest import read_manifest

        read_manifest(self.store)  # a wrong path is refused before torch and SAELens are loaded
        if (self.sparsity == "sae") != (self.k is None):
            raise RequestError(f"--sparsity {self.sparsity} {'needs a' if self.k is None else 'takes no'} --k")
        from workbench.features.extract import extract_features  # seconds: torch, SAELens
        from workbench.sae.load import load_sae
        from workbench.sae.sparsity import SPARSITY_RULES
        from workbench.store.reader import open_store

        if self.out is not None and not self.out.exists():  # what exists is given back, also from a read-only disk
            check_writable(self.out)
        sparsity = None if self.k is None else SPARSITY_RULES[self.sparsity](self.k)
        workers, device = self.parallel.workers_and_device(self.device)
        store = open_store(self.store)
        sae = self._neurons(store, device) if self.sae == "neurons" else load_sae(self.sae, self.sae_id, device=device)
        features = extract_features(
            store,
            sae,
            self.site,
            name=self.name,
            out=self.out,
            dtype=self.dtype,
            sparsity=sparsity,
            index_memory=self.index_memory,
            force=self.force,
            workers=workers,
        )
        if features is None:
            print_plain("this share of the rows is encoded; the last process of the job writes the features")
            return 0
        never = int((features.counts == 0).sum())
        print_plain(f"{features}, {never:,} never active\nfeatures  {features.path}")
        if len(features.labels):
            print_labels(features)
        return 0

    def _neurons(self, store: Store, device: str | None) -> Sae:
        """The neurons of the layer that --site names."""
        from workbench.model.reload import recorded_model  # seconds: torch
        from workbench.sae.neuron_dictionary import neuron_dictionary

        kind, _, layer = (self.site or "").rpartition(".")
        if kind != "mlp_post" or not layer.isdecimal():
            raise RequestError(f"--sae neurons needs the neurons' site: give --site mlp_post.3, not {self.site}")
        return neuron_dictionary(recorded_model(store, self.model, device), int(layer))


@dataclass(frozen=True)
class Labels:
    """Import descriptions and scores of features from delphi, Neuronpedia or a table; top and pages show them."""

    features: Positional[Path]
    """Folder that `workbench features` printed, or a store that has one."""
    labels: Positional[Path]
    """Folder of delphi, export of Neuronpedia, or CSV, JSON or Parquet file with a column feature."""
    source: str | None = None
    """SAE to take from files of several: a hookpoint of delphi, a source of Neuronpedia."""
    replace: bool = False
    """Replace columns that the features have already."""

    def run(self) -> int:
        """Imports labels and prints what the features have then."""
        from workbench.features.feature_store import open_features  # seconds: pandas
        from workbench.features.label_files import import_labels

        features = open_features(self.features)
        features = import_labels(features, self.labels, source=self.source, replace=self.replace)
        print_labels(features)
        return 0


def print_labels(features: FeatureStore) -> None:
    """Prints the number of labelled features and the columns of their labels."""
    names = ", ".join(features.labels.columns)
    print_plain(f"labels    {len(features.labels):,} of {features.shape[1]:,} features: {names}")


@dataclass(frozen=True)
class Metrics:
    """Measure how well an SAE fits the activations of a store and, with --model, what it changes in the predictions."""

    store: Positional[Path]
    """Store to read."""
    sae: str
    """Folder or file of an autoencoder (docs/features.md lists the formats), a release known to SAELens, or demo."""
    sae_id: str | None = None
    """SAE within a release, or path within a folder of several."""
    site: str | None = None
    """Site that the SAE reads; of several, with commas between. Default: those it was trained on."""
    model: str | None = None
    """Recorded model, a local directory or hub id: adds cross-entropy and KL divergence with the reconstruction."""
    rows: str | None = None
    """SQL predicate on the tokens that are evaluated. Default: "NOT is_special"."""
    resamples: int = 1000
    """Number of resamples for the intervals."""
    seed: int = 0
    """Random seed of the resamples."""
    device: str | None = None
    """cpu, cuda, cuda:1, ... Default: the GPU if there is one."""
    force: bool = False
    """Use an SAE that was trained on another site or model."""
    allow_nonfinite: bool = False
    """Leave out and count rows with NaN or infinite values, instead of refusing the store."""
    out: Path | None = None
    """Folder for the tables (CSV): metrics, and the density of every feature."""

    def run(self) -> int:
        """Prints the metrics of an SAE with their intervals."""
        from workbench.store.manifest import read_manifest

        read_manifest(self.store)  # a wrong path is refused before torch and SAELens are loaded
        from workbench.model.reload import recorded_model  # seconds: torch
        from workbench.sae.load import load_sae
        from workbench.sae.metrics import sae_metrics
        from workbench.store.reader import open_store

        if self.out is not None:
            check_new_folder(self.out)
        store = open_store(self.store)
        metrics = sae_metrics(
            store,
            load_sae(self.sae, self.sae_id, device=self.device),
            self.site,
            model=None if self.model is None else recorded_model(store, self.model, self.device),
            rows=self.rows,
            force=self.force,
            allow_nonfinite=self.allow_nonfinite,
            resamples=self.resamples,
            seed=self.seed,
        )
        print_frame(metrics.table)
        tokens = "" if metrics.loss is None else f", {metrics.loss.tokens:,} predicted tokens, losses and KL in nats"
        print_plain(f"{metrics.rows:,} rows of {metrics.documents:,} documents{tokens}; low, high: 95 % CI")
        for note in metrics.notes:
            print_plain(f"Note: {note}")
        if self.out is not None:
            print_plain(f"tables  {metrics.save(self.out)}")
        return 0


@dataclass(frozen=True)
class Top:
    """List the tokens on which a feature is most active, or write an HTML page about the feature."""

    features: Positional[Path]
    """Folder that `workbench features` printed, or a store that has one."""
    feature: Positional[int]
    """Id of the feature."""
    k: int = 20
    """Maximum number of tokens."""
    context: int | None = None
    """Tokens of context on either side. Default: 5; on a page 20."""
    where: str | None = None
    """SQL predicate on the tokens, such as "NOT is_special"."""
    page: Path | None = None
    """HTML page to write instead: contexts, histogram, features active on the same tokens."""
    sae: str | None = None
    """SAE of the features; adds promoted tokens and nearest features to the page."""
    sae_id: str | None = None
    """SAE within a release, or path within a folder of several."""

    def run(self) -> int:
        """Prints a feature's strongest activations, or writes its page."""
        if self.page is None and (self.sae or self.sae_id):
            raise RequestError("--sae is used on the page alone; give --page too, or leave --sae out")
        if self.page is not None and self.where is not None:
            raise RequestError("--where selects among the listed tokens; give --where or --page, not both")
        if self.sae is None and self.sae_id is not None:
            raise RequestError("--sae-id chooses one of several SAEs; give --sae too")
        from workbench.features.feature_store import open_features  # seconds: pandas

        features = open_features(self.features)
        return self._list(features) if self.page is None else self._write_page(features, self.page)

    def _list(self, features: FeatureStore) -> int:
        from workbench.features.labels import title_of

        table = features.top(self.feature, self.k, 5 if self.context is None else self.context, self.where)
        if len(table):
            print_frame(table, limit=80)
        active = int(features.counts[self.feature])
        note = f", {len(table)} shown" if len(table) < active else ""
        if self.feature in features.labels.index:
            print_plain(title_of(self.feature, features.labels))
        print_plain(f"active on {active:,} of {len(features):,} rows{note}")
        if len(features.record.reads) > 1:
            print_plain(f"reads {', '.join(features.sites_of(self.feature))}")
        return 0

    def _write_page(self, features: FeatureStore, page: Path) -> int:
        from workbench.pages.feature_page import feature_page  # seconds: plotly, torch
        from workbench.sae.load import load_sae

        check_writable(page, "page")
        features.rows_of(self.feature)  # a wrong number is refused before SAELens is loaded
        sae = None if self.sae is None else load_sae(self.sae, self.sae_id, device="cpu")
        context = 20 if self.context is None else self.context
        print_plain(f"page  {feature_page(features, self.feature, page, sae=sae, k=self.k, context=context)}")
        return 0
