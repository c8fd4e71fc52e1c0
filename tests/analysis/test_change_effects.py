"""Effects of changes on predictions: a hook written by hand, scipy in float64, and a planted circuit."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import torch
from planted_circuit import END, FILLER, MOVER, NAMES, READER, planted_circuit
from refusals import refused

import workbench as wb
from workbench.analysis.change_effects import MEASURES, MeasuredRows, change_effects
from workbench.analysis.head_ablation import head_ablation, random_heads
from workbench.io.errors import DataError, RequestError
from workbench.model.load import Model

IDS = [[5, 6, 7, 8, 9, 6], [10, 11, 12], [13, 5, 14, 15]]


@pytest.fixture(scope="module")
def tiny(tiny_models):
    return Model(tiny_models["llama"], None, "tiny-llama")


@pytest.fixture(scope="module")
def store(tiny, tmp_path_factory):
    return wb.record(
        tiny, IDS, sites=["resid_post.0"], out=tmp_path_factory.mktemp("effects") / "s", show_progress=False
    )


@pytest.fixture(scope="module")
def circuit():
    return Model(planted_circuit(), None, "circuit")


@pytest.fixture(scope="module")
def circuit_store(circuit, tmp_path_factory):
    ids = [[FILLER[n % 3], name, END, name] for n, name in enumerate(NAMES)]
    return wb.record(
        circuit, ids, sites=["resid_post.0"], out=tmp_path_factory.mktemp("circuit") / "s", show_progress=False
    )


def by_hand(module, ids, head):
    """Logits of a plain pass, and with one head of the last block at 0."""
    tokens, width = torch.tensor([ids]), 8
    with torch.no_grad():
        plain = module(tokens).logits[0].double().numpy()

        def zero(_module, arguments):
            x = arguments[0].clone()
            x[..., head * width : (head + 1) * width] = 0
            return (x,)

        hook = module.model.layers[2].self_attn.o_proj.register_forward_pre_hook(zero)
        try:
            return plain, module(tokens).logits[0].double().numpy()
        finally:
            hook.remove()


def test_all_measures_are_those_of_a_hook_written_by_hand_in_float64(tiny, store):
    rows = np.flatnonzero(store.tokens["position"].to_numpy() >= 1)
    measured = MeasuredRows(store, {"later": rows, "first": np.array([0])})
    effects = change_effects(tiny, measured, {"zero": lambda _batch: [wb.Zero("z.2", head=1)]}, show_progress=False)
    expected = {name: [] for name in MEASURES}
    for ids in IDS:
        plain, changed = by_hand(tiny.module, ids, 1)
        before, after = (scipy.special.log_softmax(part, axis=1)[1:] for part in (plain, changed))
        follows = np.array(ids[2:])
        expected["loss"] += list(-after[np.arange(len(follows)), follows])
        expected["accuracy"] += list(after[:-1].argmax(1) == follows)
        expected["entropy"] += list(-(np.exp(after) * after).sum(1))
        expected["kl"] += list((np.exp(before) * (before - after)).sum(1))
        expected["agreement"] += list(after.argmax(1) == before.argmax(1))
    mean, _ = effects.means(resamples=2)
    assert effects.groups == ("later", "first")
    np.testing.assert_allclose(mean[1, 0], [np.mean(values) for values in expected.values()], atol=1e-6)
    assert mean[0, 0, 3] == 0
    assert mean[0, 0, 4] == 1
    assert effects.counts.sum(0)[0].tolist() == [7, 7, 10, 10, 10]
    assert effects.chosen == {"zero": 13}


def test_intervals_are_over_documents_and_paired_with_the_plain_model(tiny, store):
    measured = MeasuredRows(store, {"all": np.arange(store.rows)})
    effects = change_effects(
        tiny, measured, {"same": lambda _: [wb.Add("resid_post.0", torch.ones(32), 0)]}, show_progress=False
    )
    mean, resampled = effects.effects(resamples=20)
    assert np.abs(mean[0, 0, :4]).max() == 0
    assert np.abs(resampled).max() == 0


def test_other_targets_than_the_next_token_are_measured(circuit, circuit_store):
    ends = circuit_store.where(f"token_id = {END}").ids
    targets = np.full(circuit_store.rows, -1)
    targets[ends] = [*NAMES[1:], NAMES[0]]
    effects = change_effects(circuit, MeasuredRows(circuit_store, {"end": ends}, targets), {}, show_progress=False)
    assert effects.means(resamples=2)[0][0, 0, 1] == 0


@pytest.mark.parametrize("head", [READER, MOVER])
def test_ablating_a_head_of_the_planted_circuit_removes_the_answer_and_random_heads_do_nothing(
    circuit, circuit_store, head
):
    ends = circuit_store.where(f"token_id = {END}").ids
    rows = MeasuredRows(circuit_store, {"end": ends})
    effects = head_ablation(circuit, rows, {"circuit": [head]}, ablation="zero", resamples=50, show_progress=False)
    accuracy = effects.of("circuit", "end", "accuracy")
    assert (accuracy.mean, accuracy.low, accuracy.high) == (-1, -1, -1)
    assert effects.of("circuit", "end", "kl").mean > 0.1
    for measure in MEASURES:
        assert effects.of("circuit", "end", measure, "random").mean == 0
    assert effects.of("circuit", "end", "accuracy", "difference").mean == -1
    assert all(draw[0][0] == head[0] and draw[0] != head for draw in effects.controls["circuit"])


def test_mean_ablation_gives_a_head_its_mean_over_all_tokens(tiny, store):
    z = []
    projection = tiny.module.model.layers[2].self_attn.o_proj
    hook = projection.register_forward_pre_hook(lambda _module, arguments: z.append(arguments[0][0].double()))
    with torch.no_grad():
        plain = [tiny.module(torch.tensor([ids])).logits[0].double().log_softmax(-1) for ids in IDS]
    hook.remove()
    mean = torch.cat(z).mean(0)[8:16].float()

    def give(_module, arguments):
        x = arguments[0].clone()
        x[..., 8:16] = mean
        return (x,)

    hook = projection.register_forward_pre_hook(give)
    with torch.no_grad():
        changed = [tiny.module(torch.tensor([ids])).logits[0].double().log_softmax(-1) for ids in IDS]
    hook.remove()
    kl = torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in zip(plain, changed, strict=True)]).mean()
    rows = MeasuredRows(store, {"all": np.arange(store.rows)})
    result = head_ablation(tiny, rows, {"one": [(2, 1)]}, controls=0, resamples=2, show_progress=False)
    assert result.of("one", "all", "kl").mean == pytest.approx(float(kl), abs=1e-6)
    assert set(result.table["kind"]) == {"named"}


def test_random_heads_come_from_the_same_layers_or_the_nearest(circuit):
    draw = np.random.default_rng(0)
    assert {head[0] for head in random_heads(circuit, [(1, 0), (1, 2)], draw)} == {1}
    assert random_heads(circuit, [(0, 0), (0, 1), (0, 2)], draw)[0] == (0, 3)
    assert [head[0] for head in random_heads(circuit, [(0, 0), (0, 1), (0, 2)], draw)] == [0, 1, 1]


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({"a": [(0, 4)]}, "head of layer 0 must be a whole number, from 0 to 3, not 4"),
        ({"a": [(3, 0)]}, "layer must be a whole number, from 0 to 1, not 3"),
        ({"a": []}, "heads 'a' is empty"),
        ({"a": [(0, 0), (0, 0)]}, "names a head twice"),
        ({"a": [(layer, head) for layer in range(2) for head in range(4)]}, "too few others"),
    ],
)
def test_heads_that_cannot_be_ablated_are_refused(circuit, circuit_store, heads, message):
    rows = MeasuredRows(circuit_store, {"all": np.arange(4)})
    assert message in refused(RequestError, lambda: head_ablation(circuit, rows, heads, show_progress=False))


def test_a_change_that_chooses_no_token_and_rows_that_are_none_are_refused(tiny, store):
    rows, none = MeasuredRows(store, {"all": np.arange(3)}), MeasuredRows(store, {"all": np.zeros(0, int)})
    late = {"late": lambda _batch: []}
    message = refused(DataError, lambda: change_effects(tiny, rows, late, label="hiding", show_progress=False))
    assert message.startswith("hiding, late: no token of the 3 measured ones' sequences is changed")
    assert "is measured" in refused(RequestError, lambda: change_effects(tiny, none, {}, show_progress=False))
