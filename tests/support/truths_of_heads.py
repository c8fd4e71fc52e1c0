"""What is known of the planted model's heads: attention, scores, values, and losses without them."""

from __future__ import annotations

import numpy as np
from planted_truths import ALTERNATING, HALF, PlantedStores, Truth, only

from workbench.embedded import planted
from workbench.embedded.planted import INDUCTION_HEAD, PREVIOUS_HEAD, SINK_HEAD, SINKS, SUCCESSOR_HEAD
from workbench.probes import (
    ActiveDormant,
    AttentionCalibration,
    AttentionSinks,
    HeadAblation,
    HiddenSinks,
    InductionHeads,
    MaskedSinks,
    MaskPositions,
    OverSquashing,
    RelativeContextualization,
    SuccessorHeads,
    ValueAwareImportance,
    ZeroTuning,
)

LENGTH = 2 * HALF + 1
"""Tokens of a passage."""
SCORE, LOGIT = 30.0, 16.0
FIRST_VALUE = 0.0161
"""Size of the first token's value in block 1: sqrt(128) / 1000 over sqrt(256 / 522)."""
NEW = "domain = 'new'"
TWICE = "domain = 'twice'"


def induction_heads(stores: PlantedStores) -> None:
    probe = InductionHeads(copying_tokens=64, early=2, late=20, resamples=10)
    data = probe.run(stores.repeats, model=stores.model).data
    assert np.argwhere(data["excess"].to_numpy() > 0.3).tolist() == [list(INDUCTION_HEAD)]
    assert data["induction"].to_numpy()[INDUCTION_HEAD] > 0.999
    assert data["copying"].to_numpy()[INDUCTION_HEAD] == 1
    assert data["previous"].to_numpy()[PREVIOUS_HEAD] > 0.999
    assert data["loss_repeated"] < 0.01 < 3.5 < data["loss_new"]


def attention_sinks(stores: PlantedStores) -> None:
    probe = AttentionSinks(length=8, where="domain = 'sentences'", min_visible=2, examples=0, resamples=10)
    data = probe.run(stores.corpus).data
    alpha = data["alpha"].to_numpy()[..., 0]
    assert [tuple(index) for index in np.argwhere(alpha > 0.9).tolist()] == list(SINKS)
    assert data["massive_dimension"].to_numpy()[0] in planted.MASSIVE
    assert (data["value_norm_ratio"].to_numpy()[[1, 1], [0, 1]] < 0.05).all()


def active_dormant(stores: PlantedStores) -> None:
    probe = ActiveDormant(epsilon=0.6, length=LENGTH, domain="domain", resamples=10, permutations=10)
    data = probe.run(stores.passages, model=stores.model).data
    assert int(data["sink_position"]) == 0
    only(data["gap"].to_numpy(), INDUCTION_HEAD)
    resting = (1 + (HALF + 1) / LENGTH) / 2  # all queries of new passages, those of the first reading
    np.testing.assert_allclose(data["sink_attention"].to_numpy()[[1, 1], [0, 1]], [resting, 1], atol=1e-3)
    np.testing.assert_allclose(data["drain"].to_numpy()[[1, 1], [0, 1]], FIRST_VALUE, rtol=0.02)
    np.testing.assert_allclose(data["peak"][0], 1000 * 2**0.5 / 22.9, rtol=0.01)


def hidden_sinks(stores: PlantedStores) -> None:
    """Key j of the induction head is read by queries j + 1, j + 3, ...; the m-th of all such queries reads m keys."""
    probe = HiddenSinks(threshold="0.077", length=ALTERNATING, min_visible=16, resamples=10)
    data = probe.run(stores.alternating).data
    only(data["share"].to_numpy(), INDUCTION_HEAD)
    second, third = (sum(1 / m for m in range(1, n + 1)) / visible for n, visible in ((23, 46), (22, 45)))
    np.testing.assert_allclose(data["mass"].to_numpy()[INDUCTION_HEAD], (second + third) / 2, rtol=0.01)
    assert np.flatnonzero(data["position_share"].to_numpy()).tolist()[:2] == [2, 3]


def attention_calibration(stores: PlantedStores) -> None:
    """Keys that give way hold the same word as those that gain; a query whose whole weight is on them is left alone."""
    probe = AttentionCalibration(threshold=0.077, min_visible=16, first=0, last=0, resamples=10)
    data = probe.run(stores.alternating, model=stores.model).data
    only(data["hidden"].to_numpy(), INDUCTION_HEAD, value=2)
    changed = data.sel(kind="all")
    assert float(changed["accuracy"]) == 0
    np.testing.assert_allclose(changed["loss"], 0, atol=1e-6)


def value_aware_importance(stores: PlantedStores) -> None:
    """The first token has 12 queries of attention 1 and values of a sixtieth; 11 keys have one query each."""
    probe = ValueAwareImportance(length=LENGTH, where=TWICE, resamples=10)
    data = probe.run(stores.passages).data
    by_attention, by_value = (data[f"sink_rank_{name}"].to_numpy() for name in ("attention", "value"))
    assert (by_attention[INDUCTION_HEAD], by_value[INDUCTION_HEAD]) == (1, HALF + 1)
    assert (by_attention[SINK_HEAD], by_value[SINK_HEAD]) == (1, 1)


def hidden_first(position: np.ndarray) -> np.ndarray:
    """Loss of a new word where both sinks attend to the words so far alike and copy them, less that with their sink."""
    resting = np.log(63 + np.exp(2 * LOGIT * FIRST_VALUE))
    return np.log(position * np.exp(2 * LOGIT / position) + 64 - position) - resting


