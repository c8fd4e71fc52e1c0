"""Path patching: the planted circuit's one edge, identities of the two steps, and both treatments of MLPs and norm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from granite_example import MULTIPLIER, granite_of
from planted_circuit import END, FILLER, MOVER, NAMES, READER, planted_circuit
from refusals import refused

import workbench as wb
from workbench.analysis.patch_pairs import PatchPair
from workbench.analysis.path_runs import PathRuns
from workbench.experiments.architectures.tiny import tiny_model
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.probes import PathPatching
from workbench.testing import ProbeContract


def names(count: int = 4) -> list[PatchPair]:
    draw, pairs = np.random.default_rng(0), []
    for number in range(count):
        first, second = (int(name) for name in draw.choice(NAMES, 2, replace=False))
        sides = [(FILLER[0], name, *FILLER[: 1 + number % 2], END) for name in (first, second)]
        pairs.append(PatchPair(*sides, (first,), (second,), {"name": (1,), "end": (3 + number % 2,)}))
    return pairs


@pytest.fixture(scope="module")
def planted():
    return Model(planted_circuit(), None, "planted")


class TestContract(ProbeContract):
    probe = PathPatching
    settings = {"metric": "kl", "resamples": 20, "layers": (1,)}  # noqa: RUF012

    @pytest.fixture
    def store(self, planted, tmp_path_factory):
        texts = [
            {"input_ids": list(ids), "pair": number, "side": side}
            for number, pair in enumerate(names(2))
            for side, ids in (("clean", pair.clean), ("corrupt", pair.corrupt))
        ]
        out = tmp_path_factory.mktemp("p") / "s"
        return wb.record(planted, texts, sites=["resid_post.0"], out=out, show_progress=False)

    @pytest.fixture
    def model(self, planted):
        return planted


def one_edge(head):
    expected = np.zeros((2, 4))
    expected[head] = 1
    return expected


@pytest.mark.parametrize(
    ("settings", "head"),
    [
        ({}, MOVER),
        ({"norm": "linear"}, MOVER),
        ({"mlps": "recomputed"}, MOVER),
        ({"receivers": ("L1H2.v",)}, READER),
        ({"receivers": ("L1H2.k", "L1H2.v"), "at": "end"}, READER),
        ({"receivers": ("L1H2.q",)}, None),
        ({"receivers": ("L1H1.v",)}, None),
    ],
)
def test_the_one_edge_of_the_planted_circuit_is_found_in_both_directions(settings, head, planted):
    data = PathPatching(resamples=20, **settings)._run(planted, names(), [], {}).data
    expected = np.zeros((2, 4)) if head is None else one_edge(head)
    for direction in ("denoising", "noising"):
        np.testing.assert_allclose(data[direction], expected, atol=1e-5)
    assert float(np.nanmax(np.abs(data["random_donor"]), initial=0.0)) < 1e-5


def path_runs(family, tiny_models, receivers=("logits",), frozen=True, linear=False):
    draw, pairs = np.random.default_rng(2), []
    for length in (5, 7):
        clean = draw.integers(10, 300, length)
        corrupt = clean.copy()
        corrupt[1] = draw.integers(10, 300)
        pairs.append(PatchPair(tuple(clean.tolist()), tuple(corrupt.tolist()), (20,), (30,), {"end": (length - 1,)}))
    model = Model(tiny_models[family], None, "tiny")
    metric = "logit-difference"
    return PathRuns.make(model, pairs, receivers, metric, frozen=frozen, linear=linear)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "granite"])
def test_with_all_held_the_logits_see_the_heads_own_difference_before_the_norm(family, tiny_models):
    """z W_O of the head, added to the last stream of the base, through the plain module's norm and head."""
    models = {**tiny_models, "granite": granite_of(tiny_models["llama"])}
    paths = path_runs(family, models)
    module, runs = models[family], paths.runs
    site, head, positions = paths.heads[1], 2, runs.pairs.mask.bool()
    clean, corrupt = runs.clean_values[site.name], runs.corrupt_values[site.name]
    difference = torch.zeros_like(clean)
    difference[:, :, head] = (clean - corrupt)[:, :, head]
    path, norm = {
        "gpt2": ("transformer.h.1.attn.c_proj", "transformer.ln_f"),
        "gpt_neox": ("gpt_neox.layers.1.attention.dense", "gpt_neox.final_layer_norm"),
    }.get(family, ("model.layers.1.self_attn.o_proj", "model.norm"))
    project, norm = module.get_submodule(path), module.get_submodule(norm)
    with torch.no_grad():
        write = project(difference.flatten(2)) - project(torch.zeros_like(difference.flatten(2)))
        stream = runs.corrupt_values[paths.last.name] + write * (MULTIPLIER if family == "granite" else 1)
        logits = module.get_output_embeddings()(norm(stream)).double()
    ends = logits[torch.arange(2), runs.pairs.end]
    effect = paths.effect("corrupt", site, head, positions, clean)
    torch.testing.assert_close(effect, ends[:, 20] - ends[:, 30], atol=2e-5, rtol=1e-5)


