"""Verbs that ask about features and activations: coactive, contributions, effect, match, patchscope, sparse-probe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from workbench.cli.options import Positional
from workbench.cli.terminal import print_frame, print_plain
from workbench.io.checks import check_fields
from workbench.io.errors import RequestError
from workbench.io.files import check_new_folder, check_writable_file
from workbench.io.saving import save_text, save_texts

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def _figure(figure: Figure, out: Path) -> None:
    from workbench.pages.figure_export import export  # seconds: plotly

    export(figure, out / "figure", formats=("html",))


@dataclass(frozen=True)
class Coactive:
    """List the pairs of features that are most often active on the same tokens, compared with independence."""

    features: Positional[Path]
    """Folder that `workbench features` printed, or a store that has one."""
    least: int = 20
    """Smallest number of tokens on which both are active."""
    k: int = 20
    """Largest number of pairs."""
    by: Literal["jaccard", "pmi", "both"] = "jaccard"
    """Order of the pairs: tokens with both / tokens with either, pointwise mutual information, tokens with both."""
    out: Path | None = None
    """Folder for the table (CSV) and the heat map (HTML)."""

    def run(self) -> int:
        """Prints the pairs."""
        from workbench.features.feature_store import open_features  # seconds: pandas
        from workbench.features.pairs import coactive_pairs

        if self.out is not None:
            check_new_folder(self.out)
        table = coactive_pairs(open_features(self.features), least=self.least, k=self.k, by=self.by)
        print_frame(table)
        print_plain(
            f"{len(table):,} of {table.attrs['pairs']:,} pairs that are active on {self.least:,} tokens or more"
        )
        if self.out is not None:
            from workbench.figures.feature_questions import pairs_figure  # seconds: plotly
            from workbench.io.spreadsheet import csv_text

            save_texts(self.out, {"pairs.csv": csv_text(table)})
            _figure(pairs_figure(table, self.by), self.out)
            print_plain(f"table  {self.out}")
        return 0


@dataclass(frozen=True)
class Contributions:
    """List what each active feature of a token adds directly to the logits after it."""

    features: Positional[Path]
    """Folder that `workbench features` printed, or a store that has one."""
    row: Positional[int]
    """Id of the row (token)."""
    sae: str
    """SAE of the features: a directory, a release known to SAELens, or demo."""
    sae_id: str | None = None
    """SAE within a release, or path within a folder of several."""
    tokens: tuple[str, ...] = ()
    """Tokens whose logits are decomposed, as text, or as ids if they are digits. Default: the most probable one."""
    k: int = 20
    """Largest number of features for each token; the others are one line."""

    def run(self) -> int:
        """Prints the terms of the logits."""
        from workbench.analysis.logit_contributions import feature_contributions  # seconds: torch
        from workbench.features.feature_store import open_features
        from workbench.sae.load import load_sae

        features = open_features(self.features)
        tokens = [int(token) if token.isdecimal() else token for token in self.tokens] or None
        sae = load_sae(self.sae, self.sae_id, device="cpu")
        table = feature_contributions(features, sae, self.row, tokens, k=self.k)
        print_frame(table.astype(object).where(table.notna(), None))
        for token_id in dict.fromkeys(table["token_id"]):
            part = table.loc[table["token_id"] == token_id]
            logit, relative = (f"{part[name].sum():.4g}" for name in ("logit", "relative"))
            print_plain(f"logit of {part['token'].iloc[0]!r}: {logit}, {relative} above the mean of the vocabulary")
        return 0


@dataclass(frozen=True)
class Effect:
    """Ablate, clamp or add to a feature while the model runs: effect on loss and logits, beside random features."""

    features: Positional[Path]
    """Folder that `workbench features` printed, or a store that has one."""
    feature: Positional[int]
    """Id of the feature."""
    sae: str
    """SAE of the features: a directory, a release known to SAELens, or demo."""
    sae_id: str | None = None
    """SAE within a release, or path within a folder of several."""
    model: str | None = None
    """Recorded model, a local directory or hub id. Default: the name in the store."""
    op: Literal["ablate", "clamp", "add"] = "ablate"
    """Set the activation to 0, set it to the value, or add the value to it."""
    value: float | None = None
    """In units of the feature's activation; required unless --op is ablate."""
    rows: str | None = None
    """SQL predicate on the tokens at which the feature is changed. Default: "NOT is_special"."""
    controls: int = 3
    """Number of random features that are active on about as many tokens."""
    resamples: int = 1000
    """Number of resamples for the intervals."""
    seed: int = 0
    """Random seed of controls and resamples."""
    device: str | None = None
    """cpu, cuda, cuda:1, ... Default: the GPU if there is one."""
    out: Path | None = None
    """Folder for the tables (CSV) and the figure (HTML)."""

    def run(self) -> int:
        """Prints the effect of changing a feature, with its intervals."""
        from workbench.analysis.feature_effect import feature_effect  # seconds: torch
        from workbench.features.feature_store import open_features
        from workbench.features.labels import title_of
        from workbench.model.reload import recorded_model
        from workbench.sae.load import load_sae

        if self.out is not None:
            check_new_folder(self.out)
        features = open_features(self.features)
        features.rows_of(self.feature)  # a wrong number is refused before the model is loaded
        effect = feature_effect(
            features,
            load_sae(self.sae, self.sae_id, device=self.device),
            self.feature,
            self.op,
            self.value,
            model=recorded_model(features.store, self.model, self.device),
            rows=self.rows,
            controls=self.controls,
            resamples=self.resamples,
            seed=self.seed,
        )
        print_frame(effect.table)
        print_plain("")
        print_frame(effect.changed)
        print_plain("")
        print_frame(effect.logits)
        if self.feature in features.labels.index:
            print_plain(title_of(self.feature, features.labels))
        print_plain(f"{effect.change}; {effect.rows:,} rows of {effect.documents:,} documents; low, high: 95 % CI")
        if self.out is not None:
            effect.save(self.out)
            _figure(effect.figure(), self.out)
            print_plain(f"tables  {self.out}")
        return 0