def masked_sinks(stores: PlantedStores) -> None:
    later = 12
    probe = MaskedSinks(later=later, where=NEW, heads=0, draws=1, resamples=10)
    data = probe.run(stores.passages, model=stores.model).data
    loss = data["loss_layer"].sel(layer=1)
    expected = hidden_first(np.arange(later, LENGTH - 1)).mean()
    np.testing.assert_allclose(loss.sel(kind="sink"), expected, rtol=0.01)
    np.testing.assert_allclose(loss.sel(kind="random"), 0, atol=1e-4)
    np.testing.assert_allclose(data["at_first"].to_numpy()[[1, 1], [0, 1]], 1)


def zero_tuning(stores: PlantedStores) -> None:
    """A head whose attention to the first token is 0 or 1 cannot respond; the others write nothing."""
    probe = ZeroTuning(gammas=(0.0, 0.5, 2.0), profile="none", where=NEW, resamples=10)
    data = probe.run(stores.passages, model=stores.model).data
    np.testing.assert_allclose(data["sensitivity"].to_numpy()[[1, 1], [0, 1]], 0, atol=1e-4)
    loss = data["loss"].sel(heads="all", key="initial")
    np.testing.assert_allclose(loss.sel(gamma=[0.5, 2.0]), 0, atol=1e-4)
    np.testing.assert_allclose(loss.sel(gamma=0.0), hidden_first(np.arange(1, LENGTH - 1)).mean(), rtol=0.01)


def mask_positions(stores: PlantedStores) -> None:
    """Scores of a clock depend on the distance alone; those of a sink on the key alone."""
    data = MaskPositions(length=LENGTH, where=NEW).run(stores.passages, model=stores.model).data
    share, clean = (data[name].to_numpy() for name in ("head_share", "head_share_no_sinks"))
    np.testing.assert_allclose([clean[PREVIOUS_HEAD], clean[SUCCESSOR_HEAD]], 0, atol=1e-4)
    query, key = np.tril_indices(LENGTH, -1)
    score = (key == 0).astype(float)
    rest = score - 1 / (LENGTH - (query - key))  # one key of each diagonal is the first
    np.testing.assert_allclose([share[INDUCTION_HEAD], share[SINK_HEAD]], rest.var() / score.var(), atol=5e-3)


def relative_contextualization(stores: PlantedStores) -> None:
    """Ten of eleven newer queries score one of eleven keys by 30 and all newer keys by 0; the last one the reverse."""
    probe = RelativeContextualization(prompt=HALF + 1, length=LENGTH, where=TWICE, resamples=10)
    data = probe.run(stores.passages, model=stores.model).data
    only(data["excess"].to_numpy(), INDUCTION_HEAD, value=(HALF - 1) / HALF * SCORE / HALF, atol=0.05)


def successor_heads(stores: PlantedStores) -> None:
    data = SuccessorHeads(permutations=50, row_limit=200).run(stores.corpus, model=stores.model).data
    only(data["macro"].to_numpy(), SUCCESSOR_HEAD)
    assert data["task"].to_numpy().tolist() == ["number words", "days", "months"]
    assert (data["tokens"].to_numpy() == [8, 6, 11]).all()
    assert data["wins"].to_numpy()[SUCCESSOR_HEAD] > 0.95


def head_ablation(stores: PlantedStores) -> None:
    """Without the induction head only the sink's small logit is left, so that the loss is that of a guess."""
    probe = HeadAblation(heads=("L1H0",), ablation="zero", where=TWICE, controls_drawn=2, resamples=10)
    data = probe.run(stores.passages, model=stores.model).data.sel(heads="L1H0", group="repeats")
    assert float(data["plain_accuracy"]) == 1
    assert float(data["accuracy"]) == -1
    np.testing.assert_allclose(data["loss"], np.log(63 + np.exp(LOGIT * FIRST_VALUE)), atol=0.01)
    np.testing.assert_allclose(data["loss_random"], 0, atol=1e-4)


def over_squashing(stores: PlantedStores) -> None:
    """One more repetition turns the clock by one step, at any length: a distance that does not shrink."""
    probe = OverSquashing(
        kinds=("constant",), dtypes=("float32",), tokens=(" stone", " river"), longest=64, draws=2, rollout=LENGTH
    )
    data = probe.run(stores.passages, model=stores.model).data
    step = np.sqrt((2 - 2 * np.cos(np.pi / 2.0 ** np.arange(8))).sum())
    np.testing.assert_allclose(data["distance_l2"], step, rtol=0.01)
    assert not data["below_floor"].any()


TRUTHS = {
    "induction-heads": Truth("L1H0 alone is written to copy what followed the present token", induction_heads),
    "attention-sinks": Truth(
        "the keys of L1H0 and L1H1 read the massive activations of the first token", attention_sinks
    ),
    "active-dormant": Truth("L1H0 rests on the first token but where the present word stood before", active_dormant),
    "hidden-sinks": Truth("of two words in turn L1H0 reads the first pair most, a harmonic sum", hidden_sinks),
    "attention-calibration": Truth("weight that moves between equal words changes nothing", attention_calibration),
    "value-aware-importance": Truth("values of the first token are a sixtieth of others", value_aware_importance),
    "masked-sinks": Truth("sinks without their token copy the mean of what they see", masked_sinks),
    "zero-tuning": Truth("attention of 0 or 1 does not respond to a factor", zero_tuning),
    "mask-positions": Truth("two heads read a clock, two the first token", mask_positions),
    "relative-contextualization": Truth("L1H0 scores matching words by 30, others by 0", relative_contextualization),
    "successor-heads": Truth("L1H2 alone is written to raise the next word of a class", successor_heads),
    "head-ablation": Truth("repeated words are predicted by L1H0 and by nothing else", head_ablation),
    "over-squashing": Truth("the clock tells positions apart at any length", over_squashing),
}
