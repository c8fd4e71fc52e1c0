"""Import of labels of features from the files of delphi and Neuronpedia, and from tables."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from workbench.corpus.file_rows import SUFFIXES, Columns, file_rows, suffix
from workbench.corpus.tokenizer import replace_surrogates
from workbench.features.feature_store import Features, open_features
from workbench.features.labels import LABELS, labels_table, save_labels
from workbench.io.checks import as_path, check_kind
from workbench.io.counted import counted
from workbench.io.errors import RequestError, nearest, shown
from workbench.io.files import check_writable, natural_order
from workbench.io.parse import load_json
from workbench.io.reading import read_file
from workbench.sae.site import site_names

_LOG = logging.getLogger(__name__)

_IDS = ("feature", "index", "feature_id", "feature_index", "latent", "latent_id", "id")
"""Columns that hold the number of the feature."""
_SOURCES = ("layer", "source", "sae_id", "module")
"""Columns that tell the autoencoders of one file apart."""
_DELPHI = re.compile(r"(.*?)[_.]?(?:latent|feature)_?(\d+)")
_LAYER = re.compile(r"^(\d+)-|(?:^|[._])(?:layers?|h|blocks)[._](\d+)(?:[._]|$)")
"""Layer in the name of an autoencoder: Neuronpedia's 8-res-jb, delphi's model.layers.8.mlp."""
_NEURONPEDIA = {"explanationModelName": "explained_by", "typeName": "explanation_type"}

_EXPECTED = (
    "give a folder of delphi, an export of Neuronpedia, or a .csv, .json, .jsonl or .parquet file with a column feature"
)

_Line = tuple[str, str, int, dict[str, Any]]
"""Place, autoencoder, feature, and values by column."""


def import_labels(
    features: Features, path: str | os.PathLike[str], *, source: str | None = None, replace: bool = False
) -> Features:
    """Saves descriptions and scores of features beside them, and returns the features with these labels.

    `features.labels` then has them as columns, and tables, pages and the command line name features by them. Files:

    - A folder that delphi wrote: `explanations` gives description; `scores/NAME` gives NAME_accuracy, balanced over
      active and inactive examples (value under the null 0.5), and NAME_f1 (always "active": 2p / (1 + p) for a share p
      of active examples), or NAME for a single number.
    - An export of Neuronpedia, a file or a folder of files: description, explained_by, explanation_type, and a column
      for each kind of score.
    - Any .csv, .tsv, .json, .jsonl or .parquet (also .gz): one line a feature, with its number in a column named
      feature, index, feature_id, latent or id; other columns of text and numbers are kept under their names.

    Of several explanations of a feature the first is kept. Labels are text: nothing in them becomes markup.

    Args:
        features: The features; `labels.json` is written into their folder.
        path: The file or folder.
        source: The autoencoder to take, where the files have several: delphi's hookpoint, Neuronpedia's source.
        replace: Replace columns that are there already.

    Raises:
        RequestError: Files of another form, several autoencoders without `source`, a feature that does not exist, or
            columns that are there already.
        DataError: A damaged file.
    """
    check_kind("features", features, Features, "opened features, such as wb.open_features('runs/x.acts')")
    path = as_path("path", path)
    check_writable(features.path / LABELS, "features")
    columns = read_labels(path, features.shape[1], source, features.record.site)
    saved = features.labels
    twice = [name for name in columns if name in saved.columns]
    if twice and not replace:
        raise RequestError(f"labels: {', '.join(twice)} of these features is there already; give replace=True")
    saved_columns = {name: saved[name].dropna().to_dict() for name in saved.columns if name not in twice}
    sources = saved.attrs["sources"] | dict.fromkeys(columns, path.name)
    save_labels(features.path, features.record.sae.fingerprint, labels_table(saved_columns | columns, sources))
    return open_features(features.path, features.store)


def read_labels(
    path: Path, features: int, source: str | None = None, site: str | None = None
) -> dict[str, dict[int, Any]]:
    """Returns the labels in files as values by column and feature; arguments and errors as for `import_labels`.

    Warns where the files name an autoencoder of another layer than `site`.
    """
    lines = list(_lines(path))
    if not lines:
        raise RequestError(f"labels: {str(path)!r} has none; {_EXPECTED}")
    known = sorted({module for _, module, _, _ in lines})
    if source is None and len(known) > 1:
        raise RequestError(
            f"labels: {str(path)!r} has several autoencoders; choose one with source: {_first_names(known)}"
        )
    if source is not None and known == [""]:
        raise RequestError(f"labels: {str(path)!r} names no autoencoders; leave source out")
    if source is not None and source not in known:
        raise RequestError(
            f"labels: {str(path)!r} has no source {source!r}, but {_first_names(known)}{nearest(source, known)}"
        )
    _warn_of_other_layer(known[0] if source is None else source, site)
    columns: dict[str, dict[int, Any]] = {}
    repeated = replaced = 0
    for place, module, feature, values in lines:
        if source is not None and module != source:
            continue
        if not 0 <= feature < features:
            raise RequestError(
                f"labels: {place}: feature {feature} does not exist, the SAE has features 0 to {features - 1}; give "
                "the labels of this SAE"
            )
        for name, value in values.items():
            if (number := _number(value)) is not None and math.isinf(number):
                raise RequestError(f"labels: {place}: {name} is {str(value)[:40]}; give a finite number, or none")
            if isinstance(value, str):  # bytes that are not UTF-8 could not be written or shown
                value, wrong = replace_surrogates(value)
                replaced += wrong > 0
            repeated += columns.setdefault(name, {}).setdefault(feature, value) != value
    if not columns:
        raise RequestError(f"labels: {str(path)!r} has numbers of features, but nothing about them; {_EXPECTED}")
    if replaced:
        _LOG.warning(f"labels: {counted(replaced, 'text')} not UTF-8 in {str(path)!r}; their bytes are shown as \ufffd")
    if repeated:
        _LOG.warning(f"labels: {repeated:,} further values of labelled features are left out, the first is kept")
    return columns


def _warn_of_other_layer(module: str, site: str | None) -> None:
    named = _LAYER.search(module)
    layers = [match[1] for name in site_names(site or "") if (match := re.match(r"blocks\.(\d+)\.", name))]
    if named and layers and (named[1] or named[2]) not in layers:
        _LOG.warning(
            f"labels: the files are of {module!r}, and these features of {site}; give the labels of this SAE, or "
            "ignore this if layers are counted in another way"
        )


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _lines(path: Path) -> Iterator[_Line]:
    """The labels of a file or folder, in order."""
    if not path.exists():
        raise RequestError(f"labels: {str(path)!r} does not exist; give a file or a folder")
    if path.is_file():
        yield from _rows(path)
        return
    parts = [path / name for name in ("explanations", "scores") if (path / name).is_dir()]
    texts = [file for folder in parts or [path] for file in _files(folder, (".txt",))]
    if texts:
        yield from _delphi(path, texts)
        return
    files = [file for file in _files(path, SUFFIXES) if suffix(file) != ".txt"]
    if not files:
        raise RequestError(f"labels: {str(path)!r} has no file of labels; {_EXPECTED}")
    for file in files:
        yield from _rows(file)


def _files(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """Files in a folder and its folders, batch-2 before batch-10."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name.lower().endswith(endings)]
    return sorted(files, key=lambda file: natural_order(str(file)))


