"""What a model of the demo's kind shows, on text held out from its training: `measure(model, sae)`.

Each function measures one phenomenon as METHODS of the field define it and says what was asked, what was found and
where. Every number can be had of any checkpoint, so that seeds, steps and a model of random weights stand side by
side in the model card.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import pandas as pd
import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

import workbench as wb
from experiments.demo.corpus import HELD_OUT, documents
from experiments.demo.world import ORDINALS
from probes import LogitLens
from workbench.demo import label_features
from workbench.lens import load_unembed
from workbench.trajectory import next_tokens

LENGTH, EPSILON = 64, 0.3
"""T and epsilon of the sink metric (Gu et al., arXiv 2410.10781)."""
REPEATED = 50
"""Random tokens, repeated once: the practical variant of prefix matching (Olsson et al. 2022)."""
RESAMPLES = 1000
"""Bootstrap resamples of documents behind a 95 % interval."""


@dataclass(frozen=True)
class Finding:
    """One number of the phenomena table."""

    phenomenon: str
    measure: str
    value: float
    unit: str
    wanted: str
    """What the demo must show, as text."""
    holds: bool
    """Whether it does."""
    where: str = ""
    """Layer, head or interval."""


def measure(model: wb.Model, sae: wb.Sae | None = None) -> tuple[list[Finding], dict[str, pd.DataFrame]]:
    """Every finding on `model`, and the curves behind them by name; without `sae`, all but its. About two minutes."""
    held_out = [document.record() for document in documents(300, HELD_OUT)]
    findings: list[Finding] = []
    curves: dict[str, pd.DataFrame] = {}
    with tempfile.TemporaryDirectory() as folder:
        heads = _record(model, held_out[:100], folder, "heads", ["pattern", "v", "resid_post"], context=LENGTH)
        corpus = _record(model, held_out, folder, "corpus", ["resid_pre.0", "resid_post"], dtype="float32")
        findings += sinks(model, heads) + active_dormant(heads)
        findings += induction(model, Path(folder)) + successors(model)
        for phenomenon in (erasure, future_lens, logit_lens):
            found, curves[phenomenon.__name__] = phenomenon(corpus)
            findings += found
        if sae is not None:
            found, curves["labels"] = sparse_autoencoder(model, corpus, sae)
            findings += found
    return findings, curves


def _record(model: wb.Model, texts: list, folder: str, name: str, sites: list[str], **settings) -> wb.Store:
    return wb.record(model, texts, sites=sites, out=Path(folder) / f"{name}.acts", show_progress=False, **settings)


# Attention sinks


def sinks(model: wb.Model, store: wb.Store) -> list[Finding]:
    """Sink_1 over full sequences of `LENGTH` tokens; value and residual norms at the sink token against the others."""
    pattern = _full_sequences(store, "pattern")
    alpha = pattern[..., 0].mean(-1)  # the first token is seen by every query
    is_sink = (alpha > EPSILON).double()
    sink_share = 100 * is_sink.mean().item()
    per_head = is_sink.mean(0)
    drain = _value_norm_ratio(model, store)[per_head > 0.5]
    norms = _full_sequences(store, "resid_post").double().norm(dim=-1)
    peak = (norms[..., 0] / norms[..., 1:].mean(-1)).mean(0)[:-1]  # the last layer is no middle layer
    return [
        Finding(
            "attention sinks",
            f"Sink_1, epsilon {EPSILON}, T {LENGTH}",
            sink_share,
            "% of heads",
            "≥ 10",
            sink_share >= 10,
            _heads(per_head > 0.5),
        ),
        Finding(
            "attention sinks",
            "value norm at the sink, over the other tokens' (mean of sink heads)",
            _mean(drain),
            "ratio",
            "< 0.5",
            _mean(drain) < 0.5,
            f"{len(drain)} heads",
        ),
        Finding(
            "attention sinks",
            "residual norm at the sink, over the other tokens'",
            peak.max().item(),
            "ratio",
            "> 2",
            peak.max().item() > 2,
            f"layer {int(peak.argmax())}",
        ),
    ]


def _full_sequences(store: wb.Store, kind: str) -> Float[Tensor, "sequence layer *site"]:
    """A site of every layer, for the sequences that have `LENGTH` tokens; heads come before positions."""
    sequence = store.tokens["sequence"].to_numpy()
    full = np.flatnonzero(np.bincount(sequence) == LENGTH)
    rows = np.flatnonzero(np.isin(sequence, full)).reshape(-1, LENGTH)
    layers = range(store.manifest.model.n_layers)
    values = torch.stack([store[kind, layer][rows].float() for layer in layers], 1)
    return rearrange(values, "s l q h k -> s l h q k") if kind in ("pattern", "v") else values


def _value_norm_ratio(model: wb.Model, store: wb.Store) -> Float[Tensor, "layer head"]:
    """Norm of the first token's value state over the mean of the others', values written through W_O (Guo et al.)."""
    values = _full_sequences(store, "v")
    written = []
    for layer, block in enumerate(model.module.model.layers):
        w_o = rearrange(block.self_attn.o_proj.weight.detach().float(), "m (h d) -> h d m", h=values.shape[2])
        written.append(einsum(values[:, layer], w_o, "s h q d, h d m -> s h q m").norm(dim=-1))
    norms = torch.stack(written, 1)
    return (norms[..., 0] / norms[..., 1:].mean(-1)).mean(0)


def active_dormant(store: wb.Store) -> list[Finding]:
    """The head whose attention to BOS differs most between two domains, BOS's own row left out."""
    tokens = store.tokens.select(["position", "domain", "document"]).to_pandas()
    later = tokens["position"].to_numpy() > 0
    layers = range(store.manifest.model.n_layers)
    to_bos = np.stack([store["pattern", layer][:][:, :, 0].numpy() for layer in layers], 1)[later]
    domain, document = tokens["domain"].to_numpy()[later], tokens["document"].to_numpy()[later]
    names = sorted(set(domain))
    means = np.stack([to_bos[domain == name].mean(0, dtype=np.float64) for name in names])
    gap = means.max(0) - means.min(0)
    layer, head = np.unravel_index(gap.argmax(), gap.shape)
    high, low = means[:, layer, head].argmax(), means[:, layer, head].argmin()
    per_document = pd.DataFrame({"domain": domain, "document": document, "mass": to_bos[:, layer, head]})
    by_domain = {
        name: part.groupby("document")["mass"].mean().to_numpy() for name, part in per_document.groupby("domain")
    }
    interval = _bootstrap(
        lambda draw: _resampled(by_domain[names[high]], draw) - _resampled(by_domain[names[low]], draw)
    )
    where = (
        f"head {layer}.{head}: {means[high, layer, head]:.2f} in {names[high]}, "
        f"{means[low, layer, head]:.2f} in {names[low]}; {_interval(interval)}"
    )
    return [
        Finding(
            "active-dormant",
            "attention to BOS, highest minus lowest domain",
            gap.max(),
            "",
            "≥ 0.5",
            gap.max() >= 0.5,
            where,
        )
    ]


