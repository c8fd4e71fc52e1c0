"""Steering: what a direction, added while the model generates, does to a metric, and what it costs in plain loss.

Prompts are the first tokens of a store's sequences. For each scale a the model continues them greedily with a d added
to the chosen tokens of the site, at every chosen layer. Measured are ln P of the target tokens after the prompt, the
share of target tokens among the generated ones, and the loss that the model without steering gives to the generated
text: a direction that raises the metric by making text that the model itself finds absurd shows in the loss. The
control is a random direction of the same norm. A scale of 0 is the plain model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Int64
from torch import Tensor

from workbench.probing import (
    CATEGORIES,
    NEUTRAL,
    Add,
    Direction,
    Model,
    RequestError,
    Result,
    Store,
    StoreProbe,
    ThemedFigure,
    Variable,
    check_fields,
    check_kind,
    clustered_means,
    continue_steered,
    counted,
    dataset,
    error_bars,
    intervals,
    load_direction,
    plain_torch,
    provenance,
    random_direction,
    recorded_model,
    require_causal,
    token_of_text,
    token_texts,
    with_interval,
    with_note,
)

_CELL = ("kind", "scale")
MEASURES = {
    "log_probability": ("nats", "ln P of the target tokens after the prompt"),
    "share": ("share of tokens", "generated tokens that are target tokens"),
    "loss": ("nats", "loss per generated token of the model without steering"),
}
VARIABLES = tuple(
    variable
    for name, (units, meaning) in MEASURES.items()
    for variable in with_interval(Variable(name, _CELL, units, meaning, "that of the random direction"))
)
KINDS = ("direction", "random")


@dataclass(frozen=True)
class Steering(StoreProbe):
    """Adds a direction while the model generates: effect on target tokens, and loss of the plain model, by scale."""

    name: ClassVar[str] = "steering"
    needs_model: ClassVar[bool] = True
    sources: ClassVar[tuple[str, ...]] = (
        "Turner et al. 2023, Steering language models with activation engineering, arXiv 2308.10248",
        "Rimsky et al. 2023, Steering Llama 2 via contrastive activation addition, arXiv 2312.06681",
    )
    variables: ClassVar[tuple[Variable, ...]] = VARIABLES
    controls: ClassVar[Mapping[str, str]] = {"random": "a random direction of the same L2 norm at the same layers"}

    direction: str = ""
    """File of a direction (`wb.Direction.save`), whose site it is added to."""
    tokens: tuple[str, ...] = ()
    """Texts of the target tokens, with their leading space."""
    scales: tuple[float, ...] = (0.0, 1.0, 2.0, 4.0, 8.0)
    """Factors of the direction."""
    unit: str = "raw"
    """raw: the direction as it is; unit: of norm 1; norm: of the norm of each row."""
    layers: tuple[int, ...] | None = None
    """Layers at which it is added, together. None: its own."""
    at: str = "all"
    """Tokens that are changed. all: prompt and generated ones; new: generated ones."""
    prompt: int = 16
    """Tokens of each prompt; shorter sequences are left out."""
    new_tokens: int = 24
    """Generated tokens of each prompt."""
    row_limit: int = 32
    """Maximum number of prompts."""
    where: str | None = None
    """SQL over the token table; a sequence is used if it holds for its first token. None: all."""
    model: str | None = None
    """Directory or hub id of the recorded model, if the name in the store is not enough to load it."""
    resamples: int = 1000
    """Resamples of prompts for the intervals."""
    seed: int = 0
    """Random seed of the control's direction and of the resamples."""
    device: str | None = None
    """Device of a model that the probe loads: cpu, cuda, cuda:1. None: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, "unit", one_of=("raw", "unit", "norm"))
        check_fields(self, "at", one_of=("all", "new"))
        check_fields(self, "prompt", "row_limit", "resamples", at_least=1, whole=True)
        check_fields(self, "new_tokens", at_least=1, at_most=100_000, whole=True)
        check_fields(self, "seed", at_least=0, whole=True)
        if len(set(self.scales)) != len(self.scales) or not self.scales:
            raise RequestError("scales must be one or more numbers that differ")

    def run(self, store: Store, *, model: Model | None = None) -> Result:
        """Steers continuations of the store's sequences.

        Costs, for each scale, 2 x new_tokens passes over the prompts (with a cache one token each) and four passes over
        prompts and continuations.

        Args:
            store: Its sequences begin with the prompts; it names the model.
            model: The recorded model. None: it is loaded from the setting `model` or the store's name for it.

        Raises:
            RequestError: No direction or target token is named, a target is no single token, no sequence is long
                enough, the store holds chosen rows, or the model cannot be loaded, is another one, is not causal or has
                no such site.
        """
        if not self.direction:
            raise RequestError("direction is not given; name the file of a direction: wb.Direction(...).save(path)")
        return self.steer(store, load_direction(self.direction), model=model)

    @plain_torch()
    def steer(self, store: Store, direction: Direction, *, model: Model | None = None) -> Result:
        """Steers with a direction in memory, whatever the setting `direction`; see `run`."""
        require_causal(store, self.name)
        check_kind("direction", direction, Direction, "a direction, such as wb.load_direction(path)")
        store.require_whole_sequences("a continuation of prompts")
        model = recorded_model(store, model or self.model, self.device)
        targets = _target_ids(model, self.tokens)
        ids, left_out = self._prompts(store)
        if (longest := self.prompt + self.new_tokens) > (limit := model.context_limit or longest):
            raise RequestError(
                f"new_tokens: {counted(longest, 'token')} with the prompt, the model takes {limit:,}; give fewer"
            )
        values: dict[str, np.ndarray] = {name: np.full((len(ids), 2, len(self.scales)), np.nan) for name in MEASURES}
        lines = []
        for row, kind in enumerate(KINDS):
            used = direction if kind == "direction" else random_direction(direction, self.seed)
            for column, scale in enumerate(self.scales):
                records = [Add(site, used.vector, scale, self.unit, at=self.at) for site in self._sites(direction)]  # pyright: ignore[reportArgumentType]  # checked
                continuation = continue_steered(model, ids, records if scale else [], self.new_tokens)
                values["log_probability"][:, row, column] = continuation.after_prompt[:, targets].logsumexp(1).numpy()
                hits = torch.isin(continuation.tokens, torch.tensor(targets)).double()
                values["share"][:, row, column] = hits.mean(1).numpy()
                values["loss"][:, row, column] = continuation.losses.mean(1).numpy()
                for prompt, tokens in enumerate(continuation.tokens):
                    text = "".join(token_texts(model.tokenizer, tokens.tolist()))
                    lines.append({"kind": kind, "scale": scale, "prompt": prompt, "text": text})
        data = self._data(values)
        data.attrs["note"] = (
            f"{counted(left_out, 'sequence')} left out: fewer than {self.prompt} tokens" if left_out else ""
        )
        data.attrs |= {"direction": direction.name, "site": ", ".join(self._sites(direction)), "prompts": len(ids)}
        measured = {name: values[name].transpose(1, 2, 0).reshape(-1) for name in MEASURES}
        return Result(self.name, data, pd.DataFrame(lines).assign(**measured), provenance(store, self))

    def _sites(self, direction: Direction) -> list[str]:
        if self.layers is None:
            return [direction.site]
        kind, _, layer = direction.site.rpartition(".")
        if not layer.isdecimal() or not kind:
            raise RequestError(f"layers: the direction is at {direction.site}, which is no site of a layer")
        return [f"{kind}.{layer}" for layer in self.layers]

    def _prompts(self, store: Store) -> tuple[Int64[Tensor, "prompt position"], int]:
        """Ids of the prompts, and the number of sequences that are too short."""
        tokens = store.tokens
        starts = np.flatnonzero(np.diff(tokens["sequence"].to_numpy(), prepend=-1))
        if self.where is not None:
            starts = np.intersect1d(starts, store.where(self.where).ids)
        lengths = np.append(np.flatnonzero(np.diff(tokens["sequence"].to_numpy(), prepend=-1)), store.rows)
        long = lengths[np.searchsorted(lengths, starts) + 1] - starts >= self.prompt
        chosen = starts[long][: self.row_limit]
        if not len(chosen):
            raise RequestError(f"prompt: no selected sequence has {self.prompt} tokens; give a smaller prompt")
        ids = tokens["token_id"].to_numpy().astype(np.int64)
        return torch.from_numpy(ids[chosen[:, None] + np.arange(self.prompt)]), int((~long).sum())

    def _data(self, values: Mapping[str, np.ndarray]) -> Any:
        arrays: dict[str, Any] = {}
        for name, array in values.items():
            flat = array.reshape(len(array), -1)
            mean, resampled = clustered_means(flat, np.arange(len(array)), resamples=self.resamples, seed=self.seed)
            low, high = intervals(resampled, len(array))
            shape = array.shape[1:]
            arrays |= {
                name: mean.reshape(shape),
                f"{name}_low": low.reshape(shape),
                f"{name}_high": high.reshape(shape),
            }
        return dataset(VARIABLES, arrays, {"kind": list(KINDS), "scale": list(self.scales)})

    @staticmethod
    def headline(result: Result) -> str:
        """Returns ln P of the targets and the plain loss where the direction exceeds the control most."""
        data = result.data
        gain = data["log_probability"].sel(kind="direction") - data["log_probability"].sel(kind="random")
        scale = float(data["scale"].to_numpy()[int(gain.to_numpy().argmax())])
        base, at = data.isel(scale=0), data.sel(scale=scale)
        steered, random = at.sel(kind="direction"), at.sel(kind="random")
        text = (
            f"{data.attrs['direction']!r} at {data.attrs['site']}, scale {scale:g}: ln P of the targets "
            f"{float(steered['log_probability']):z.2f} (scale {float(base['scale']):g}: "
            f"{float(base.sel(kind='direction')['log_probability']):z.2f}; random direction "
            f"{float(random['log_probability']):z.2f}); plain loss of the generated text {float(steered['loss']):z.2f} "
            f"nats (random {float(random['loss']):z.2f}), {counted(data.attrs['prompts'], 'prompt')}."
        )
        return with_note(text, result)

    @staticmethod
    def figures(result: Result) -> dict[str, Any]:
        """Returns "effect", ln P by scale; "loss", plain loss by scale; "share", target tokens by scale."""
        names = {"effect": "log_probability", "loss": "loss", "share": "share"}
        return {figure: _by_scale(result.data, name) for figure, name in names.items()}


def _target_ids(model: Model, tokens: Sequence[str]) -> list[int]:
    """Ids of the target tokens. RequestError where none is named, one is no single token, or one is named twice."""
    if not tokens:
        raise RequestError("tokens is empty; name one or more target tokens, such as ' Monday'")
    if model.tokenizer is None:
        raise RequestError(f"model {model.name!r} has no tokenizer, which target tokens need")
    ids = [token_of_text(model.tokenizer, model.vocab, token) for token in tokens]
    if twice := [token for index, token in enumerate(tokens) if ids.index(ids[index]) < index]:
        raise RequestError(f"tokens: {twice[0]!r} is named twice; name each target token once")
    return ids


def _by_scale(data: Any, name: str) -> go.Figure:
    units, meaning = MEASURES[name]
    figure = ThemedFigure()
    for kind, color in zip(KINDS, (CATEGORIES[0], NEUTRAL), strict=True):
        mean, low, high = (data[f"{name}{end}"].sel(kind=kind).to_numpy() for end in ("", "_low", "_high"))
        figure.add_scatter(
            x=data["scale"].to_numpy(),
            y=mean,
            error_y=error_bars(mean, low, high),
            name={"direction": "direction", "random": "random direction of equal norm"}[kind],
            mode="lines+markers",
            line={"color": color, "dash": "dash" if kind == "random" else "solid"},
            hovertemplate="scale %{x}: %{y:.3f}",
        )
    figure.update_layout(
        title={
            "text": f"Steering: {meaning}",
            "subtitle": {"text": f"95 % CI over {counted(data.attrs['prompts'], 'prompt')}"},
        },
        width=760,
        height=440,
        margin={"t": 110},
    )
    figure.update_xaxes(title="scale")
    return figure.update_yaxes(title=units)