@dataclass(frozen=True)
class Match:
    """Match the features of two SAEs over one store by their activations, or find features that have split."""

    features: Positional[Path]
    """Folder of the first features; a line each."""
    other: Positional[Path]
    """Folder of the second features, of the same store."""
    sae: str | None = None
    """SAE of the first features; with --other-sae, adds cosines of decoder directions."""
    sae_id: str | None = None
    """SAE within a release, or within a directory of several."""
    other_sae: str | None = None
    """SAE of the second features."""
    other_sae_id: str | None = None
    """SAE within a release, or within a directory of several."""
    splits: bool = False
    """List the features of the first SAE that contain features of the second one instead."""
    k: int = 20
    """Largest number of lines."""
    out: Path | None = None
    """File for the whole table (CSV)."""

    def run(self) -> int:
        """Prints the matches, most correlated first."""
        from workbench.features.feature_store import open_features  # seconds: pandas, torch
        from workbench.features.matching import feature_splits, match_features
        from workbench.io.spreadsheet import csv_text
        from workbench.sae.load import load_sae

        check_fields(self, "k", at_least=1)
        if self.out is not None:
            check_writable_file(self.out)
        first, second = open_features(self.features), open_features(self.other)
        if self.splits:
            table = feature_splits(first, second)
        else:
            named = ((self.sae, self.sae_id), (self.other_sae, self.other_sae_id))
            saes = [None if name is None else load_sae(name, sae_id, device="cpu") for name, sae_id in named]
            table = match_features(first, second, *saes).sort_values("correlation", ascending=False, kind="stable")
        rows = table.head(self.k).astype(object)
        print_frame(rows.where(rows.notna(), None))
        print_plain(f"{min(self.k, len(table)):,} of {len(table):,} features")
        if self.out is not None:
            save_text(self.out, csv_text(table))
            print_plain(f"table  {self.out}")
        return 0