# Induction


def induction(model: wb.Model, folder: Path) -> list[Finding]:
    """Prefix matching and loss on random tokens that are repeated once, BOS before them."""
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
            _heads(matching >= 0.5) or _heads(matching == matching.max()),
        ),
        Finding(
            "induction",
            "loss on the repeat, over that on the first occurrence",
            second / first,
            "ratio",
            "< 0.5",
            second < first / 2,
            f"{second:.2f} against {first:.2f} nats",
        ),
    ]


def _repeats(model: wb.Model, sequences: int) -> Int[Tensor, "sequence position"]:
    draw = Random("repeats")
    bos = model.tokenizer.bos_token_id
    ordinary = [token_id for token_id in range(model.vocab) if token_id != bos]
    return torch.tensor([[bos, *(draw.sample(ordinary, REPEATED) * 2)] for _ in range(sequences)])


# Successor heads


def successors(model: wb.Model) -> list[Finding]:
    """Class-restricted successor score of every head's OV circuit on `x + MLP_0(LN x)`, ordinals with a leading space.

    Gould et al., arXiv 2312.09230. A tie is a failure. The null puts the successors in random order.
    """
    draw = np.random.default_rng(0)
    scores, nulls, chance = {}, [], []
    for kind, members in ORDINALS.items():
        ids = [model.tokenizer(f" {member}", add_special_tokens=False)["input_ids"] for member in members]
        ids = torch.tensor([first for first, *rest in ids if not rest])
        logits = _ov_logits(model, ids).flatten(0, 1)
        scores[kind] = _successor_score(logits, torch.arange(1, len(ids)))
        nulls += [_successor_score(logits, torch.from_numpy(draw.permutation(len(ids))[1:])) for _ in range(100)]
        chance.append(1 / len(ids))
    table = torch.stack(list(scores.values()))
    above = (table > 0.5).sum(0)
    best = int((above + table.mean(0)).argmax())
    layer, head = divmod(best, model.module.config.num_attention_heads)
    null = torch.stack(nulls)[:, best].mean().item()
    each = ", ".join(f"{kind} {score[best]:.2f}" for kind, score in scores.items())
    return [
        Finding(
            "successor head",
            "ordinal classes in which one head's score is above 0.5",
            int(above[best]),
            f"of {len(scores)}",
            "≥ 4",
            int(above[best]) >= 4,
            f"head {layer}.{head}: {each}",
        ),
        Finding(
            "successor head",
            "the same head with the successors shuffled",
            null,
            "score",
            f"near chance, {np.mean(chance):.2f}",
            abs(null - np.mean(chance)) < 0.05,
            f"head {layer}.{head}",
        ),
    ]


