"""Token erasure: the planted scores and segmentations, a planted model that forgets, every setting."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from erasure_example import DOCUMENTS, LENGTH, VOCAB, forgetful_words
from planted import planted_store
from refusals import refused

import workbench as wb
from workbench.analysis.erasure_figures import implicit_vocabulary
from workbench.analysis.rows import split_by_document
from workbench.analysis.segmentation import SCORED, erasure_scores, segment
from workbench.analysis.softmax_probe import SoftmaxFit, fit_softmax
from workbench.io.errors import RequestError
from workbench.probes import TokenErasure
from workbench.testing import ProbeContract

# The score


def deltas(n: int, inside: range, outside: float = 0.0) -> tuple[np.ndarray, ...]:
    """delta(t, 0), delta(t, -1), delta(t, -2): 1 where t and t + i lie in the word, `outside` elsewhere."""
    parts = []
    for offset in SCORED:
        part = np.full(n, np.nan)
        for t in range(max(0, -offset), n):
            part[t] = 1.0 if t in inside and t + offset in inside else outside
        parts.append(part)
    return tuple(parts)


def naive(current, previous, second, p, q):
    """The definition, a term at a time."""
    total, terms = current[q], 0
    for t in range(p, q + 1):
        for offset, part in ((-1, previous), (-2, second)):
            if t + offset >= 0:
                total += (-1 if t + offset < p else 1) * part[t]
                terms += 1
    return total / (1 + terms)


@pytest.mark.parametrize(("length", "psi"), [(1, 1 / 3), (2, 0.4), (3, 0.5714), (4, 0.6667), (5, 0.7273)])
def test_psi_of_an_interior_span_that_is_all_erased(length, psi):
    scores = erasure_scores(*deltas(20, range(8, 8 + length)), longest=6)
    assert scores[length - 1, 7 + length] == pytest.approx(psi, abs=5e-5)
    assert scores[length - 1, 7 + length] == pytest.approx((1 + (length - 1) + max(length - 2, 0)) / (1 + 2 * length))


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_psi_is_one_where_the_tokens_before_appear(length):
    current, previous, second = deltas(20, range(8, 8 + length), outside=-1.0)
    assert erasure_scores(current, previous, second, longest=6)[length - 1, 7 + length] == pytest.approx(1)


def test_psi_of_the_first_token_is_its_own_delta():
    draw = np.random.default_rng(0)
    current, previous, second = draw.normal(size=(3, 5))
    previous[0] = second[:2] = np.nan
    assert erasure_scores(current, previous, second, longest=3)[0, 0] == pytest.approx(current[0])


def test_prefix_sums_are_the_definition():
    draw = np.random.default_rng(0)
    current, previous, second = draw.normal(size=(3, 15))
    previous[0] = second[:2] = np.nan
    scores = erasure_scores(current, previous, second, longest=15)
    for q in range(15):
        for p in range(q + 1):
            assert scores[q - p, q] == pytest.approx(naive(current, previous, second, p, q))
    assert np.isnan(scores[3, :3]).all()


def test_the_segmenter_returns_the_word_whole():
    scores = erasure_scores(*deltas(12, range(5, 8)), longest=12)
    spans = sorted(((scores[q - p, q], p, q) for q in range(12) for p in range(q + 1)), reverse=True)[:4]
    assert [(round(psi, 4), p, q) for psi, p, q in spans] == [
        (0.5714, 5, 7),
        (0.4444, 4, 7),
        (0.4, 5, 6),
        (0.3636, 3, 7),
    ]
    singles = [(token, token) for token in range(12) if token not in range(5, 8)]
    assert segment(scores) == sorted([(5, 7), *singles])


def test_segments_cover_a_text_once():
    scores = erasure_scores(*np.random.default_rng(1).normal(size=(3, 30)), longest=7)
    covered = [token for first, last in segment(scores) for token in range(first, last + 1)]
    assert covered == list(range(30))


# A planted model


@pytest.fixture(scope="module")
def planted():
    return forgetful_words()


@pytest.fixture(scope="module")
def store(planted, tmp_path_factory) -> wb.Store:
    path = tmp_path_factory.mktemp("erasure") / "x.acts"
    return planted_store(path, planted["ids"], planted["sites"], columns={"word_span": planted["span"]})


WELL = TokenErasure(early=1, late=2, epochs=60, batch=32, learning_rate=0.05, weight_decay=0.0, resamples=50)


@pytest.fixture(scope="module")
def result(store):
    return WELL.run(store)


class TestContract(ProbeContract):
    probe = TokenErasure
    settings = {"epochs": 2, "batch": 64, "early": 1, "late": 2, "resamples": 20}  # noqa: RUF012

    @pytest.fixture
    def store(self, planted, tmp_path):
        sites = {"word_span": planted["span"]}
        return planted_store(tmp_path / "x.acts", planted["ids"], planted["sites"], columns=sites)


def test_last_tokens_forget_and_others_do_not(result):
    accuracy = result.data["accuracy"]
    for offset in (0, -1, -2):
        last, control = (accuracy.sel(offset=offset, group=group) for group in ("last", "control"))
        assert last.sel(layer=1) > 0.99
        assert last.sel(layer=2) < 0.75
        assert abs(float(control.sel(layer=1)) - float(control.sel(layer=2))) < 0.15
        assert float(result.data["fall"].sel(offset=offset)) > 0.2
        assert float(result.data["fall_low"].sel(offset=offset)) > 0


def test_what_is_counted(result, store):
    tested = round(0.3 * DOCUMENTS)
    tokens = result.data["tokens"]
    assert tokens.sel(group="last").values.tolist() == [0, 2 * tested, 2 * tested, 2 * tested, 2 * tested]
    control = (LENGTH - 6) * tested
    missing = {-3: 3, -2: 2, -1: 1, 0: 0, 1: 1}  # at the beginning or end of a text there is no such token
    assert tokens.sel(group="control").values.tolist() == [control - missing[o] * tested for o in (-3, -2, -1, 0, 1)]
    assert np.isnan(result.data["accuracy"].sel(group="last", offset=-3)).all()  # no word has four tokens


def test_the_word_is_found_in_the_text(result):
    several = result.table[result.table["tokens"] > 1]
    right = several[several["text"] == "t5t6t7"]
    assert len(right) >= 0.9 * 2 * round(0.3 * DOCUMENTS)
    assert right["is_span"].all()
    assert float(result.data["recall"]) == pytest.approx(len(right) / (2 * round(0.3 * DOCUMENTS)))
    assert float(result.data["precision"]) == pytest.approx(several["is_span"].mean())
    assert implicit_vocabulary(result.table)["text"][0] == "t5t6t7"


def test_targets_that_no_training_row_has_do_not_count(planted, store, tmp_path):
    """Every test document has a token of its own at position 9, and no other document has any of them."""
    ids = np.array(planted["ids"])
    documents = np.repeat(np.arange(DOCUMENTS), LENGTH)
    tested = np.unique(documents[split_by_document(documents, 0.3, purpose="a test")[2]])
    ids[tested, 9] = VOCAB + np.arange(len(tested))
    path = tmp_path / "x.acts"
    rare = planted_store(path, ids.tolist(), planted["sites"], columns={"word_span": planted["span"]})
    few = {**SHORT, "offsets": (-1, 0)}
    data, whole = (TokenErasure(**few).run(recorded).data for recorded in (rare, store))
    control = LENGTH - 6
    assert data["coverage"].sel(group="last").values.tolist() == [1, 1]
    assert data["coverage"].sel(group="control").values.tolist() == [
        (control - 2) / (control - 1),
        (control - 1) / control,
    ]
    missing = (whole["tokens"] - data["tokens"]).sel(group="control").values
    assert missing.tolist() == [len(tested)] * 2


def test_a_fall_from_the_best_layer_is_found_where_the_early_layer_knows_nothing(planted, tmp_path):
    noise = np.random.default_rng(5).normal(size=planted["sites"]["resid_post.0"].shape)
    sites = {**planted["sites"], "resid_post.0": noise}
    store = planted_store(tmp_path / "x.acts", planted["ids"], sites, columns={"word_span": planted["span"]})
    measured = dataclasses.replace(WELL, early=0, offsets=(-1, 0)).run(store)
    at = measured.data.sel(offset=-1)
    assert int(at["best"]) == 1
    early, late = (float(at["accuracy"].sel(group="last", layer=layer)) for layer in (0, 2))
    assert early < late  # and that of the control group rises more, which looks like a fall
    assert float(at["fall_from_best_low"]) > 0.2
    assert measured.headline().startswith("Token erasure at offset -1, layers 0 to 2: ")
    assert "; layers 1 to 2: last tokens of words 100 to " in measured.headline()


def test_early_and_late_are_rounded_by_one_rule(tmp_path):
    """Of 30 layers 30 / 32 is layer 1 and 270 / 32 layer 8."""
    ids = np.random.default_rng(0).integers(0, 4, (6, 5))
    sites = {f"resid_post.{layer}": np.random.default_rng(layer).normal(size=(30, 3)) for layer in (1, 8)}
    store = planted_store(tmp_path / "x.acts", ids.tolist(), sites, n_layers=30)
    data = TokenErasure(epochs=1, resamples=2, offsets=(0,)).run(store).data
    assert (int(data["early"]), int(data["late"])) == (1, 8)


def test_segments_cover_every_tested_token(result, store):
    rows = np.concatenate(
        [np.arange(line.first_row, line.first_row + line.tokens) for line in result.table.itertuples()]
    )
    documents = store.tokens["document"].to_numpy()[rows]
    assert len(np.unique(rows)) == len(rows) == LENGTH * len(np.unique(documents))


# The probes


def test_softmax_probes_read_a_planted_code_and_keep_their_best_pass():
    draw = np.random.default_rng(0)
    code = draw.normal(size=(6, 10))
    ids = draw.integers(0, 6, 800)
    x = torch.tensor(code[ids] + 0.1 * draw.normal(size=(800, 10)), dtype=torch.float32)
    targets = np.stack([ids + 30, np.where(np.arange(800) % 2, ids[::-1], -1)])  # the second is noise, half of it
    rows = np.arange(800)
    split = (rows[:500], targets[:, :500], rows[500:], targets[:, 500:])
    probes = fit_softmax(lambda at: x[at], *split, SoftmaxFit(epochs=30, batch=64, learning_rate=0.05))
    assert probes.classes.tolist() == [*range(6), *range(30, 36)]
    right = probes.classes[probes.log_probabilities(0, x[500:]).argmax(1)] == targets[0, 500:]
    assert right.mean() > 0.98
    total = probes.log_probabilities(1, x).exp().sum(1)
    torch.testing.assert_close(total, torch.ones(800))
    assert probes.class_of(np.array([31, 99, -1])).tolist() == [7, -1, -1]


@pytest.mark.parametrize("rounding", [torch.float32, torch.bfloat16])
def test_a_dimension_that_does_not_vary_serves_as_a_bias(rounding):
    """Divided by its deviation it would be millions, and no other dimension would be read."""
    ids = np.arange(600) % 10
    draw = np.random.default_rng(0)
    x = torch.tensor(np.concatenate([np.eye(10)[ids], 16.03 + 1e-3 * draw.normal(size=(600, 1))], 1))
    x = x.to(rounding).float()
    split = (np.arange(400), ids[None, :400], np.arange(400, 600), ids[None, 400:])
    probes = fit_softmax(lambda at: x[at], *split, SoftmaxFit(epochs=8, batch=64))
    assert (probes.log_probabilities(0, x[400:]).argmax(1).numpy() == ids[400:]).all()


# Settings


SHORT = {"epochs": 2, "batch": 64, "early": 1, "late": 2, "resamples": 20}


@pytest.mark.parametrize(
    "changed",
    [
        {"epochs": 5},
        {"batch": 16},
        {"learning_rate": 0.1},
        {"weight_decay": 20.0},
        {"seed": 1},
        {"held_out": 0.5},
        {"early": 0},
        {"late": 3},
        {"where": "position > 2"},
        {"longest": 2},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_settings_change_the_segments(store, changed):
    before, after = (TokenErasure(**settings).run(store).table for settings in (SHORT, SHORT | changed))
    assert not before.equals(after)
    if "longest" in changed:
        assert after["tokens"].max() <= 2


def test_resamples_offsets_and_site(store, planted, tmp_path):
    settings = SHORT | {"offsets": (-1,)}
    few, many = (TokenErasure(**settings | {"resamples": n}).run(store).data for n in (2, 200))
    assert few["accuracy"].equals(many["accuracy"])
    assert not few["accuracy_low"].equals(many["accuracy_low"])
    assert few["offset"].values.tolist() == [-1]
    assert len(TokenErasure(**settings).run(store).table) == 0  # the score needs 0, -1 and -2
    sites = {f"resid_pre.{layer}": planted["sites"][f"resid_post.{layer}"] for layer in range(4)}
    of_pre = planted_store(tmp_path / "pre.acts", planted["ids"], sites)
    assert TokenErasure(**settings | {"site": "resid_pre"}).run(of_pre).data["layer"].values.tolist() == [0, 1, 2, 3]


def test_spans_by_label_or_by_spaces(store, planted, tmp_path):
    labelled = TokenErasure(**SHORT).run(store)
    assert labelled.data.attrs["spans"] == "labelled spans of 'word'"
    unlabelled = TokenErasure(**SHORT | {"spans": "entity"}).run(store)
    assert unlabelled.data.attrs["spans"] == "words split by spaces"
    assert int(labelled.data["words"]) == 2 * round(0.3 * DOCUMENTS)
    assert int(unlabelled.data["words"]) == 0  # "t5" is no word: it holds a digit
    assert unlabelled.headline().startswith(
        "Token erasure not measured at offset -1, where a group has no token to compare."
    )
    assert "nan" not in unlabelled.headline()


def test_words_by_spaces(tiny_models, tiny_tokenizer, tmp_path):
    from workbench.analysis.words import find_words
    from workbench.model.load import Model

    texts = ["the little day was Monday"]
    model = Model(tiny_models["llama"], tiny_tokenizer, "tiny")
    store = wb.record(model, texts, sites=["embed"], out=tmp_path / "x.acts", show_progress=False)
    spans, _ = find_words(store, "word")
    words = {}
    for row, token in enumerate(store.tokens["token"].to_pylist()):
        if spans.number[row] >= 0:
            words[int(spans.first[row])] = words.get(int(spans.first[row]), "") + token
    assert [word.strip() for word in words.values()] == texts[0].split()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"longest": 0}, "longest must be from 1 to 100000, not 0"),
        ({"epochs": 0}, "epochs must be from 1 to 100000, not 0"),
        ({"batch": 0}, "batch must be from 1 to 100000, not 0"),
        ({"resamples": 0}, "resamples must be from 1 to 100000, not 0"),
        ({"learning_rate": -1.0}, "learning_rate must be at least 0 and finite, not -1.0"),
        ({"weight_decay": math.inf}, "weight_decay must be at least 0 and finite, not inf"),
        ({"offsets": ()}, "offsets must be one or more different whole numbers, not ()"),
        ({"offsets": (1, 1)}, "offsets must be one or more different whole numbers, not (1, 1)"),
        ({"held_out": 0.7}, "held_out must be above 0 and below 0.6, not 0.7"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    assert refused(RequestError, lambda: TokenErasure(**settings)) == message


def test_layers_that_cannot_be(store):
    assert refused(RequestError, lambda: TokenErasure(early=2, late=2).run(store)) == (
        "late must come after early, layer 2, not at layer 2"
    )
    assert "resid_post.7" in refused(RequestError, lambda: TokenErasure(late=7).run(store))
    assert refused(RequestError, lambda: TokenErasure(device="toaster").run(store)).startswith("device 'toaster' ")


def test_the_default_layers_are_the_papers_share_of_the_depth(store):
    data = TokenErasure(epochs=1, resamples=2).run(store).data
    assert (int(data["early"]), int(data["late"])) == (0, 1)


def test_small_samples_are_noted(store, result):
    assert result.data.attrs["note"] == ""
    few = TokenErasure(**SHORT | {"where": "position < 3"}).run(store)
    assert "training rows are few for 24 x 24 maps; 120 or more are needed" in few.headline()


# The result


def test_result_headline_and_figures(result, tmp_path):
    assert result.headline().startswith("Token erasure at offset -1, layers 1 to 2: last tokens of words 100 to ")
    assert "95 % CI [" in result.headline()
    assert list(result.figures()) == ["accuracy", "vocabulary", "segments"]
    again = wb.load_result(result.save(tmp_path / "erasure"))
    assert again.data.identical(result.data)
    assert again.table.equals(result.table)
    lines = {line.name: line.y for line in again.figure("accuracy").data}
    np.testing.assert_allclose(lines["-1 last"], result.data["accuracy"].sel(offset=-1, group="last"))
