"""Blocks skipped and exchanged, against models without the block or with exchanged weights."""

import pytest
import torch
from change_oracles import TYPES, generated, logits, weights_exchanged, without_block
from refusals import refused
from warned import warned

import workbench as wb
from workbench.io.errors import DataError, RequestError
from workbench.model.load import Model, load_model

IDS = torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(5))
ALL_TYPES = [*TYPES, "mamba", "mpt"]


@pytest.fixture(scope="module", params=["gpt2", "llama", "gpt_neox", "gemma2"])
def model(request, tiny_models, tiny_tokenizer):
    return Model(tiny_models[request.param], tiny_tokenizer, request.param)


@pytest.fixture(scope="module")
def llama(tiny_models, tiny_tokenizer):
    return Model(tiny_models["llama"], tiny_tokenizer, "llama")


def assert_same_logits(model, record, expected):
    """The same logits bit by bit in a pass and in generation, and others than the plain model's."""
    plain = logits(model.module, IDS)
    with wb.intervene(model, record) as run:
        changed, cached = logits(model.module, IDS), generated(model.module, IDS)
        uncached = generated(model.module, IDS, use_cache=False)
    assert torch.equal(changed, logits(expected, IDS))
    assert torch.equal(cached, generated(expected, IDS))
    assert (cached - uncached).abs().max() < 1e-5 * cached.abs().max()
    assert (changed - plain).abs().max() > 1e-3
    assert torch.equal(logits(model.module, IDS), plain)
    assert run.counts[0].rows == 18 + 2 * (2 * 9 + 2 * 3)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_skipped_block_passes_its_input_on(model, layer):
    assert_same_logits(model, wb.SkipBlock(layer), without_block(model.module, model.site_map.blocks, layer))


def test_exchanged_blocks_are_exchanged_weights(model):
    assert_same_logits(model, wb.SwapBlocks(0, 2), weights_exchanged(model.module, model.site_map.blocks, 0, 2))


@pytest.mark.torture
@pytest.mark.parametrize("kind", ALL_TYPES)
def test_blocks_of_any_architecture_are_skipped_and_exchanged(kind):
    from workbench.experiments.architectures.tiny import tiny_model

    model = load_model(tiny_model(kind))
    assert_same_logits(model, wb.SkipBlock(1), without_block(model.module, model.site_map.blocks, 1))
    assert_same_logits(model, wb.SwapBlocks(0, 2), weights_exchanged(model.module, model.site_map.blocks, 0, 2))


def test_the_table_does_not_call_exchanged_blocks_unchanged(llama):
    with wb.intervene(llama, wb.SwapBlocks(0, 2)) as run:
        logits(llama.module, IDS)
    assert run.table()[["changed", "relative_change"]].isna().all(axis=None)


def test_after_an_exchange_layers_are_places(llama):
    value = torch.randn(32)
    with wb.intervene(llama, wb.Set("resid_post.0", value, at="all"), wb.SwapBlocks(0, 1)):
        changed = logits(llama.module, IDS)
    twin = Model(weights_exchanged(llama.module, "model.layers", 0, 1), None, "twin")
    with wb.intervene(twin, wb.Set("resid_post.0", value, at="all")):
        assert torch.equal(logits(twin.module, IDS), changed)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_places_and_hooks_are_restored_after_an_exception(llama, error):
    blocks, plain = list(llama.module.model.layers), logits(llama.module, IDS)

    def fail():
        with wb.intervene(llama, wb.SwapBlocks(0, 2), wb.SkipBlock(1)):
            assert list(llama.module.model.layers) == blocks[::-1]
            text = refused(RequestError, llama.module.state_dict)
            assert "weights are not saved while blocks have changed places" in text
            raise error

    with pytest.raises(error):
        fail()
    assert list(llama.module.model.layers) == blocks
    assert [block.self_attn.layer_idx for block in blocks] == [0, 1, 2]
    assert torch.equal(logits(llama.module, IDS), plain)
    assert "lm_head.weight" in llama.module.state_dict()


def test_blocks_of_other_kinds_warn_or_are_refused(tiny_models, tiny_tokenizer):
    gemma = Model(tiny_models["gemma2"], tiny_tokenizer, "gemma2")
    with warned("block 0 is sliding_attention and block 1 full_attention"):
        wb.intervene(gemma, wb.SwapBlocks(0, 1))
    assert "name two blocks" in refused(RequestError, lambda: wb.intervene(gemma, wb.SwapBlocks(1, 1)))
    assert refused(RequestError, lambda: wb.intervene(gemma, wb.SkipBlock(7))).startswith(
        "layer must be a whole number"
    )
    assert "no forward pass reached it" in refused(DataError, lambda: wb.intervene(gemma, wb.SkipBlock(1)).check())
