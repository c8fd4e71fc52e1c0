"""Autoencoders of several layers as one: a cross-layer transcoder, a set of transcoders, a crosscoder of Gemma Scope 2.

Each layer has an encoder and features of its own. The features of all layers have one numbering: those of the first
layer come first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.io.errors import DataError, RequestError
from workbench.sae.autoencoder import Sae


@dataclass(frozen=True, eq=False, repr=False)
class LayeredSae(Sae):
    """Autoencoders that each read one site of a row, with one numbering of their features. Made by `layered`."""

    parts: tuple[Sae, ...]
    """The autoencoders, in the order of their sites."""

    @property
    def d_in(self) -> int:
        """Width of a row of all sites together."""
        return sum(part.d_in for part in self.parts)

    @property
    def d_sae(self) -> int:
        """Number of features of all layers."""
        return sum(part.d_sae for part in self.parts)

    @property
    def firsts(self) -> tuple[int, ...]:
        """Id of the first feature of each part."""
        return tuple(np.cumsum([0, *(part.d_sae for part in self.parts[:-1])]).tolist())

    @property
    def architecture(self) -> str:
        """cross_layer_transcoder where features write to several layers, else layers_of_ and that of the layers."""
        return "cross_layer_transcoder" if self.encoder_only else f"layers_of_{self.parts[0].architecture}"

    @property
    def site(self) -> None:
        """None: it reads several, `sites`."""
        return

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites of the parts; empty if the files do not record one."""
        names = tuple(part.site for part in self.parts if part.site)
        return names if len(names) == len(self.parts) else ()

    @property
    def n_sites(self) -> int:
        """Number of parts."""
        return len(self.parts)

    @property
    def encoder_only(self) -> bool:
        """True if it encodes and cannot decode: its features write to several layers."""
        return any(part.encoder_only for part in self.parts)

    @property
    def reconstructs(self) -> bool:
        """False: what it writes is not what it reads, or not read from its files."""
        return False

    @property
    def W_dec(self) -> Float[Tensor, "feature d_model"]:
        """The decoders, each of its own layer, one below the other: a copy."""
        return torch.cat([part.W_dec for part in self.parts])

    def decoder_rows(self, features: Sequence[int]) -> Float[Tensor, "feature d_model"]:
        """Returns rows of `W_dec`, without a copy of all."""
        ids, firsts = np.asarray(features, np.int64), np.array(self.firsts)
        part = np.searchsorted(firsts, ids, side="right") - 1
        return torch.stack(
            [self.parts[number].W_dec[feature - firsts[number]] for number, feature in zip(part, ids, strict=True)]
        )

    def encode(self, rows: Float[Tensor, "row site d_in"], *, gradients: bool = False) -> Float[Tensor, "row feature"]:
        """Returns the dense activations of all features of all layers in float32."""
        parts = [part.encode(rows[:, index], gradients=gradients) for index, part in enumerate(self.parts)]
        return torch.cat(parts, dim=1)

    def encoder_input(self, rows: Float[Tensor, "row site d_in"]) -> Float[Tensor, "row d_in"]:
        """Returns the inputs of all encoders side by side."""
        return torch.cat([part.encoder_input(rows[:, index]) for index, part in enumerate(self.parts)], dim=1)

    def decode(self, activations: Float[Tensor, "row feature"]) -> Float[Tensor, "row d_model"]:
        """Refuses: each layer writes to a site of its own.

        Raises:
            RequestError: Always.
        """
        raise RequestError(f"SAE {self.name!r} has several layers, which write to several sites; decode one layer")

    def config(self) -> dict[str, Any]:
        """Returns the settings of all parts."""
        return {"architecture": self.architecture, "layers": [part.config() for part in self.parts]}

    def fingerprint(self) -> str:
        """Returns the SHA-256 of the fingerprints of all parts, in order."""
        return hashlib.sha256("\n".join(part.fingerprint() for part in self.parts).encode()).hexdigest()

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What the files record of the training, as far as all parts have the same; without sites."""
        first, *other_metadata = (part.metadata for part in self.parts)
        site_keys = {"hook_name", "hook_name_out", "hook_names"}
        return {
            name: value
            for name, value in first.items()
            if name not in site_keys and all(metadata.get(name) == value for metadata in other_metadata)
        }


def layered(parts: Sequence[Sae], name: str) -> LayeredSae:
    """Returns autoencoders as one, with one numbering of features.

    Raises:
        DataError: Parts that read rows of other widths.
    """
    if len({part.d_in for part in parts}) != 1:
        raise DataError(f"SAE {name!r}: its layers read rows of other widths; load them one by one")
    return LayeredSae(parts[0].module, name, tuple(replace(part, name=f"{name}/{part.site}") for part in parts))
