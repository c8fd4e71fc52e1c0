"""Attribution patching: plain autograd, linear models, integrated gradients, a planted circuit, controls, refusals."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from planted_circuit import END, FILLER, MOVER, NAMES, READER, planted_circuit
from refusals import refused

import workbench as wb
from workbench.analysis.attribution import correlations
from workbench.analysis.patch_pairs import PatchPair
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.probes import AttributionPatching
from workbench.testing import ProbeContract


def names(count: int = 6) -> list[PatchPair]:
    draw, pairs = np.random.default_rng(0), []
    for number in range(count):
        first, second = (int(name) for name in draw.choice(NAMES, 2, replace=False))
        at, length = 1 + number % 2, 4 + number % 2
        sides = [[FILLER[index % 3] for index in range(length)] + [END] for _ in range(2)]
        sides[0][at], sides[1][at] = first, second
        pairs.append(PatchPair(*map(tuple, sides), (first,), (second,), {"name": (at,), "end": (length,)}))
    return pairs


def random_pairs(count: int = 4) -> list[PatchPair]:
    draw, pairs = np.random.default_rng(1), []
    for number in range(count):
        clean = draw.integers(10, 300, 5 + number % 2)
        corrupt = clean.copy()
        corrupt[1:3] = draw.integers(10, 300, 2)
        places = {"subject": (1, 2), "end": (len(clean) - 1,)}
        pairs.append(PatchPair(tuple(clean.tolist()), tuple(corrupt.tolist()), (20,), (30,), places))
    return pairs


@pytest.fixture(scope="module")
def planted():
    return Model(planted_circuit(), None, "planted")


class TestContract(ProbeContract):
    probe = AttributionPatching
    settings = {"metric": "kl", "resamples": 20, "exact_pairs": 2}  # noqa: RUF012

    @pytest.fixture
    def store(self, planted, tmp_path_factory):
        texts = [
            {"input_ids": list(ids), "pair": number, "side": side}
            for number, pair in enumerate(names(3))
            for side, ids in (("clean", pair.clean), ("corrupt", pair.corrupt))
        ]
        out = tmp_path_factory.mktemp("p") / "s"
        return wb.record(planted, texts, sites=["resid_post.0"], out=out, show_progress=False)

    @pytest.fixture
    def model(self, planted):
        return planted


def estimated(model, pairs, **settings):
    probe = AttributionPatching(**{"resamples": 20, "metric": "log-probability"} | settings)
    return probe._run(model, pairs, [], {"settings": {}}).data


@pytest.mark.parametrize("base", ["corrupt", "clean"])
@pytest.mark.parametrize(("site", "place"), [("resid_post", "out"), ("z", "in")])
def test_estimates_are_those_of_plain_autograd(site, place, base, tiny_models):
    module = tiny_models["llama"]
    data = estimated(Model(module, None, "tiny"), random_pairs(), site=site, base=base, exact_pairs=1)
    part = module.model.layers[1] if place == "out" else module.model.layers[1].self_attn.o_proj
    for row, number in enumerate(data["pair"].to_numpy()):
        pair, tensors = random_pairs()[number], {}
        for side in ("clean", "corrupt"):

            def keep(_module, args, output=None, side=side, tensors=tensors):
                tensors[side] = args[0] if output is None else output
                tensors[side].retain_grad()

            handle = part.register_forward_hook(keep) if place == "out" else part.register_forward_pre_hook(keep)
            module.model.embed_tokens.weight.requires_grad_(True)
            logits = module(torch.tensor([getattr(pair, side)])).logits[0, -1].double()
            handle.remove()
            if side == base:
                logits.log_softmax(-1)[20].backward()
        terms = ((tensors["clean"] - tensors["corrupt"]) * tensors[base].grad)[0].detach().double()
        module.zero_grad()
        if place == "out":
            rest = [0, *range(3, len(terms) - 1)]
            expected = {"subject": terms[1:3].sum(), "end": terms[-1].sum(), "other": terms[rest].sum()}
        else:
            expected = {f"H{head}": terms[:, 8 * head : 8 * head + 8].sum() for head in range(4)}
        for name, value in expected.items():
            estimate = float(data["by_pair"].sel(layer=1, place=name)[row])
            assert estimate == pytest.approx(float(value), abs=1e-5), (number, name)


def test_in_a_linear_model_the_estimate_is_the_exact_effect(tiny_models):
    """Without the final norm a logit difference is linear in the last block's output and in what its MLP adds."""
    module = copy.deepcopy(tiny_models["llama"])
    module.model.norm = torch.nn.Identity()
    model = Model(module, None, "linear")
    pairs = [with_top_answers(module, pair) for pair in random_pairs(8)]
    for site, layers in (("resid_post", (2,)), ("mlp_out", (2,))):
        for base in ("corrupt", "clean"):
            settings = {"metric": "logit-difference", "layers": layers, "base": base}
            data = estimated(model, pairs, site=site, **settings)
            np.testing.assert_allclose(data["estimate_by_pair"], data["exact_by_pair"], atol=1e-5)
            np.testing.assert_allclose(data["completeness_error"], 0, atol=1e-5)
            assert float(data["largest_miss"].max()) < 1e-5 < float(abs(data["exact_by_pair"]).max())


