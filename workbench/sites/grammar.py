"""Sites: places in a model, in TransformerLens names, and the grammar that selects them.

resid_post              every layer
resid_post.3            one layer
resid_post.0:8:2        a slice of layers, as in Python
blocks.3.hook_resid_post, ln_final.hook_out        TransformerLens names
blocks.*.attn.hook_v    globs over those names
model.layers.3.mlp      output of a module, by its Hugging Face name; globs over these names where no other one matches

Some sites are derived: statistics of another site, computed in the same forward pass and selected by kind or name like
any other. Globs do not select them.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from workbench.io.errors import RequestError, nearest
from workbench.sites.score_rule import ScoreRule

SHORT_NAMES: Mapping[str, str] = {
    "embed": "hook_embed",
    "pos_embed": "hook_pos_embed",
    "resid_pre": "blocks.{layer}.hook_resid_pre",
    "ln1": "blocks.{layer}.ln1.hook_out",
    "q": "blocks.{layer}.attn.hook_q",
    "k": "blocks.{layer}.attn.hook_k",
    "v": "blocks.{layer}.attn.hook_v",
    "v_norm": "blocks.{layer}.attn.hook_v_norm",
    "rot_q": "blocks.{layer}.attn.hook_rot_q",
    "rot_k": "blocks.{layer}.attn.hook_rot_k",
    "pattern": "blocks.{layer}.attn.hook_pattern",
    "attn_received": "blocks.{layer}.attn.hook_attn_received",
    "attn_received_entropy": "blocks.{layer}.attn.hook_attn_received_entropy",
    "attn_entropy": "blocks.{layer}.attn.hook_attn_entropy",
    "attn_first": "blocks.{layer}.attn.hook_attn_first",
    "attn_current": "blocks.{layer}.attn.hook_attn_current",
    "attn_previous": "blocks.{layer}.attn.hook_attn_previous",
    "attn_recent": "blocks.{layer}.attn.hook_attn_recent",
    "attn_duplicate": "blocks.{layer}.attn.hook_attn_duplicate",
    "attn_induction": "blocks.{layer}.attn.hook_attn_induction",
    "z": "blocks.{layer}.attn.hook_z",
    "attn_out": "blocks.{layer}.hook_attn_out",
    "resid_mid": "blocks.{layer}.hook_resid_mid",
    "ln2": "blocks.{layer}.ln2.hook_out",
    "mlp_pre": "blocks.{layer}.mlp.hook_pre",
    "mlp_pre_linear": "blocks.{layer}.mlp.hook_pre_linear",
    "mlp_post": "blocks.{layer}.mlp.hook_post",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
    "resid_post": "blocks.{layer}.hook_resid_post",
    "resid_norm": "blocks.{layer}.hook_resid_norm",
    "final_norm": "ln_final.hook_out",
    "logits": "logits",
}
"""Short name -> name. TransformerLens' name where it has one; `logits` are the model's output, and derived sites have
names of the same form."""

DERIVED: Mapping[str, str] = {
    "attn_received": "pattern",
    "attn_received_entropy": "pattern",
    "attn_entropy": "pattern",
    "attn_first": "pattern",
    "attn_current": "pattern",
    "attn_previous": "pattern",
    "attn_recent": "pattern",
    "attn_duplicate": "pattern",
    "attn_induction": "pattern",
    "v_norm": "v",
    "resid_norm": "resid_post",
}
"""Kind of derived site -> kind of the site it is computed from, whose last axis it lacks."""

_OF_LATER_QUERIES = ("attn_received", "attn_received_entropy")
"""Derived sites that are means over the queries at and after a key."""

GRADIENT = "grad."
"""Prefix of the name of a recorded gradient with respect to a site: `grad.resid_post.3`."""

_SHORT = re.compile(r"(?P<kind>\w+)\.(?P<layers>-?\d*(?::-?\d*){0,2})")
_BLOCK = re.compile(r"blocks\.(\d+)\.")

Part = Literal["in", "out", "returned_weights", "query", "key", "value", "output", "weights", "logits"]


@dataclass(frozen=True)
class Tap:
    """Place at which a site is read: the input or output of a module, attention weights that it returns, a part of its
    attention call, or the model's logits."""

    path: str
    part: Part