@torch.no_grad()
def _ov_logits(model: wb.Model, ids: Int[Tensor, " member"]) -> Float[Tensor, "layer head member target"]:
    """Logits that each head's OV circuit gives the tokens `ids`, for each of them as the source."""
    body = model.module.model
    embedded = body.embed_tokens.weight[ids]
    first = embedded + body.layers[0].mlp(body.layers[0].post_attention_layernorm(embedded))
    found = []
    for block in body.layers:
        value = block.self_attn.v_proj(block.input_layernorm(first))
        w_o = block.self_attn.o_proj.weight
        heads = model.module.config.num_attention_heads
        written = einsum(
            rearrange(value, "x (h d) -> h x d", h=heads),
            rearrange(w_o, "m (h d) -> h m d", h=heads),
            "h x d, h m d -> h x m",
        )
        found.append(body.norm(written) @ embedded.T)
    return torch.stack(found)


def _successor_score(
    logits: Float[Tensor, "head member member"], successor: Int[Tensor, " source"]
) -> Float[Tensor, " head"]:
    """Share of members, the last left out, whose successor has strictly the largest logit of the class."""
    logits = logits[:, : len(successor)]
    at = logits.gather(2, successor.expand(len(logits), -1)[..., None])
    return ((logits >= at).sum(2) == 1).float().mean(1)


# Token erasure


