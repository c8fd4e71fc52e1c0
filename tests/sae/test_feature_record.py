"""Features ablated, clamped and added while a model runs, against plain hooks in float64 NumPy."""

import json

import numpy as np
import pytest
import torch
from refusals import refused
from sae_example import encode64, save_sae
from safetensors.numpy import load_file

from workbench.io.errors import RequestError
from workbench.model.intervene import intervene
from workbench.model.load import Model
from workbench.sae.feature_record import Feature
from workbench.sae.load import load_sae

IDS = torch.randint(2, 300, (2, 7), generator=torch.Generator().manual_seed(1))
SITE = "blocks.1.hook_resid_post"
KINDS = {
    "topk": ("topk", {"k": 8}),
    "unit decoder": ("topk", {"k": 8, "rescale_acts_by_decoder_norm": True}),
    "jumprelu": ("jumprelu", {}),
    "gated": ("gated", {}),
    "layer norm": ("standard", {"normalize_activations": "layer_norm"}),
    "pursuit": ("matching_pursuit", {}),
}


@pytest.fixture(scope="module")
def model(tiny_models, tiny_tokenizer):
    return Model(tiny_models["llama"], tiny_tokenizer, "llama")


def saved(folder, kind="topk", **settings):
    architecture, extra = KINDS[kind]
    return save_sae(folder, architecture, d_in=32, d_sae=40, **{"hook_name": SITE, **extra, **settings})


def hidden(model, change=None):
    """Rows at the site, and logits with these rows changed by a plain hook."""
    states = []

    def after(_module, _args, output):
        first = output if isinstance(output, torch.Tensor) else output[0]
        states.append(first.clone())
        new = first if change is None else torch.from_numpy(change(first.flatten(0, 1).double().numpy()))
        new = new.to(first.dtype).reshape(first.shape)
        return new if isinstance(output, torch.Tensor) else (new, *output[1:])

    handle = model.module.model.layers[1].register_forward_hook(after)
    try:
        with torch.no_grad():
            logits = model.module(input_ids=IDS).logits
    finally:
        handle.remove()
    return states[0].flatten(0, 1), logits


def in_numpy(folder, feature, op, value):
    """The change of rows in float64, from the SAE's files alone."""
    direction = load_file(folder / "sae_weights.safetensors")["W_dec"][feature].astype(np.float64)
    config = json.loads((folder / "cfg.json").read_text())
    if config.get("rescale_acts_by_decoder_norm"):
        direction = direction / np.linalg.norm(direction)

    def change(x):
        f = encode64(folder, x)[:, feature]
        target = {"ablate": 0 * f, "clamp": 0 * f + value, "add": f + value}[op]
        scale = x.std(1, ddof=1) if config["normalize_activations"] == "layer_norm" else 1
        return x + ((target - f) * scale)[:, None] * direction

    return change


@pytest.mark.parametrize("kind", KINDS)
def test_a_feature_is_changed_as_by_a_plain_hook(kind, model, tmp_path):
    folder = saved(tmp_path / "one", kind)
    sae = load_sae(folder, device="cpu")
    rows, plain = hidden(model)
    active = encode64(folder, rows.double().numpy())
    feature = int((active != 0).sum(0).argmax())
    for op, value in (("ablate", None), ("clamp", 3.0), ("add", -2.5)):
        with intervene(model, Feature(sae, feature, op, value)) as run, torch.no_grad():
            changed = model.module(input_ids=IDS).logits
        expected = hidden(model, in_numpy(folder, feature, op, value or 0.0))[1]
        torch.testing.assert_close(changed, expected, atol=2e-4, rtol=1e-4)
        assert not torch.allclose(changed, plain, atol=1e-3)
        line = run.table().iloc[0]
        where = int((active[:, feature] != 0).sum()) if op == "ablate" else 14
        assert (line["rows"], line["changed"]) == (14, where)


def test_what_changes_no_activation_changes_no_bit(model, tmp_path):
    folder = saved(tmp_path / "one")
    sae = load_sae(folder, device="cpu")
    rows, plain = hidden(model)
    activations = sae.encode(rows)
    dead = int((activations == 0).all(0).nonzero()[0])
    feature = int((activations != 0).sum(0).argmax())
    row = int(activations[:7, feature].argmax())
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, row] = True
    present = float(sae.encode(rows[row : row + 1])[0, feature])  # of one row, as products of more rows round otherwise
    clamped = Feature(sae, feature, "clamp", present, at=mask)
    for record in (Feature(sae, dead), Feature(sae, feature, "add", 0.0), clamped):
        with intervene(model, record) as run, torch.no_grad():
            assert torch.equal(model.module(input_ids=IDS).logits, plain)
        assert run.table()["changed"][0] == 0
        assert run.table()["rows"][0] > 0


