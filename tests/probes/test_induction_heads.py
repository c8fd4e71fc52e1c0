"""Induction heads: planted heads, a naive reading in float64, weights and losses of plain Hugging Face."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import planted_store
from refusals import refused

import workbench as wb
from workbench.analysis.copying import copying_scores
from workbench.experiments.controls import random_copy
from workbench.figures.theme import NEUTRAL
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.model.unembed import load_unembed
from workbench.probes import InductionHeads
from workbench.testing import ProbeContract

# ---- planting -------------------------------------------------------------------------------------------


def head(ids, key_of):
    """Every query attends to `key_of(i)`, and to itself where that is None."""
    pattern = np.zeros((len(ids), len(ids)))
    for i in range(len(ids)):
        key = key_of(i)
        pattern[i, i if key is None else key] = 1
    return pattern


def last_before(ids, i):
    earlier = [d for d in range(i - 1) if ids[d] == ids[i]]
    return earlier[-1] if earlier else None


def textbook(ids, period):
    """Heads: induction, duplicate, previous, `period` - 1 tokens back, uniform."""

    def after(i):
        d = last_before(ids, i)
        return None if d is None else d + 1

    uniform = np.tril(np.ones((len(ids), len(ids)))) / np.arange(1, len(ids) + 1)[:, None]
    return [
        head(ids, after),
        head(ids, lambda i: last_before(ids, i)),
        head(ids, lambda i: max(i - 1, 0)),
        head(ids, lambda i: max(i - period + 1, 0)),
        uniform,
    ]


def store_of(path, documents, patterns):
    """A store of one layer of `patterns`, one list of heads [query, key] for each document."""
    longest = max(map(len, documents))
    rows = [
        np.stack([np.pad(pattern, ((0, 0), (0, longest - len(pattern)))) for pattern in heads], 1) for heads in patterns
    ]
    return planted_store(path, documents, {"pattern.0": np.concatenate(rows)})


def planted(path, documents, period):
    return store_of(path, documents, [textbook(ids, period) for ids in documents])


def run(store, **settings):
    return InductionHeads(**{"resamples": 20, "device": "cpu", **settings}).run(store)


@pytest.fixture(scope="module")
def drawn():
    """32 sequences, each of another period."""
    return wb.random_repeats(range(100), 32, period=(5, 36), filler=(1, 12))


@pytest.fixture(scope="module")
def textbook_store(drawn, tmp_path_factory):
    return planted(tmp_path_factory.mktemp("induction") / "s", drawn, 20)


class TestContract(ProbeContract):
    probe = InductionHeads
    settings = {"resamples": 20, "device": "cpu"}  # noqa: RUF012

    @pytest.fixture
    def store(self, textbook_store):
        return textbook_store


# ---- planted heads --------------------------------------------------------------------------------------


def test_textbook_heads(textbook_store, drawn):
    data = run(textbook_store).data.isel(layer=0)
    assert data["induction"].to_numpy()[:3].tolist() == [1, 0, 0]
    assert data["duplicate"].to_numpy()[:3].tolist() == [0, 1, 0]
    assert data["previous"].to_numpy()[:3].tolist() == [0, 0, 1]
    lengths = np.array([len(ids) for ids in drawn])
    assert int(data["queries"]) == sum(len(ids) - len(set(ids)) for ids in drawn)
    assert int(data["sequences"]) == len(lengths)
    assert float(data["excess"][0]) > 0.9
    assert data["induction_reference"].to_numpy()[2] == 1
    assert data["reference_offset"].to_numpy()[2] == 1
    expected = [1 / (i + 1) for ids in drawn for i in range(len(ids)) if last_before(ids, i) is not None]
    assert float(data["uniform"]) == pytest.approx(np.mean(expected))
    assert float(data["induction"][4]) == pytest.approx(np.mean(expected), abs=1e-6)
    assert (
        run(textbook_store)
        .headline()
        .startswith(
            "1 of 5 heads are induction heads (excess > 0.3); strongest L0H0: induction 1.00, 95 % CI [1.00, 1.00]"
        )
    )


def test_a_head_that_reads_no_token_scores_1_at_a_fixed_period_and_has_no_excess(tmp_path):
    fixed = wb.random_repeats(range(100), 12, period=(20, 20), filler=(3, 3))
    data = run(planted(tmp_path / "s", fixed, 20)).data.isel(layer=0)
    assert data["induction"].to_numpy()[[0, 3]].tolist() == [1, 1]
    assert data["induction_reference"].to_numpy()[[0, 3]].tolist() == [1, 1]
    np.testing.assert_allclose(data["excess"], 0, atol=1e-6)  # nor can a real one be known there


def test_at_random_periods_it_has_the_share_of_its_period(textbook_store, drawn):
    data = run(textbook_store).data.isel(layer=0)
    share = sum(20 for ids in drawn if len(ids) - len(set(ids)) == 20) / int(data["queries"])
    assert float(data["induction"][3]) == pytest.approx(share, abs=1e-6)
    assert abs(float(data["excess"][3])) < 0.02
    assert float(data["induction"][0] - data["induction_shuffled"][0]) == pytest.approx(float(data["excess"][0]))


@pytest.mark.parametrize("occurrences", ["all", "last"])
def test_any_pattern_against_a_naive_reading(tmp_path, occurrences):
    draw = np.random.default_rng(1)
    documents = [draw.integers(0, 6, n).tolist() for n in (9, 14, 11, 3)]
    patterns = []
    for ids in documents:
        raw = np.tril(draw.random((2, len(ids), len(ids))) + 0.01)
        patterns.append((raw / raw.sum(-1, keepdims=True)).astype(np.float32).astype(float))
    data = run(store_of(tmp_path / "s", documents, patterns), occurrences=occurrences).data.isel(layer=0)
    queries = []
    for s, ids in enumerate(documents):
        for i in range(len(ids)):
            earlier = [d for d in range(i - 1) if ids[d] == ids[i]]
            if earlier:
                queries.append((s, i, earlier if occurrences == "all" else earlier[-1:]))
    for h in range(2):
        a = [pattern[h] for pattern in patterns]
        close = {"abs": 1e-6}
        assert float(data["induction"][h]) == pytest.approx(
            np.mean([sum(a[s][i, d + 1] for d in known) for s, i, known in queries]), **close
        )
        assert float(data["duplicate"][h]) == pytest.approx(
            np.mean([sum(a[s][i, d] for d in known) for s, i, known in queries]), **close
        )
        for name, key in (("previous", lambda i: i - 1), ("current", lambda i: i), ("first", lambda i: 0)):
            assert float(data[name][h]) == pytest.approx(np.mean([a[s][i, key(i)] for s, i, _ in queries]), **close)
        offsets = [np.mean([a[s][i, i - o] if o <= i else 0 for s, i, _ in queries]) for o in range(1, 14)]
        assert float(data["induction_reference"][h]) == pytest.approx(max(offsets), **close)
        assert int(data["reference_offset"][h]) == 1 + int(np.argmax(offsets))
        shuffled = [
            np.mean(pairs)
            for s, i, _ in queries
            if (pairs := [sum(a[s][i, d + 1] for d in known) for t, j, known in queries if j == i and t != s])
        ]
        assert float(data["induction_shuffled"][h]) == pytest.approx(np.mean(shuffled), **close)


def test_special_tokens_are_no_queries_and_one_sequence_has_no_excess(tmp_path):
    ids = [1, 2, 3, 1, 2, 3]
    result = run(planted(tmp_path / "s", [ids], 3))
    assert float(result.data["induction"][0, 0]) == 1
    assert result.data["excess"].isnull().all()
    assert "excess not computed: it needs two sequences or more" in result.data.attrs["note"]
    assert result.headline().startswith("Induction heads not counted: there is no other sequence to compare with; ")


def test_a_store_without_repeats_is_refused(tmp_path):
    text = refused(RequestError, lambda: run(planted(tmp_path / "s", [[1, 2, 3, 4]], 3)))
    assert text.startswith("no token of the selected sequences stands earlier in its sequence; ")


# ---- weights and losses ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_store(tiny_models, tmp_path_factory):
    ids = wb.random_repeats(range(2, 320), 6, period=(4, 9), filler=(0, 3))
    folder = tmp_path_factory.mktemp("induction-llama")
    options = {"sites": ["pattern", "resid_post"], "dtype": "float32", "show_progress": False}
    return wb.record(Model(tiny_models["llama"], None, "tiny"), ids, out=folder / "a", **options)


def test_copying_is_that_of_the_weights_in_float64(tiny_models, llama_store):
    module, heads, d_head = tiny_models["llama"], 4, 8
    ids = torch.arange(3, 60)
    scores = copying_scores(Model(module, None, "tiny"), load_unembed(llama_store.path), ids)
    embedded = module.model.embed_tokens.weight[ids].detach().double()
    read = (module.model.norm.weight * module.lm_head.weight[ids]).detach().double()
    for layer, block in enumerate(module.model.layers):
        norm = embedded * torch.rsqrt(embedded.square().mean(1, keepdim=True) + block.input_layernorm.variance_epsilon)
        values = (norm * block.input_layernorm.weight.double()) @ block.self_attn.v_proj.weight.double().T
        for h in range(heads):
            part = slice(h // 2 * d_head, (h // 2 + 1) * d_head)  # two query heads share a value
            write = values[:, part] @ block.self_attn.o_proj.weight[:, h * d_head : (h + 1) * d_head].double().T
            circuit = (write @ read.T).detach().numpy()
            eigen = np.linalg.eigvals(circuit)
            assert scores[layer]["copying_eigen"][h] == pytest.approx(eigen.sum().real / abs(eigen).sum(), abs=1e-4)
            right = circuit.argmax(1) == np.arange(len(ids))  # the norm's scale changes no order
            assert scores[layer]["copying"][h] == pytest.approx(right.mean(), abs=1e-9)


def test_losses_are_those_of_the_model(tiny_models, llama_store):
    result = InductionHeads(early=2, late=7, window=1, resamples=5, device="cpu").run(llama_store)
    by_position, repeated = {}, {True: [], False: []}
    tokens = llama_store.tokens.to_pandas()
    for _, part in tokens.groupby("sequence"):
        ids = part["token_id"].tolist()
        with torch.inference_mode():
            log = tiny_models["llama"](torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for i in range(len(ids) - 1):
            loss = -float(log[i, ids[i + 1]])
            by_position.setdefault(i, []).append(loss)
            repeated[last_before(ids, i) is not None].append(loss)
    means = [np.mean(by_position[i]) for i in sorted(by_position)]
    np.testing.assert_allclose(result.data["icl_loss"], means, atol=1e-4)
    late, early = (np.mean([loss for i in at for loss in by_position[i]]) for at in ((6, 7, 8), (1, 2, 3)))
    assert float(result.data["icl_score"]) == pytest.approx(late - early, abs=1e-4)
    assert float(result.data["loss_repeated"]) == pytest.approx(np.mean(repeated[True]), abs=1e-4)
    assert float(result.data["loss_new"]) == pytest.approx(np.mean(repeated[False]), abs=1e-4)


@pytest.fixture(scope="module")
def demo_repeats():
    model = wb.load_model("demo", device="cpu")
    sites = ["pattern", "resid_post.3"]
    return model, wb.record(model, wb.random_repeats(model.tokenizer, 8), sites=sites, show_progress=False)


def test_the_embedded_model_has_induction_heads_and_its_random_copy_has_none(demo_repeats):
    model, store = demo_repeats
    random = wb.record(
        random_copy(model), wb.random_repeats(model.tokenizer, 8), sites=["pattern"], show_progress=False
    )
    results = [InductionHeads(resamples=5, ablated=0).run(store, model=model), InductionHeads(resamples=5).run(random)]
    best = results[0].table.iloc[0]
    assert best["excess"] > 0.7
    assert best["copying"] > 0.9
    assert best["copying_eigen"] > 0.9
    assert results[1].table["excess"].abs().max() < 0.02


# ---- derived while recording ----------------------------------------------------------------------------

DERIVED = ("attn_induction", "attn_duplicate", "attn_previous", "attn_current", "attn_first")


def test_what_was_derived_while_recording_agrees_with_patterns(tiny_models, llama_store, tmp_path):
    model, ids = (
        Model(tiny_models["llama"], None, "tiny"),
        wb.random_repeats(range(2, 320), 6, period=(4, 9), filler=(0, 3)),
    )
    sites = ["pattern.1", *DERIVED, "resid_post"]
    derived = run(wb.record(model, ids, sites=sites, dtype="float32", show_progress=False))
    whole = run(llama_store)
    for name in ("induction", "duplicate", "previous", "current", "first", "induction_low", "loss_repeated"):
        np.testing.assert_allclose(derived.data[name], whole.data[name], rtol=0, atol=1e-6, err_msg=name)
    assert float(derived.data["offset_bound"]) == float(whole.data["offset_bound"])
    np.testing.assert_allclose(derived.data["excess"][1], whole.data["excess"][1], atol=1e-6)  # from its pattern
    np.testing.assert_allclose(
        derived.data["excess"][[0, 2]], whole.data["induction"][[0, 2]] - whole.data["offset_bound"], atol=1e-6
    )
    assert derived.data["induction_shuffled"].notnull().all("head").to_numpy().tolist() == [False, True, False]
    assert "at layers 0, 2 excess is induction less offset_bound, because pattern was not recorded" in str(
        derived.data.attrs["note"]
    )


def test_a_fixed_period_has_no_excess_without_patterns_either(tmp_path):
    fixed = wb.random_repeats(range(100), 12, period=(20, 20), filler=(3, 3))
    scores = {"attn_induction.0": np.ones((sum(map(len, fixed)), 2))}
    result = run(planted_store(tmp_path / "s", fixed, scores))
    assert float(result.data["offset_bound"]) == 1
    assert result.data["excess"].to_numpy().tolist() == [[0, 0]]
    assert "duplicate" not in result.data
    assert "0 of 2 heads are induction heads" in result.headline()
    assert "one fixed offset collects at most 1.00." in result.headline()
    assert {*result.figures()} == {"heads", "kinds"}


def test_the_bound_counts_the_queries_of_the_most_frequent_offset(textbook_store, drawn):
    offsets = [i - last_before(ids, i) - 1 for ids in drawn for i in range(len(ids)) if last_before(ids, i) is not None]
    share = np.bincount(offsets).max() / len(offsets)
    assert float(run(textbook_store).data["offset_bound"]) == pytest.approx(share)


def test_the_latest_occurrence_needs_patterns(tmp_path):
    store = planted_store(tmp_path / "s", [[1, 2, 3, 1, 2]], {"attn_induction.0": np.ones((5, 2))})
    text = refused(RequestError, lambda: run(store, occurrences="last"))
    assert text.startswith("occurrences 'last' needs pattern: attn_induction is the attention after all earlier")


# ---- ablation -------------------------------------------------------------------------------------------


def test_ablated_heads_change_the_loss_as_plain_hugging_face_does(tiny_models, llama_store):
    """The output of the heads is replaced by its mean, before W_O."""
    module = copy.deepcopy(tiny_models["llama"])
    probe = InductionHeads(ablated=2, ablation_controls=1, ablation_tokens=10_000, resamples=5, device="cpu")
    result = probe.run(llama_store, model=Model(tiny_models["llama"], None, "tiny"))
    data, best = result.data, result.table.iloc[0]
    layer, head = int(best["layer"]), int(best["head"])
    assert data["ablated"].to_numpy().tolist()[0] == f"L{layer}H{head}"
    assert data["ablated"].to_numpy().tolist()[-1] == "all 2"
    project, outputs = module.model.layers[layer].self_attn.o_proj, []
    sequences = [part["token_id"].tolist() for _, part in llama_store.tokens.to_pandas().groupby("sequence")]

    def losses():
        by_group = {True: [], False: []}
        for ids in sequences:
            with torch.inference_mode():
                log = module(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            for i in range(len(ids) - 1):
                by_group[last_before(ids, i) is not None].append(-float(log[i, ids[i + 1]]))
        return np.array([np.mean(by_group[repeated]) for repeated in (True, False)])

    hook = project.register_forward_pre_hook(lambda _module, arguments: outputs.append(arguments[0][0].clone()))
    plain = losses()
    hook.remove()
    part = slice(8 * head, 8 * head + 8)
    mean = torch.cat(outputs)[:, part].mean(0)

    def ablate(_module, arguments):
        changed = arguments[0].clone()
        changed[..., part] = mean
        return (changed,)

    project.register_forward_pre_hook(ablate)
    np.testing.assert_allclose(data["ablation"][0], losses() - plain, atol=1e-4)
    assert "loss after repeated tokens with the strongest 2 ablated" in result.headline()
    assert "ablation" in result.figures()


def test_ablation_of_the_demos_induction_heads_hurts_where_tokens_repeat(demo_repeats):
    model, store = demo_repeats
    data = InductionHeads(resamples=20, ablated=3, device="cpu").run(store, model=model).data
    together = data.isel(ablated=-1)
    assert float(together["ablation_low"].sel(group="after repeated tokens")) > 0.5
    assert float(together["ablation_excess_low"].sel(group="after repeated tokens")) > 0.5
    assert abs(float(together["ablation"].sel(group="after new tokens"))) < 0.5
    assert "ablation" not in InductionHeads(resamples=5, ablated=0, device="cpu").run(store, model=model).data


def test_figures_draw_the_intervals_of_their_points_and_controls_in_grey(demo_repeats):
    model, store = demo_repeats
    settings = {"ablated": 2, "ablation_controls": 1, "ablation_tokens": 300, "resamples": 50}
    result = InductionHeads(layers=(1,), copying_tokens=50, **settings).run(store, model=model)
    data, best, figures = result.data, result.table.head(12), result.figures()
    for trace in figures["kinds"].data[:5]:
        np.testing.assert_allclose(trace.error_y.array, best[f"{trace.name}_high"] - best[trace.name])
        np.testing.assert_allclose(trace.error_y.arrayminus, best[trace.name] - best[f"{trace.name}_low"])
    assert figures["kinds"].data[-1].marker.color == NEUTRAL  # black is invisible on a dark page
    random = figures["ablation"].data[-1]
    assert random.marker.color == NEUTRAL
    first = data.isel(group=0)
    np.testing.assert_allclose(random.error_y.array, first["ablation_random_high"] - first["ablation_random"])
    (band, curve), known = figures["loss"].data, data["icl_tokens"].to_numpy() > 0
    np.testing.assert_array_equal(curve.y, data["icl_loss"].to_numpy()[known])
    assert len(band.y) == 2 * data["icl_loss_low"].notnull().sum()  # positions that several documents have
    assert "queries in" in figures["kinds"].layout.title.subtitle.text
    added = [f"{name}_{end}" for name in ("icl_loss", "ablation_random", "first") for end in ("low", "high")]
    earlier = replace(result, data=data.drop_vars(added), table=result.table.drop(columns=["first_low", "first_high"]))
    assert len(earlier.figures()["loss"].data) == 1
    assert earlier.figures()["kinds"].data[4].error_y.array is None


def test_a_model_without_other_heads_has_no_ablation_and_says_why(tiny_models, llama_store):
    """Twelve heads are ablated, so that none is left as a control."""
    probe = InductionHeads(ablated=12, resamples=5, copying_tokens=20, device="cpu")
    result = probe.run(llama_store, model=Model(tiny_models["llama"], None, "tiny"))
    assert "ablation" not in result.data
    assert "ablation not computed: heads: 12 are named" in result.data.attrs["note"]


# ---- sequences ------------------------------------------------------------------------------------------


def test_random_repeats_repeat_and_nothing_else_does(tiny_tokenizer):
    texts = wb.random_repeats(tiny_tokenizer, 41, period=(20, 60), copies=3, filler=(0, 9), seed=3)
    periods = []
    for ids in texts:
        assert ids[0] == tiny_tokenizer.bos_token_id
        period = (len(ids) - len(set(ids))) // 2
        periods.append(period)
        assert ids[-period:] == ids[-2 * period : -period] == ids[-3 * period : -2 * period]
        assert not {*ids[1:]} & {*tiny_tokenizer.all_special_ids}
    assert sorted(periods) == list(range(20, 61))
    assert texts == wb.random_repeats(tiny_tokenizer, 41, period=(20, 60), copies=3, filler=(0, 9), seed=3)
    assert (
        wb.random_repeats([4, 5, 6], 1, period=(2, 2), filler=(0, 0))[0][:2]
        == wb.random_repeats([4, 5, 6], 1, period=(2, 2), filler=(0, 0), bos=False)[0][:2]
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"period": (60, 20)}, "the largest period must be at least 60"),
        ({"copies": 1}, "copies must be a whole number, from 2 to 100000, not 1"),
        ({"period": (5, 9)}, "up to 39 different tokens, and there are 30"),
    ],
)
def test_impossible_sequences_are_refused(settings, words):
    assert words in refused(RequestError, lambda: wb.random_repeats(range(30), **settings))
