"""Tests of sites: every form of the grammar, every error message, and the maps of models."""

import copy
import functools
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from workbench.experiments.architectures.tiny import tiny_model as tiny_of_type
from workbench.io.errors import RequestError
from workbench.model import trial as sitemap
from workbench.model.discovery import find_sites
from workbench.sites.grammar import SHORT_NAMES, Site, SiteMap, Tap, full_name, short_name

LAYERS = 12


def _site(name):
    return Site(name, ("d_model",), (8,), Tap(name, "out"))


def _handmade() -> SiteMap:
    """Twelve layers of v and resid_post between embed and final norm, with one synonym and one reason."""
    blocks = [f"blocks.{layer}.{part}" for layer in range(LAYERS) for part in ("attn.hook_v", "hook_resid_post")]
    names = ["hook_embed", *blocks, "ln_final.hook_out", "logits"]
    return SiteMap(
        sites={name: _site(name) for name in names},
        synonyms={f"blocks.{layer}.hook_out": f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)},
        missing={f"blocks.{layer}.attn.hook_q": "queries are fused" for layer in range(LAYERS)},
        blocks="model.layers",
        n_layers=LAYERS,
        adapter="MadeUpAdapter",
    )


HANDMADE = _handmade()


def selected(*patterns, sites=HANDMADE):
    return [site.name for site in sites.select(patterns)]


def resid_post(*layers):
    return [f"blocks.{layer}.hook_resid_post" for layer in layers]


# ---- the grammar ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("resid_post", resid_post(*range(12))),
        ("resid_post.3", resid_post(3)),
        ("resid_post.0", resid_post(0)),
        ("resid_post.0:8:2", resid_post(0, 2, 4, 6)),
        ("resid_post.10:", resid_post(10, 11)),
        ("resid_post.:2", resid_post(0, 1)),
        ("resid_post.-2:", resid_post(10, 11)),
        ("resid_post.10:99", resid_post(10, 11)),
        ("resid_post.::-6", resid_post(5, 11)),
        ("blocks.3.hook_resid_post", resid_post(3)),
        ("blocks.*.attn.hook_v", [f"blocks.{layer}.attn.hook_v" for layer in range(12)]),
        ("blocks.?.hook_resid_post", resid_post(*range(10))),
        ("blocks.[02].hook_resid_post", resid_post(0, 2)),
        ("blocks.1*.hook_resid*", resid_post(1, 10, 11)),
        ("embed", ["hook_embed"]),
        ("final_norm", ["ln_final.hook_out"]),
        ("ln_final.hook_out", ["ln_final.hook_out"]),
        ("logits", ["logits"]),
    ],
)
def test_a_pattern_names(pattern, names):
    assert selected(pattern) == names


ends = st.none() | st.integers(-15, 15)


@given(ends, ends, ends.filter(lambda step: step != 0))
def test_a_slice_of_layers_is_pythons(start, stop, step):
    text = ":".join("" if end is None else str(end) for end in (start, stop, step))
    layers = list(range(LAYERS))[start:stop:step]
    if layers:
        assert selected(f"resid_post.{text}") == resid_post(*sorted(layers))
    else:
        with pytest.raises(RequestError, match="no such layer"):
            selected(f"resid_post.{text}")


def test_sites_come_once_and_in_the_order_of_the_model_whatever_the_request():
    request = ("logits", "resid_post.5", "blocks.5.hook_*", "v.5", "blocks.5.hook_out", "embed", "resid_post.1")
    assert selected(*request) == [
        "hook_embed",
        "blocks.1.hook_resid_post",
        "blocks.5.attn.hook_v",
        "blocks.5.hook_resid_post",
        "logits",
    ]


def test_a_synonym_is_the_site():
    assert selected("blocks.4.hook_out") == resid_post(4)
    assert selected("blocks.*.hook_out") == resid_post(*range(12))


# ---- refusals -------------------------------------------------------------------------------------------