@dataclass(frozen=True)
class Site:
    """One recordable place. `axes` and `shape` leave out rows; a pattern's key axis is as long as the context."""

    name: str
    axes: tuple[str, ...]
    shape: tuple[int | None, ...]
    tap: Tap
    of: Site | None = None
    """Site that it is computed from, where it is derived; None: it is the value at its tap."""

    @property
    def layer(self) -> int | None:
        """Index of its block, from 0; None outside of the blocks."""
        block = _BLOCK.match(self.name)
        return int(block[1]) if block else None

    @property
    def short(self) -> str | None:
        """Its short form, `resid_post.3`; None where there is none."""
        return short_name(self.name)

    @property
    def kind(self) -> str | None:
        """Its short form without the layer, `resid_post`; None where there is none."""
        return _kind(self.name)


@dataclass(frozen=True)
class SiteMap:
    """All sites of one model, in the order of the forward pass, and the reason why each other name is missing."""

    sites: Mapping[str, Site]
    synonyms: Mapping[str, str]
    missing: Mapping[str, str]
    blocks: str
    """Path of the module list that holds the blocks."""
    n_layers: int
    adapter: str | None
    """Name of the TransformerLens adapter the names came from; None: found by structure, residual sites only."""
    causal: bool = True
    """True if no token changes what is computed at earlier positions."""
    chained: tuple[int, ...] = ()
    """Layers whose resid_pre is the resid_post of the layer before: one tensor."""
    modules: Mapping[str, Site] = field(default_factory=dict)
    """Outputs of modules that no other name stands for, by Hugging Face name, in the order of the forward pass. Those
    of `sites` have their module among the synonyms."""
    score_rules: tuple[ScoreRule, ...] = ()
    """Rules by which layers score their queries and keys; without layers that attend in their own way."""
    factors: Mapping[str, float] = field(default_factory=dict)
    """Number by which a block multiplies the output of its attention or MLP before it adds it, by the name of what is
    added, such as blocks.0.hook_attn_out, which is no site then."""

    @property
    def last_block(self) -> str:
        """Path of the last block."""
        return f"{self.blocks}.{self.n_layers - 1}"

    @cached_property
    def recordable(self) -> Mapping[str, Site]:
        """`sites`, each followed by the sites derived from it."""
        derived: dict[str, list[Site]] = defaultdict(list)
        for kind, source_kind in DERIVED.items():
            for layer in range(self.n_layers):
                name = SHORT_NAMES[source_kind].format(layer=layer)
                source = self.sites.get(self.synonyms.get(name, name))
                if not self.causal and kind in _OF_LATER_QUERIES:
                    continue
                if source and (source_kind == "resid_post" or source.axes[0] == "head"):  # fused heads may be flat
                    derived[source.name].append(self._derive(kind, layer, source))
        return {site.name: site for source in self.sites.values() for site in (source, *derived[source.name])}

    def _derive(self, kind: str, layer: int, source: Site) -> Site:
        axes, shape = source.axes[:-1], source.shape[:-1]
        if kind == "v_norm":  # one for each query head, as for all other statistics of heads
            of_layer = (
                self.sites.get(SHORT_NAMES[part].format(layer=layer)) for part in ("pattern", "z", "q", "rot_q")
            )
            shape = next((site.shape[:1] for site in of_layer if site and site.axes[0] == "head"), shape)
        return Site(SHORT_NAMES[kind].format(layer=layer), axes, shape, source.tap, source)

    @cached_property
    def selectable(self) -> Mapping[str, Site]:
        """`recordable`, then the outputs of other modules: the order of sites in a store."""
        return {**self.recordable, **self.modules}

    def select(self, patterns: Iterable[str]) -> tuple[Site, ...]:
        """Returns the sites that `patterns` select, each once, in the order of `selectable`.

        Raises:
            RequestError: A pattern selects no site; the text has the nearest names, or the reason why it is missing.
        """
        names = {name for pattern in patterns for name in self._match(pattern)}
        return tuple(site for name, site in self.selectable.items() if name in names)

    def names_of(self, site: Site) -> tuple[str, ...]:
        """Returns the other names of a site: TransformerLens' and that of the module whose output it is."""
        return tuple(name for name, canonical in self.synonyms.items() if canonical == site.name)

    def _match(self, pattern: str) -> set[str]:
        short = _SHORT.fullmatch(pattern)
        if pattern in SHORT_NAMES:
            return self._of_kind(pattern, range(self.n_layers), pattern=pattern)
        if short and short["kind"] in SHORT_NAMES:
            return self._of_kind(short["kind"], _layers(short, self.n_layers), pattern=pattern)
        if set(pattern) & set("*?["):
            lens_names = (name for name in (*self.sites, *self.synonyms) if is_lens_name(name))
            paths = (name for name in (*self.synonyms, *self.modules) if not is_lens_name(name))
            names = set(fnmatch.filter(lens_names, pattern)) or set(fnmatch.filter(paths, pattern))
        else:
            names = {pattern} & {*self.selectable, *self.synonyms}
        if not names:
            raise RequestError(self._unknown(pattern))
        return {self.synonyms.get(name, name) for name in names}

    def _of_kind(self, kind: str, layers: Iterable[int], pattern: str) -> set[str]:
        template = SHORT_NAMES[kind]
        _check_has_layer(kind, pattern)
        names = [template.format(layer=layer) for layer in layers] if "{layer}" in template else [template]
        existing = {self.synonyms.get(name, name) for name in names if name in self.recordable or name in self.synonyms}
        if not existing:
            raise RequestError(self._unknown(pattern, names[0]))
        return existing

    @property
    def source(self) -> str:
        """What the names of the sites came from, in words."""
        return f"the {self.adapter} of TransformerLens" if self.adapter else "a model without TransformerLens adapter"

    def reason(self, name: str) -> str | None:
        """Returns the reason why the site of a full name is missing, that of its source if it is derived; None: none is
        known."""
        if not self.causal and _kind(name) in _OF_LATER_QUERIES:
            return (
                "it is a mean over the queries at and after a token, and in this model earlier tokens attend to later "
                "ones"
            )
        source, block = DERIVED.get(_kind(name) or ""), _BLOCK.match(name)
        return self.missing.get(SHORT_NAMES[source].format(layer=block[1]) if source and block else name)

    def _unknown(self, pattern: str, name: str | None = None) -> str:
        name = name or pattern
        all_names = [*SHORT_NAMES, *self.sites, *self.synonyms, *self.modules]
        if reason := self.reason(name):
            offered = sorted({kind for kind in map(_kind, self.sites) if kind}, key=list(SHORT_NAMES).index)
            return f"site {pattern!r} cannot be recorded here: {reason}; this model has {', '.join(offered)}"
        if pattern in SHORT_NAMES or name != pattern or _kind(name) in DERIVED:
            offered = [kind for kind in SHORT_NAMES if self._has(kind)]
            return f"site {pattern!r} does not exist in {self.source}; this model has {', '.join(offered)}"
        return f"site {pattern!r} is unknown{nearest(pattern, all_names) or '; short names: ' + ', '.join(SHORT_NAMES)}"

    def _has(self, kind: str) -> bool:
        return any(_kind(name) == kind for name in self.sites)


