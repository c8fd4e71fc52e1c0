"""Names of sites against the documented sums, computed here by hooks of plain torch, for blocks of many shapes."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    CohereConfig,
    CohereForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from workbench.io.errors import RequestError
from workbench.model.capture import capture
from workbench.model.discovery import find_sites

BODY = {"vocab_size": 60, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16, "intermediate_size": 24}
BODY |= {"max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
GROUPED = BODY | {"num_key_value_heads": 2}
OPT = {key: BODY[key] for key in ("vocab_size", "num_hidden_layers", "num_attention_heads", "hidden_size")}
OPT |= {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32, "pad_token_id": 1}
GPTJ = {"vocab_size": 60, "n_layer": 2, "n_head": 4, "n_embd": 16, "rotary_dim": 4, "n_positions": 32}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GROUPED, head_dim=4)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**GROUPED)),
    "opt pre-norm": lambda: OPTForCausalLM(OPTConfig(**OPT)),
    "opt post-norm": lambda: OPTForCausalLM(OPTConfig(**OPT, do_layer_norm_before=False)),
    "bert": lambda: BertLMHeadModel(BertConfig(**BODY, is_decoder=True)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**GROUPED, residual_multiplier=0.22)),
    "granite of 1": lambda: GraniteForCausalLM(GraniteConfig(**GROUPED)),
    "neox parallel": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**BODY)),
    "neox in sequence": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**BODY, use_parallel_residual=False)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**GPTJ)),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**BODY, new_decoder_architecture=True, num_kv_heads=2)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**BODY)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**GROUPED)),
}
SEQUENTIAL = {"llama", "gemma2", "olmo2", "opt pre-norm", "neox in sequence"}
POST_NORM = {"opt post-norm", "bert"}
IDS = torch.arange(2, 14).reshape(2, 6)


@functools.cache
def built(name):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = MODELS[name]().eval()
        for weight in module.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return module, find_sites(module)


def recorded(module, sites, kinds, layer=1):
    """Sites of one layer by kind; those that are not offered are left out."""
    offered = {site.kind for site in sites.sites.values() if site.layer == layer}
    chosen = sites.select([f"{kind}.{layer}" for kind in kinds if kind in offered])
    by_site = {}

    def receive(site, tensor, _first):
        by_site[site.kind] = tensor.clone()  # Falcon adds in place

    capture(module, chosen, IDS, torch.ones_like(IDS), receive)
    return {kind: tensor.clone() for kind, tensor in by_site.items()}  # no inference tensors


STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "ln1", "ln2")


@pytest.mark.parametrize("name", MODELS)
def test_the_stream_adds_up(name):
    by_site = recorded(*built(name), STREAM)
    pre, post = by_site["resid_pre"], by_site["resid_post"]
    if name in POST_NORM:
        assert {"attn_out", "mlp_out", "resid_mid"} <= by_site.keys()
    elif name == "granite":
        assert not {"attn_out", "mlp_out"} & by_site.keys()
    elif name in SEQUENTIAL:
        torch.testing.assert_close(pre + by_site["attn_out"], by_site["resid_mid"])
        torch.testing.assert_close(by_site["resid_mid"] + by_site["mlp_out"], post)
    elif name != "granite of 1":
        assert "resid_mid" not in by_site
        torch.testing.assert_close(pre + by_site["attn_out"] + by_site["mlp_out"], post)


@pytest.mark.parametrize(
    ("name", "mlp", "norms"),
    [
        ("opt post-norm", "model.decoder.layers.1.fc1", ("self_attn_layer_norm", "final_layer_norm")),
        ("bert", "bert.encoder.layer.1.intermediate.dense", ("attention.output.LayerNorm", "output.LayerNorm")),
    ],
)
def test_in_a_post_norm_block_resid_mid_is_what_the_mlp_reads(name, mlp, norms):
    module, sites = built(name)
    read = []
    handle = module.get_submodule(mlp).register_forward_pre_hook(lambda _module, args: read.append(args[0]))
    module(IDS)
    handle.remove()
    by_site = recorded(module, sites, STREAM)
    torch.testing.assert_close(by_site["resid_mid"], read[0].reshape(by_site["resid_mid"].shape))
    block = module.get_submodule(sites.last_block)
    first, second = (block.get_submodule(path) for path in norms)
    torch.testing.assert_close(first(by_site["resid_pre"] + by_site["attn_out"]), by_site["resid_mid"])
    torch.testing.assert_close(second(by_site["resid_mid"] + by_site["mlp_out"]), by_site["resid_post"])
    for norm, instead in (("ln1", "resid_mid"), ("ln2", "resid_post")):
        with pytest.raises(RequestError, match=f"post-norm block .* writes the stream itself; record {instead}"):
            sites.select([norm])


@pytest.mark.parametrize(("name", "kind"), [("granite", "attn_out"), ("granite", "mlp_out")])
def test_a_residual_multiplier_is_the_reason(name, kind):
    _, sites = built(name)
    with pytest.raises(RequestError, match=r"multiplies the output of .* by 0\.22 before it adds it; record "):
        sites.select([kind])
    assert sites.select(["resid_mid", "blocks.*.attn.hook_out", "blocks.*.mlp.hook_out"])


def test_the_multiplier_is_kept_for_what_reads_heads_and_neurons():
    _, sites = built("granite")
    names = [f"blocks.{layer}.hook_{part}" for layer in range(2) for part in ("attn_out", "mlp_out")]
    assert dict(sites.factors) == pytest.approx(dict.fromkeys(names, 0.22))
    for name in ("llama", "granite of 1", "gemma2"):
        assert not built(name)[1].factors


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt pre-norm", "neox parallel", "falcon", "cohere"])
def test_the_norms_before_the_sublayers_read_the_stream(name):
    module, sites = built(name)
    offered = {site.kind for site in sites.sites.values()}
    assert "ln1" in offered
    tap = sites.select(["ln1.1"])[0].tap
    by_site = recorded(module, sites, ("resid_pre", "ln1"))
    torch.testing.assert_close(module.get_submodule(tap.path)(by_site["resid_pre"]), by_site["ln1"])


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
LATENT |= {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
MIXTURES = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**GROUPED, num_local_experts=4)),
    "qwen2 moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**GROUPED, **EXPERTS, shared_expert_intermediate_size=8, decoder_sparse_step=1)
    ),
    "qwen3 moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**GROUPED, **EXPERTS, head_dim=4)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2)),
    "granite moe": lambda: GraniteMoeForCausalLM(
        GraniteMoeConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2, residual_multiplier=0.22)
    ),
    "deepseek v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(**BODY, **LATENT, num_experts_per_tok=2, moe_intermediate_size=8)
    ),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_experts_has_an_output_and_no_neurons(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = MIXTURES[name]().eval()
    sites = find_sites(module)
    for kind, end in (("mlp_pre", "in"), ("mlp_post", "out")):
        with pytest.raises(RequestError, match=rf"as in a mixture of experts, .*; record blocks\.1\.mlp\.hook_{end}"):
            sites.select([f"{kind}.1"])
        assert sites.select([f"blocks.1.mlp.hook_{end}"])
    dense = {site.short for site in sites.sites.values() if site.kind == "mlp_post"}
    assert dense == ({"mlp_post.0"} if name == "deepseek v3" else set())
    mixture_values, block = {}, module.get_submodule(sites.last_block)
    mixture = next(part for path, part in block.named_children() if path in ("mlp", "block_sparse_moe"))
    handle = mixture.register_forward_hook(
        lambda _module, args, out: mixture_values.update(read=args[0], wrote=out[0] if isinstance(out, tuple) else out)
    )
    module(IDS)
    handle.remove()
    chosen, tensors = sites.select(["blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out"]), []
    capture(module, chosen, IDS, torch.ones_like(IDS), lambda _site, tensor, _first: tensors.append(tensor.clone()))
    for tensor, expected in zip(tensors, (mixture_values["read"], mixture_values["wrote"]), strict=True):
        torch.testing.assert_close(tensor.reshape(-1, 16), expected.reshape(-1, 16), rtol=0, atol=0)


def test_names_keep_their_meaning_in_half_precision():
    for dtype in (torch.bfloat16, torch.float16):
        for name in ("llama", "opt post-norm", "granite", "bert"):
            _, sites = built(name)
            half = find_sites(MODELS[name]().to(dtype).eval())
            kinds = [
                {site.short for site in site_map.sites.values() if site.kind in STREAM} for site_map in (half, sites)
            ]
            assert kinds[0] - kinds[1] <= {"attn_out.0", "attn_out.1", "mlp_out.0", "mlp_out.1"}, (name, dtype)
            assert kinds[1] <= kinds[0]


# ---- causality and heads --------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "config"), [(BertLMHeadModel, BertConfig), (RobertaForCausalLM, RobertaConfig)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_is_causal_and_an_encoder_is_not(kind, config, dtype):
    assert find_sites(kind(config(**BODY, is_decoder=True)).to(dtype)).causal
    encoder = find_sites(kind(config(**BODY)).to(dtype))
    assert not encoder.causal
    assert "blocks.0.attn.hook_attn_received" not in encoder.recordable


def test_attention_received_is_refused_where_tokens_look_ahead():
    encoder = find_sites(BertLMHeadModel(BertConfig(**BODY)))
    with pytest.raises(RequestError, match="a mean over the queries at and after a token, and in this model earlier"):
        encoder.select(["attn_received"])
    assert encoder.select(["attn_entropy", "pattern"])


def test_a_model_without_head_has_all_sites_but_logits():
    with_head, without = (
        find_sites(LlamaForCausalLM(LlamaConfig(**GROUPED))),
        find_sites(LlamaModel(LlamaConfig(**GROUPED))),
    )
    kinds = [{site.short for site in sites.sites.values() if site.short} for sites in (with_head, without)]
    assert kinds[0] - kinds[1] == {"logits"}
    assert (without.blocks, without.adapter) == ("layers", "LlamaArchitectureAdapter")
    with pytest.raises(RequestError, match="no language-model head; AutoModelForCausalLM in place of AutoModel"):
        without.select(["logits"])
    assert find_sites(BertModel(BertConfig(**BODY))).adapter == "BertArchitectureAdapter"