OFFERED = "embed, v, resid_post, final_norm, logits"


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("resid_post.12", "site 'resid_post.12': no such layer; the model has layers 0 to 11"),
        ("resid_post.-13", "site 'resid_post.-13': no such layer; the model has layers 0 to 11"),
        ("resid_post.5:5", "site 'resid_post.5:5': no such layer; the model has layers 0 to 11"),
        ("resid_post.", "site 'resid_post.': no such layer; the model has layers 0 to 11"),
        ("resid_post.0:8:0", "site 'resid_post.0:8:0': the step of a slice of layers cannot be 0"),
        ("embed.3", "site 'embed.3': embed is outside of the blocks and has no layer; write 'embed'"),
        ("logits.0", "site 'logits.0': logits is outside of the blocks and has no layer; write 'logits'"),
        ("resid_pst", "site 'resid_pst' is unknown; nearest: resid_post, resid_pre, resid_mid"),
        (
            "blocks.3.hook_resid_pots",
            "site 'blocks.3.hook_resid_pots' is unknown; nearest: blocks.3.hook_resid_post, "
            "blocks.9.hook_resid_post, blocks.8.hook_resid_post",
        ),
        (
            "~~~",
            "site '~~~' is unknown; short names: " + ", ".join(SHORT_NAMES),
        ),
        ("v.5.", "site 'v.5.' is unknown; nearest: v"),
        ("z", f"site 'z' does not exist in the MadeUpAdapter of TransformerLens; this model has {OFFERED}"),
        ("z.3", f"site 'z.3' does not exist in the MadeUpAdapter of TransformerLens; this model has {OFFERED}"),
        ("q", f"site 'q' cannot be recorded here: queries are fused; this model has {OFFERED}"),
        ("q.4", f"site 'q.4' cannot be recorded here: queries are fused; this model has {OFFERED}"),
        (
            "blocks.4.attn.hook_q",
            f"site 'blocks.4.attn.hook_q' cannot be recorded here: queries are fused; this model has {OFFERED}",
        ),
    ],
)
def test_a_refusal_says_what_to_write_instead(pattern, text):
    with pytest.raises(RequestError) as refusal:
        selected("resid_post", pattern)
    assert str(refusal.value) == text


def test_a_glob_that_matches_nothing_is_refused():
    with pytest.raises(RequestError, match=r"site 'blocks\.\*\.attn\.hook_w' is unknown; nearest: blocks\.\d+\.attn"):
        selected("blocks.*.attn.hook_w")


def test_a_model_found_by_structure_says_so():
    with pytest.raises(RequestError) as refusal:
        selected("z", sites=replace(HANDMADE, adapter=None))
    assert str(refusal.value) == (
        f"site 'z' does not exist in a model without TransformerLens adapter; this model has {OFFERED}"
    )


# ---- names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHORT_NAMES)
def test_short_and_full_names_are_each_others_inverse(kind):
    short = f"{kind}.7" if "{layer}" in SHORT_NAMES[kind] else kind
    assert short_name(full_name(short)) == short
    assert full_name(full_name(short)) == full_name(short)


def test_names_without_another_form_stay():
    assert short_name("blocks.3.attn.q_norm.hook_out") is None
    assert full_name("blocks.3.attn.q_norm.hook_out") == "blocks.3.attn.q_norm.hook_out"
    assert full_name("resid_post") == "resid_post"  # which layer?
    assert full_name("resid_post.3") == "blocks.3.hook_resid_post"
    assert full_name("pos_embed") == "hook_pos_embed"


def test_a_site_knows_its_layer():
    assert _site("blocks.11.hook_resid_post").layer == 11
    assert _site("hook_embed").layer is None
    assert _site("blocks.11.hook_resid_post").short == "resid_post.11"


@functools.cache
def map_of(model_type):
    return find_sites(tiny_of_type(model_type))


# ---- maps of models -------------------------------------------------------------------------------------

