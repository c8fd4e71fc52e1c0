"""Directions: one vector at one site, with a record of how it was made, in a safetensors file.

direction = wb.mean_difference(quoted, others, "resid_post", 12)
direction.save("quoted.safetensors")
wb.load_direction("quoted.safetensors").vector              # float32, the shape of a row of the site
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.io.checks import as_path
from workbench.io.errors import DataError, RequestError, shown
from workbench.io.files import explain_full_disk, new_file, sha256_bytes
from workbench.io.parse import check_checksum, from_json, parse, to_checked_json, to_json
from workbench.io.tensors import header_bytes, open_safetensors

_FORMAT = "workbench.direction"
_ADVICE = "save the direction again"


@dataclass(frozen=True, eq=False, init=False)
class Direction:
    """A vector at a site, in float32, and how it was made."""

    site: str
    """Label or name of the site: `resid_post.9`."""
    vector: Float[Tensor, "*row"]
    """Of the shape of a row of the site, in float32 on the CPU."""
    name: str
    """What the direction is meant to represent, for figures and tables."""
    made_of: Mapping[str, Any]
    """How it was made, as JSON holds it: method, fingerprint of the store, label, counts."""

    def __init__(self, site: str, vector: Any, name: str, made_of: Mapping[str, Any] | None = None) -> None:
        """Keeps a copy of `vector`, a tensor, an array or a list of numbers.

        Raises:
            RequestError: The vector has no value or one that is not finite, or `made_of` holds what JSON does not.
        """
        for key, text in (("site", site), ("name", name)):
            if not isinstance(text, str) or not text:
                raise RequestError(f"{key} must be a text that is not empty, not {shown(text)}")
        try:
            vector = torch.as_tensor(vector).detach().to("cpu", torch.float32, copy=True).contiguous()
        except (TypeError, ValueError, RuntimeError):
            raise RequestError(f"vector must be an array of numbers, not {shown(vector)}") from None
        if not vector.numel():
            raise RequestError(f"vector has the shape {tuple(vector.shape)} and no value; give a row of {site}")
        if not bool(vector.isfinite().all()):
            raise RequestError(f"vector of {name!r} has a value that is not finite in float32")
        try:
            made_of = from_json(to_json(dict(made_of or {})), "made_of")
        except (TypeError, ValueError, DataError) as error:
            raise RequestError(f"made_of must hold what JSON holds: {error}") from None
        for key, value in (("site", site), ("vector", vector), ("name", name), ("made_of", made_of)):
            object.__setattr__(self, key, value)

    def __repr__(self) -> str:
        axes = " x ".join(map(str, self.vector.shape))
        return f"Direction({self.name!r} at {self.site}, {axes}, L2 norm {float(self.vector.norm()):.4g})"

    def unit(self) -> Direction:
        """Returns the direction divided by its L2 norm. RequestError for one that is 0."""
        return Direction(self.site, self._scaled().float(), self.name, self.made_of)

    def cosine(self, other: Direction) -> float:
        """Returns the cosine similarity with another direction, -1 to 1; near 0 for random ones in many dimensions.

        Raises:
            RequestError: The other has another shape, or one of both is 0.
        """
        if self.vector.shape != other.vector.shape:
            raise RequestError(
                f"{self.name!r} has the shape {tuple(self.vector.shape)} and {other.name!r} "
                f"{tuple(other.vector.shape)}; directions of one shape have a cosine"
            )
        return float((self._scaled() * other._scaled()).sum().clamp(-1, 1))

    def _scaled(self) -> Tensor:
        """The unit vector in float64."""
        vector = self.vector.double()
        if not float(norm := vector.norm()):
            raise RequestError(f"direction {self.name!r} is 0 and has no unit vector")
        return vector / norm

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes a safetensors file with one tensor, `direction`; the rest is JSON in its metadata.

        Args:
            path: A name that ends in `.safetensors`; its folder is made. The file of a direction is replaced.

        Returns:
            `path`.

        Raises:
            RequestError: Another ending, or the file exists and is no direction.
            DataError: The disk is full or read-only.
        """
        path = as_path("path", path)
        if path.suffix != ".safetensors":
            raise RequestError(f"path {str(path)!r} must end in .safetensors")
        if os.path.lexists(path):
            try:
                load_direction(path)
            except (DataError, RequestError):
                raise RequestError(f"path {str(path)!r} exists and is no direction; choose another") from None
        data = self.vector.numpy().astype("<f4", copy=False).tobytes()
        record = {"site": self.site, "name": self.name, "made_of": self.made_of, "sha256": sha256_bytes(data)}
        header = header_bytes("direction", "float32", tuple(self.vector.shape), {_FORMAT: to_checked_json(record)})
        with explain_full_disk(str(path), "save it again"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(path) as file:
                file.write(header)
                file.write(data)
        return path


@dataclass(frozen=True)
class _Record:
    """Metadata of the file."""

    site: str
    name: str
    made_of: dict[str, Any]
    sha256: str
    """Of the vector's bytes."""


def load_direction(path: str | os.PathLike[str]) -> Direction:
    """Reads the file that `Direction.save` wrote.

    Raises:
        RequestError: No file there, or a safetensors file of something else.
        DataError: The file is damaged.
    """
    path = as_path("path", path)
    if not path.is_file():
        raise RequestError(f"no direction at {path}; give the file that Direction.save wrote")
    with open_safetensors(path, _ADVICE) as file:
        text = (file.metadata() or {}).get(_FORMAT)
        if text is None:
            raise RequestError(f"{path} is no direction; give the file that Direction.save wrote")
        value = from_json(text, path, _ADVICE)
        check_checksum(value, path, _ADVICE)
        record: _Record = parse(_Record, value, str(path))
        vector = file.get_tensor("direction")
        if sha256_bytes(vector.contiguous().numpy().tobytes()) != record.sha256:
            raise ValueError("the checksum of its vector differs")
    try:
        return Direction(record.site, vector, record.name, record.made_of)
    except RequestError as error:
        raise DataError(f"{path} is damaged ({error}); {_ADVICE}") from None
