"""An autoencoder sent to other processes as files, because it may be too large to pickle."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from workbench.io.errors import RequestError
from workbench.io.files import remove
from workbench.sae.autoencoder import Sae
from workbench.sae.layered import LayeredSae, layered
from workbench.sae.load import load_sae
from workbench.sae.ruled import RuledSae

SAVED = "sae"
"""Folder of the saved autoencoder, inside the folder where features are made."""


@dataclass(frozen=True)
class SavedSae:
    """An autoencoder in a folder that other processes can read."""

    folder: Path
    name: str
    fingerprint: str
    parts: tuple[SavedSae, ...] = ()
    """Layers of an autoencoder of several, each in a folder of its own."""

    def load(self, device: str) -> Sae:
        """Returns the autoencoder on `device`.

        Raises:
            RequestError: SAELens saves and loads it with other weights or settings.
        """
        if self.parts:
            return layered([part.load(device) for part in self.parts], self.name)
        loaded = replace(load_sae(self.folder, device=device), name=self.name)
        if loaded.fingerprint() != self.fingerprint:
            raise RequestError(
                "sae: what SAELens saves of it and loads again has other weights or settings, so workers cannot use "
                "it; extract with one process"
            )
        return loaded


def save_sae(sae: Sae, place: Path) -> SavedSae:
    """Saves the autoencoder in a folder under `place`, over what an earlier call saved there.

    Raises:
        RequestError: An autoencoder whose decoders were not read.
    """
    if sae.encoder_only:
        raise RequestError(
            f"workers: SAE {sae.name!r} cannot be sent to them, since its decoders were not read; extract with one "
            "process or shares"
        )
    if isinstance(sae, RuledSae):
        raise RequestError(
            f"workers: SAE {sae.name!r} cannot be sent to them; give the SAE without its rule, and sparsity="
        )
    folder = place / SAVED
    remove(folder)
    if not isinstance(sae, LayeredSae):
        return _save(sae, folder)
    parts = tuple(_save(part, folder / str(number)) for number, part in enumerate(sae.parts))
    return SavedSae(folder, sae.name, sae.fingerprint(), parts)


def _save(sae: Sae, folder: Path) -> SavedSae:
    sae.module.save_model(folder)
    return SavedSae(folder, sae.name, sae.fingerprint())
