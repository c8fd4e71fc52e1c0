"""Probes of token erasure as objects: softmax maps for each layer and offset, saved in a folder, for any store."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from workbench.analysis.saved_maps import MapsRecord, check_lens_model, damaged, load_maps, save_maps
from workbench.analysis.softmax_probe import SoftmaxProbes
from workbench.io.counted import counted
from workbench.io.errors import RequestError
from workbench.results.registry import find_probe
from workbench.results.result import Result
from workbench.store.reader import Store, StoreOrPath, opened

FORMAT, _VERSION = "workbench.erasure", 1


@dataclass(frozen=True)
class _Record(MapsRecord):
    offsets: tuple[int, ...]
    classes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class TrainedErasure:
    """Linear softmax probes of the token at t + offset from the state at t, by layer and offset, of one model."""

    site: str
    """Kind of site that the probes read: resid_post."""
    layers: tuple[int, ...]
    """Layers with probes, ascending."""
    offsets: tuple[int, ...]
    """Offsets that are predicted: -1 is the token before."""
    classes: Int[np.ndarray, " class"]
    """Token ids that the probes can predict, ascending: those of the training rows."""
    weight: Float[Tensor, "layer offset d_model class"]
    scale: Float[Tensor, "layer d_model"]
    """Divisor of the states before the product."""
    validated: Float[Tensor, "layer offset"]
    """Last tokens of words in the validation documents whose token at the offset is predicted."""
    model: str
    """Name of the model."""
    model_fingerprint: str | None
    """Fingerprint of its weights."""
    n_layers: int
    """Number of the model's blocks."""
    made_of: Mapping[str, Any]
    """How they were trained, as JSON holds it."""

    def __repr__(self) -> str:
        size = (
            f"{counted(len(self.layers), 'layer')} of {self.site}, offsets "
            f"{', '.join(f'{offset:+d}' for offset in self.offsets)}"
        )
        return f"TrainedErasure of {self.model}: {size}, {counted(len(self.classes), 'token')}"

    def probes(self, layer: int) -> SoftmaxProbes:
        """Returns the probes of a layer, one for each offset; RequestError for a layer without."""
        layer = layer + self.n_layers if layer < 0 else layer
        if layer not in self.layers:
            layers = ", ".join(map(str, self.layers))
            raise RequestError(f"layer {layer} has no probes; layers with probes are {layers}")
        place = self.layers.index(layer)
        return SoftmaxProbes(self.weight[place], self.scale[place], self.classes)

    def log_probabilities(
        self, layer: int, offset: int, states: Float[Tensor, "row d_model"]
    ) -> Float[Tensor, "row class"]:
        """Returns the log-probability of each of `classes` to stand at t + offset, from the states at t, in nats.

        Raises:
            RequestError: A layer or an offset without a probe.
        """
        if offset not in self.offsets:
            raise RequestError(f"offset {offset} has no probe; offsets with probes are {self.offsets}")
        probes = self.probes(layer).to(states.device)
        return probes.log_probabilities(self.offsets.index(offset), states)

    def read(self, store: StoreOrPath, **settings: Any) -> Result:
        """Returns accuracy, drop and segments of all selected tokens of a store, as the result of `TokenErasure`.

        Args:
            store: A store, or its path, of the model that the probes were trained on. Give one of other texts: on the
                training documents the accuracy is that of training.
            **settings: Settings of `TokenErasure` other than those of training: where, spans, early, late, longest,
                layers, resamples, batch, seed, device.

        Raises:
            RequestError: A store of another model, or what the probe refuses.
        """
        probe: Any = find_probe("token-erasure")
        return probe(**{"site": self.site, "offsets": self.offsets, **settings}).read(self, opened(store))

    def check_model(self, store: Store) -> None:
        """Raises RequestError for a store of another model."""
        check_lens_model(store, self.model, self.model_fingerprint, self.n_layers, self.scale.shape[1], "probe")

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes maps.safetensors and lens.json into a new or empty folder, and returns it; `wb.load_lens` reads it.

        Raises:
            RequestError: The folder is not empty.
            DataError: The disk is full or read-only.
        """
        names = ("site", "layers", "offsets", "model", "model_fingerprint", "n_layers")
        facts = {name: getattr(self, name) for name in names} | {"classes": self.classes.tolist()}
        facts |= {"d_model": self.scale.shape[1], "made_of": dict(self.made_of)}
        maps = {"weight": self.weight, "scale": self.scale, "validated": self.validated}
        return save_maps(folder, FORMAT, _VERSION, facts, maps)


def load_erasure(folder: Path) -> TrainedErasure:
    """Reads the folder that `TrainedErasure.save` wrote; errors as `load_lens`."""
    record, maps = load_maps(folder, _Record, _VERSION)
    layers, offsets = len(record.layers), len(record.offsets)
    shapes = {
        "weight": (layers, offsets, record.d_model, len(record.classes)),
        "scale": (layers, record.d_model),
        "validated": (layers, offsets),
    }
    if {name: tuple(part.shape) for name, part in maps.items()} != shapes:
        raise damaged(folder)
    return TrainedErasure(
        record.site,
        record.layers,
        record.offsets,
        np.array(record.classes, np.int64),
        maps["weight"],
        maps["scale"],
        maps["validated"],
        record.model,
        record.model_fingerprint,
        record.n_layers,
        record.made_of,
    )
