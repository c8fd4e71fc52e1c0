"""Lenses as objects: an affine map for each layer, trained or fitted, saved in a folder, for any store of one model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.analysis.frozen_norm import token_id
from workbench.analysis.saved_maps import (
    ADVICE,
    RECORD,
    MapsRecord,
    check_lens_model,
    damaged,
    format_of,
    load_maps,
    save_maps,
)
from workbench.analysis.trained_erasure import FORMAT as ERASURE
from workbench.analysis.trained_erasure import TrainedErasure, load_erasure
from workbench.analysis.trained_future import FORMAT as FUTURE
from workbench.analysis.trained_future import TrainedFutureLens, load_future_lens
from workbench.io.checks import as_path
from workbench.io.counted import counted
from workbench.io.errors import DataError, RequestError
from workbench.io.files import sha256_bytes
from workbench.io.parse import read_json, to_json
from workbench.io.tensors import open_safetensors
from workbench.model.direction import Direction
from workbench.model.unembed import load_unembed
from workbench.results.registry import find_probe
from workbench.results.result import Result
from workbench.store.manifest import LENSES
from workbench.store.reader import Store, StoreOrPath, opened

_FORMAT, _VERSION = "workbench.lens", 1
_CONFIG, _PICKLE = "config.json", "params.pt"  # of the package tuned-lens
_PROBES = {"jacobian lens": "jacobian-lens"}  # method to the probe that reads


@dataclass(frozen=True, eq=False)
class TrainedLens:
    """Maps h -> h + A h + b before the final norm, one for each layer, of one model."""

    site: str
    """Kind of site that the maps read: resid_post."""
    layers: tuple[int, ...]
    """Layers with a map, ascending."""
    weight: Float[Tensor, "layer d_model d_model"]
    """A of each layer."""
    bias: Float[Tensor, "layer d_model"]
    """b of each layer."""
    model: str
    """Name of the model."""
    model_fingerprint: str | None
    """Fingerprint of its weights; None: the file does not say."""
    n_layers: int
    """Number of the model's blocks."""
    made_of: Mapping[str, Any]
    """How it was trained, as JSON holds it."""

    def __repr__(self) -> str:
        layers = counted(len(self.layers), "layer")
        return f"TrainedLens of {self.model}: {layers} of {self.site}, d_model {self.bias.shape[1]}"

    def translate(self, layer: int, states: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """Returns h + A h + b, the input of the final norm, in float32; RequestError for a layer without a map."""
        place, states = self._place(layer), states.float()
        weight, bias = (part[place].to(states.device) for part in (self.weight, self.bias))
        return states + states @ weight.T + bias

    def read(self, store: StoreOrPath, **settings: Any) -> Result:
        """Returns the readings of all selected tokens of a store, as the result of the probe that makes such lenses.

        Args:
            store: A store, or its path, of the model that the lens was trained on.
            **settings: Settings of the probe, `TunedLens` or `JacobianLens`: where, layers, top_k, detail, device.

        Raises:
            RequestError: A store of another model, or what the probe refuses.
        """
        probe: Any = find_probe(_PROBES.get(self.made_of.get("method", ""), "tuned-lens"))
        return probe(**{"site": self.site, **settings}).read(self, opened(store))

    def direction(self, store: StoreOrPath, token: str | int, layer: int) -> Direction:
        """Returns the row of W_U (I + A) of one token: the direction of the layer's states that the lens reads it by.

        Add it to steer towards the token, or project it out. The final norm and its gain are not in it.

        Args:
            store: A store of the lens's model, or its path, which has W_U.
            token: Text of one token of the vocabulary, or its id.
            layer: Layer of the states; negative ones count from the last block, whose map is the identity.

        Raises:
            RequestError: A store of another model or without unembedding, no single token, or a layer without a map.
        """
        self.check_model(store := opened(store))
        unembed = load_unembed(store.path)
        number, layer = token_id(unembed, token, "token"), layer + self.n_layers if layer < 0 else layer
        vector = unembed.weight[number]
        if layer != self.n_layers - 1:
            vector = vector + vector @ self.weight[self._place(layer)]
        made_of = {"method": f"W_U (I + A) of a {self.made_of.get('method', 'lens')}", "model": self.model}
        made_of |= {"model_fingerprint": self.model_fingerprint, "token_id": number}
        return Direction(f"{self.site}.{layer}", vector, f"reads {unembed.token(number)!r}", made_of)

    def _place(self, layer: int) -> int:
        if layer not in self.layers:
            raise RequestError(f"layer {layer} has no map; the lens has layers {', '.join(map(str, self.layers))}")
        return self.layers.index(layer)

    def check_model(self, store: Store) -> None:
        """Raises RequestError for a store of another model; warns where only the shape can be compared."""
        check_lens_model(store, self.model, self.model_fingerprint, self.n_layers, self.bias.shape[1])

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes maps.safetensors and lens.json into a new or empty folder, and returns it.

        Raises:
            RequestError: The folder is not empty.
            DataError: The disk is full or read-only.
        """
        facts = {name: getattr(self, name) for name in ("site", "layers", "model", "model_fingerprint", "n_layers")}
        facts |= {"d_model": self.bias.shape[1], "made_of": dict(self.made_of)}
        return save_maps(folder, _FORMAT, _VERSION, facts, {"weight": self.weight, "bias": self.bias})


def kept_lens(store: Store, kind: str, settings: Mapping[str, Any]) -> Path:
    """Returns the folder in a store for the lens of a kind that is fitted on it with these settings."""
    key = to_json({"settings": dict(settings), "store": store.manifest.fingerprint})
    return store.path / LENSES / f"{kind}-{sha256_bytes(key.encode())[:12]}"


def load_lens(folder: str | os.PathLike[str]) -> TrainedLens | TrainedFutureLens | TrainedErasure:
    """Reads the folder that `save` of a lens or of erasure probes wrote, or a released one of the package tuned-lens.

    A released folder has config.json and the tensors `0.weight`, `0.bias`, ... in a safetensors file. Its map i reads
    the stream before block i, which is `resid_post` of layer i - 1; that of the embedding is left out. It does not name
    the weights that it was trained on.

    Raises:
        RequestError: No lens there, one of a later format, or maps in a pickle alone.
        DataError: The files are damaged.
    """
    folder = as_path("folder", folder)
    if (folder / RECORD).is_file():
        kind = format_of(folder)
        loaders = {_FORMAT: _load, FUTURE: load_future_lens, ERASURE: load_erasure}
        if kind not in loaders:
            raise DataError(f"{folder / RECORD}: format is {kind!r}, expected one of {', '.join(loaders)}; {ADVICE}")
        return loaders[kind](folder)
    if (folder / _CONFIG).is_file():
        return _load_released(folder)
    raise RequestError(f"no lens at {folder}: it has neither {RECORD} nor {_CONFIG}; give a folder of a saved lens")


def _load(folder: Path) -> TrainedLens:
    record, maps = load_maps(folder, MapsRecord, _VERSION)
    shape = (len(record.layers), record.d_model)
    weight, bias = maps.get("weight"), maps.get("bias")
    if weight is None or bias is None or (weight.shape, bias.shape) != ((*shape, record.d_model), shape):
        raise damaged(folder)
    model = (record.model, record.model_fingerprint, record.n_layers)
    return TrainedLens(record.site, record.layers, weight, bias, *model, record.made_of)


def _load_released(folder: Path) -> TrainedLens:
    """A lens in the layout of the package tuned-lens."""
    config = read_json(folder / _CONFIG, "fetch the lens again")
    size, count = config.get("d_model"), config.get("num_hidden_layers")
    if not isinstance(size, int) or not isinstance(count, int) or count < 2:
        raise RequestError(f"{folder / _CONFIG} is no tuned lens: d_model and num_hidden_layers are needed")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickle = folder / _PICKLE
        if not pickle.exists():
            raise RequestError(f"{folder} has no safetensors file with the maps of a tuned lens")
        code = (
            "import torch, safetensors.torch as s; "
            f"t = torch.load('{pickle}', weights_only=True, map_location='cpu'); "
            f"s.save_file({{k: v.contiguous() for k, v in t.items()}}, '{folder / 'params.safetensors'}')"
        )
        raise RequestError(
            f"{pickle} is a pickle, which can run code and is not opened; where you trust it, convert it: "
            f'python -c "{code}"'
        )
    weights, biases = [], []
    with open_safetensors(files[0], "fetch the lens again") as file:
        names = set(file.keys())
        for layer in range(1, count):
            name = next(
                (prefix for prefix in (f"{layer}", f"layer_translators.{layer}") if f"{prefix}.weight" in names), None
            )
            if name is None:
                holds = ", ".join(sorted(names))[:120]
                raise RequestError(f"{files[0]} has no tensor {layer}.weight; it holds {holds}")
            weights.append(file.get_tensor(f"{name}.weight").float())
            zero = torch.zeros(size)
            biases.append(file.get_tensor(f"{name}.bias").float() if f"{name}.bias" in names else zero)
    if {tuple(w.shape) for w in weights} != {(size, size)} or {tuple(b.shape) for b in biases} != {(size,)}:
        raise DataError(f"{files[0]}: its maps are not {size} x {size} with a bias of {size}, as {_CONFIG} says")
    name = str(config.get("base_model_name_or_path", "an unnamed model"))
    made_of = {"method": "tuned-lens package", "config": {key: str(value) for key, value in config.items()}}
    layers = tuple(range(count - 1))
    return TrainedLens("resid_post", layers, torch.stack(weights), torch.stack(biases), name, None, count, made_of)