COMMON = ["embed", "resid_pre", "ln1", "v", "pattern", "z", "attn_out", "ln2", "mlp_pre", "mlp_post", "mlp_out"]
COMMON += ["resid_post", "final_norm", "logits"]
OWN = {
    "gpt2": ["q", "k", "resid_mid"],
    "llama": ["q", "k", "rot_q", "rot_k", "resid_mid", "mlp_pre_linear"],
    "gpt_neox": ["rot_q", "rot_k"],
    "gemma2": ["q", "k", "rot_q", "rot_k", "resid_mid", "mlp_pre_linear"],
}
"""gpt_neox fuses q, k and v, and attends beside the MLP: no q, no k, no resid_mid."""


@pytest.fixture(scope="module")
def maps(tiny_models):
    return {family: find_sites(module) for family, module in tiny_models.items()}


@pytest.mark.parametrize("family", OWN)
def test_each_family_has_its_sites(maps, family):
    offered = {site.short.split(".")[0] for site in maps[family].sites.values() if site.short}
    assert offered == {*COMMON, *OWN[family]}


@pytest.mark.parametrize("family", OWN)
def test_shapes_are_those_of_the_config(maps, tiny_models, family):
    config = tiny_models[family].config
    heads, width = config.num_attention_heads, getattr(config, "head_dim", None) or 8
    kv_heads = getattr(config, "num_key_value_heads", heads)
    d_mlp = 4 * 32 if family == "gpt2" else config.intermediate_size
    expected = {
        "resid_post": (("d_model",), (32,)),
        "embed": (("d_model",), (32,)),
        "attn_out": (("d_model",), (32,)),
        "final_norm": (("d_model",), (32,)),
        "v": (("head", "d_head"), (kv_heads, width)),
        "k": (("head", "d_head"), (kv_heads, width)),
        "q": (("head", "d_head"), (heads, width)),
        "rot_q": (("head", "d_head"), (heads, width)),
        "rot_k": (("head", "d_head"), (kv_heads, width)),
        "z": (("head", "d_head"), (heads, width)),
        "pattern": (("head", "key"), (heads, None)),
        "mlp_pre": (("d_mlp",), (d_mlp,)),
        "mlp_post": (("d_mlp",), (d_mlp,)),
        "mlp_pre_linear": (("d_mlp",), (d_mlp,)),
        "logits": (("vocab",), (320,)),
    }
    for site in maps[family].sites.values():
        kind = site.short and site.short.split(".")[0]
        if kind in expected:
            assert (site.axes, site.shape) == expected[kind], site.name


def test_grouped_query_heads_keep_their_own_count(maps):
    counts = {kind: maps["llama"].select([f"{kind}.1"])[0].shape[0] for kind in ("q", "k", "v", "z", "pattern")}
    assert counts == {"q": 4, "k": 2, "v": 2, "z": 4, "pattern": 4}


def test_the_order_is_that_of_the_forward_pass(maps):
    order = ["resid_pre", "ln1", "q", "k", "v", "rot_q", "rot_k", "pattern", "z", "attn_out", "resid_mid", "ln2"]
    order += ["mlp_pre", "mlp_pre_linear", "mlp_post", "mlp_out", "resid_post"]
    expected = ["embed", *(f"{kind}.{layer}" for layer in range(3) for kind in order), "final_norm", "logits"]
    assert [site.short for site in maps["llama"].sites.values() if site.short] == expected


def test_transformer_lens_names_lead_to_the_same_site(maps):
    for name, short in {
        "blocks.1.hook_in": "resid_pre.1",
        "blocks.1.hook_out": "resid_post.1",
        "blocks.1.attn.o.hook_in": "z.1",
        "blocks.1.attn.k.hook_out": "k.1",
        "blocks.1.mlp.out.hook_in": "mlp_post.1",
        "embed.hook_out": "embed",
    }.items():
        assert selected(name, sites=maps["llama"]) == [full_name(short)]


