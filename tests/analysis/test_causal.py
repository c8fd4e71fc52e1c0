"""Probes of next-token prediction refuse a model in which later tokens change earlier positions."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration
from warned import warned

import workbench as wb
from workbench.io.errors import RequestError
from workbench.probes import (
    ActivationPatching,
    AttentionSinks,
    DirectLogitAttribution,
    FutureLens,
    FuturePrompts,
    InductionHeads,
    JacobianLens,
    LogitLens,
    NextTokenLaw,
    OverSquashing,
    PathPatching,
    ResidualUncertainty,
    SuccessorHeads,
    TokenGeometry,
    TunedLens,
)
from workbench.store.manifest import read_manifest


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
        module = BertLMHeadModel(BertConfig(**sizes, intermediate_size=24, max_position_embeddings=16)).eval()
    out = tmp_path_factory.mktemp("encoder") / "s.acts"
    texts = [[3, 4, 5, 6], [7, 8, 9], [10, 11]]
    with warned("is not causal: later tokens change what it computes at earlier positions"):
        return wb.record(module, texts, sites=["resid_post", "pattern"], out=out, show_progress=False)


def test_the_manifest_says_that_the_model_is_not_causal(store):
    assert read_manifest(store.path).model.causal is False


CAUSAL = (
    *(
        ActivationPatching,
        AttentionSinks,
        DirectLogitAttribution,
        FutureLens,
        FuturePrompts,
        InductionHeads,
        JacobianLens,
    ),
    *(
        LogitLens,
        NextTokenLaw,
        OverSquashing,
        PathPatching,
        ResidualUncertainty,
        SuccessorHeads,
        TokenGeometry,
        TunedLens,
    ),
)


@pytest.mark.parametrize("probe", CAUSAL)
def test_a_causal_probe_refuses_it(store, probe):
    with pytest.raises(RequestError, match="needs a causal language model; in 'BertLMHeadModel'"):
        probe().run(store)


def test_an_encoder_decoder_is_refused_before_it_runs():
    config = T5Config(vocab_size=40, d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8)
    with pytest.raises(RequestError, match="T5ForConditionalGeneration is an encoder-decoder"):
        wb.load_model(T5ForConditionalGeneration(config))
