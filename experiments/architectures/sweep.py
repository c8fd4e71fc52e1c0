"""Record a tiny model of one type and compare every value with readings that share no code with ours.

The recorder sees sequences of unequal lengths in one padded batch. Each of them is then run alone, without padding:
the plain model's `output_hidden_states` give the residual stream, eager attention gives the patterns, and
TransformerBridge, booted on a copy, gives the other sites by its own hooks. The store's unembedding, applied to the
last recorded residual stream, has to give the recorded logits.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import workbench as wb
from workbench.experiments.architectures.tiny import tiny_model
from workbench.io.errors import RequestError
from workbench.model.checkpoint import quietly
from workbench.model.claims import adapter_claims
from workbench.model.load import Model
from workbench.model.unembed import load_unembed
from workbench.store.reader import Store

LENGTHS = (11, 7, 9, 5)
"""Tokens of each sequence. The longest is longer than the windows and chunks of the tiny models, which are 8."""
CONTEXT = 16
TOLERANCE = 1e-5
"""Largest difference that passes, in float32, relative to the largest value read, or to 1 where that is larger."""
LENS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Check:
    """Sites of one model type, and the error of each against independent readings."""

    model_type: str
    adapter: str | None = None
    """TransformerLens' adapter; None: found by structure, or not recordable."""
    kinds: tuple[str, ...] = ()
    """Kinds of site offered, in the order of the forward pass."""
    errors: Mapping[str, float] = field(default_factory=dict)
    """Largest relative difference of each kind that could be compared; 0: equal."""
    lens: float | str | None = None
    """Largest relative difference of the last block's lens from the logits, or the reason why the store has no lens."""
    remarks: tuple[str, ...] = ()
    """Sites that could not be compared, with the reason."""
    failure: str | None = None
    """Reason why the type does not pass; None: it passes."""

    @property
    def passed(self) -> bool:
        """Returns True if the check did not fail."""
        return self.failure is None

    @property
    def recordable(self) -> bool:
        """Returns True if any site is offered."""
        return bool(self.kinds)


def check(model_type: str) -> Check:
    """Records a tiny random model of this type and compares. Never raises: an error is part of the result."""
    result = Check(model_type)
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), quietly():
            warnings.simplefilter("ignore")  # transformers and TransformerLens have many about old architectures
            model = Model(tiny_model(model_type), None, model_type)
            kinds = dict.fromkeys(_kind(site.short) for site in model.site_map.sites.values() if site.short)
            result = replace(result, adapter=model.site_map.adapter, kinds=tuple(kinds))
            return _compare(result, model, Path(folder))
    except (RequestError, ValueError) as error:
        return replace(result, failure=_one_line(error))
    except Exception as error:
        return replace(result, failure=f"{type(error).__name__}: {_one_line(error)}")


def _compare(result: Check, model: Model, folder: Path) -> Check:
    if "resid_post" not in result.kinds:
        missing = model.site_map.missing.get("blocks.0.hook_resid_post", "its architecture has none")
        return replace(result, failure=f"no resid_post: {missing}")
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(8, 120, (n,), generator=generator) for n in LENGTHS]
    sites = [site.short for site in model.site_map.sites.values() if site.short]
    texts = [sequence.tolist() for sequence in ids]
    store = wb.record(
        model, texts, out=folder / "store", sites=sites, context=CONTEXT, dtype="float32", show_progress=False
    )
    recorded = _RecordedSequences(store, ids)
    remarks: list[str] = []
    lens = _lens(recorded)
    errors = _against_plain_model(recorded, model.module, isinstance(lens, float), remarks)
    if "pattern" in result.kinds:
        errors |= _against_eager_attention(recorded, tiny_model(result.model_type), remarks)
    if result.adapter:
        errors |= _against_bridge(recorded, model, remarks)
    failures = [f"{kind} differs by {format_error(error)}" for kind, error in errors.items() if not error <= TOLERANCE]
    if isinstance(lens, float) and not lens <= LENS_TOLERANCE:
        failures.append(f"the lens differs from the logits by {format_error(lens)}")
    return replace(result, errors=errors, lens=lens, remarks=tuple(remarks), failure="; ".join(failures) or None)


# ---- the readings ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _RecordedSequences:
    """The store, and the sequences it was recorded from."""

    store: Store
    ids: list[Tensor]

    def layers(self, kind: str) -> list[int]:
        """Returns the layers in which a kind was recorded."""
        labels = [site.short.split(".") for site in self.store.sites if site.short]
        return sorted(int(label[1]) for label in labels if label[0] == kind and len(label) == 2)

    def read(self, site: str, sequence: int) -> Tensor:
        """Returns the rows of a site for one sequence."""
        first = sum(LENGTHS[:sequence])
        return self.store[site][first : first + LENGTHS[sequence]]


def _against_plain_model(
    recorded: _RecordedSequences, module: nn.Module, has_lens: bool, remarks: list[str]
) -> dict[str, float]:
    """Compares resid_post and logits, each sequence run alone."""
    layers, errors = recorded.layers("resid_post"), {"resid_post": 0.0, "logits": 0.0}
    for sequence, ids in enumerate(recorded.ids):
        output = _run_alone(module, ids, output_hidden_states=True)
        _note(errors, "logits", recorded.read("logits", sequence), output.logits[0])
        states = output.hidden_states
        begins = _difference(recorded.read(f"resid_pre.{layers[0]}", sequence), states[0][0]) <= TOLERANCE
        after = states[begins : begins + len(layers)]  # most types return the input of the first block first
        for layer, state in zip(layers, after, strict=True):
            residual = recorded.read(f"resid_post.{layer}", sequence)
            if layer == layers[-1] and not _difference(residual, state[0]) <= TOLERANCE:
                if not has_lens:
                    _remark(remarks, "resid_post of the last block could not be compared")
                continue  # most types return the last state after the final norm; the lens checks that one
            _note(errors, "resid_post", residual, state[0])
    return errors