def test_the_blocks_are_where_the_model_keeps_them(maps, tiny_models):
    blocks = {family: (site_map.blocks, site_map.n_layers) for family, site_map in maps.items()}
    assert blocks == {
        "gpt2": ("transformer.h", 3),
        "llama": ("model.layers", 3),
        "gpt_neox": ("gpt_neox.layers", 3),
        "gemma2": ("model.layers", 3),
    }
    assert maps["llama"].last_block == "model.layers.2"
    assert maps["llama"].adapter == "LlamaArchitectureAdapter"


@pytest.mark.parametrize(
    ("family", "site", "reason"),
    [
        ("gpt_neox", "q", "before rotation it exists only inside a fused projection; record rot_q and rot_k"),
        ("gpt2", "rot_q", "its queries and keys are not rotated, or not as a whole; record q and k"),
        ("gpt2", "pos_embed", "its tensor of shape (1, 7, 32) has no batch and position axes"),
        ("llama", "pos_embed", "this architecture has no such module"),
    ],
)
def test_what_is_missing_has_its_reason(maps, family, site, reason):
    with pytest.raises(RequestError) as refusal:
        selected(site, sites=maps[family])
    assert str(refusal.value).startswith(f"site {site!r} cannot be recorded here: {reason}; this model has embed, ")


def test_a_module_shared_by_two_blocks_is_no_site(tiny_models):
    shared = copy.deepcopy(tiny_models["gpt2"])
    shared.transformer.h[1].ln_1 = shared.transformer.h[0].ln_1
    site_map = find_sites(shared)
    assert site_map.missing["blocks.0.ln1.hook_out"] == "it runs 2 times in a forward pass"
    assert "blocks.1.ln1.hook_out" not in site_map.sites
    assert "blocks.2.ln1.hook_out" in site_map.sites


def test_a_module_that_does_not_run_is_no_site(tiny_models):
    idle = copy.deepcopy(tiny_models["gpt2"])
    idle.transformer.h[1].mlp.forward = torch.zeros_like
    site_map = find_sites(idle)
    assert site_map.missing["blocks.1.mlp.in.hook_out"] == "its module does not run"
    assert "blocks.1.hook_mlp_out" in site_map.sites


def test_a_module_that_runs_for_some_lengths_is_no_site(tiny_models):
    moody = copy.deepcopy(tiny_models["gpt2"])
    mlp = moody.transformer.h[1].mlp
    inner = mlp.forward
    mlp.forward = lambda x: inner(x) if x.shape[1] < 9 else torch.zeros_like(x)
    assert find_sites(moody).missing["blocks.1.mlp.in.hook_out"] == "whether it runs depends on the sequence"


def test_attention_that_is_no_softmax_has_no_pattern(tiny_models, monkeypatch):
    """A pattern recomputed from queries and keys would differ from the model's; z is still recorded."""

    def uniform(_module, query, _key, value, *_args, **_kwargs):
        means = value.cumsum(2) / torch.arange(1, value.shape[2] + 1)[:, None]
        return means.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "uniform", uniform)
    odd = copy.deepcopy(tiny_models["llama"])
    odd.config._attn_implementation = "uniform"
    site_map = find_sites(odd)
    reason = "attention differs from softmax(q k) v, so its pattern cannot be recomputed"
    assert {site_map.missing[f"blocks.{layer}.attn.hook_pattern"] for layer in range(3)} == {reason}
    assert {"blocks.1.attn.hook_z", "blocks.1.attn.hook_rot_q"} <= site_map.sites.keys()


def test_a_width_that_follows_the_length_is_no_site():
    """DeepSeek V4's indexer scores every second token."""
    site_map = map_of("deepseek_v4")
    depends = "its shape depends on the length of the sequence"
    names = [name for name, reason in site_map.missing.items() if reason == depends]
    assert names
    assert not {*names} & {*site_map.sites}


def test_a_dense_layer_among_mixtures_has_its_own_neurons():
    """In TransformerLens' names mlp_pre is what enters a mixture of experts; here it is the gate's output alone."""
    site_map = map_of("deepseek_v3")
    taps = [site_map.select([name])[0].tap for name in ("mlp_pre", "mlp_post", "blocks.1.mlp.hook_in")]
    parts = (("0.mlp.gate_proj", "out"), ("0.mlp.down_proj", "in"), ("1.mlp", "in"))
    assert taps == [Tap(f"model.layers.{path}", side) for path, side in parts]


