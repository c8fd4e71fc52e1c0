"""Prompts whose last position is another text's state, against plain Hugging Face hooks and generation."""

import copy

import pytest
import torch
from refusals import refused

from workbench.io.errors import RequestError
from workbench.model.embedding_records import token_embeddings
from workbench.model.intervene import intervene
from workbench.model.load import Model
from workbench.model.prompted_run import continue_prompted, run_prompted
from workbench.model.row_changes import RowFunction

BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers", "gpt_neox": "gpt_neox.layers", "gemma2": "model.layers"}
PROMPT = torch.tensor([5, 40, 7, 301])
FED = torch.tensor([[9, 10], [11, 12], [290, 3]])


@pytest.fixture(params=list(BLOCKS))
def family(request):
    return request.param


@pytest.fixture
def model(family, tiny_models, tiny_tokenizer):
    return Model(copy.deepcopy(tiny_models[family]), tiny_tokenizer, family)


def states(rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(0))


def by_hand(model: Model, family: str, layer: int, states: torch.Tensor, fed: torch.Tensor = FED) -> torch.Tensor:
    """The prompt and what is fed run as ids, one row at a time, the block's output replaced by a hook of torch."""
    block = model.module.get_submodule(f"{BLOCKS[family]}.{layer}")
    logits = []
    for row, state in enumerate(states):

        def replace(_module, _args, output, state=state):
            first = output if isinstance(output, torch.Tensor) else output[0]
            first[:, len(PROMPT) - 1] = state
            return output

        handle = block.register_forward_hook(replace)
        with torch.no_grad():
            ids = torch.cat([PROMPT, fed[row]])[None]
            logits.append(model.module(input_ids=ids).logits[0, len(PROMPT) - 1 :])
        handle.remove()
    return torch.stack(logits)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_prompted_run_is_the_hooked_run(model, family, layer):
    (site,) = model.site_map.select([f"resid_post.{layer}"])
    logits = run_prompted(model, site, token_embeddings(model, PROMPT), states(), FED)
    assert logits.shape == (3, 3, 320)
    torch.testing.assert_close(logits, by_hand(model, family, layer, states()), atol=1e-5, rtol=1e-4)


@pytest.fixture(params=[True, False], ids=["behind kept keys", "whole passes"])
def kept(request, model):
    vars(model)["continues_from_cache"] = request.param  # as if it had been measured
    return request.param


def test_earlier_tokens_of_the_prompt_run_once(model, family, kept):
    (site,) = model.site_map.select(["resid_post.0"])
    runs = []
    handle = model.module.get_input_embeddings().register_forward_hook(
        lambda _module, args, _output: runs.append(tuple(args[0].shape))
    )
    logits = run_prompted(model, site, token_embeddings(model, PROMPT), states(), FED)
    handle.remove()
    assert [shape for shape in runs if len(shape) == 2] == ([(1, 3), (3, 3)] if kept else [(3, 6)])
    torch.testing.assert_close(logits, by_hand(model, family, 0, states()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 4])
def test_its_own_top_tokens_follow_in_free_running(model, family, kept, length, monkeypatch):
    monkeypatch.setitem(globals(), "PROMPT", PROMPT[:length])
    (site,) = model.site_map.select(["resid_post.1"])
    top = continue_prompted(model, site, token_embeddings(model, PROMPT), states(), 5, 4)
    assert top.shape == (3, 4, 5)
    fed = torch.zeros(3, 0, dtype=torch.long)
    for step in range(4):
        answers = by_hand(model, family, 1, states(), fed)[:, -1].topk(5).indices
        torch.testing.assert_close(top[:, step], answers)
        fed = torch.cat([fed, answers[:, :1]], 1)


def test_its_own_state_put_back_changes_nothing(model):
    (site,) = model.site_map.select(["resid_post.1"])
    ids = torch.cat([PROMPT.expand(3, -1), FED], dim=1)
    states_by_name = {}
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    mask[:, len(PROMPT) - 1] = True

    def keep(rows, _chosen):
        states_by_name["own"] = rows.clone()
        return rows

    with torch.no_grad(), intervene(model, RowFunction("resid_post.1", keep, "keep", at=mask)):
        clean = model.module(input_ids=ids).logits
    logits = run_prompted(model, site, token_embeddings(model, PROMPT), states_by_name["own"], FED)
    torch.testing.assert_close(logits, clean[:, len(PROMPT) - 1 :], atol=1e-5, rtol=1e-4)


def test_gradients_reach_the_prompt_alone_and_are_those_of_finite_differences(tiny_models, tiny_tokenizer):
    model = Model(copy.deepcopy(tiny_models["llama"]).double(), tiny_tokenizer, "llama")
    (site,) = model.site_map.select(["resid_post.0"])
    prompt = token_embeddings(model, PROMPT).requires_grad_(True)

    def loss(vectors):
        return run_prompted(model, site, vectors, states().double(), FED, gradients=True)[:, 1, 17].sum()

    (gradient,) = torch.autograd.grad(loss(prompt), [prompt])
    assert all(weight.grad is None for weight in model.module.parameters())
    step = torch.zeros_like(prompt)
    step[1, 5] = 1e-2
    slope = (loss(prompt.detach() + step) - loss(prompt.detach() - step)) / 2e-2
    assert gradient[1, 5].item() == pytest.approx(slope.item(), rel=1e-2)


def test_the_embeddings_are_those_the_model_reads(model, family):
    read = {}
    embedding = model.module.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _module, _args, output: read.update(own=output.detach().clone()))
    model.module(input_ids=PROMPT[None])
    handle.remove()
    torch.testing.assert_close(token_embeddings(model, PROMPT), read["own"][0])


def test_a_site_inside_of_attention_is_refused(tiny_models, tiny_tokenizer):
    model = Model(tiny_models["llama"], tiny_tokenizer, "llama")
    (site,) = model.site_map.select(["pattern.0"])
    text = refused(RequestError, lambda: run_prompted(model, site, token_embeddings(model, PROMPT), states(), FED))
    assert "cannot be changed" in text