# ---- delphi -----------------------------------------------------------------------------------------------


def _delphi(root: Path, texts: list[Path]) -> Iterator[_Line]:
    """Explanations and scores that delphi wrote: HOOKPOINT_latentN.txt, JSON of one explanation or of its examples."""
    for file in texts:
        match = _DELPHI.fullmatch(file.stem)
        if match is None:
            raise RequestError(f"labels: {str(file)!r} is not named as delphi does, HOOKPOINT_latentN.txt; {_EXPECTED}")
        try:
            value = load_json(read_file(file, "run delphi again"), finite=False)
        except ValueError as error:
            raise RequestError(
                f"labels: {str(file)!r} is not JSON ({error}), as delphi writes it; run it again"
            ) from None
        yield str(file), match[1].rstrip("/"), int(match[2]), _delphi_values(file, value)


def _delphi_values(file: Path, value: Any) -> dict[str, Any]:
    name = file.parent.name
    if isinstance(value, list) and value and isinstance(value[0], str):
        value = value[0]  # the best of several explanations
    if isinstance(value, str):
        return {"description": value} if value else {}
    if (number := _number(value)) is not None:
        return {name: number}
    examples = [example for example in value if isinstance(example, dict)] if isinstance(value, list) else []
    if not any("prediction" in example or "final_score" in example for example in examples):
        raise RequestError(f"labels: {str(file)!r} has neither an explanation nor predictions of examples; {_EXPECTED}")
    if (final := _number(examples[0].get("final_score"))) is not None:
        return {name: final}
    known = [(_first(example, "activating", "ground_truth"), example.get("prediction")) for example in examples]
    if wrong := [pair for pair in known if any(not isinstance(part, bool | int | float | NoneType) for part in pair)]:
        raise RequestError(
            f"labels: {str(file)!r}: an example has {shown(wrong[0])} as truth and prediction, expected True or False; "
            "run delphi again"
        )
    pairs = [(bool(truth), float(guess) >= 0.5) for truth, guess in known if truth is not None and guess is not None]
    return _scores(name, pairs) if pairs else {}  # none where all requests of delphi failed