def with_top_answers(module, pair):
    """The pair with the top tokens of both runs as answers: a random model then gives both right ones."""
    with torch.no_grad():
        right, wrong = (int(module(torch.tensor([ids])).logits[0, -1].argmax()) for ids in (pair.clean, pair.corrupt))
    return PatchPair(pair.clean, pair.corrupt, (right,), (wrong,), pair.places)


def test_integrated_gradients_tend_to_the_exact_effect_of_the_site(tiny_models):
    model, pairs = Model(tiny_models["llama"], None, "tiny"), random_pairs()
    errors = {}
    for site in ("resid_post", "z"):
        for steps in (0, 4, 32):
            data = estimated(model, pairs, site=site, steps=steps, layers=(1,), exact_pairs=8)
            errors[site, steps] = float(data["completeness_error"].max())
        assert errors[site, 32] < 1e-3
        assert errors[site, 32] < errors[site, 4] < errors[site, 0]
    whole = float(estimated(model, pairs, layers=(1,))["whole"][0])
    assert whole == pytest.approx(1, abs=1e-5)  # the whole stream carries all that differs


def test_the_planted_heads_alone_have_an_effect(planted):
    for base in ("corrupt", "clean"):
        data = estimated(planted, names(), metric="logit-difference", site="z", base=base)
        effect = data["estimate"].to_numpy()
        elsewhere = np.ones((2, 4), bool)
        elsewhere[READER] = elsewhere[MOVER] = False
        assert abs(effect[elsewhere]).max() < 1e-5
        assert min(effect[READER], effect[MOVER]) > 0.3
        exact = data["exact"].to_numpy()
        assert exact[READER] == pytest.approx(1, abs=1e-5)
    integrated = estimated(planted, names(), metric="logit-difference", site="resid_pre", steps=12, layers=(0,))
    np.testing.assert_allclose(integrated["estimate"], integrated["exact"], atol=2e-3)


def test_controls_are_flat_where_activations_carry_this_pairs_answer_alone(planted):
    data = estimated(planted, names(30), metric="logit-difference", site="resid_post")
    for control in ("random_donor", "shuffled"):
        assert bool((data[f"{control}_low"] <= 1e-6).all())
        assert bool((data[f"{control}_high"] >= -1e-6).all())
    assert float(data["estimate_low"].sel(layer=0, place="end")) > 0.3


def test_correlations_are_those_of_numpy_and_leave_out_equal_cells():
    draw = np.random.default_rng(0)
    x = draw.standard_normal((9, 2, 5))
    y = x + draw.standard_normal(x.shape)
    y[0, 0, 0] = np.nan
    x[1, 0], y[1, 0] = 0, 0
    mean, low, high = correlations(x, y, 500, 0)
    known = ~np.isnan(y[:, 0])
    known[1] = False
    assert mean[0] == pytest.approx(np.corrcoef(x[:, 0][known], y[:, 0][known])[0, 1], abs=1e-12)
    assert mean[1] == pytest.approx(np.corrcoef(x[:, 1].ravel(), y[:, 1].ravel())[0, 1], abs=1e-12)
    assert bool(((low < mean) & (mean < high)).all())
    mean, low, _ = correlations(np.ones((4, 1, 3)), draw.standard_normal((4, 1, 3)), 50, 0)
    assert bool(np.isnan([mean[0], low[0]]).all())


def test_a_task_is_estimated_with_figures_and_misses(tmp_path):
    model = wb.load_model("demo", device="cpu")
    probe = AttributionPatching(layers=(0, 3), resamples=50, exact_pairs=4)
    result = probe.run_pairs(model, wb.prompt_pairs("facts", model, 6))
    assert set(result.figures()) == {"scatter", "correlation", "estimate", "exact"}
    assert "Estimated patching of resid_post (gradient of the corrupt run): r " in result.headline()
    assert "with exact patching over the cells of 4 pairs" in result.headline()
    data = result.data
    misses = abs(data["miss_exact"] - data["miss_estimate"]).to_numpy()
    assert misses[0] == pytest.approx(float(data["largest_miss"].max()))
    assert bool((np.diff(misses) <= 0).all())
    assert wb.load_result(result.save(tmp_path / "r")).headline() == result.headline()


def test_bad_settings_are_refused(planted):
    for settings, message in (
        ({"base": "both"}, "base must be one of corrupt, clean"),
        ({"metric": "kl", "base": "clean"}, "the gradient of the KL from the clean run is 0 there"),
        ({"steps": -1}, "steps must be"),
        ({"exact_pairs": 0}, "exact_pairs must be"),
        ({"layers": ()}, "layers is empty"),
        ({"site": "z", "at": "subject"}, "at 'subject' is no label"),
        ({"site": "pattern"}, "site 'pattern' cannot be patched"),
    ):
        call = lambda settings=settings: estimated(planted, names(), **settings)  # noqa: E731
        assert message in refused(RequestError, call)
    module = copy.deepcopy(planted.module)
    module.is_quantized = True
    quantised = Model(module, None, "small")
    assert "'small' is quantised" in refused(RequestError, lambda: estimated(quantised, names()))
