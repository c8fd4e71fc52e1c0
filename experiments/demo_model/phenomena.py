"""Phenomena of a model of the demo's kind, on text held out from its training: `measure(model, sae)`.

The probes measure them; this module has their settings, the criteria, and the numbers that go into the model card.
Induction has no probe and is measured here. All of it works for any checkpoint, so that the card compares seeds with
models of random weights.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import workbench as wb
from workbench.demo.run import label_features
from workbench.experiments.demo_model.corpus import HELD_OUT, documents
from workbench.figures.head_grid import head_name
from workbench.model.circuits import FirstMlp
from workbench.probes import AttentionSinks, FutureLens, LogitLens, SuccessorHeads, TokenErasure

DOCUMENTS = 300
"""Documents measured, held out from training."""
LENGTH, EPSILON = 64, 0.3
"""T and epsilon of the sink metric (Gu et al., arXiv 2410.10781)."""
REPEATED = 50
"""Random tokens, repeated once: the practical variant of prefix matching (Olsson et al. 2022)."""


@dataclass(frozen=True)
class Finding:
    """One number of the phenomena table."""

    phenomenon: str
    measure: str
    value: int | float
    unit: str
    wanted: str
    """Criterion that the demo must meet, as text."""
    holds: bool
    """True if it is met."""
    where: str = ""
    """Layer, head or interval."""


def measure(model: wb.Model, sae: wb.Sae | None = None) -> tuple[list[Finding], dict[str, pd.DataFrame]]:
    """Returns every finding on `model`, and the curves behind them by name; without `sae`, all but its.

    About two minutes on one core.
    """
    held_out = [document.record() for document in documents(DOCUMENTS, HELD_OUT)]
    findings: list[Finding] = []
    curves: dict[str, pd.DataFrame] = {}
    with tempfile.TemporaryDirectory() as folder:
        heads = record_heads(model, held_out[:100], Path(folder))
        corpus = wb.record(
            model,
            held_out,
            sites=["resid_post"],
            out=Path(folder) / "corpus.acts",
            dtype="float32",
            show_progress=False,
        )
        findings += sinks(heads) + induction(model, Path(folder)) + successors(model, heads)
        for phenomenon in (erasure, future_lens, logit_lens):
            new_findings, curves[phenomenon.__name__] = phenomenon(corpus)
            findings += new_findings
        if sae is not None:
            new_findings, curves["labels"] = sparse_autoencoder(model, corpus, sae)
            findings += new_findings
    return findings, curves


def record_heads(model: wb.Model, texts: list, folder: Path) -> wb.Store:
    """Records the sites that the findings on heads need, in sequences of `LENGTH` tokens."""
    sites = ["pattern", "v", "resid_post"]
    return wb.record(model, texts, sites=sites, context=LENGTH, out=folder / "heads.acts", show_progress=False)


# Attention sinks


def sinks(store: wb.Store) -> list[Finding]:
    """Returns Sink_1, value and residual norms at BOS over those of other tokens, and the head whose attention to BOS
    depends most on the domain of the text."""
    data = AttentionSinks(epsilon=EPSILON, length=LENGTH, domain="domain").run(store).data
    share = float(data["sink_k"][0])
    always = data["sink_share"].to_numpy() > 0.5
    drained = data["value_norm_ratio"].to_numpy()[always]
    drain = float(drained.mean()) if len(drained) else float("nan")
    middle = data["residual_norm_ratio"].to_numpy()[1:-1]
    peak = float(middle.max())
    gap = data["gap"].to_numpy()
    if np.isfinite(gap).any():
        layer, head = _strongest(np.nan_to_num(gap, nan=-np.inf))
        widest = float(gap[layer, head])
        at = data.isel(layer=layer, head=head)
        paid = [
            f"{float(at['attention'][int(at[name])]):.2f} in {data['domain'].to_numpy()[int(at[name])]}"
            for name in _GAP
        ]
        where = f"{head_name(layer, head)}: {', '.join(paid)}; {_interval(float(at['gap_low']), float(at['gap_high']))}"
    else:
        widest, where = float("nan"), "fewer than two domains of several documents"
    value, resid = (f"{name} norm at the sink over that of other tokens" for name in ("value", "residual"))
    rows = (
        (f"Sink_1, epsilon {EPSILON}, T {LENGTH}", share, "% of heads", "≥ 10", share >= 10, _heads(always)),
        (f"{value} (mean of sink heads)", drain, "ratio", "< 0.5", drain < 0.5, f"{len(drained)} heads"),
        (f"{resid} (middle layers)", peak, "ratio", "> 2", peak > 2, f"layer {1 + middle.argmax()}"),
    )
    domains = "attention to BOS, highest minus lowest domain"
    return [
        *(Finding("attention sinks", *row) for row in rows),
        Finding("active-dormant", domains, widest, "", "≥ 0.5", widest >= 0.5, where),
    ]


_GAP = ("gap_most", "gap_least")


# Induction


def induction(model: wb.Model, folder: Path) -> list[Finding]:
    """Returns prefix matching and loss on random tokens repeated once after BOS."""
    ids = _repeats(model, sequences=32)
    store = wb.record(
        model,
        ids.tolist(),
        sites=["pattern", "logits"],
        out=folder / "repeats.acts",
        dtype="float32",
        show_progress=False,
    )
    length = ids.shape[1]
    layers = range(store.manifest.model.n_layers)
    score = []
    for layer in layers:
        pattern = store["pattern", layer][:][:, :, :length].unflatten(0, (-1, length))
        queries = torch.arange(REPEATED + 1, length)
        score.append(pattern[:, queries, :, queries - REPEATED + 1].mean((0, 1)))
    matching = torch.stack(score)
    logits = store["logits"][:].unflatten(0, (-1, length))
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2).double(), ids[:, 1:], reduction="none")
    first, second = loss[:, :REPEATED].mean().item(), loss[:, REPEATED:].mean().item()
    return [
        Finding(
            "induction",
            f"prefix matching, {REPEATED} random tokens repeated",
            matching.max().item(),
            "",
            "≥ 0.5",
            matching.max().item() >= 0.5,
            _heads((matching >= 0.5).numpy()) or _heads((matching == matching.max()).numpy()),
        ),
        Finding(
            "induction",
            "loss on the repeat over that on the first occurrence",
            second / first,
            "ratio",
            "< 0.5",
            second < first / 2,
            f"{second:.2f} and {first:.2f} nats",
        ),
    ]


def _repeats(model: wb.Model, sequences: int) -> Int[Tensor, "sequence position"]:
    draw = Random("repeats")
    assert model.tokenizer is not None  # the demo and its checkpoints have one
    bos = model.tokenizer.bos_token_id
    ordinary = [token_id for token_id in range(model.vocab) if token_id != bos]
    return torch.tensor([[bos, *(draw.sample(ordinary, REPEATED) * 2)] for _ in range(sequences)])


# Successor heads


def successors(model: wb.Model, store: wb.Store) -> list[Finding]:
    """Returns the head that scores above 0.5 in most ordinal classes, by its OV circuit alone, and its score with
    shuffled successors; once for each reading of the paper's MLP_0(W_E): with the embedding added back, and without."""
    return [*_successors(model, store, "residual", "x + MLP_0(x)"), *_successors(model, store, "mlp", "MLP_0(x)")]