def erasure(store: wb.Store) -> tuple[list[Finding], pd.DataFrame]:
    """Linear probes for the previous token, at the last tokens of people's names and at control tokens, by layer.

    One map without bias for each layer (Feucht et al., arXiv 2406.20086, offset -1), trained on two thirds of the
    documents and tested on the others; early is the first block's output, late the last's. Control tokens are the last
    tokens of words that are no entity.
    """
    tokens = store.tokens.select(["token_id", "document", "position", "entity", "entity_span", "word_span"]).to_pandas()
    ids, document = tokens["token_id"].to_numpy(), tokens["document"].to_numpy()
    known = np.flatnonzero((tokens["position"] > 1) & (np.roll(document, 1) == document))
    held_out = document[known] % 3 == 0
    last_of_word = _last_of(tokens, "word_span")
    name = (tokens["entity"] == "person").to_numpy() & _last_of(tokens, "entity_span")
    name &= np.roll(tokens["entity_span"], 1) == tokens["entity_span"]  # of two tokens or more
    groups = {"names": name, "control": last_of_word & tokens["entity"].isna().to_numpy()}
    lines, right = [], {}
    for layer, site in _residuals(store):
        probe = _softmax_probe(
            store[site][known[~held_out]].float(), torch.from_numpy(ids[known - 1][~held_out].astype(np.int64))
        )
        tested = known[held_out]
        correct = (store[site][tested].float() @ probe).argmax(1).numpy() == ids[tested - 1]
        for group, mask in groups.items():
            chosen = mask[tested]
            right[layer, group] = pd.Series(correct[chosen]).groupby(document[tested][chosen]).agg(["sum", "count"])
            low, high = _bootstrap(lambda draw, counts=right[layer, group]: _resampled_share(counts, draw))
            lines.append(
                {
                    "layer": layer,
                    "group": group,
                    "accuracy": correct[chosen].mean(),
                    "low": low,
                    "high": high,
                    "tokens": int(chosen.sum()),
                }
            )
    curve = pd.DataFrame(lines)
    early, late = "layer 0", curve["layer"].iloc[-1]

    def fall(group: str, draw: np.random.Generator) -> float:
        return _resampled_share(right[early, group], draw) - _resampled_share(right[late, group], draw)

    accuracy = curve.set_index(["group", "layer"])["accuracy"]
    falls = {group: accuracy[group, early] - accuracy[group, late] for group in groups}
    low, high = _bootstrap(lambda draw: fall("names", draw) - fall("control", draw))
    where = (
        f"names {accuracy['names', early]:.2f} to {accuracy['names', late]:.2f}, "
        f"control {accuracy['control', early]:.2f} to {accuracy['control', late]:.2f}, "
        f"{early} to {late}; {_interval((low, high))}"
    )
    difference = falls["names"] - falls["control"]
    return [
        Finding(
            "token erasure",
            "fall of the previous token's accuracy, names minus control",
            difference,
            "",
            "> 0, interval apart from 0",
            low > 0,
            where,
        )
    ], curve


def _last_of(tokens: pd.DataFrame, span: str) -> Bool[np.ndarray, " row"]:
    """Rows that are the last token of a span of their document."""
    spans, document = tokens[span].to_numpy(dtype=float, na_value=np.nan), tokens["document"].to_numpy()
    goes_on = np.append((spans[1:] == spans[:-1]) & (document[1:] == document[:-1]), False)
    return ~np.isnan(spans) & ~goes_on


