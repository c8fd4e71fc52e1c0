"""One table of the results of one probe on several models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from workbench.io.errors import RequestError
from workbench.results.result import Result

if TYPE_CHECKING:
    import pandas as pd

_PLACE = ("device",)  # settings that say where something was computed, and change no number


def combine(results: Sequence[Result], names: Sequence[str] | None = None) -> pd.DataFrame:
    """Returns the tables of several results of one probe below each other, with a first column `model`.

    Args:
        results: Results of the same probe with the same settings; the device may differ.
        names: A name for each result, in the column `model`. None: the models' names; of results whose models have the
            same name, such as checkpoints, with the store's name behind it.

    Raises:
        RequestError: Results of different probes or settings, or two of the same model and store; the text names what
            differs.
    """
    import pandas as pd  # seconds

    if isinstance(results, Result):
        results = (results,)
    if not results:
        raise RequestError("results is empty; give one or more")
    labels = _labels(results) if names is None else list(names)
    if len(labels) != len(results) or len(set(labels)) < len(labels):
        raise RequestError(f"names: {len(results)} different names are needed, one for each result, not {labels}")
    first, known = results[0], _settings(results[0])
    for label, later_result in zip(labels[1:], results[1:], strict=True):
        if later_result.probe != first.probe:
            raise RequestError(
                f"results are of different probes: {labels[0]} of {first.probe}, {label} of {later_result.probe}; "
                "combine results of one probe"
            )
        present = _settings(later_result)
        for name in dict.fromkeys((*known, *present)):
            if known.get(name) != present.get(name):
                raise RequestError(
                    f"results have different settings: {name} is {known.get(name)!r} for {labels[0]} and "
                    f"{present.get(name)!r} for {label}; run {first.probe} with the same settings"
                )
    tables = []
    for label, result in zip(labels, results, strict=True):
        table = result.table.rename(columns={"model": "model_of_row"}).copy()
        table.insert(0, "model", label)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _labels(results: Sequence[Result]) -> list[str]:
    models = [str(result.provenance["model"]) for result in results]
    labels = [
        model if models.count(model) == 1 else f"{model} ({result.provenance['store']})"
        for model, result in zip(models, results, strict=True)
    ]
    for label in labels:
        if labels.count(label) > 1:
            raise RequestError(f"results: {labels.count(label)} are of {label}; give each a name in names=")
    return labels


def _settings(result: Result) -> dict[str, Any]:
    """Settings as JSON has them, those that an earlier version did not have with their defaults."""
    settings = {name: _plain(value) for name, value in result.provenance["settings"].items() if name not in _PLACE}
    try:
        declared: Any = fields(result.maker())  # pyright: ignore[reportArgumentType]  # a dataclass
    except (RequestError, TypeError):  # a probe that is not installed, or an experiment
        return settings
    defaults = {
        setting.name: setting.default
        for setting in declared
        if setting.default is not MISSING and setting.name not in _PLACE
    }
    return {name: _plain(value) for name, value in defaults.items()} | settings


def _plain(value: Any) -> Any:
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