def _successors(model: wb.Model, store: wb.Store, first_mlp: FirstMlp, read: str) -> list[Finding]:
    data = SuccessorHeads(first_mlp=first_mlp, row_limit=0).run(store, model=model).data
    above, macro = data["tasks_above"].to_numpy(), data["macro"].to_numpy()
    layer, head = _strongest(above + macro)
    at = data.isel(layer=layer, head=head)
    classes, null, chance = int(at["tasks_above"]), float(at["null_macro"]), float(data["chance"].mean())
    scores = zip(data["task"].to_numpy(), at["score"].to_numpy(), strict=True)
    tasks = ", ".join(f"{task} {score:.2f}" for task, score in scores)
    bare = float(data["first_mlp_score"].mean())
    detail = f"{head_name(layer, head)}: {tasks}; without a head {bare:.2f}; p = {float(at['p_family']):.2g} over heads"
    return [
        Finding(
            "successor head",
            f"ordinal classes in which one head's score is above 0.5, heads reading {read}",
            classes,
            f"of {data.sizes['task']}",
            "≥ 4",
            classes >= 4,
            detail,
        ),
        Finding(
            "successor head",
            f"the same head with the successors shuffled, heads reading {read}",
            null,
            "score",
            f"near chance, {chance:.2f}",
            abs(null - chance) < 0.05,
            head_name(layer, head),
        ),
    ]


# Token erasure


def erasure(store: wb.Store) -> tuple[list[Finding], pd.DataFrame]:
    """Returns the accuracy of linear probes for the previous token by layer, at last tokens of multi-token names and at
    tokens outside of names; early is the output of the first block, late that of the last."""
    late = store.manifest.model.n_layers - 1
    data = TokenErasure(offsets=(-1,), spans="entity", early=0, late=late).run(store).data.isel(offset=0)
    names = ["accuracy", "accuracy_low", "accuracy_high"]
    curve = (
        data[names]
        .to_dataframe()
        .reset_index()[["layer", "group", *names]]
        .assign(tokens=lambda lines: data["tokens"].sel(group=lines["group"].to_numpy()).to_numpy())
    )
    accuracy = data["accuracy"]
    falls = (
        f"{group} {float(accuracy.sel(group=group, layer=0)):.2f} to {float(accuracy.sel(group=group, layer=late)):.2f}"
        for group in data["group"].to_numpy()
    )
    low, high = float(data["fall_low"]), float(data["fall_high"])
    return [
        Finding(
            "token erasure",
            "drop of the previous token's accuracy, names minus control",
            float(data["fall"]),
            "",
            "≥ 0.1 at the lower end of the 95 % CI",
            low >= 0.1,
            f"{', '.join(falls)}, layer 0 to layer {late}; {_interval(low, high)}",
        )
    ], curve