@dataclass(frozen=True)
class Patchscope:
    """Put recorded activations into a prompt and list what the model says after it, with random ones beside."""

    store: Positional[Path]
    """Store with the activations."""
    site: Positional[str]
    """Recorded site to read, such as resid_post.12."""
    where: str | None = None
    """SQL over the token table: the rows (tokens) to read. Default: all."""
    limit: int = 20
    """Maximum number of rows, from the first selected one on."""
    prompt: str | None = None
    """Prompt that takes the activation. Default: "cat->cat; 1124->1124; hello->hello; ?"."""
    placeholder: str | None = None
    """Part of the prompt whose tokens, at every occurrence, take the activation. Default: its last token."""
    into: str | None = None
    """Site of the prompt that takes the activation. Default: the one that is read."""
    tokens: tuple[str, ...] = ()
    """Tokens, with their leading space, whose log-probability is listed."""
    top_k: int = 5
    """Number of most probable tokens to list."""
    new_tokens: int = 0
    """Number of tokens to generate, greedily."""
    model: str | None = None
    """Recorded model, a local directory or hub id. Default: the name in the store."""
    seed: int = 0
    """Random seed of the random activations."""
    device: str | None = None
    """cpu, cuda, cuda:1, ... Default: the GPU if there is one."""
    out: Path | None = None
    """Folder for the table (CSV), with all columns."""

    def run(self) -> int:
        """Prints what the model says of each row."""
        from workbench.analysis.patchscope import IDENTITY_PROMPT, patchscope  # seconds: torch
        from workbench.io.spreadsheet import csv_text
        from workbench.model.reload import recorded_model
        from workbench.store.reader import open_store

        check_fields(self, "limit", at_least=1, whole=True)
        if self.out is not None:
            check_new_folder(self.out)
        store = open_store(self.store)
        store.require(self.site)  # a wrong site is refused before the model is loaded
        rows = store.where("true" if self.where is None else self.where)
        if not len(rows):
            raise RequestError(f"where={self.where!r} selects no row; choose another condition")
        scope = patchscope(
            rows[: self.limit],
            self.site,
            IDENTITY_PROMPT if self.prompt is None else self.prompt,
            placeholder=self.placeholder,
            into=self.into,
            tokens=self.tokens,
            top_k=self.top_k,
            new_tokens=self.new_tokens,
            model=recorded_model(store, self.model, self.device),
            seed=self.seed,
        )
        print_frame(scope.table if self.new_tokens else scope.table.drop(columns="text"))
        positions = ", ".join(map(str, scope.prompt.positions))
        print_plain(
            f"{min(len(rows), self.limit):,} of {len(rows):,} rows of {scope.source}, put into {scope.into} at "
            f"position{'s' * (len(scope.prompt.positions) > 1)} {positions} of {scope.prompt.text!r}"
        )
        if self.out is not None:
            save_texts(self.out, {"patchscope.csv": csv_text(scope.table)})
            print_plain(f"table  {self.out}")
        return 0


@dataclass(frozen=True)
class SparseProbe:
    """Test how well k features detect each value of a column of the token table, beside shuffled labels."""

    features: Positional[Path]
    """Folder that `workbench features` printed, or a store that has one."""
    labels: Positional[tuple[str, ...]] = ()
    """Columns of the token table. Default: every label that the spans of the texts defined."""
    k: tuple[int, ...] = (1, 2, 5, 10)
    """Numbers of features."""
    least: int = 20
    """Smallest number of tokens of a value."""
    held_out: float = 0.3
    """Share of the documents to test on."""
    resamples: int = 1000
    """Number of resamples for the intervals."""
    seed: int = 0
    """Random seed of split, shuffle and resamples."""
    out: Path | None = None
    """Folder for the table (CSV) and the figure (HTML)."""

    def run(self) -> int:
        """Prints F1 and accuracy of the probes."""
        from workbench.analysis.sparse_probe import sparse_probe  # seconds: pandas, torch
        from workbench.features.feature_store import open_features

        if self.out is not None:
            check_new_folder(self.out)
        probes = sparse_probe(
            open_features(self.features),
            self.labels or None,
            k=self.k,
            least=self.least,
            held_out=self.held_out,
            resamples=self.resamples,
            seed=self.seed,
        )
        columns = ["label", "value", "k", "tokens", "f1", "f1_low", "f1_high", "accuracy", "shuffled_f1", "always_f1"]
        named = [name for name in ("features", "features_description") if name in probes.table]
        print_frame(probes.table.loc[:, [*columns, *named]])
        training, test = probes.documents
        left_out = f"; {probes.left_out} values without tokens in both left out" if probes.left_out else ""
        print_plain(f"{training:,} training and {test:,} test documents{left_out}; low, high: 95 % CI")
        if self.out is not None:
            probes.save(self.out)
            _figure(probes.figure(), self.out)
            print_plain(f"table  {self.out}")
        return 0