def check_patterns(
    patterns: Iterable[str], n_layers: int | None, modules: Callable[[], Collection[str] | None] = lambda: None
) -> None:
    """Refuses patterns that no model can have, or not this one, before its weights are loaded.

    Args:
        patterns: Patterns of sites.
        n_layers: Number of blocks. None: unknown.
        modules: Returns the Hugging Face names of the model's modules; called for a pattern that may be one. None:
            unknown.

    Raises:
        RequestError: An unknown kind of site, a layer or a module that the model does not have.
    """
    for pattern in patterns:
        short = _SHORT.fullmatch(pattern)
        if short and short["kind"] in SHORT_NAMES:
            _check_has_layer(short["kind"], pattern)
            if n_layers is not None:
                _layers(short, n_layers)
        elif is_lens_name(pattern):
            block = _BLOCK.match(pattern)
            if block and n_layers is not None and int(block[1]) >= n_layers:
                raise RequestError(f"site {pattern!r}: no such layer; the model has layers 0 to {n_layers - 1}")
        elif pattern not in SHORT_NAMES and not set(pattern) & set("*?["):
            module_paths = modules()
            if (
                _is_misspelt(short["kind"] if short else pattern)
                if module_paths is None
                else pattern not in module_paths
            ):
                close = nearest(pattern, [*SHORT_NAMES, *(module_paths or ())])
                raise RequestError(f"site {pattern!r} is unknown{close or '; short names: ' + ', '.join(SHORT_NAMES)}")


