"""Loading of sparse autoencoders: a folder of SAELens or another library, a SAELens release, or the embedded one.

SAELens reads the files and does the mathematics. Errors that it would ignore are raised here: a misspelt key of
`cfg.json`, a training architecture without an inference class, weights that do not fit. Its import takes seconds, so a
missing path is reported before that.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench import embedded
from workbench.embedded.planted import planted_autoencoder
from workbench.io.checks import as_path
from workbench.io.errors import DataError, RequestError, WorkbenchError, nearest
from workbench.io.reading import check_regular
from workbench.io.torch_state import plain_torch, usable_device
from workbench.model.checkpoint import quietly
from workbench.model.location import folders
from workbench.sae.autoencoder import Sae
from workbench.sae.config import check_metadata, check_settings, ignored_settings, loaded_metadata
from workbench.sae.conversion import AGAIN, Converted, converted, read_object, read_tensors, tensor_names
from workbench.sae.folding import SCALER, UNFOLDED, folded, scaled
from workbench.sae.formats import (
    CONFIG,
    WEIGHTS,
    check_one_format,
    converter,
    is_place,
    layers_of,
    listed,
    missing_layers,
    pickled,
    pickles_in,
    place_of,
    places_in,
)
from workbench.sae.layered import layered

if TYPE_CHECKING:
    from sae_lens import SAE

_LOG = logging.getLogger(__name__)


@plain_torch()
def load_sae(
    name: str | os.PathLike[str],
    sae_id: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device | None = None,
) -> Sae:
    """Loads a sparse autoencoder in float32.

    Args:
        name: A folder or safetensors file of SAELens, Gemma Scope, Llama Scope, circuit-tracer, Qwen Scope, Goodfire,
            OpenAI, sparsify or dictionary_learning, or a folder of several; a release listed by SAELens, the only case
            that may use the network; "demo", the SAE that ships with the workbench; or "planted", the features that the
            planted model writes.
        sae_id: The path inside a folder of several, or the id within a release.
        device: Where to compute. None: the GPU if there is one, else the CPU.

    Raises:
        RequestError: No such directory, release or id; an architecture that cannot encode rows; an unusable device.
        DataError: Files that are damaged or do not fit each other.
    """
    as_path("name", name)
    if sae_id is not None:
        sae_id = os.fspath(as_path("sae_id", sae_id))
    device, text = usable_device(device), os.fspath(name)
    if sae_id is not None and text in (embedded.NAME, embedded.PLANTED):
        raise RequestError(f"sae_id {sae_id!r}: SAE {text!r} is the only one of its name; leave sae_id out")
    if text == embedded.NAME:
        return _load_place(_demo_directory(), embedded.NAME, device)
    if text == embedded.PLANTED:
        about = {"hook_name": "blocks.0.hook_mlp_out", "model_name": text}
        autoencoder = converted("jumprelu", planted_autoencoder(), {"apply_b_dec_to_input": False}, about)
        return _inference_sae(from_converted(autoencoder, embedded.FOLDER / text, device), text)
    path = Path(text).expanduser()
    if path.exists() and not (path.is_dir() or path.is_file()):
        raise RequestError(f"SAE {text!r} is neither a folder nor a file; give one that holds an autoencoder")
    if path.exists():
        place = _checked_place(path, sae_id)
        return _load_place(place, _name(place, sae_id), device)
    if not isinstance(name, str) or os.sep in text:  # no release has a slash
        parent = next(folder for folder in path.absolute().parents if folder.is_dir())
        missing = path.absolute().relative_to(parent).parts[:1]
        raise RequestError(f"SAE {text!r}: no such directory{nearest(''.join(missing), folders(parent))}")
    return _load_release(text, sae_id, device)


def _demo_directory() -> Path:
    folder = embedded.SAE
    if not (folder / CONFIG).is_file():
        raise DataError("SAE 'demo': the embedded autoencoder is missing; reinstall the workbench")
    return folder


def _checked_place(path: Path, sae_id: str | None) -> Path:
    """The folder or file of one autoencoder; RequestError where there is none, or there are several."""
    place = place_of(path, sae_id)
    check_one_format(place)
    if not place.exists():
        close = nearest(str(sae_id), ids := places_in(path)) or (f"; it has {listed(ids)}" if ids else "")
        raise RequestError(f"sae_id {sae_id!r}: no such folder in {str(path)!r}{close}")
    if place.is_file():
        if converter(place) is None and not is_place(place.parent):
            raise RequestError(f"SAE {str(place)!r} is a file; give the folder that contains {CONFIG} and {WEIGHTS}")
        return place.parent if converter(place) is None else place
    if not (place / CONFIG).is_file() and converter(place) is None and not layers_of(place):
        ids = places_in(place)
        if ids and sae_id is None:
            several = "several; choose one with sae_id" if len(ids) > 1 else "one; give its sae_id"
            raise RequestError(f"SAE {str(path)!r} contains {several}: {listed(ids)}")
        if ids:
            raise RequestError(
                f"sae_id {sae_id!r} contains several; choose one: {listed([f'{sae_id}/{i}' for i in ids])}"
            )
        if pickles := pickles_in(place):
            raise pickled(pickles[0])
        inside = ", ".join(sorted(entry.name for entry in place.iterdir())[:5]) or "nothing"
        raise RequestError(f"SAE {str(place)!r} is a directory without {CONFIG}; it contains {inside}")
    return place


def _name(place: Path, sae_id: str | None) -> str:
    """Name of an autoencoder: that of its folder, with as many folders above as tell it from its neighbours."""
    if sae_id is not None and "/" in sae_id:
        return sae_id
    place = place.absolute()
    if place.is_file():
        return f"{place.parent.name}/{place.stem}"
    parents = 2 if re.match("average_l0_|canonical", place.name) else 0  # Gemma Scope: layer_0/width_16k/average_l0_9
    return "/".join(place.resolve().parts[-1 - parents :])


def _load_place(place: Path, name: str, device: torch.device) -> Sae:
    with _silenced():
        from sae_lens import SAE
        from safetensors import SafetensorError

    if foreign := converter(place):
        return _inference_sae(from_converted(foreign(), place, device), name)
    if not (place / CONFIG).is_file() and (files := layers_of(place)):
        if missing := missing_layers(files):
            _LOG.warning(
                f"SAE {name!r} has no file of layer {listed(missing)}; the ids of its features count the layers that "
                "are there, so those of the whole differ: download the others, or use features.sites"
            )
        return layered([_load_place(file, file.stem, device) for file in files], name)
    settings = read_object(place / CONFIG)
    check_settings(settings, place / CONFIG)
    overrides = loaded_metadata(settings)
    try:
        if weights := _weights_in_memory(place, settings):
            settings |= overrides
            if "scaling_factor" in weights:
                weights = scaled(settings, weights, place)
            module = from_converted(Converted(settings, weights), place, device)
        else:
            with _silenced():
                module = SAE.load_from_disk(place, str(device), "float32", _reader(overrides))
        with _silenced():
            module = folded(module, place)
    except WorkbenchError:
        raise
    except (OSError, SafetensorError) as error:
        raise DataError(f"{place / WEIGHTS} is missing or damaged: {_line(error)}") from None
    except Exception as error:  # SAELens and torch raise many kinds for weights that do not fit
        raise DataError(f"SAE {str(place)!r}: {CONFIG} and {WEIGHTS} do not fit: {_line(error)}") from error
    return _inference_sae(module, name)


def _reader(overrides: Mapping[str, Any]) -> Callable[..., Any]:
    """SAELens' reader of a folder, with these settings in place of those in the file."""
    from sae_lens.loading.pretrained_sae_loaders import sae_lens_disk_loader

    def read(path: Path, device: str, cfg_overrides: dict[str, Any]) -> Any:
        return sae_lens_disk_loader(path, device, {**cfg_overrides, **overrides})

    return read


