"""Edges: exact path patching, the identities of runs with all and no edges, a planted circuit, linear models."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from planted_circuit import END, FILLER, NAMES, planted_circuit
from refusals import refused
from transformers import OPTConfig, OPTForCausalLM

import workbench as wb
from workbench.analysis.edge_graph import EdgeGraph
from workbench.analysis.edge_runs import EdgeRuns
from workbench.analysis.patch_pairs import PatchPair
from workbench.analysis.patching import Runs
from workbench.analysis.path_runs import PathRuns
from workbench.experiments.architectures.tiny import tiny_model
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.model.unembed import measure_unembed
from workbench.probes import EdgeAttribution
from workbench.testing import ProbeContract


def names(count: int = 4) -> list[PatchPair]:
    draw, pairs = np.random.default_rng(0), []
    for number in range(count):
        first, second = (int(name) for name in draw.choice(NAMES, 2, replace=False))
        sides = [(FILLER[0], name, *FILLER[: 1 + number % 2], END) for name in (first, second)]
        pairs.append(PatchPair(*sides, (first,), (second,), {"name": (1,), "end": (3 + number % 2,)}))
    return pairs


def random_pairs() -> list[PatchPair]:
    draw, pairs = np.random.default_rng(2), []
    for length in (5, 7):
        clean = draw.integers(10, 300, length)
        corrupt = clean.copy()
        corrupt[1] = draw.integers(10, 300)
        pairs.append(PatchPair(tuple(clean.tolist()), tuple(corrupt.tolist()), (20,), (30,), {"end": (length - 1,)}))
    return pairs


def edges_of(module, pairs) -> EdgeRuns:
    model = Model(module, None, "tiny")
    graph = EdgeGraph.of(model)
    runs = Runs.make(model, pairs, graph.sites, "logit-difference", False)
    return EdgeRuns(graph, runs, measure_unembed(module, model.site_map.last_block))


@pytest.fixture(scope="module")
def planted():
    return Model(planted_circuit(), None, "planted")


class TestContract(ProbeContract):
    probe = EdgeAttribution
    settings = {"metric": "kl", "resamples": 20, "sizes": (1, 5)}  # noqa: RUF012

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


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_all_edges_are_the_clean_run_and_none_the_corrupt_one(family, tiny_models):
    edges = edges_of(copy.deepcopy(tiny_models[family]).double(), random_pairs())
    allowed = edges.graph.allowed
    torch.testing.assert_close(edges.metric(allowed), edges.runs.clean, atol=1e-6, rtol=0)
    torch.testing.assert_close(edges.metric(np.zeros_like(allowed)), edges.runs.corrupt, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("family", "receiver"), [("gpt2", "L2H1.v"), ("llama", "L2H3.q"), ("gpt_neox", "L2H2.k")])
def test_one_edge_with_all_behind_it_is_exact_path_patching(family, receiver, tiny_models):
    """The sender's write reaches the receiver alone, and everything from the receiver on acts as it does."""
    edges, pairs = edges_of(tiny_models[family], random_pairs()), random_pairs()
    graph = edges.graph
    paths = PathRuns.make(
        Model(tiny_models[family], None, "tiny"), pairs, (receiver,), "logit-difference", frozen=True, linear=False
    )
    z = paths.heads[0]
    donor, positions = paths.runs.clean_values[z.name], paths.runs.pairs.mask.bool()
    expected = paths.effect("corrupt", z, 1, positions, donor)
    assert float((expected - paths.runs.corrupt).abs().max()) > 1e-4
    senders, receivers = ([part.name for part in parts] for parts in (graph.senders, graph.receivers))
    (known,) = (receiver for receiver in paths.receivers)
    receiver_name = f"L2H{known.head}.{receiver[-1]}"
    edge_mask = np.array([[sender.layer >= 2] * len(receivers) for sender in graph.senders])
    edge_mask[senders.index("L0H1"), receivers.index(receiver_name)] = True
    # with the embedding's edges into block 0 its heads have the clean run's z
    edge_mask[
        :, [index for index, receiver in enumerate(graph.receivers) if receiver.layer == 0 and receiver.kind in "qkv"]
    ] = True
    torch.testing.assert_close(edges.metric(edge_mask & graph.allowed), expected, atol=2e-5, rtol=1e-5)


