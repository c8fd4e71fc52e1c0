"""Loading a sparse autoencoder: a SAELens directory, another library's, a SAELens release, or the one that comes along.

SAELens reads the files and does the mathematics. What it would pass over in silence is refused here: a misspelt key of
`cfg.json`, a training form without inference class, weights that do not fit. Its import takes seconds, so a path that
is not there is refused before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench import embedded
from workbench.io.errors import DataError, RequestError, nearest
from workbench.model.load import folders, quietly, usable_device
from workbench.sae.formats import Converted, converter, read_object

if TYPE_CHECKING:
    from sae_lens import SAE

_LOG = logging.getLogger(__name__)

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"

_UNFOLDED = ("expected_average_only_in", "covariance_whitening")
"""Normalisations whose constants are not in the files: SAELens then takes inputs as they are."""


@dataclass(frozen=True, eq=False)
class Sae:
    """A SAELens autoencoder in eval mode, float32 as loaded, and what its files say it is for."""

    module: SAE
    name: str
    """Name of its directory, or "release/id"."""

    @property
    def d_in(self) -> int:
        """Numbers in one row it encodes."""
        return self.module.cfg.d_in

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.module.cfg.d_sae

    @property
    def architecture(self) -> str:
        """standard, gated, topk, jumprelu, ... as SAELens calls it; batchtopk and matryoshka are saved as jumprelu."""
        return self.module.cfg.architecture()

    @property
    def site(self) -> str | None:
        """TransformerLens name of the place it was trained on; None where its files do not say."""
        return self._metadata.get("hook_name")

    @property
    def model_name(self) -> str | None:
        """The model it was trained on, as its authors call it; None where its files do not say."""
        return self._metadata.get("model_name")

    @property
    def context_size(self) -> int | None:
        """Tokens in a sequence it was trained on; None where its files do not say."""
        return self._metadata.get("context_size")

    @property
    def reconstructs(self) -> bool:
        """Whether it writes what it reads; a transcoder writes another site."""
        return "transcoder" not in self.architecture and not self._metadata.get("transcode")

    @property
    def sequential(self) -> bool:
        """Whether it encodes a row with those before it in the sequence (temporal), and not each for itself."""
        return self.architecture == "temporal"

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.W_dec.device

    @property
    def W_dec(self) -> Float[Tensor, "feature d_model"]:
        """The directions features write."""
        return self.module.W_dec

    def encode(self, rows: Float[Tensor, "row ..."]) -> Float[Tensor, "row feature"]:
        """Activations of every feature, dense, in float32: SAELens' own `encode`. Heads are flattened.

        A temporal one takes `rows` as one sequence from its beginning, and gives its novel codes.

        Costs 2 d_in d_sae operations and 4 d_sae bytes a row; jumprelu holds four times that for a moment.
        """
        with torch.no_grad():
            shaped = self._shaped(rows)
            return self.module.encode(shaped[None])[0] if self.sequential else self.module.encode(shaped).flatten(1)

    def prepared(self, rows: Float[Tensor, "row ..."]) -> Float[Tensor, "row d_in"]:
        """Rows as the encoder's weights take them: normalised, less the decoder's bias, as far as its settings say."""
        with torch.no_grad():
            return self.module.process_sae_in(self._shaped(rows)).flatten(1)

    def decode(self, activations: Float[Tensor, "row feature"]) -> Float[Tensor, "row d_model"]:
        """The reconstruction of the rows encoded last: with layer_norm SAELens keeps their mean and scale aside."""
        with torch.no_grad():
            return self.module.decode(activations).flatten(1)

    def config(self) -> dict[str, Any]:
        """Everything its `cfg.json` says, metadata included, but for the device it is on."""
        config = {name: value for name, value in self.module.cfg.to_dict().items() if name != "device"}
        return json.loads(json.dumps(config, default=str))

    def fingerprint(self) -> str:
        """sha256 over every tensor and over the settings that change the mathematics. About 1 s a gigabyte."""
        settings = {name: value for name, value in self.config().items() if name not in ("metadata", "dtype")}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy())
        return digest.hexdigest()

    def __repr__(self) -> str:
        where = f", {self.site}" if self.site else ""
        return f"Sae({self.name!r}, {self.architecture}, {self.d_in:,} -> {self.d_sae:,}{where}, {self.device})"

    @property
    def _metadata(self) -> Mapping[str, Any]:
        return self.module.cfg.metadata.to_dict()  # the object itself answers None to whatever it is asked

    def _shaped(self, rows: Float[Tensor, "row ..."]) -> Float[Tensor, "row ..."]:
        flat = rows.to(self.device, torch.float32).flatten(1)
        # an autoencoder of z takes heads apart; one head as wide as all of them flattens to the same
        return flat[:, None] if self.module.cfg.reshape_activations == "hook_z" else flat


def load_sae(
    name: str | os.PathLike[str], sae_id: str | None = None, *, device: str | torch.device | None = None
) -> Sae:
    """Loads a sparse autoencoder in float32.

    `name`: a directory that SAELens wrote (`cfg.json` and `sae_weights.safetensors`), sparsify (`cfg.json` and
    `sae.safetensors`) or dictionary_learning (`config.json` and `ae.safetensors`), or one that holds several, of which
    `sae_id` is the folder; a release in SAELens' own list, with `sae_id` one of its ids: the only case that may
    use the network; or "demo", the one that comes with the workbench. `device`: the GPU if there is one.

    Raises RequestError: no such directory, release or id, an architecture that cannot encode rows, a device that
    cannot be used. Raises DataError: files that are damaged or do not fit each other.
    """
    device = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    text = os.fspath(name)
    if text == embedded.NAME:
        return _load_directory(_demo_directory(), embedded.NAME, device)
    path = Path(text).expanduser()
    if text and path.exists():
        folder = path if sae_id is None else path / sae_id
        return _load_directory(_checked_directory(path, folder, sae_id), folder.resolve().name, device)
    if not isinstance(name, str) or not text or os.sep in text:  # no release has a slash
        parent = next(folder for folder in path.absolute().parents if folder.is_dir())
        missing = path.absolute().relative_to(parent).parts[:1]
        raise RequestError(f"SAE {text!r}: no such directory{nearest(''.join(missing), folders(parent))}")
    return _load_release(text, sae_id, device)


def _demo_directory() -> Path:
    folder = embedded.SAE
    if not (folder / CONFIG).is_file():
        raise DataError("SAE 'demo': this installation lacks the embedded autoencoder; install the workbench again")
    return folder


def _checked_directory(path: Path, folder: Path, sae_id: str | None) -> Path:
    if path.is_file():
        raise RequestError(f"SAE {str(path)!r} is a file; give the folder that holds {CONFIG} and {WEIGHTS}")
    several = sorted({entry.parent.name for name in (CONFIG, "config.json") for entry in path.glob(f"*/{name}")})
    if not folder.is_dir():
        raise RequestError(f"sae_id {sae_id!r}: no such folder in {str(path)!r}{nearest(str(sae_id), several)}")
    if not (folder / CONFIG).is_file() and converter(folder) is None:
        if several and sae_id is None:
            raise RequestError(f"SAE {str(path)!r} holds several; give one as sae_id: {', '.join(several[:8])}")
        inside = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
        raise RequestError(f"SAE {str(folder)!r} is a directory without {CONFIG}; it holds {inside}")
    return folder


def _load_directory(folder: Path, name: str, device: torch.device) -> Sae:
    with _silently():
        from sae_lens import SAE
        from safetensors import SafetensorError

    if foreign := converter(folder):
        return _ready(_converted(foreign(), folder, device), name)
    _check_config(read_object(folder / CONFIG), folder / CONFIG)
    try:
        with _silently():
            module = SAE.load_from_disk(folder, device=str(device), dtype="float32")
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder / WEIGHTS} is missing or damaged: {_line(error)}") from None
    except Exception as error:  # SAELens and torch raise whatever a config and weights that do not fit lead to
        raise DataError(f"SAE {str(folder)!r}: {CONFIG} and {WEIGHTS} do not fit: {_line(error)}") from error
    return _ready(module, name)


def _converted(found: Converted, folder: Path, device: torch.device) -> SAE:
    from sae_lens import SAE

    config, weights = found
    config |= {"device": str(device), "dtype": "float32"}
    weights = {name: part.to(device) for name, part in weights.items()}
    try:
        with _silently():
            return SAE.load_from_disk(folder, device=str(device), converter=lambda *_, **__: (config, weights))
    except Exception as error:  # torch raises whatever weights that do not fit each other lead to
        raise DataError(f"SAE {str(folder)!r}: its settings and weights do not fit: {_line(error)}") from error


def _load_release(release: str, sae_id: str | None, device: torch.device) -> Sae:
    with _silently():
        from sae_lens import SAE
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    releases = get_pretrained_saes_directory()
    if release not in releases:
        here = nearest(release, [*releases, *folders(Path.cwd())])
        raise RequestError(f"SAE {release!r} is no directory here and no release that SAELens lists{here}")
    ids = list(releases[release].saes_map)
    if sae_id not in ids:
        close = nearest(sae_id or "", ids) or f"; it has {', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''}"
        raise RequestError(f"sae_id {sae_id!r} is none of the {len(ids)} of release {release!r}{close}")
    try:
        with _silently():
            module = SAE.from_pretrained(release, sae_id, device=str(device), dtype="float32")
    except Exception as error:  # the hub's, SAELens' and each converter's own kinds
        raise RequestError(f"SAE {release}/{sae_id} cannot be fetched or read: {_line(error)}") from error
    return _ready(module, f"{release}/{sae_id}")


def _ready(module: Any, name: str) -> Sae:
    sae = Sae(module.eval().requires_grad_(False), name)
    if module.cfg.normalize_activations in _UNFOLDED:
        _LOG.warning(
            f"SAE {name!r} was trained on inputs under {module.cfg.normalize_activations}, which its files do not hold "
            "and SAELens does not apply: fold it into the weights first, or its activations are off"
        )
    return sae


def _check_config(config: dict[str, Any], source: Path) -> None:
    """Refuse what SAELens would drop or replace by a default without a word."""
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    older = "metadata" not in config  # before SAELens 6 everything lay on one level, training settings included
    architecture = config.get("architecture", "standard" if older else None)
    if architecture not in SAE_CLASS_REGISTRY:
        training = architecture in SAE_TRAINING_CLASS_REGISTRY
        way = "save it with save_inference_model" if training else f"known are {', '.join(SAE_CLASS_REGISTRY)}"
        raise RequestError(f"{source}: architecture {architecture!r} has no inference form in SAELens; {way}")
    for key in ("d_in", "d_sae"):
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise DataError(f"{source}: {key} is {config.get(key)!r}, expected a whole number above 0")
    classes = [SAE_CLASS_REGISTRY[architecture][1]]
    if architecture in SAE_TRAINING_CLASS_REGISTRY:
        classes.append(SAE_TRAINING_CLASS_REGISTRY[architecture][1])
    known = {"architecture", "metadata"} | {field.name for kind in classes for field in dataclasses.fields(kind)}
    unknown = [] if older else sorted(config.keys() - known)
    if unknown:
        close = nearest(unknown[0], known, 1)
        raise DataError(f"{source}: SAELens knows no {unknown[0]!r} of a {architecture} SAE and would ignore it{close}")
    if not older and "k" in known and "k" not in config:
        raise DataError(f"{source}: k is missing, and SAELens would take 100 for it")


@contextmanager
def _silently() -> Iterator[None]:
    """Inside, SAELens and what it imports give no advice: what matters is said by our own errors."""
    with quietly(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