def _weights_in_memory(place: Path, settings: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The weights of a folder that SAELens would not read as they are: several files, or factors of features."""
    if not (place / WEIGHTS).exists():
        shards = sorted(place.glob("*-of-*.safetensors"))
        return {name: part for shard in shards for name, part in read_tensors(shard).items()} or None
    check_regular(place / WEIGHTS, AGAIN)
    if "scaling_factor" in tensor_names(place / WEIGHTS):
        return read_tensors(place / WEIGHTS)
    if settings.get("finetuning_scaling_factor"):
        raise DataError(
            f"{place / CONFIG}: finetuning_scaling_factor is true, but {WEIGHTS} has no tensor 'scaling_factor', "
            f"by which the decoder would be multiplied; {AGAIN}"
        )
    return None


def from_converted(converted: Converted, folder: Path | str, device: torch.device) -> SAE[Any]:
    """Returns SAELens' module of settings and weights in memory; DataError if they do not fit, which names `folder`."""
    from sae_lens import SAE

    config = converted.settings | {"device": str(device), "dtype": "float32"}
    weights = {name: _moved(part, device) for name, part in converted.weights.items()}
    try:
        with _silenced():
            return SAE.load_from_disk(folder, device=str(device), converter=lambda *_, **__: (config, weights))
    except Exception as error:  # torch raises many kinds for weights that do not fit
        raise DataError(f"SAE {str(folder)!r}: its settings and weights do not fit: {_line(error)}") from error


def _moved(part: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; one number that was expanded to a matrix stays one number."""
    constant = part.ndim == 2 and part.stride() == (0, 0)
    return part[:1, :1].to(device).expand(part.shape) if constant else part.to(device)


def _load_release(release: str, sae_id: str | None, device: torch.device) -> Sae:
    with _silenced():
        from sae_lens import SAE
        from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    releases = get_pretrained_saes_directory()
    if release not in releases:
        close = nearest(release, [*releases, *folders(Path.cwd())])
        raise RequestError(f"SAE {release!r} is neither a directory here nor a release listed by SAELens{close}")
    ids = list(releases[release].saes_map)
    if sae_id not in ids:
        close = nearest(sae_id or "", ids) or f"; it has {', '.join(ids[:3])}{', ...' if len(ids) > 3 else ''}"
        raise RequestError(f"sae_id {sae_id!r} is not one of the {len(ids)} ids of release {release!r}{close}")
    raw: list[dict[str, Any]] = []
    try:
        with _silenced():
            module = SAE.from_pretrained(
                release, sae_id, device=str(device), dtype="float32", converter=_noting(release, raw)
            )
    except Exception as error:  # of the hub, of SAELens, and of each of its converters
        raise RequestError(f"SAE {release}/{sae_id} could not be downloaded or read: {_line(error)}") from error
    if ignored := sorted({key for config in raw for key in ignored_settings(config)}):
        _LOG.warning(
            f"SAE {release}/{sae_id}: SAELens ignores {', '.join(ignored[:5])} of its cfg.json; if that changes what "
            "it computes, its features are wrong"
        )
    return _inference_sae(module, f"{release}/{sae_id}")


def _noting(release: str, raw: list[dict[str, Any]]) -> Callable[..., Any]:
    """SAELens' loader of a release, which appends the config as it is in the file to `raw`."""
    from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_LOADERS, get_conversion_loader_name

    name = get_conversion_loader_name(release)

    def load(*arguments: Any, **options: Any) -> Any:
        loaded = NAMED_PRETRAINED_SAE_LOADERS[name](*arguments, **options)
        added = {*options.get("cfg_overrides", ()), "device", "finetuning_scaling_factor"}  # by SAELens
        config = {key: value for key, value in loaded[0].items() if key not in added}
        raw.extend([config] if name == "sae_lens" else [])  # the others make their config themselves
        return loaded

    return load


def _inference_sae(module: SAE[Any], name: str) -> Sae:
    sae = Sae(module.eval().requires_grad_(False), name)
    check_metadata(sae.metadata, f"SAE {name!r}")
    k = getattr(module.cfg, "k", None)
    if isinstance(k, int) and k > sae.d_sae:
        raise DataError(f"SAE {name!r}: k is {k}, but it has only {sae.d_sae} features; correct its settings")
    for weights, part in module.named_parameters():
        if part.ndim != 1:
            continue
        wrong, words = (~part.isfinite(), "NaN or infinite") if weights == "b_dec" else (part.isnan(), "NaN")
        if undefined := int(wrong.sum()):
            raise DataError(f"SAE {name!r}: {undefined} of {len(part)} numbers of {weights} are {words}; {AGAIN}")
    if module.cfg.normalize_activations in UNFOLDED:
        _LOG.warning(
            f"SAE {name!r} was trained with {module.cfg.normalize_activations}, whose constants are not in its files "
            f"and which SAELens does not apply: its activations are wrong; save them as SAELens does, in {SCALER}"
        )
    return sae


@contextmanager
def _silenced() -> Iterator[None]:
    """Silences SAELens and its imports; the errors of this module report what matters."""
    with quietly(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
