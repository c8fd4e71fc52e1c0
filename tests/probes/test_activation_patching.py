"""Activation patching: a circuit planted by hand, identities, and the same numbers by hooks written here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted_circuit import END, FILLER, MOVER, NAMES, READER, planted_circuit
from refusals import refused

import workbench as wb
from workbench.analysis.frozen_norm import ids_of_values
from workbench.analysis.patch_pairs import OTHER, PatchPair, pairs_from_store
from workbench.analysis.patching import Runs, other_pair, shuffled_positions
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.probes import ActivationPatching
from workbench.testing import ProbeContract


def pairs_of_names(count: int = 6) -> list[PatchPair]:
    """Prompts of unequal lengths: fillers, a name at position 1 or 2, END."""
    draw, pairs = np.random.default_rng(0), []
    for number in range(count):
        first, second = (int(name) for name in draw.choice(NAMES, 2, replace=False))
        at, length = 1 + number % 2, 4 + number % 3
        sides = []
        for name in (first, second):
            ids = [FILLER[index % 3] for index in range(length)] + [END]
            ids[at] = name
            sides.append(tuple(ids))
        pairs.append(PatchPair(*sides, (first,), (second,), {"name": (at,), "end": (length,)}))
    return pairs


@pytest.fixture(scope="module")
def planted():
    return Model(planted_circuit(), None, "planted")


@pytest.fixture(scope="module")
def store(planted, tmp_path_factory):
    texts = [
        {"input_ids": list(ids), "pair": number, "side": side}
        for number, pair in enumerate(pairs_of_names())
        for side, ids in (("clean", pair.clean), ("corrupt", pair.corrupt))
    ]
    return wb.record(planted, texts, sites=["resid_post"], out=tmp_path_factory.mktemp("p") / "s", show_progress=False)


class TestContract(ProbeContract):
    probe = ActivationPatching
    settings = {"metric": "kl", "places": "positions", "resamples": 20}  # noqa: RUF012

    @pytest.fixture
    def store(self, store):
        return store

    @pytest.fixture
    def model(self, planted):
        return planted


def test_where_selects_whole_pairs_and_a_store_of_chosen_rows_is_refused(planted, store):
    chosen_pairs = pairs_from_store(store, planted, "position > 1 AND side = 'clean' AND pair < 2")[0]
    assert [pair.clean for pair in chosen_pairs] == [pair.clean for pair in pairs_of_names()[:2]]
    texts = [{"input_ids": list(chosen_pairs[0].clean), "pair": 0, "side": side} for side in ("clean", "corrupt")]
    last = wb.record(planted, texts, sites=["resid_post"], keep="last", show_progress=False)
    assert "holds chosen rows" in refused(RequestError, lambda: pairs_from_store(last, planted))


def test_a_missing_answer_names_no_token():
    by_text = {" a": 3, "None": 7, "nan": 8}
    assert ids_of_values([" a", None, "None", float("nan"), "b"], by_text).tolist() == [3, -1, 7, -1, -1]


def patched(planted, pairs, **settings):
    return ActivationPatching(resamples=50, **settings)._run(planted, pairs, [], {"settings": {}}).data


def test_the_planted_head_is_found_at_its_position_alone_in_both_directions(planted):
    data = patched(planted, pairs_of_names(), site="z")
    for direction in ("denoising", "noising"):
        expected = np.zeros((2, 4))
        expected[READER] = expected[MOVER] = 1
        np.testing.assert_allclose(data[direction], expected, atol=1e-5)
        np.testing.assert_allclose(data[f"{direction}_low"], expected, atol=1e-5)
    only_end = patched(planted, pairs_of_names(), site="z", at="end")
    np.testing.assert_allclose(only_end["denoising"], data["denoising"], atol=1e-5)
    assert float(abs(patched(planted, pairs_of_names(), site="z", at="name")["denoising"]).max()) == 0


def test_the_name_moves_to_the_end_in_the_planted_circuit(planted):
    for site, name, end in (("resid_pre", [1, 0], [0, 1]), ("resid_post", [0, 0], [1, 1])):
        data = patched(planted, pairs_of_names(), site=site)
        for direction in ("denoising", "noising"):
            values = data[direction]
            np.testing.assert_allclose(values.sel(place="name"), name, atol=1e-5)
            np.testing.assert_allclose(values.sel(place="end"), end, atol=1e-5)
            assert float(abs(values.sel(place=OTHER)).max()) == 0


def test_the_last_row_of_the_last_layer_is_all_of_the_gap(tiny_models):
    model = Model(tiny_models["llama"], None, "tiny")
    runs, site = small_runs(model, "resid_post.2")
    end = runs.pairs.places["end"]
    torch.testing.assert_close(runs.effect("corrupt", site, end, runs.clean_values[site.name]), runs.clean)
    torch.testing.assert_close(runs.effect("clean", site, end, runs.corrupt_values[site.name]), runs.corrupt)


def test_a_donor_equal_to_the_run_gives_the_same_logits_bit_by_bit(tiny_models):
    """Also where the run is repeated: one value of another position differs, so that it is."""
    model = Model(tiny_models["gpt_neox"], None, "tiny")
    for name in ("resid_post.1", "z.1"):
        runs, site = small_runs(model, name)
        unchanged = runs.corrupt_values[site.name]
        everywhere = runs.pairs.mask.bool()
        assert runs.effect("corrupt", site, everywhere, unchanged) is runs.corrupt
        records = [wb.Set(site.name, unchanged, at=everywhere)]
        again = runs.patched("corrupt", lambda _part, records=records: list(records))
        assert torch.equal(again, runs.corrupt)


@pytest.mark.parametrize(("family", "site", "head"), [("gpt2", "mlp_out.1", None), ("llama", "z.1", 2)])
def test_effects_are_those_of_hooks_written_by_hand(family, site, head, tiny_models):
    model = Model(tiny_models[family], None, "tiny")
    runs, where = small_runs(model, site)
    part = model.module.get_submodule(where.tap.path)
    at, donor = runs.pairs.places["subject"], runs.clean_values[where.name]

    def change(value):
        value = value.clone()
        shaped = value.reshape(*value.shape[:2], *where.shape)
        if head is None:
            shaped[at] = donor[at]
        else:
            shaped[:, :, head][at] = donor[:, :, head][at]
        return shaped.reshape(value.shape)

    before = lambda _m, args: (change(args[0]), *args[1:])  # noqa: E731
    after = lambda _m, _a, output: change(output)  # noqa: E731
    hook = part.register_forward_pre_hook(before) if where.tap.part == "in" else part.register_forward_hook(after)
    try:
        with torch.no_grad():
            logits = model.module(runs.pairs.corrupt, attention_mask=runs.pairs.mask).logits.double()
    finally:
        hook.remove()
    ends = logits[torch.arange(len(logits)), runs.pairs.end]
    expected = [row[pair.answer[0]] - row[pair.wrong[0]] for row, pair in zip(ends, runs.answers, strict=True)]
    effect = runs.effect("corrupt", where, at, donor, head)
    torch.testing.assert_close(effect, torch.stack(expected), atol=1e-5, rtol=1e-5)


def small_runs(model, site):
    draw = np.random.default_rng(1)
    pairs = []
    for length in (6, 8, 7):
        clean = draw.integers(10, 300, length)
        corrupt = clean.copy()
        corrupt[1:3] = draw.integers(10, 300, 2)
        places = {"subject": (1, 2), "end": (length - 1,)}
        pairs.append(PatchPair(tuple(clean.tolist()), tuple(corrupt.tolist()), (20,), (30,), places))
    sites = model.site_map.select((site,))
    return Runs.make(model, pairs, sites, "logit-difference", False), sites[0]


def test_metrics_are_those_of_float64(tiny_models):
    model = Model(tiny_models["gpt2"], None, "tiny")
    site = model.site_map.select(("resid_post.0",))
    pairs = [PatchPair((5, 6, 7), (5, 9, 7), (20, 21), (30, 31, 32), {"end": (2,)})]
    with torch.no_grad():
        sides = (pairs[0].clean, pairs[0].corrupt)
        rows = [model.module(torch.tensor([ids])).logits[0, -1].double().numpy() for ids in sides]
    logs = [row - np.logaddexp.reduce(row) for row in rows]
    expected = {
        "logit-difference": [np.logaddexp.reduce(row[[20, 21]]) - np.logaddexp.reduce(row[30:33]) for row in rows],
        "log-probability": [np.logaddexp.reduce(row[[20, 21]]) for row in logs],
        "loss": [np.logaddexp.reduce(row[[20, 21]]) for row in logs],
        "kl": [0.0, -float(np.exp(logs[0]) @ (logs[0] - logs[1]))],
    }
    for metric, values in expected.items():
        runs = Runs.make(model, pairs, site, metric, False)
        assert [float(runs.clean), float(runs.corrupt)] == pytest.approx(values, rel=1e-9, abs=1e-12)


def test_donors_of_the_controls_are_other_pairs_and_positions(planted):
    pairs = pairs_of_names(12)
    runs = Runs.make(planted, pairs, planted.site_map.select(("resid_pre.0",)), "logit-difference", False)
    at = runs.pairs.places["name"]
    (source, position), has_donor = other_pair(runs.pairs, pairs, at, False, 0)
    assert has_donor.all()
    for number, pair in enumerate(pairs):
        donor = int(source[number][at[number]])
        assert donor != number
        assert not {*pairs[donor].answer, *pairs[donor].wrong} & {*pair.answer, *pair.wrong}
        assert int(position[number][at[number]]) == pairs[donor].places["name"][0]
    (source, _), has_donor = other_pair(runs.pairs, pairs, at, True, 0)
    for number in np.flatnonzero(has_donor):
        assert pairs[int(source[number][at[number]])].answer == pairs[number].answer
    _, position = shuffled_positions(runs.pairs, at, 0)
    assert not bool((position[at] == torch.arange(at.shape[1]).expand(at.shape)[at]).any())
    data = patched(planted, pairs, site="resid_pre")
    assert float(abs(data["shuffled"].sel(place="name", layer=0)).max()) == 0  # all else is equal in both runs
    assert float(data["same_answer"].sel(place="name", layer=0)) == pytest.approx(1, abs=1e-5)


def test_a_single_pair_has_no_random_donor(planted):
    known = {"settings": {"site": "resid_pre"}, "probe": "activation-patching"}
    result = ActivationPatching(resamples=10, site="resid_pre")._run(planted, pairs_of_names(1), [], known)
    assert "no random donor there" in ActivationPatching.headline(result)


def test_random_donors_are_flat_in_the_planted_circuit(planted):
    data = patched(planted, pairs_of_names(40), site="resid_pre")
    at = data.sel(place="name", layer=0)
    assert float(at["random_donor_low"]) <= 0 <= float(at["random_donor_high"])
    assert float(at["denoising_low"]) == pytest.approx(1, abs=1e-5)


def test_pairs_that_the_model_does_not_know_are_left_out_and_counted(planted):
    good = pairs_of_names()
    swapped = PatchPair(good[0].corrupt, good[0].clean, good[0].answer, good[0].wrong, good[0].places)
    data = patched(planted, [*good, swapped], site="resid_pre")
    assert data.sizes["pair"] == len(good)
    assert "1 of 7 pairs left out: the model does not give both right answers" in data.attrs["note"]
    assert "none of 1 pair can be used" in refused(RequestError, lambda: patched(planted, [swapped]))


def test_pairs_with_labels_and_answers_come_from_a_store(tmp_path):
    model = wb.load_model("demo", device="cpu")
    pairs = wb.prompt_pairs("facts", model, 4)
    store = wb.record(model, pairs.texts(), sites=["resid_post.0"], out=tmp_path / "s", show_progress=False)
    settings = ActivationPatching(layers=(0, 1), controls_too=False, resamples=20)
    from_store, from_pairs = settings.run(store, model=model), settings.run_pairs(model, pairs)
    for name in from_store.data.data_vars:
        np.testing.assert_allclose(from_store.data[name], from_pairs.data[name], atol=1e-5, err_msg=name)
    assert from_store.data["place"].to_numpy().tolist() == [OTHER, "subject", "end"]
    assert "% of the gap at layer 0, subject" in from_store.headline()
    saved = wb.load_result(from_pairs.save(tmp_path / "result"))
    assert saved.provenance["store"] == "pairs of facts"
    assert set(saved.figures()) == {"denoising", "noising", "lines", "spread"}


def test_a_store_without_pairs_and_bad_settings_are_refused(planted, store, tmp_path):
    plain = wb.record(planted, [[5, 6, 7]], sites=["resid_post"], out=tmp_path / "s", show_progress=False)
    message = refused(RequestError, lambda: ActivationPatching().run(plain, model=planted))
    assert "has no column 'pair', so it holds no pairs" in message
    message = refused(RequestError, lambda: ActivationPatching().run(store, model=planted))
    assert "needs the answers of every pair; give metric='kl'" in message
    for settings, expected in (
        ({"metric": "logits"}, "metric must be one of logit-difference"),
        ({"site": "resid_post.1"}, "site must be a kind without a layer"),
        ({"site": "pattern"}, "site 'pattern' cannot be patched"),
        ({"site": "z", "at": "subject"}, "at 'subject' is no label; known are all, other, name, end"),
        ({"layers": (7,)}, "no such layer"),
    ):
        call = lambda settings=settings: patched(planted, pairs_of_names(), **settings)  # noqa: E731
        assert expected in refused(RequestError, call)