def _is_misspelt(name: str) -> bool:
    """True for a word that is nearly a short name, and so hardly a module of a model that is not there yet."""
    close = difflib.get_close_matches(name, SHORT_NAMES, n=1, cutoff=0.75)
    return not name or (name.isidentifier() and bool(close))


def is_lens_name(name: str) -> bool:
    """Returns True for a name in the form of TransformerLens, and False for a path of modules."""
    return "hook_" in name or name in SHORT_NAMES.values()


def _check_has_layer(kind: str, pattern: str) -> None:
    if "{layer}" not in SHORT_NAMES[kind] and pattern != kind:
        raise RequestError(f"site {pattern!r}: {kind} is outside of the blocks and has no layer; write {kind!r}")


def _layers(short: re.Match[str], n_layers: int) -> range:
    text = short["layers"]
    if ":" in text:
        bounds = [int(part) if part else None for part in text.split(":")]
        if len(bounds) == 3 and bounds[2] == 0:
            raise RequestError(f"site {short[0]!r}: the step of a slice of layers cannot be 0")
        layers = range(n_layers)[slice(*bounds)]
    elif text.lstrip("-").isdigit() and -n_layers <= int(text) < n_layers:  # -1: the last one
        layer = int(text) % n_layers
        layers = range(layer, layer + 1)
    else:
        layers = range(0)
    if not layers:
        raise RequestError(f"site {short[0]!r}: no such layer; the model has layers 0 to {n_layers - 1}")
    return layers


def gradient_name(name: str) -> str:
    """Returns the name of the gradient with respect to a site, short or full."""
    return GRADIENT + name


def short_name(name: str) -> str | None:
    """Returns `resid_post.3` for `blocks.3.hook_resid_post`; None for a name that has no short form."""
    if name.startswith(GRADIENT):
        short = short_name(name.removeprefix(GRADIENT))
        return short and gradient_name(short)
    block = _BLOCK.match(name)
    template = _BLOCK.sub("blocks.{layer}.", name, count=1)
    for kind, full_name in SHORT_NAMES.items():
        if full_name == template:
            return f"{kind}.{block[1]}" if block else kind
    return None


def _kind(name: str) -> str | None:
    short = short_name(name)
    return short and short.split(".")[0]


def full_name(name: str) -> str:
    """Returns `blocks.3.hook_resid_post` for `resid_post.3`; a name that is not a short form is returned as it is."""
    short = _SHORT.fullmatch(name)
    if short and short["kind"] in SHORT_NAMES and short["layers"].isdigit():
        return SHORT_NAMES[short["kind"]].format(layer=int(short["layers"]))
    template = SHORT_NAMES.get(name, name)
    return name if "{layer}" in template else template