def test_a_feature_of_heads(model, tmp_path):
    folder = saved(tmp_path / "one", hook_name="blocks.1.attn.hook_z", reshape_activations="hook_z")
    sae = load_sae(folder, device="cpu")
    direction = load_file(folder / "sae_weights.safetensors")["W_dec"][3]
    handle = model.module.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
        lambda _module, args: (args[0] + 2 * torch.from_numpy(direction),)
    )
    with torch.no_grad():
        expected = model.module(input_ids=IDS).logits
    handle.remove()
    with intervene(model, Feature(sae, 3, "add", 2.0)), torch.no_grad():
        torch.testing.assert_close(model.module(input_ids=IDS).logits, expected, atol=1e-5, rtol=1e-5)


def test_features_in_order_in_blocks_and_in_generation(model, tmp_path, monkeypatch):
    sae = load_sae(saved(tmp_path / "one", "jumprelu"), device="cpu")
    records = Feature(sae, 1, "clamp", 4.0), Feature(sae, 2), Feature(sae, 5, "add", 2.0, at="new")
    arguments = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 1}
    padded = torch.cat([torch.ones(2, 3, dtype=torch.long), IDS], dim=1)
    mask = torch.cat([torch.zeros(2, 3), torch.ones(2, 7)], dim=1).long()
    outputs = []
    for ids, options in (
        (IDS, {"attention_mask": torch.ones_like(IDS)}),
        (IDS, {"attention_mask": torch.ones_like(IDS), "use_cache": False}),
        (padded, {"attention_mask": mask}),
    ):
        with intervene(model, *records) as run, torch.no_grad():
            outputs.append(model.module.generate(ids, **arguments, **options)[:, ids.shape[1] :])
        assert run.table()["rows"].tolist() == [20, 20, 6]
        monkeypatch.setattr("workbench.sae.feature_record.block_rows", lambda _sae: 3)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_gradients_of_an_ablation_reach_what_the_feature_reads(model, tmp_path):
    """The logits' derivative along the embedding, against central differences: the activation depends on it, too."""
    sae = load_sae(saved(tmp_path / "one", "gated"), device="cpu")
    embeds = model.module.get_input_embeddings()(IDS[:1]).detach()
    along = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(2))
    rows, _ = hidden(model)
    feature = int((sae.encode(rows[:7]) != 0).sum(0).argmax())
    step = torch.tensor(0.0, requires_grad=True)
    value = torch.tensor(1.0, requires_grad=True)

    def total(size, target):
        with intervene(model, Feature(sae, feature, "clamp", target)):
            return model.module(inputs_embeds=embeds + size * along).logits.square().sum()

    total(step, value).backward()
    for leaf, ends in (
        (step, [total(torch.tensor(size), 1.0) for size in (3e-3, -3e-3)]),
        (value, [total(torch.tensor(0.0), 1 + size) for size in (3e-3, -3e-3)]),
    ):
        difference = float(ends[0].detach().double() - ends[1].detach().double()) / 6e-3
        assert float(leaf.grad) == pytest.approx(difference, rel=2e-2)


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({}, {"id": 40}, "id must be a whole number, from 0 to 39, not 40"),
        ({}, {"op": "clamp"}, "value: clamp needs one"),
        ({}, {"value": 1.0}, "value: ablate takes none"),
        ({}, {"op": "add", "value": float("nan")}, "value must be"),
        ({}, {"site": "resid_post.0"}, f"SAE 'one' was trained on {SITE}, but site is blocks.0.hook_resid_post; leave"),
        ({"hook_name": None}, {}, "site: the files of SAE 'one' do not record its site; give site="),
        ({"model_name": "gpt2"}, {}, "SAE 'one' was trained on the model gpt2, not on llama; if they are the"),
        ({"hook_name": "blocks.1.mlp.hook_post"}, {}, "SAE 'one' reads rows of width 32, but mlp_post.1 of model"),
        ({"kind": "temporal"}, {}, "SAE 'one' is temporal: its features depend on earlier tokens"),
        ({"kind": "transcoder"}, {}, "SAE 'one' is a transcoder: it reads one site, writes another"),
    ],
)
def test_a_feature_that_does_not_fit_is_refused(settings, arguments, message, model, tmp_path):
    settings = {"hook_name": SITE} | settings
    kind = settings.pop("kind", "topk")
    more = {"d_out": 32, "apply_b_dec_to_input": False} if kind == "transcoder" else {}
    sae = load_sae(save_sae(tmp_path / "one", kind, d_in=32, d_sae=40, **more, **settings), device="cpu")
    record = Feature(sae, **{"id": 3} | arguments)
    assert refused(RequestError, lambda: intervene(model, record)).startswith(message)


def test_another_site_is_possible_by_force(model, tmp_path):
    sae = load_sae(saved(tmp_path / "one", model_name="gpt2"), device="cpu")
    with intervene(model, Feature(sae, 3, "add", 1.0, site="resid_pre.1", force=True)) as run, torch.no_grad():
        model.module(input_ids=IDS)
    assert run.table()["site"].tolist() == ["resid_pre.1"]
