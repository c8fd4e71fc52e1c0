"""A sparse autoencoder: SAELens' module with what its files record, and the mathematics that everything here needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.io.checks import check_kind
from workbench.io.errors import DataError, RequestError
from workbench.io.torch_state import plain_torch
from workbench.sae.input_rows import joint_name
from workbench.sae.training import centres

if TYPE_CHECKING:
    from sae_lens import SAE


@dataclass(frozen=True, eq=False)
class Sae:
    """A SAELens autoencoder in eval mode, in float32 as loaded, with the metadata of its files."""

    module: SAE[Any]
    name: str
    """Name of its directory, or "release/id"."""

    @property
    def d_in(self) -> int:
        """Width of an input row; of several sites, that of all of them together."""
        return self.module.cfg.d_in

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.module.cfg.d_sae

    @property
    def architecture(self) -> str:
        """SAELens' name: standard, gated, topk, jumprelu, ...; batchtopk and matryoshka SAEs are saved as jumprelu."""
        return self.module.cfg.architecture()

    @property
    def site(self) -> str | None:
        """TransformerLens name of the site it was trained on; None if its files do not record it."""
        return self.metadata.get("hook_name")

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites it reads at once, in the order of its input; of most it is `site` alone. Empty if its
        files do not record them."""
        names = self.metadata.get("hook_names")
        return tuple(names) if names else (self.site,) if self.site else ()

    @property
    def n_sites(self) -> int:
        """Number of sites of a row that it reads at once: 1, or those of a crosscoder or of several layers."""
        return self.metadata.get("n_sites") or 1

    @property
    def head(self) -> int | None:
        """Index of the head that it reads; None: it reads all of its site."""
        return self.metadata.get("hook_head_index")

    @property
    def model_name(self) -> str | None:
        """Name of the model it was trained on, as its authors spell it; None if its files do not record it."""
        return self.metadata.get("model_name")

    @property
    def context_size(self) -> int | None:
        """Tokens per training sequence; None if its files do not record it."""
        return self.metadata.get("context_size")

    @property
    def centres(self) -> bool:
        """True if it reads rows minus their mean over d_model, as a model with centred writing weights has them; the
        mean is subtracted here. Reconstructions have mean 0 as well, up to the SAE's error."""
        return centres(self.metadata)

    @property
    def reconstructs(self) -> bool:
        """True for an autoencoder, False for a transcoder, whose output is another site than its input."""
        return "transcoder" not in self.architecture and not self.metadata.get("transcode")

    @property
    def sequential(self) -> bool:
        """True if a row's features depend on the rows before it in the sequence (temporal SAEs)."""
        return self.architecture == "temporal"

    @property
    def device(self) -> torch.device:
        """The device of its weights."""
        return next(self.module.parameters()).device

    @property
    def W_dec(self) -> Float[Tensor, "feature d_model"]:
        """The decoder: one direction per feature.

        Raises:
            RequestError: It writes to several layers, so its decoders were not read.
        """
        if self.encoder_only:
            raise RequestError(f"SAE {self.name!r} writes to several layers; its decoders are not read")
        return self.module.W_dec

    @cached_property
    def undefined(self) -> tuple[int, ...]:
        """Ids of features whose direction has NaN or infinite values; the decoder is read for it, once."""
        if bool(self.W_dec.sum().isfinite()):  # ten times faster; it may overflow
            return ()
        return tuple((~self.W_dec.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist())

    @property
    def encoder_only(self) -> bool:
        """True if it encodes and cannot decode: its features write to several layers."""
        return bool(self.metadata.get("encoder_only"))

    @plain_torch()
    def encode(self, rows: Float[Tensor, "row ..."], *, gradients: bool = False) -> Float[Tensor, "row feature"]:
        """Returns the dense activations of all features in float32, by SAELens' `encode`. Heads are flattened.

        A temporal SAE reads `rows` as one sequence from its first token and returns its novel codes. `gradients` lets
        the gradient of `rows` pass through.

        Cost per row: 2 d_in d_sae operations and 4 d_sae bytes, at the peak four times that for jumprelu.
        """
        with torch.enable_grad() if gradients else torch.no_grad():
            shaped = self._shaped(rows)
            return self.module.encode(shaped[None])[0] if self.sequential else self.module.encode(shaped).flatten(1)

    @plain_torch()
    def encoder_input(self, rows: Float[Tensor, "row ..."]) -> Float[Tensor, "row d_in"]:
        """Returns the input of the encoder's product: rows normalised and minus b_dec, as the settings require."""
        with torch.no_grad():
            return self.module.process_sae_in(self._shaped(rows)).flatten(1)

    @plain_torch()
    def decode(self, activations: Float[Tensor, "row feature"]) -> Float[Tensor, "row d_model"]:
        """Returns the reconstruction of the rows encoded last; under layer_norm SAELens stores their mean and scale.

        Raises:
            DataError: The decoder has NaN or infinite values, which reach every reconstruction.
        """
        if self.undefined:
            raise not_defined(self.name, self.undefined)
        with torch.no_grad():
            return self.module.decode(activations).flatten(1)

    def config(self) -> dict[str, Any]:
        """Returns the content of its `cfg.json`, metadata included, without the device."""
        config = {name: value for name, value in self.module.cfg.to_dict().items() if name != "device"}
        return json.loads(json.dumps(config, default=str), parse_constant=lambda _: None)  # JSON has no NaN

    def fingerprint(self) -> str:
        """Returns the SHA-256 of all tensors and of the settings that change the mathematics; 1 s per gigabyte."""
        settings = {name: value for name, value in self.config().items() if name not in ("metadata", "dtype")}
        settings |= ({"centres": True} if self.centres else {}) | ({} if self.head is None else {"head": self.head})
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name, tensor in sorted(self.module.state_dict().items()):
            if self.encoder_only and name == "W_dec":
                continue
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy())
        return digest.hexdigest()

    def __repr__(self) -> str:
        site = f", {joint_name(self.sites)}" if self.sites else ""
        return f"Sae({self.name!r}, {self.architecture}, {self.d_in:,} -> {self.d_sae:,}{site}, {self.device})"

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What its files record of its training: hook_name, model_name, context_size, prepend_bos, ..."""
        return self.module.cfg.metadata.to_dict()  # the object itself returns None for any unknown attribute

    def input_rows(self, rows: Float[Tensor, "row ..."]) -> Float[Tensor, "row d_in"]:
        """Returns the rows that it was trained on, in float32: heads flattened, minus their mean if it `centres`."""
        flat = rows.to(self.device, torch.float32).flatten(1)
        return flat - flat.mean(1, keepdim=True) if self.centres else flat

    def _shaped(self, rows: Float[Tensor, "row ..."]) -> Float[Tensor, "row ..."]:
        flat = self.input_rows(rows)
        # an SAE of z expects separate heads; a single head of the full width flattens to the same
        return flat[:, None] if self.module.cfg.reshape_activations == "hook_z" else flat


def not_defined(name: str, features: Sequence[int]) -> DataError:
    """Returns the error for features whose directions have NaN or infinite values."""
    more = ", ..." if len(features) > 5 else ""
    text = "feature " if len(features) == 1 else f"{len(features):,} features, "
    text += ", ".join(map(str, features[:5])) + more
    return DataError(f"SAE {name!r}: the decoder has NaN or infinite values at {text}; save or download the SAE again")


def check_autoencoder(sae: object) -> None:
    """Refuses what is no loaded autoencoder, such as its name."""
    check_kind("sae", sae, Sae, "a loaded SAE, such as wb.load_sae('demo')")
