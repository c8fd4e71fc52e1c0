"""Interventions on models that are adapted, offloaded or compiled, and after faults: right numbers or an error."""

import copy

import pytest
import torch
from refusals import refused

import workbench as wb
from workbench.io.errors import DataError
from workbench.model.load import Model, load_model
from workbench.model.row_changes import RowFunction

IDS = torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(5))
DIRECTION = torch.randn(32, generator=torch.Generator().manual_seed(6))


@pytest.fixture
def llama(tiny_models, tiny_tokenizer):
    return Model(copy.deepcopy(tiny_models["llama"]), tiny_tokenizer, "llama")


def logits(model, **arguments):
    with torch.no_grad():
        return model.module(input_ids=IDS, **arguments).logits


def records():
    rows = wb.Zero("z.1", head=2), wb.Add("resid_post.0", DIRECTION, 2, at=3)
    return *rows, wb.ScaleAttention(2, 1, 0, 2)


def changed(model, *interventions):
    with wb.intervene(model, *(interventions or records())):
        return logits(model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_unmerged_adapter_is_changed_as_the_merged_model(llama):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["o_proj", "q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(llama.module, config)
    before = changed(load_model(adapted.base_model.model))
    merged = load_model(adapted.merge_and_unload())
    torch.testing.assert_close(before, changed(merged), atol=1e-5, rtol=1e-5)
    assert (before - logits(merged)).abs().max() > 1e-2


def test_offloaded_weights_give_the_same_numbers(llama):
    accelerate = pytest.importorskip("accelerate")
    expected = changed(llama), changed(llama, wb.SwapBlocks(0, 2)), changed(llama, wb.EmbedTokens(2, 7))
    accelerate.cpu_offload(llama.module, execution_device="cpu")
    offloaded = Model(llama.module, None, "offloaded")
    assert torch.equal(changed(offloaded), expected[0])
    assert torch.equal(changed(offloaded, wb.SwapBlocks(0, 2)), expected[1])
    assert torch.equal(changed(offloaded, wb.EmbedTokens(2, 7)), expected[2])


def test_a_half_precision_model_is_changed_in_float32_and_rounded_once(tiny_models):
    model = Model(copy.deepcopy(tiny_models["llama"]).bfloat16(), None, "half")
    tensors, _ = [], model.sites
    handle = model.module.model.layers[1].register_forward_pre_hook(lambda _module, args: tensors.append(args[0]))
    plain = logits(model)
    with wb.intervene(model, wb.Add("resid_post.0", DIRECTION, 1e-3, at=[2])):
        logits(model)
    handle.remove()
    before, after = tensors
    assert torch.equal(after[:, 2], (before[:, 2].float() + 1e-3 * DIRECTION).bfloat16())
    assert torch.equal(after[:, 3:], before[:, 3:])
    assert torch.equal(logits(model), plain)
    assert changed(model).dtype == torch.bfloat16
    assert changed(model).isfinite().all()


def test_a_module_that_is_replaced_or_does_not_run_is_an_error(llama):
    bound = wb.intervene(llama, wb.Zero("mlp_out.1"))
    llama.module.model.layers[1].mlp = torch.nn.Identity()
    with bound:  # the hook is on what is there when the block begins
        logits(llama)
    skipped = wb.intervene(llama, wb.Zero("mlp_out.2"))
    llama.module.model.layers[2].forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(DataError, match="no forward pass reached it"), skipped:
        logits(llama)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in llama.module.modules())


def test_gradients_flow_through_every_change(llama):
    value = DIRECTION.clone().requires_grad_(True)
    more = wb.ScaleAttention(2, None, 3, 2), wb.Project("resid_post.1", DIRECTION, at=5)
    with wb.intervene(llama, wb.Set("resid_mid.1", value, at=3), *more):
        llama.module(input_ids=IDS).logits[..., 7].sum().backward()
    step, slopes = 1e-2, []
    for sign in (1, -1):
        shifted = DIRECTION.clone()
        shifted[4] += sign * step
        with wb.intervene(llama, wb.Set("resid_mid.1", shifted, at=3), *more):
            slopes.append(logits(llama)[..., 7].double().sum())
    assert value.grad is not None
    assert float(value.grad[4]) == pytest.approx(float((slopes[0] - slopes[1]) / (2 * step)), rel=2e-2, abs=1e-3)


def test_added_zeros_have_the_gradient_of_the_tensor(llama):
    zeros, tensors, _ = torch.zeros(18, 32, requires_grad=True), [], llama.sites

    def keep(_module, _args, output):
        output.retain_grad()
        tensors.append(output)

    handle = llama.module.model.layers[1].register_forward_hook(keep)
    with wb.intervene(llama, RowFunction("resid_post.1", lambda rows, _chosen: rows + zeros, "zeros")):
        llama.module(input_ids=IDS).logits[..., 7].sum().backward()
    handle.remove()
    assert zeros.grad is not None
    torch.testing.assert_close(zeros.grad.reshape(2, 9, 32), tensors[0].grad, atol=1e-6, rtol=1e-6)


def test_embeddings_of_other_tokens_are_those_tokens(llama):
    changed_ids = IDS.clone()
    changed_ids[:, 4] = 17
    expected = llama.module(input_ids=changed_ids).logits
    with wb.intervene(llama, wb.EmbedTokens(4, 17)) as run:
        assert torch.equal(logits(llama), expected)
    assert run.table()["rows"][0] == 2
    changed_ids[:, 6] = 21
    expected = llama.module(input_ids=changed_ids).logits
    with wb.intervene(llama, wb.EmbedTokens([4, 6], [17, 21])):
        assert torch.equal(logits(llama), expected)
    vectors = llama.module.get_input_embeddings().weight[changed_ids[0]].detach()
    with wb.intervene(llama, wb.EmbedTokens([4, 6], vectors=vectors)):
        assert torch.equal(logits(llama)[:1], expected[:1])
    text = refused(DataError, lambda: changed(llama, wb.EmbedTokens(40, 17)))
    assert text == "embed tokens 17: no sequence had a token at position 40; name another"