# Future lens


def future_lens(store: wb.Store) -> tuple[list[Finding], pd.DataFrame]:
    """Returns the accuracy for token T+2 from the state at T, by both linear methods, for the model's prediction and
    for the text, and the gain over the bigram. The layer is the best one on validation documents."""
    data = FutureLens(horizons=2).run(store).data.sel(horizon=1)
    findings = []
    for method in data["method"].to_numpy().tolist():
        of_method = data.sel({"method": method})
        at = of_method.sel(layer=int(of_method["validation_precision"].idxmax()))
        gain, low, high = (100 * float(at[name]) for name in ("gain", "gain_low", "gain_high"))
        where = (
            f"layer {int(at['layer'])}: {float(at['precision'][0]):.3f}, bigram {float(data['bigram_precision']):.3f}; "
            f"95 % CI of the gain [{low:.1f}, {high:.1f}] points"
        )
        findings.append(_future(method, "the model's prediction", gain, where))
        right, bigram = float(at["text_precision"][0]), float(data["bigram_text_precision"])
        where = f"layer {int(at['layer'])}: {right:.3f}, bigram {bigram:.3f}"
        findings.append(_future(method, "the text", 100 * (right - bigram), where))
    curve = data["precision"].isel(k=0).to_dataframe("accuracy").reset_index()[["method", "layer", "accuracy"]]
    return findings, curve.assign(bigram=float(data["bigram_precision"]))


_METHODS = {"linear": "linear map to the last state", "direct": "linear map to the logits"}


def _future(method: str, target: str, points: float, where: str) -> Finding:
    measure = f"{_METHODS[method]}: N = 1 accuracy for {target}, gain over the bigram"
    return Finding("future lens", measure, points, "points", "≥ 10", points >= 10, where)


# Logit lens


def logit_lens(store: wb.Store) -> tuple[list[Finding], pd.DataFrame]:
    """Returns the mean cross-entropy of the text after each block, and its smallest drop from one to the next."""
    result = LogitLens(detail=0).run(store)
    loss = result.data["mean_cross_entropy"].to_numpy()
    smallest = float((-np.diff(loss)).min())
    where = "layers 0 to {}: {}".format(len(loss) - 1, ", ".join(f"{nats:.2f}" for nats in loss))
    curve = pd.DataFrame(
        {"layer": [f"layer {layer}" for layer in result.data["layer"].to_numpy()], "cross-entropy": loss}
    )
    return [
        Finding(
            "logit lens",
            "smallest drop of the cross-entropy from layer to layer",
            smallest,
            "nats",
            "> 0",
            smallest > 0,
            where,
        )
    ], curve


# Sparse autoencoder


def sparse_autoencoder(model: wb.Model, store: wb.Store, sae: wb.Sae) -> tuple[list[Finding], pd.DataFrame]:
    """Returns the fit of the SAE on held-out text without BOS, and the labels of the corpus that a feature detects."""
    fit = wb.sae_metrics(store, sae, model=model, force=True)
    features = wb.extract_features(store, sae, force=True, show_progress=False)
    assert features is not None  # None only with workers
    best = label_features(features)
    good = best.loc[best["f1"] >= 0.9]
    count = good["feature"].nunique()
    loss = fit.loss
    assert loss is not None  # None only without a model
    spliced = f"{loss.clean:.3f} nats clean, {loss.spliced:.3f} spliced, {loss.zeroed:.3f} zeroed"
    return [
        Finding(
            "SAE",
            "explained variance",
            fit.explained_variance,
            "",
            "≥ 0.9",
            fit.explained_variance >= 0.9,
            features.record.site,
        ),
        Finding("SAE", "L0", fit.l0, "features a token", "≤ 32", fit.l0 <= 32),
        Finding("SAE", "cross-entropy recovered", 100 * loss.recovered, "%", "≥ 95", loss.recovered >= 0.95, spliced),
        Finding(
            "SAE",
            "features with F1 of 0.9 or more against a label",
            count,
            f"of {len(best)} labels",
            "≥ 20",
            count >= 20,
            ", ".join(good["label"][:6]),
        ),
    ], best


# Parts


def _interval(low: float, high: float) -> str:
    return f"95 % CI [{low:.2f}, {high:.2f}]"


def _strongest(values: Float[np.ndarray, "layer head"]) -> tuple[int, int]:
    layer, head = np.unravel_index(values.argmax(), values.shape)
    return int(layer), int(head)


def _heads(chosen: Bool[np.ndarray, "layer head"]) -> str:
    return ", ".join(head_name(layer, head) for layer, head in np.argwhere(chosen).tolist())
