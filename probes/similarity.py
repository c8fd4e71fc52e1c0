"""Similarity of layers: how alike the representations of the same tokens are at two layers, of one model or of two.

    CKA(X, Y) = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)),  K = X X^T, L = Y Y^T

with the unbiased estimator of HSIC (Song et al. 2012), whose mean is 0 for independent rows; CKA does not change with a
rotation of either space or one factor for all of it, and the widths may differ. SVCCA is the mean canonical correlation
of the principal directions that hold 99 % of the variance, at most a tenth as many as rows; it does not change with any
invertible map of those. The overlap of the first principal directions, ‖A^T B‖² / number, asks if both layers use the
same directions of one basis, so it has a meaning within one residual stream only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from workbench import open_store
from workbench.probing import (
    LOST_VARIABLES,
    LayerProbe,
    Model,
    Principal,
    RequestError,
    Result,
    Store,
    Variable,
    check_fields,
    counted,
    dataset,
    label,
    layer_grid,
    matching_rows,
    plain_torch,
    principal,
    selected_rows,
    subspace_overlap,
    svcca,
    unbiased_cka,
    with_note,
)

_LEAST = 20  # rows
_PAIR = ("layer", "other_layer")

VARIABLES = (
    Variable("cka", _PAIR, "1", "unbiased linear CKA of two layers, at most 1", "cka_shuffled"),
    Variable("cka_shuffled", _PAIR, "1", "the same with the rows of the second layer in random order", "0"),
    Variable(
        "svcca", _PAIR, "1", "mean canonical correlation of the kept principal directions, 0 to 1", "svcca_shuffled"
    ),
    Variable("svcca_shuffled", _PAIR, "1", "the same with the rows of the second layer in random order"),
    Variable(
        "overlap",
        _PAIR,
        "1",
        "overlap of the first principal subspaces, 0 to 1; NaN for other widths",
        "overlap_random",
    ),
    Variable("overlap_random", (), "1", "expected overlap of random subspaces, number of directions / d_model"),
    Variable("kept", ("layer",), "directions", "principal directions that SVCCA keeps"),
    Variable("rows", (), "tokens", "tokens that were compared"),
)


@dataclass(frozen=True)
class Similarity(LayerProbe):
    """Compares layers with each other, or with those of another store: unbiased CKA, SVCCA, principal subspaces."""

    name: ClassVar[str] = "similarity"
    needs_model: ClassVar[bool] = False
    sources: ClassVar[tuple[str, ...]] = (
        "Kornblith et al. 2019, arXiv 1905.00414",
        "Song et al. 2012, JMLR 13, eq. 5",
        "Raghu et al. 2017, arXiv 1706.05806",
    )
    variables: ClassVar[tuple[Variable, ...]] = (*VARIABLES, *LOST_VARIABLES)
    controls: ClassVar[Mapping[str, str]] = {
        "shuffled rows": "cka_shuffled and svcca_shuffled: what the measure gives where nothing corresponds",
        "random weights": "a model of the same shape with random weights: its neighbouring layers are alike, too",
    }

    site: str = "resid_post"
    """Kind of site, of every layer, in the first store."""
    other: str | None = None
    """Path of a second store of the same texts: another model, checkpoint or width. None: the layers of one store."""
    other_site: str | None = None
    """Kind of site in the second store. None: `site`."""
    where: str | None = "position > 0"
    """SQL over the first store's token table. The default leaves out first tokens, whose massive activations would
    decide all three measures. None: all."""
    row_limit: int = 2000
    """Maximum number of tokens, drawn at random among the selected ones."""
    variance: float = 0.99
    """Share of the variance that the directions kept for SVCCA hold."""
    subspace: int = 16
    """Principal directions whose overlap is measured."""
    seed: int = 0
    """Random seed of the drawn tokens and of the shuffled rows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "row_limit", at_least=_LEAST, whole=True)
        check_fields(self, "subspace", at_least=1, whole=True)
        check_fields(self, "variance", above=0, at_most=1)
        check_fields(self, "seed", at_least=0, whole=True)

    @plain_torch()
    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Compares every pair of layers.

        Costs layers x rows² x d_model operations in float64 for CKA and the principal directions, and as many again
        with the second store; memory is layers x rows x d_model float32. A stored fp16 value is off by up to 0.05 %.

        Raises:
            RequestError: A site was not recorded, values are NaN or infinite, the second store has other texts, or
                fewer than 20 tokens are selected in both.
        """
        second = store if self.other is None else open_store(self.other)
        layers, labels = self.recorded(store, self.site)
        other_layers, other_labels = self.recorded(second, self.other_site or self.site)
        rows, other_rows, notes = self._rows(store, labels, second, other_labels)
        order = np.random.default_rng(self.seed).permutation(len(rows.rows))
        parts = _read(store, labels, rows.rows)
        same_layers = second is store and labels == other_labels
        other_parts = parts if same_layers else _read(second, other_labels, other_rows)
        bases = [principal(part, self.variance, self.subspace) for part in parts]
        other_bases = bases if same_layers else [principal(part, self.variance, self.subspace) for part in other_parts]
        arrays: dict[str, Any] = {
            "cka": unbiased_cka(parts, other_parts),
            "cka_shuffled": unbiased_cka(parts, [part[torch.as_tensor(order)] for part in other_parts]),
            "svcca": _pairs(bases, other_bases, svcca),
            "svcca_shuffled": _pairs(bases, other_bases, lambda a, b: svcca(a, b, order)),
            "overlap": _pairs(bases, other_bases, lambda a, b: subspace_overlap(a, b, self.subspace)),
            "overlap_random": min(1.0, self.subspace / parts[0].shape[1]),
            "kept": [basis.kept for basis in bases],
            "rows": len(rows.rows),
        }
        data = dataset(self.variables, arrays, {"layer": layers, "other_layer": other_layers})
        names = [name for name in arrays if data[name].dims == _PAIR]
        return self.result(store, data, data[names].to_dataframe().reset_index(), rows, notes)

    def _rows(self, store: Store, labels: Sequence[str], second: Store, other_labels: Sequence[str]) -> Any:
        """The finite rows of the first store, the same tokens' rows of the second, and notes."""
        chosen, notes = selected_rows(store, self.where), []
        other_rows = chosen
        if second is not store:
            chosen, other_rows = matching_rows(store, second, chosen)
            notes.append(
                f"compared with {second.path.name} at {counted(len(chosen), 'token')} that end at the same characters"
            )
        if len(chosen) > self.row_limit:
            drawn = np.sort(np.random.default_rng(self.seed).choice(len(chosen), self.row_limit, replace=False))
            chosen, other_rows = chosen[drawn], other_rows[drawn]
        rows = self.finite_rows(store, labels, chosen)
        in_first = np.isin(chosen, rows.rows)
        second_finite = self.finite_rows(second, other_labels, other_rows[in_first])
        finite = np.isin(other_rows[in_first], second_finite.rows)
        if not finite.all():
            rows = self.finite_rows(store, labels, rows.rows[finite])
            notes += second_finite.notes
        if len(rows.rows) < _LEAST:
            raise RequestError(f"{counted(len(rows.rows), 'token')} are selected; similarity needs {_LEAST} or more")
        return rows, other_rows[in_first][finite], notes

    @staticmethod
    def headline(result: Result) -> str:
        """Returns the CKA of neighbouring layers and of the ends, or of the best matches in the second store."""
        cka, data = result.data["cka"].to_numpy(), result.data
        layers, other_layers = (data[axis].to_numpy() for axis in _PAIR)
        floor = f"shuffled rows at most {float(data['cka_shuffled'].max()):z.2f}"
        if result.provenance["settings"]["other"] is not None:
            matches = ", ".join(f"{layers[row]} with {other_layers[cka[row].argmax()]}" for row in _spread(len(layers)))
            text = f"Best matching layer has a CKA of {np.nanmean(cka.max(1)):z.2f} on average ({matches}); {floor}."
        elif len(layers) == 1:
            text = "One layer was recorded; similarity compares two or more."
        else:
            near = np.diagonal(cka, 1)
            least = int(near.argmin())
            text = (
                f"CKA of neighbouring layers is {near.mean():z.2f} on average, least {near[least]:z.2f} (layers "
                f"{layers[least]} and {layers[least + 1]}), of the first and last layer {cka[0, -1]:z.2f}; {floor}."
            )
        return with_note(text, result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "cka", "svcca" and, for equal widths, "overlap": layers by layers."""
        data, second_path = result.data, result.provenance["settings"]["other"]
        names = ("layer", "layer" if second_path is None else f"layer of {label(Path(second_path).name, 30)}")
        rows = f"{counted(data['rows'], 'token')}"
        grids = [
            (
                "cka",
                "Similarity of layers: unbiased CKA",
                f"shuffled rows: at most {float(data['cka_shuffled'].max()):z.2f}",
            ),
            (
                "svcca",
                "Similarity of layers: SVCCA",
                f"shuffled rows: at most {float(data['svcca_shuffled'].max()):z.2f}",
            ),
            ("overlap", "Overlap of principal subspaces", f"random subspaces: {float(data['overlap_random']):z.2f}"),
        ]
        return {
            name: layer_grid(
                data[name].to_numpy(),
                layers=data["layer"].to_numpy().tolist(),
                other_layers=data["other_layer"].to_numpy().tolist(),
                names=names,
                title=title,
                subtitle=f"{rows}; {floor}",
                unit="overlap" if name == "overlap" else name.upper(),
            )
            for name, title, floor in grids
            if not bool(data[name].isnull().all())
        }


def _read(store: Store, labels: Sequence[str], rows: Int[np.ndarray, " row"]) -> list[Tensor]:
    """Centred rows of every layer, in float32."""
    parts = []
    for site in labels:
        values = store[site][rows].double()
        parts.append((values - values.mean(0)).float())
        if not bool(parts[-1].any()):
            raise RequestError(f"{site} is the same for all {counted(len(rows), 'token')}; nothing can be compared")
    return parts


def _pairs(a: Sequence[Principal], b: Sequence[Principal], measure: Any) -> np.ndarray:
    return np.array([[measure(first, second) for second in b] for first in a])


def _spread(number: int) -> list[int]:
    """Three indices from the first to the last."""
    return sorted({0, number // 2, number - 1})