def _softmax_probe(
    x: Float[Tensor, "row d_model"], target: Int[Tensor, " row"], epochs: int = 12
) -> Float[Tensor, "d_model vocab"]:
    """A linear map without bias, fitted by AdamW on softmax cross-entropy over standardised inputs; decay 1e-3."""
    generator = torch.Generator().manual_seed(0)
    scale = x.std(0, correction=0).clamp(min=1e-6)
    weight = torch.zeros(x.shape[1], int(target.max()) + 1, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=1e-3)
    steps = epochs * -(-len(x) // 2048)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(2048):
            loss = torch.nn.functional.cross_entropy((x[rows] / scale) @ weight, target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return (weight / scale[:, None]).detach()


# Future lens


def future_lens(store: wb.Store) -> tuple[list[Finding], pd.DataFrame]:
    """Linear approximation of the next position's last state, read with the unembedding (Pal et al., arXiv 2311.04897).

    N = 1: from the state at token T, what the model says for token T+2. The bigram baseline says, for the token at T,
    what the model most often says there. Fitted on two thirds of the documents, tested on the others.
    """
    unembed = load_unembed(store.path)
    final = f"resid_post.{store.manifest.model.n_layers - 1}"
    document, ids = store.tokens["document"].to_numpy(), store.tokens["token_id"].to_numpy()
    source = np.flatnonzero(next_tokens(store) >= 0)
    source = source[store.tokens["position"].to_numpy()[source] > 0]
    with torch.no_grad():
        says = unembed(store[final][source + 1].float()).argmax(1).numpy()
    train = document[source] % 3 != 0
    common = pd.Series(says[train]).groupby(ids[source[train]]).agg(lambda said: said.mode()[0])
    fallback = pd.Series(says[train]).mode()[0]
    baseline = np.mean(common.reindex(ids[source[~train]]).fillna(fallback).to_numpy() == says[~train])
    lines = []
    target = store[final][source + 1].float()
    for layer, site in _residuals(store):
        x = store[site][source].float()
        predicted = _ridge(x[train], target[train], x[~train])
        accuracy = (unembed(predicted).argmax(1).numpy() == says[~train]).mean()
        lines.append({"layer": layer, "accuracy": accuracy, "bigram": baseline})
    curve = pd.DataFrame(lines)
    best = curve.loc[curve["accuracy"].idxmax()]
    gain = 100 * (best["accuracy"] - baseline)
    where = f"{best['layer']}: {best['accuracy']:.3f}, bigram {baseline:.3f}"
    return [
        Finding(
            "future lens", "linear N = 1 accuracy above the bigram baseline", gain, "points", "≥ 10", gain >= 10, where
        )
    ], curve


def _ridge(x: Tensor, y: Tensor, asked: Tensor, penalty: float = 1e-3) -> Tensor:
    """`y` at `asked` by ridge regression with intercept, in float64; `penalty` is relative to the mean variance."""
    x, y, asked = x.double(), y.double(), asked.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    gram = (x - mean_x).T @ (x - mean_x)
    gram += penalty * gram.diagonal().mean() * torch.eye(len(gram))
    weight = torch.linalg.solve(gram, (x - mean_x).T @ (y - mean_y))
    return ((asked - mean_x) @ weight + mean_y).float()


# Logit lens


def logit_lens(store: wb.Store) -> tuple[list[Finding], pd.DataFrame]:
    """Mean cross-entropy of the text after each block, and its smallest fall from one to the next."""
    result = LogitLens(detail=0).run(store)
    loss = result.data["mean_cross_entropy"].to_numpy()
    falls = -np.diff(loss)
    where = "layers 0 to {}: {}".format(len(loss) - 1, ", ".join(f"{nats:.2f}" for nats in loss))
    curve = pd.DataFrame(
        {"layer": [f"layer {layer}" for layer in result.data["layer"].to_numpy()], "cross-entropy": loss}
    )
    return [
        Finding(
            "logit lens",
            "smallest fall of the cross-entropy from layer to layer",
            falls.min(),
            "nats",
            "> 0",
            falls.min() > 0,
            where,
        )
    ], curve


# Sparse autoencoder


def sparse_autoencoder(model: wb.Model, store: wb.Store, sae: wb.Sae) -> tuple[list[Finding], pd.DataFrame]:
    """Fit of the SAE on held-out text, BOS left out, and the labels of the corpus that one feature tells."""
    fit = wb.sae_metrics(store, sae, model=model, force=True)
    features = wb.extract_features(store, sae, force=True, show_progress=False)
    best = label_features(features)
    good = best[best["f1"] >= 0.9]
    count = good["feature"].nunique()
    loss = fit.loss
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


def _residuals(store: wb.Store) -> Iterator[tuple[str, str]]:
    """What a reader calls each state of the residual stream, and its site: the embedding, then after each block."""
    yield "embedding", "resid_pre.0"
    for layer in range(store.manifest.model.n_layers):
        yield f"layer {layer}", f"resid_post.{layer}"


def _bootstrap(statistic: Callable[[np.random.Generator], float]) -> tuple[float, float]:
    """The central 95 % of a statistic over resamples of documents."""
    draw = np.random.default_rng(0)
    low, high = np.percentile([statistic(draw) for _ in range(RESAMPLES)], [2.5, 97.5])
    return float(low), float(high)


def _resampled(values: Float[np.ndarray, " document"], draw: np.random.Generator) -> float:
    return float(draw.choice(values, len(values)).mean())


def _resampled_share(counts: pd.DataFrame, draw: np.random.Generator) -> float:
    chosen = draw.integers(len(counts), size=len(counts))
    return float(counts["sum"].to_numpy()[chosen].sum() / counts["count"].to_numpy()[chosen].sum())


def _interval(bounds: tuple[float, float]) -> str:
    return f"95 % interval {bounds[0]:.2f} to {bounds[1]:.2f}"


def _heads(chosen: Bool[Tensor, "layer head"]) -> str:
    return ", ".join(f"{layer}.{head}" for layer, head in chosen.nonzero().tolist())


def _mean(values: Tensor) -> float:
    return values.mean().item() if len(values) else float("nan")