def _against_eager_attention(
    recorded: _RecordedSequences, module: PreTrainedModel, remarks: list[str]
) -> dict[str, float]:
    """Compares pattern, each sequence run alone with eager attention, and checks that no query sees a later key."""
    module.set_attn_implementation("eager")
    layers, errors = recorded.layers("pattern"), {"pattern": 0.0}
    for sequence, ids in enumerate(recorded.ids):
        n = len(ids)
        weights = _run_alone(module, ids, output_attentions=True).attentions or ()
        if len(weights) > len(layers):  # one for every layer, of which some do not attend
            weights = [weights[layer] for layer in layers]
        if len(weights) != len(layers) or any(w is None or w.shape[-2:] != (n, n) for w in weights):
            _remark(remarks, "eager attention gives no weights to compare the pattern with")
            weights = [None] * len(layers)
        for layer, weight in zip(layers, weights, strict=True):
            pattern = recorded.read(f"pattern.{layer}", sequence)
            _note(errors, "pattern", pattern.transpose(0, 1).triu(1), torch.zeros(()))
            sums = torch.ones(n, pattern.shape[1]) if weight is None else weight[0].sum(-1).T
            if (sums < 1 - 1e-3).any():
                _remark(remarks, "patterns sum to less than 1: each head has a sink that is no token")
            _note(errors, "pattern", pattern.sum(-1), sums)
            if weight is not None:
                _note(errors, "pattern", pattern[..., :n], weight[0].transpose(0, 1))
    return errors


def _against_bridge(recorded: _RecordedSequences, model: Model, remarks: list[str]) -> dict[str, float]:
    """Compares every site that TransformerBridge also has, each sequence run alone through it."""
    try:
        with _silent(), torch.no_grad():
            bridge = model.bridge()
            caches = [bridge.run_with_cache(ids[None], use_cache=False)[1] for ids in recorded.ids]
    except Exception as error:
        remarks.append(f"TransformerBridge does not run it ({type(error).__name__}: {_one_line(error)})")
        return {}
    errors: dict[str, float] = {}
    names = {site.short: site.name for site in recorded.store.sites if site.short}
    stream = [short for short in names if _kind(short) in ("attn_out", "resid_mid", "mlp_out")]
    moved = {_kind(short) for short in stream if _is_moved(model, names[short])}
    if moved:
        remarks.append(f"TransformerBridge's {', '.join(sorted(moved))} is another tensor than documented")
    for short, name in names.items():
        if _kind(short) in moved:
            continue
        for sequence, cache in enumerate(caches):
            if name in cache and isinstance(cache[name], Tensor):
                _note(errors, _kind(short), recorded.read(short, sequence), cache[name][0])
    residual_error = errors.pop("resid_post", 0.0)  # compared with the plain model already
    if residual_error > TOLERANCE:
        remarks.append(
            f"TransformerBridge's own residual stream is {format_error(residual_error)} from the plain model's"
        )
        return {}
    absent = set(map(_kind, names)) - {*errors, *moved, "resid_post", "pattern", "logits"}
    if absent:
        remarks.append(f"TransformerBridge has no {', '.join(sorted(absent))}")
    errors.pop("pattern", None)
    return errors


def _is_moved(model: Model, name: str) -> bool:
    """True if a site is another tensor than the one that the adapter gives its name, which failed the trial pass."""
    claims = adapter_claims(model.module)
    places = claims.aliases.get(name, ()) if claims else ()
    taps = [claims.taps[place] for place in places if place in claims.taps] if claims else []
    return bool(taps) and model.site_map.sites[name].tap not in taps


def _lens(recorded: _RecordedSequences) -> float | str:
    """Compares the store's unembedding of the last block with the recorded logits."""
    last = recorded.store[f"resid_post.{recorded.layers('resid_post')[-1]}"][:]
    try:
        unembed = load_unembed(recorded.store.path)
    except RequestError as error:
        return _one_line(error).removeprefix("store store holds no unembedding: ")
    return _difference(unembed(last), recorded.store["logits"][:])


def _run_alone(module: nn.Module, ids: Tensor, **options: bool) -> Any:
    with torch.no_grad():
        return module(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), use_cache=False, **options)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# ---- differences ----------------------------------------------------------------------------------------


def _note(errors: dict[str, float], kind: str, tensor: Tensor, reference: Tensor) -> None:
    errors[kind] = max(errors.get(kind, 0.0), _difference(tensor, reference))


def _difference(tensor: Tensor, reference: Tensor) -> float:
    """Returns the largest difference relative to the largest of `reference`, or to 1; infinite for other shapes.

    `reference` may have its heads before its positions, or flat.
    """
    if reference.ndim == 3 and reference.shape != tensor.shape and reference.transpose(0, 1).shape == tensor.shape:
        reference = reference.transpose(0, 1)
    if reference.ndim and reference.numel() != tensor.numel():
        return float("inf")
    reference = reference.reshape(tensor.shape) if reference.ndim else reference
    difference = ((tensor - reference).abs().max() / reference.abs().max().clamp(min=1)).item()
    return difference if difference == difference else float("inf")


def format_error(error: float) -> str:
    """Returns an error with one digit: 3.4e-07 as "3e-7"."""
    digit, exponent = f"{error:.0e}".split("e") if error and error != float("inf") else (str(error), None)
    return f"{digit}e{int(exponent)}" if exponent else digit.removesuffix(".0")


def _remark(remarks: list[str], text: str) -> None:
    if text not in remarks:
        remarks.append(text)


def _kind(short: str) -> str:
    return short.split(".")[0]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