def test_scores_into_the_logits_are_those_of_plain_autograd(tiny_models):
    module = tiny_models["gpt2"]
    edges = edges_of(module, random_pairs())
    scores, graph = edges.scores(), edges.graph
    last = graph.site("resid_post.2").name
    for number, pair in enumerate(random_pairs()):
        end = len(pair.clean) - 1
        stream = edges.runs.corrupt_values[last][number, end].clone().requires_grad_()
        logits = module.lm_head(module.transformer.ln_f(stream))
        (gradient,) = torch.autograd.grad(logits[20] - logits[30], stream)
        mlp = graph.site("mlp_out.1").name
        added = (edges.runs.clean_values[mlp] - edges.runs.corrupt_values[mlp])[number, end]
        sender = [sender_part.name for sender_part in graph.senders].index("MLP1")
        assert scores[number, sender, -1] == pytest.approx(float(added @ gradient), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_in_a_linear_model_the_scores_into_the_logits_sum_to_the_change(family, tiny_models):
    module = copy.deepcopy(tiny_models[family])
    if family == "llama":
        module.model.norm = torch.nn.Identity()
    else:
        module.gpt_neox.final_layer_norm = torch.nn.Identity()
    edges = edges_of(module, random_pairs())
    np.testing.assert_allclose(edges.scores()[:, :, -1].sum(1), edges.runs.gap, atol=1e-5)


def test_the_three_edges_of_the_planted_circuit_are_found_and_carry_everything(planted):
    result = EdgeAttribution(resamples=20, sizes=(2, 3, 10))._run(planted, names(), [], {"settings": {}})
    edges = {(line.sender, line.receiver) for line in result.table.head(3).itertuples()}
    assert edges == {("embedding", "L0H1.v"), ("L0H1", "L1H2.v"), ("L1H2", "logits")}
    data = result.data
    np.testing.assert_allclose(data["faithfulness"], [0, 1, 1], atol=1e-5)
    assert float(data["random_faithfulness"].max()) < 1e-5
    assert float(data["half"]) == 3
    score = data["score"].to_numpy()
    assert not score[~EdgeGraph.of(planted).allowed].any()
    assert "The 3 edges of largest score, of 110, recover 100 % of the gap" in result.headline()
    for name in ("faithfulness", "random_faithfulness"):
        assert bool((data[f"{name}_low"] <= data[name] + 1e-12).all())


def test_a_task_has_figures_and_is_saved(tmp_path):
    model = wb.load_model("demo", device="cpu")
    pairs = wb.prompt_pairs("facts", model, 4)
    result = EdgeAttribution(resamples=20, sizes=(300,)).run_pairs(model, pairs)
    assert set(result.figures()) == {"faithfulness", "edges"}
    assert float(result.data["faithfulness"][0]) > 0.5 > float(result.data["random_faithfulness"][0])
    assert wb.load_result(result.save(tmp_path / "r")).headline() == result.headline()


def test_a_stream_that_is_no_sum_of_what_its_parts_add_is_refused():
    """A post-norm OPT, whose norms rewrite the stream; Falcon-H1, which adds a state space beside attention."""
    size = {"vocab_size": 320, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "ffn_dim": 16}
    config = OPTConfig(**size, word_embed_proj_dim=16, max_position_embeddings=32, do_layer_norm_before=False)
    edges = edges_of(OPTForCausalLM(config).eval(), random_pairs())
    assert "does not sum to its last residual stream" in refused(RequestError, edges.scores)
    model = Model(tiny_model("falcon_h1"), None, "tiny")
    assert "layer 0 of FalconH1ForCausalLM adds more" in refused(RequestError, lambda: EdgeGraph.of(model))


def test_models_without_such_edges_and_bad_settings_are_refused(tiny_models, planted):
    call = lambda: EdgeGraph.of(Model(tiny_models["gemma2"], None, "tiny"))  # noqa: E731
    assert "Gemma2ForCausalLM has a norm behind attention" in refused(RequestError, call)
    assert "sizes must be numbers of edges" in refused(RequestError, lambda: EdgeAttribution(sizes=()))
    assert "metric must be one of" in refused(RequestError, lambda: EdgeAttribution(metric="logits"))