def test_a_linear_norm_makes_the_effects_of_heads_add_up(tiny_models):
    """In one layer, where no head sees another: the sum of single effects is the effect of direct writes together."""
    paths = path_runs("llama", tiny_models, linear=True)
    runs, site, positions = paths.runs, paths.heads[2], paths.runs.pairs.mask.bool()
    clean = runs.clean_values[site.name]
    single = [paths.effect("corrupt", site, head, positions, clean) - runs.corrupt for head in range(4)]
    all_of_them = paths._batch("corrupt", slice(None), site, clean) - runs.corrupt
    torch.testing.assert_close(sum(single), all_of_them, atol=2e-5, rtol=1e-5)
    exact = path_runs("llama", tiny_models)
    bent = [exact.effect("corrupt", site, head, positions, clean) - runs.corrupt for head in range(4)]
    assert not torch.allclose(sum(bent), all_of_them, atol=1e-4)


def test_recomputed_mlps_see_the_change_and_frozen_ones_do_not(tiny_models):
    frozen, recomputed = path_runs("llama", tiny_models), path_runs("llama", tiny_models, frozen=False)
    site, positions = frozen.heads[0], frozen.runs.pairs.mask.bool()
    donor = frozen.runs.clean_values[site.name]
    kept_frozen, computed_anew = (paths.effect("corrupt", site, 1, positions, donor) for paths in (frozen, recomputed))
    assert not torch.allclose(kept_frozen, computed_anew, atol=1e-4)
    last = frozen.heads[2]  # with the last MLP alone behind it
    donor = frozen.runs.clean_values[last.name]
    again = recomputed.effect("corrupt", last, 1, positions, donor)
    with wb.intervene(frozen.runs.model, wb.Set("z.2", donor[:, :, 1:2], head=1, at="all")):
        logits = frozen.runs.model.module(frozen.runs.pairs.corrupt, attention_mask=frozen.runs.pairs.mask).logits
    ends = logits[torch.arange(2), frozen.runs.pairs.end].detach().double()
    torch.testing.assert_close(again, ends[:, 20] - ends[:, 30], atol=2e-5, rtol=1e-5)


def test_keys_and_values_are_those_of_the_group(tiny_models):
    paths = path_runs("llama", tiny_models, ("L2H3.k", "L2H1.v", "L2H0.q"))
    assert [(receiver.site.short, receiver.head) for receiver in paths.receivers] == [
        ("k.2", 1),
        ("v.2", 0),
        ("q.2", 0),
    ]
    runs, site, positions = paths.runs, paths.heads[0], paths.runs.pairs.mask.bool()
    effect = paths.effect("corrupt", site, 0, positions, runs.clean_values[site.name])
    assert not torch.equal(effect, runs.corrupt)
    null_effect = paths.effect("corrupt", paths.heads[2], 0, positions, runs.clean_values[paths.heads[2].name])
    assert null_effect is runs.corrupt  # a sender in the receiver's layer


@pytest.mark.parametrize("kind", ["falcon_h1", "lfm2"])
def test_models_that_mix_tokens_by_more_than_heads_are_refused(kind):
    """A state space beside attention; convolutions in some blocks. They would carry what is to be held."""
    models = {kind: tiny_model(kind)}
    message = refused(RequestError, lambda: path_runs(kind, models))
    assert "moves values between tokens by more than attention heads" in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"receivers": ("L9H6",)}, "receiver 'L9H6' is none of logits, L9H6.q"),
        ({"receivers": ("L1H7.q",)}, "layer 1 has the heads 0 to 3"),
        ({"receivers": ("L7H1.q",)}, "no such layer"),
        ({"receivers": ("logits", "L1H1.q")}, 'receivers must be "logits" alone'),
        ({"receivers": ("L1H1.q",), "norm": "linear"}, "norm='linear' is for the receiver logits"),
        ({"mlps": "zero"}, "mlps must be one of frozen, recomputed"),
        ({"at": "subject"}, "at 'subject' is no label"),
    ],
)
def test_bad_settings_are_refused(settings, message, planted):
    assert message in refused(RequestError, lambda: PathPatching(**settings)._run(planted, names(), [], {}))
