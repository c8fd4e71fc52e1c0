"""Sites: places in a model, in TransformerLens names, and the grammar that selects them.

resid_post              every layer
resid_post.3            one layer
resid_post.0:8:2        a slice of layers, as in Python
blocks.3.hook_resid_post, ln_final.hook_out        TransformerLens names
blocks.*.attn.hook_v    globs over those names
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from workbench.errors import RequestError, nearest

SHORT_NAMES: Mapping[str, str] = {
    "embed": "hook_embed",
    "pos_embed": "hook_pos_embed",
    "resid_pre": "blocks.{layer}.hook_resid_pre",
    "ln1": "blocks.{layer}.ln1.hook_out",
    "q": "blocks.{layer}.attn.hook_q",
    "k": "blocks.{layer}.attn.hook_k",
    "v": "blocks.{layer}.attn.hook_v",
    "rot_q": "blocks.{layer}.attn.hook_rot_q",
    "rot_k": "blocks.{layer}.attn.hook_rot_k",
    "pattern": "blocks.{layer}.attn.hook_pattern",
    "z": "blocks.{layer}.attn.hook_z",
    "attn_out": "blocks.{layer}.hook_attn_out",
    "resid_mid": "blocks.{layer}.hook_resid_mid",
    "ln2": "blocks.{layer}.ln2.hook_out",
    "mlp_pre": "blocks.{layer}.mlp.hook_pre",
    "mlp_pre_linear": "blocks.{layer}.mlp.hook_pre_linear",
    "mlp_post": "blocks.{layer}.mlp.hook_post",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
    "resid_post": "blocks.{layer}.hook_resid_post",
    "final_norm": "ln_final.hook_out",
    "logits": "logits",
}
"""Short name -> name. Where TransformerLens has a name it is that one; `logits` are the model's own output."""

_SHORT = re.compile(r"(?P<kind>\w+)\.(?P<layers>-?\d*(?::-?\d*){0,2})")
_BLOCK = re.compile(r"blocks\.(\d+)\.")

Part = Literal["in", "out", "returned_weights", "query", "key", "value", "output", "weights", "logits"]


@dataclass(frozen=True)
class Tap:
    """Where a site is read: the input or output of a module, attention weights it returns beside its output, a part of
    its attention call, or the model's logits."""

    path: str
    part: Part


@dataclass(frozen=True)
class Site:
    """One recordable place. `axes` and `shape` leave out rows; a pattern's key axis is as long as the context."""

    name: str
    axes: tuple[str, ...]
    shape: tuple[int | None, ...]
    tap: Tap

    @property
    def layer(self) -> int | None:
        """The block it lies in, counted from 0; None outside of blocks."""
        block = _BLOCK.match(self.name)
        return int(block[1]) if block else None

    @property
    def short(self) -> str | None:
        """Its short form, `resid_post.3`; None where there is none."""
        return short_name(self.name)


@dataclass(frozen=True)
class SiteMap:
    """Every site of one model, in the order of the forward pass, and why each other name is not one."""

    sites: Mapping[str, Site]
    synonyms: Mapping[str, str]
    missing: Mapping[str, str]
    blocks: str
    """Path of the module list that holds the blocks."""
    n_layers: int
    adapter: str | None
    """Name of the TransformerLens adapter the names came from; None: found by structure, residual sites only."""

    @property
    def last_block(self) -> str:
        """Path of the last block."""
        return f"{self.blocks}.{self.n_layers - 1}"

    def select(self, wanted: Iterable[str]) -> tuple[Site, ...]:
        """The sites that the patterns in `wanted` name, each once, in model order.

        Raises RequestError for a pattern that names none, with the nearest names or the reason it is missing.
        """
        names = {name for pattern in wanted for name in self._match(pattern)}
        return tuple(site for name, site in self.sites.items() if name in names)

    def _match(self, pattern: str) -> set[str]:
        short = _SHORT.fullmatch(pattern)
        if pattern in SHORT_NAMES:
            return self._of_kind(pattern, range(self.n_layers), asked=pattern)
        if short and short["kind"] in SHORT_NAMES:
            return self._of_kind(short["kind"], self._layers(short, pattern), asked=pattern)
        names = {*self.sites, *self.synonyms}
        found = set(fnmatch.filter(names, pattern)) if set(pattern) & set("*?[") else {pattern} & names
        if not found:
            raise RequestError(self._unknown(pattern))
        return {self.synonyms.get(name, name) for name in found}

    def _layers(self, short: re.Match[str], pattern: str) -> range:
        text = short["layers"]
        if ":" in text:
            bounds = [int(part) if part else None for part in text.split(":")]
            if len(bounds) == 3 and bounds[2] == 0:
                raise RequestError(f"site {pattern!r}: the step of a slice of layers cannot be 0")
            layers = range(self.n_layers)[slice(*bounds)]
        elif text.isdigit() and int(text) < self.n_layers:
            layers = range(int(text), int(text) + 1)
        else:
            layers = range(0)
        if not layers:
            raise RequestError(f"site {pattern!r}: no such layer; the model has layers 0 to {self.n_layers - 1}")
        return layers

    def _of_kind(self, kind: str, layers: Iterable[int], asked: str) -> set[str]:
        template = SHORT_NAMES[kind]
        if "{layer}" not in template and asked != kind:
            raise RequestError(f"site {asked!r}: {kind} is outside of the blocks and has no layer; write {kind!r}")
        wanted = [template.format(layer=layer) for layer in layers] if "{layer}" in template else [template]
        found = {self.synonyms.get(name, name) for name in wanted if name in self.sites or name in self.synonyms}
        if not found:
            raise RequestError(self._unknown(asked, wanted[0]))
        return found

    def _unknown(self, asked: str, name: str | None = None) -> str:
        name = name or asked
        known = [*SHORT_NAMES, *self.sites, *self.synonyms]
        if name in self.missing:
            offered = sorted({kind for kind in map(self._kind, self.sites) if kind}, key=list(SHORT_NAMES).index)
            return f"site {asked!r} cannot be recorded here: {self.missing[name]}; this model has {', '.join(offered)}"
        if asked in SHORT_NAMES or name != asked:
            offered = [kind for kind in SHORT_NAMES if self._has(kind)]
            source = f"the {self.adapter}" if self.adapter else "a model without TransformerLens adapter"
            return f"site {asked!r} does not exist in {source}; this model has {', '.join(offered)}"
        return f"site {asked!r} is unknown{nearest(asked, known) or '; short names: ' + ', '.join(SHORT_NAMES)}"

    def _has(self, kind: str) -> bool:
        return any(self._kind(name) == kind for name in self.sites)

    @staticmethod
    def _kind(name: str) -> str | None:
        short = short_name(name)
        return short and short.split(".")[0]


def short_name(name: str) -> str | None:
    """`blocks.3.hook_resid_post` -> `resid_post.3`; None for a name that has no short form."""
    block = _BLOCK.match(name)
    template = _BLOCK.sub("blocks.{layer}.", name, count=1)
    for kind, known in SHORT_NAMES.items():
        if known == template:
            return f"{kind}.{block[1]}" if block else kind
    return None


def full_name(name: str) -> str:
    """`resid_post.3` -> `blocks.3.hook_resid_post`; a name that is no short form comes back as it is."""
    short = _SHORT.fullmatch(name)
    if short and short["kind"] in SHORT_NAMES and short["layers"].isdigit():
        return SHORT_NAMES[short["kind"]].format(layer=int(short["layers"]))
    template = SHORT_NAMES.get(name, name)
    return name if "{layer}" in template else template
