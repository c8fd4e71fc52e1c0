"""Hugging Face module names as sites: a module's output, where it gives one tensor with a row per token once."""

from __future__ import annotations

import copy
import fnmatch
import shutil

import pytest
import torch
from command_line import refused as refused_on_command_line
from refusals import refused
from torch import nn

import workbench as wb
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.sites.grammar import check_patterns

TEXTS = [[3, 9, 27, 81, 243], [4, 16, 64]]


def plain_outputs(module, paths):
    """Output rows of modules in one plain pass a text: the first tensor that a plain hook sees."""
    rows = {path: [] for path in paths}

    def keep(path, output):
        rows[path].append((output if isinstance(output, torch.Tensor) else output[0])[0].clone())

    hooks = [
        module.get_submodule(path).register_forward_hook(lambda _m, _a, output, path=path: keep(path, output))
        for path in paths
    ]
    try:
        with torch.inference_mode():
            for ids in TEXTS:
                module(input_ids=torch.tensor([ids]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {path: torch.cat(parts) for path, parts in rows.items()}


def test_every_module_that_is_offered_gives_what_a_plain_hook_sees(tiny_model, tmp_path):
    module = copy.deepcopy(tiny_model)
    model = Model(module, None, "m")
    names = {name for name, _ in module.named_modules() if name}
    paths = [path for path in (*model.site_map.modules, *model.site_map.synonyms) if path in names]
    assert len(paths) > 30
    store = wb.record(model, TEXTS, sites=paths, dtype="float32", out=tmp_path / "a.acts", show_progress=False)
    for path, expected in plain_outputs(module, paths).items():
        torch.testing.assert_close(store[path][:], expected, rtol=1e-5, atol=1e-5, msg=path)
    assert not len(store.verify())
    assert len({site.label for site in store.sites}) == len(store.sites) <= len(paths)


def test_a_site_has_its_module_and_lens_names_in_the_store(tiny_models, tmp_path):
    model = Model(tiny_models["llama"], None, "m")
    sites = ["model.layers.1", "model.layers.1.self_attn.q_proj", "blocks.2.mlp.out.hook_in"]
    store = wb.record(model, TEXTS, sites=sites, out=tmp_path / "a.acts", show_progress=False)
    assert [site.label for site in store.sites] == ["resid_post.1", "mlp_post.2", "model.layers.1.self_attn.q_proj"]
    assert torch.equal(store["model.layers.1"][:], store["resid_post", 1][:])
    assert torch.equal(store["blocks.2.mlp.out.hook_in"][:], store["mlp_post.2"][:])
    assert store["model.layers.1.self_attn.q_proj"].shape == (8, 32)  # flat, as the module gives it; q has heads
    grown = wb.record(model, None, sites=["model.layers.1.self_attn.k_proj"], out=store.path, show_progress=False)
    assert grown["model.layers.1.self_attn.k_proj"].axes == ("row", "d_k_proj")
    assert [site.label for site in grown.delete_sites("model.layers.1").sites] == [
        "mlp_post.2",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
    ]


def test_globs_match_lens_names_first_and_module_names_where_there_is_none(tiny_models):
    site_map = Model(tiny_models["llama"], None, "m").site_map
    chosen = site_map.select(["model.layers.*.mlp.act_fn"])
    assert [site.name for site in chosen] == [f"model.layers.{layer}.mlp.act_fn" for layer in range(3)]
    for pattern in ("*", "*hook*", "blocks.1.*"):
        names = {name for name in (*site_map.sites, *site_map.synonyms) if fnmatch.fnmatch(name, pattern)}
        expected = {site_map.synonyms.get(name, name) for name in names if "hook_" in name or name == "logits"}
        assert {site.name for site in site_map.select([pattern])} == expected


class Two(nn.Module):
    """Gives two tensors with a row per token, and no tensor where `pair` is False."""

    def __init__(self, layer, pair):
        super().__init__()
        self.layer, self.pair, self.inner = layer, pair, _Pair(pair)

    def forward(self, x):
        self.inner(x)
        return self.layer(x)


class _Pair(nn.Module):
    def __init__(self, pair):
        super().__init__()
        self.pair = pair

    def forward(self, x):
        return (x, 2 * x) if self.pair else "no tensor"


def test_a_module_without_one_row_a_token_is_refused_with_the_reason(tiny_models):
    module = copy.deepcopy(tiny_models["llama"])
    module.model.layers[0].mlp = Two(module.model.layers[0].mlp, pair=True)
    module.model.layers[1].mlp = Two(module.model.layers[1].mlp, pair=False)
    module.model.layers[2].mlp.up_proj = module.model.layers[2].mlp.gate_proj
    module.model.unused = nn.Linear(2, 2)
    select = Model(module, None, "m").site_map.select
    reasons = {
        "model.layers.0.mlp.inner": "it gives 2 tensors with a row per token",
        "model.layers.1.mlp.inner": "no tensor of floating-point numbers passes there",
        "model.layers.2.mlp.gate_proj": "it runs 2 times in a forward pass",
        "model.rotary_emb": "has no batch and position axes",
        "model.unused": "its module does not run",
    }
    for path, reason in reasons.items():
        assert reason in refused(RequestError, lambda path=path: select([path]))
    assert "nearest: model.layers.1.mlp" in refused(RequestError, lambda: select(["model.layers.1.mpl"]))


def test_a_module_is_changed_by_its_name(tiny_models):
    module = copy.deepcopy(tiny_models["llama"])
    model, ids = Model(module, None, "m"), torch.tensor([TEXTS[0]])
    with wb.intervene(model, wb.Zero("model.layers.1.mlp.down_proj", at="all")), torch.inference_mode():
        changed = module(ids).logits
    module.model.layers[1].mlp.down_proj.weight.data.zero_()
    with torch.inference_mode():
        assert torch.equal(changed, module(ids).logits)


def test_a_module_that_the_model_lacks_is_refused_before_weights_are_read(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])  # whoever reads them fails otherwise
    for name in ("model.layers.3.mlp.down_proj", "model.layers.1.mlp.down_porj", "nosite"):
        text = refused_on_command_line("record", folder, "a text", "--sites", name, "--out", tmp_path / "o")
        assert text.startswith(f"site '{name}' is unknown; nearest: ")
    text = refused_on_command_line("record", folder, "a text", "--sites", "model.norm", "--out", tmp_path / "o")
    assert "cannot be loaded" in text


def test_names_of_modules_pass_where_the_model_is_not_there_yet():
    check_patterns(["model.layers.3.mlp", "transformer.h.0", "blocks.0.hook_out"], None)
    for name in ("resid_pst", "resid_pst.0", ""):
        with pytest.raises(RequestError, match="is unknown"):
            check_patterns([name], None)
    check_patterns(["lm_head", "h.0", "resid_pst"], None, lambda: {"lm_head", "h.0", "resid_pst"})