def _scores(name: str, pairs: list[tuple[bool, bool]]) -> dict[str, Any]:
    """Balanced accuracy and F1 of predictions (active, predicted)."""
    hits = sum(truth and guess for truth, guess in pairs)
    active, guessed = sum(truth for truth, _ in pairs), sum(guess for _, guess in pairs)
    refused = sum(not truth and not guess for truth, guess in pairs)
    shares = [part / of for part, of in ((hits, active), (refused, len(pairs) - active)) if of]
    f1 = 2 * hits / (active + guessed) if active + guessed else 0.0
    return {f"{name}_accuracy": sum(shares) / len(shares), f"{name}_f1": f1}


def _first(example: Mapping[str, Any], *names: str) -> Any:
    return next((example[name] for name in names if example.get(name) is not None), None)


# ---- tables -----------------------------------------------------------------------------------------------


def _rows(file: Path) -> Iterator[_Line]:
    """The labels of a table, or of an export of Neuronpedia."""
    if suffix(file) not in SUFFIXES or suffix(file).removesuffix(".gz") == ".txt":
        raise RequestError(f"labels: {str(file)!r} is not of a known form; {_EXPECTED}")
    try:
        for place, row in file_rows(file, Columns()):
            yield from _row(place, row)
    except RequestError as error:
        raise RequestError(f"labels: {str(error).removeprefix('texts: ').removeprefix('labels: ')}") from None


def _row(place: str, row: Any) -> Iterator[_Line]:
    if not isinstance(row, dict):
        raise RequestError(f"{place}: no object with the number of a feature; {_EXPECTED}")
    lowered = {str(name).strip().lower(): name for name in row}
    named = [_name(name) for name in row]
    if twice := [name for name in named if named.count(name) > 1]:
        raise RequestError(f"{place}: two columns are called {twice[0]!r}; rename one")
    column = next((lowered[name] for name in _IDS if name in lowered), None)
    if column is None:
        raise RequestError(
            f"{place}: no column {_first_names(list(_IDS))}, but {_first_names(list(map(str, row)))}; rename one"
        )
    feature = row[column].strip() if isinstance(row[column], str) else row[column]
    if isinstance(feature, float) and feature.is_integer():
        feature = int(feature)
    if not re.fullmatch(r"\d{1,18}", str(feature)) or isinstance(feature, bool):
        found = "empty" if feature is None or feature == "" else repr(str(feature)[:40])
        raise RequestError(f"{place}: {column.strip()} is {found}, no number of a feature; give a whole number")
    module = str(_first(row, *(lowered[name] for name in _SOURCES if name in lowered)) or "")
    of_neuronpedia = "modelId" in row or isinstance(row.get("explanations"), list)
    explanations = row.get("explanations")
    for explanation in explanations if isinstance(explanations, list) else [row]:
        if not isinstance(explanation, dict):
            raise RequestError(f"{place}: an explanation is no object; export it again")
        values = _explained(explanation) if of_neuronpedia else _cells(row, column)
        yield place, module, int(feature), values


def _explained(explanation: Mapping[str, Any]) -> dict[str, Any]:
    """Description and scores of one explanation of Neuronpedia."""
    values = {"description": explanation.get("description")}
    values |= {name: explanation.get(key) for key, name in _NEURONPEDIA.items()}
    scores = explanation.get("scores")
    for score in scores if isinstance(scores, list) else ():
        if isinstance(score, dict) and (number := _number(score.get("value"))) is not None:
            values.setdefault(str(score.get("explanationScoreTypeName") or "score"), number)
    return {name: value for name, value in values.items() if isinstance(value, str | float) and value != ""}


def _cells(row: Mapping[Any, Any], column: Any) -> dict[str, Any]:
    """Texts and numbers of a line, besides the number of the feature."""
    cells = {
        _name(name): value for name, value in row.items() if name != column and isinstance(value, str | int | float)
    }
    return {name: value for name, value in cells.items() if value != "" and value == value}


def _name(heading: Any) -> str:
    """Name of a column; headings are written with spaces around them and capitals."""
    name = str(heading).strip()
    return name.lower() if name.lower() == "description" else name


def _number(value: Any) -> float | None:
    """A number as such, infinite beyond the range of 64 bits; None for NaN, which is none, and anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool) or value != value:
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
