"""Future lenses as objects: a map for each layer and horizon, saved in a folder, for any store of one model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.analysis.future_maps import AffineMap, FutureMap
from workbench.analysis.saved_maps import MapsRecord, check_lens_model, damaged, load_maps, save_maps
from workbench.io.checks import check
from workbench.io.counted import counted
from workbench.io.errors import RequestError
from workbench.io.torch_state import plain_torch, usable_device
from workbench.model.unembed import load_unembed
from workbench.store.reader import Store, StoreOrPath, opened
from workbench.store.selected_rows import Rows

FORMAT, _VERSION = "workbench.future-lens", 1


@dataclass(frozen=True)
class _Record(MapsRecord):
    method: str
    horizons: int


@dataclass(frozen=True, eq=False)
class TrainedFutureLens:
    """Maps from a state at T to the model's output at T+N, one for each layer and horizon N, of one model.

    `linear`: the map gives the last block's state, which the unembedding of a store reads. `direct`: it gives logits.
    """

    site: str
    """Kind of site that the maps read: resid_post."""
    method: str
    """linear or direct."""
    layers: tuple[int, ...]
    """Layers with maps, ascending."""
    weight: Float[Tensor, "layer horizon d_model out"]
    bias: Float[Tensor, "layer horizon out"]
    mean: Float[Tensor, "layer horizon d_model"]
    """Subtracted from the states first."""
    scale: Float[Tensor, "layer horizon d_model"]
    """Factor of the states after that."""
    model: str
    """Name of the model."""
    model_fingerprint: str | None
    """Fingerprint of its weights."""
    n_layers: int
    """Number of the model's blocks."""
    made_of: Mapping[str, Any]
    """How it was fitted, as JSON holds it."""

    def __repr__(self) -> str:
        size = f"{counted(len(self.layers), 'layer')} of {self.site}, {self.horizons} horizons"
        return f"TrainedFutureLens ({self.method}) of {self.model}: {size}"

    @property
    def horizons(self) -> int:
        """Number of horizons: N = 0 (the next token) to horizons - 1."""
        return self.weight.shape[1]

    @plain_torch()
    def read(
        self,
        store: StoreOrPath,
        layer: int,
        horizon: int = 1,
        *,
        rows: Rows | None = None,
        top_k: int = 1,
        device: str | None = None,
    ) -> pd.DataFrame:
        """Returns the prediction of the model's output at T+N for rows T of a store, beside the text.

        Costs a product with the map and the unembedding a row. Null: a lens that reads nothing predicts the most
        frequent tokens.

        Args:
            store: A store of the lens's model, or its path.
            layer: Layer with a map; negative ones count from the last block.
            horizon: N.
            rows: Rows T. None: all.
            top_k: Predicted tokens of each row.
            device: Device to compute on. None: the GPU if there is one.

        Returns:
            One line a row and rank: row, sequence, position, token, rank, predicted_id, predicted and probability.

        Raises:
            RequestError: A store of another model, without the site or an unembedding, or no such layer or horizon.
        """
        store = opened(store)
        check_lens_model(store, self.model, self.model_fingerprint, self.n_layers, self.mean.shape[2])
        check("horizon", horizon, at_least=0, below=self.horizons, whole=True)
        layer = layer + self.n_layers if layer < 0 else layer
        if layer not in self.layers:
            raise RequestError(f"layer {layer} has no map; the lens has layers {', '.join(map(str, self.layers))}")
        unembed = load_unembed(store.path, usable_device(device))
        check("top_k", top_k, at_least=1, at_most=unembed.vocab, whole=True)
        parts = (part[self.layers.index(layer), horizon] for part in (self.weight, self.bias, self.mean, self.scale))
        tensors = [part.to(unembed.weight.device) for part in parts]
        logits = AffineMap(*tensors, unembed=unembed if self.method == "linear" else None)
        chosen_rows = Rows(store, np.arange(store.rows)) if rows is None else rows
        ids = chosen_rows.ids_in(store)
        future_map = FutureMap(logits, float("nan"), float("nan"), float("nan"))
        top, probability = future_map.top_tokens(store[self.site, layer], ids, top_k, unembed)
        frame = chosen_rows.tokens.select(["row", "sequence", "position", "token"]).to_pandas()
        lines = frame.loc[frame.index.repeat(top_k)].reset_index(drop=True)
        lines["rank"] = np.tile(np.arange(top_k), len(ids))
        lines["predicted_id"] = top.reshape(-1)
        lines["predicted"] = [unembed.token(int(token)) for token in top.reshape(-1)]
        lines["probability"] = probability.reshape(-1)
        return lines

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes maps.safetensors and lens.json into a new or empty folder, and returns it; `wb.load_lens` reads it.

        Raises:
            RequestError: The folder is not empty.
            DataError: The disk is full or read-only.
        """
        facts = {name: getattr(self, name) for name in ("site", "method", "layers", "horizons", "model", "n_layers")}
        facts |= {"model_fingerprint": self.model_fingerprint, "d_model": self.mean.shape[2]}
        maps = {name: getattr(self, name) for name in ("weight", "bias", "mean", "scale")}
        return save_maps(folder, FORMAT, _VERSION, {**facts, "made_of": dict(self.made_of)}, maps)


def pack_future_lens(
    store: Store, site: str, method: str, maps: Mapping[int, list[FutureMap]], made_of: Mapping[str, Any]
) -> TrainedFutureLens:
    """Returns fitted maps, by layer a list of horizons, as one object."""
    affine_maps = [[future_map.logits for future_map in maps[layer]] for layer in sorted(maps)]

    def stacked(part: Any) -> Tensor:
        return torch.stack([torch.stack([part(affine).cpu() for affine in of_layer]) for of_layer in affine_maps])

    model = store.manifest.model
    return TrainedFutureLens(
        site,
        method,
        tuple(sorted(maps)),
        stacked(lambda affine: affine.weight),
        stacked(lambda affine: affine.bias),
        stacked(lambda affine: torch.zeros(len(affine.weight)) if affine.mean is None else affine.mean),
        stacked(lambda affine: torch.ones(len(affine.weight)) if affine.scale is None else affine.scale),
        model.name,
        model.fingerprint,
        model.n_layers,
        made_of,
    )


def load_future_lens(folder: Path) -> TrainedFutureLens:
    """Reads the folder that `TrainedFutureLens.save` wrote; errors as `load_lens`."""
    record, maps = load_maps(folder, _Record, _VERSION)
    shape = (len(record.layers), record.horizons, record.d_model)
    parts = [maps.get(name) for name in ("weight", "bias", "mean", "scale")]
    weight, bias, mean, scale = parts
    if weight is None or bias is None or mean is None or scale is None:
        raise damaged(folder)
    shapes = [tuple(part.shape) for part in (weight, bias, mean, scale)]
    if shapes != [(*shape, weight.shape[-1]), (*shape[:2], weight.shape[-1]), shape, shape]:
        raise damaged(folder)
    return TrainedFutureLens(
        record.site,
        record.method,
        record.layers,
        weight,
        bias,
        mean,
        scale,
        record.model,
        record.model_fingerprint,
        record.n_layers,
        record.made_of,
    )