def test_latent_attention_calls_what_it_attends_with_q_and_k():
    """It rotates a part of each; TransformerLens' rot_q is that part, q the whole."""
    site_map = map_of("deepseek_v3")
    (q,) = site_map.select(["q.1"])
    assert (q.tap.part, q.shape) == ("query", (4, 16))
    with pytest.raises(RequestError, match="not as a whole; record q and k"):
        site_map.select(["rot_q.1"])


def test_the_contribution_of_attention_is_the_tensor_that_is_added():
    """OLMo hybrid norms the output of its full attention before it adds it, and nothing after linear attention."""
    taps = {s.short: s.tap.path for s in map_of("olmo_hybrid").sites.values()}
    assert taps["attn_out.3"] == "model.layers.3.post_attention_layernorm"
    assert taps["attn_out.0"] == "model.layers.0.linear_attn"


def test_several_residual_streams_have_an_axis():
    (site,) = map_of("hy_v4").select(["resid_post.1"])
    assert (site.axes, site.shape) == (("stream", "d_model"), (4, 32))


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_finding_sites_leaves_the_model_alone(model_type):
    """TransformerLens would split the fused projections of Phi 3 to tell their names."""
    module = tiny_of_type(model_type).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    find_sites(module)
    assert torch.equal(torch.rand(3), expected), "the random state was used"
    assert all(part.training for part in module.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert before.keys() == module.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_the_hooks_of_a_module_run_in_one_order(monkeypatch):
    """Input, output, weights: sites seen in one call of a module keep this order, in every process."""
    parts = {}

    @contextmanager
    def noted(module, part, _receive):
        parts.setdefault(module, []).append(part)
        yield

    monkeypatch.setattr(sitemap, "hook_tensor", noted)
    monkeypatch.setattr(sitemap, "hook_output", lambda module, receive: noted(module, "out", receive))
    find_sites(tiny_of_type("codegen"))
    orders = {tuple(order[: len(order) // 2]) for order in parts.values()}  # each trial pass hooks them all
    assert orders == {("out",), ("in", "out"), ("in", "out", "returned_weights")}  # "out" alone: claimed by no name


# ---- by structure ---------------------------------------------------------------------------------------


def test_an_architecture_without_adapter_has_its_residual_stream():
    site_map = map_of("persimmon")
    assert site_map.adapter is None
    shorts = [site.short for site in site_map.sites.values()]
    # resid_post of one block is resid_pre of the next, but each is seen at its own module
    assert shorts == [*(f"{kind}.{layer}" for layer in range(4) for kind in ("resid_pre", "resid_post")), "logits"]
    with pytest.raises(RequestError) as refusal:
        site_map.select(["pattern"])
    assert str(refusal.value) == (
        "site 'pattern' does not exist in a model without TransformerLens adapter; "
        "this model has resid_pre, resid_post, logits"
    )


def test_a_model_whose_blocks_cannot_be_told_is_refused():
    with pytest.raises(RequestError) as refusal:
        map_of("xlm")
    assert str(refusal.value) == (
        "model XLMWithLMHeadModel: TransformerLens has no adapter for it and its blocks cannot be found by structure: "
        "lists of 4 modules found: transformer.attentions, transformer.layer_norm1, transformer.ffns, "
        "transformer.layer_norm2; it cannot be recorded"
    )


def test_a_model_that_cannot_run_says_why(tiny_models):
    broken = copy.deepcopy(tiny_models["llama"])

    def fail(*_args, **_kwargs):
        raise RuntimeError("no\n  luck")

    broken.model.norm.forward = fail
    with pytest.raises(RequestError) as refusal:
        find_sites(broken)
    assert str(refusal.value) == (
        "model LlamaForCausalLM: a trial pass over 2 x 7 tokens failed: RuntimeError: no luck"
    )
