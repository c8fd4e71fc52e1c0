"""Exact ablation beside direct logit attribution, and directions as targets: plain Hugging Face, token differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lens_example import TEXTS, record, sequences_of
from refusals import refused

import workbench as wb
from workbench.io.errors import RequestError
from workbench.model.load import Model
from workbench.model.unembed import load_unembed
from workbench.probes import DirectLogitAttribution

PAIR = {"token": " Monday", "against": " Tuesday"}
SITES = ("resid_pre.0", "resid_post", "attn_out", "mlp_out", "z", "mlp_post")


@pytest.fixture(scope="module")
def model(tiny_models, tiny_tokenizer):
    return Model(tiny_models["llama"], tiny_tokenizer, "tiny")


@pytest.fixture(scope="module")
def store(model, tmp_path_factory):
    return record(model, TEXTS, tmp_path_factory.mktemp("a") / "s", SITES, context=12, bos="always")


def plain(module, ids, pair, path=None, change=None):
    """Logit difference after the last token, with the output (or the input of o_proj) of a module changed there."""
    part = module.get_submodule(path) if path else None

    def before(_module, args):
        new = args[0].clone()
        new[:, -1] = change(new[:, -1])
        return (new, *args[1:])

    def after(_module, _args, output):
        new = (output[0] if isinstance(output, tuple) else output).clone()
        new[:, -1] = change(new[:, -1])
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = None
    if part is not None:
        inside = path.endswith("o_proj")
        handle = part.register_forward_pre_hook(before) if inside else part.register_forward_hook(after)
    try:
        with torch.no_grad():
            logits = module(torch.tensor([ids])).logits[0, -1].double()
    finally:
        if handle is not None:
            handle.remove()
    return float(logits[pair[0]] - logits[pair[1]])


@pytest.mark.parametrize("replacement", ["zero", "mean"])
def test_ablation_is_the_plain_models_loss_at_the_token_alone(replacement, model, store, tiny_tokenizer):
    pair = [tiny_tokenizer.encode(text, add_special_tokens=False)[0] for text in PAIR.values()]
    probe = DirectLogitAttribution(parts="heads", ablation=replacement, ablated_tokens=4, resamples=20, **PAIR)
    result = probe.run(store, model=model)
    data, module = result.data, model.module
    positions, texts = store.tokens["position"].to_numpy(), sequences_of(store)
    sequence = store.tokens["sequence"].to_numpy()

    def mean(site):
        return store[site][:].double().mean(0).float() if replacement == "mean" else torch.zeros(())

    def head(rows):
        new = rows.clone()
        new[:, 16:24] = mean("z.1")[2] if replacement == "mean" else 0
        return new

    cases = {
        "mlp_out.1": ("model.layers.1.mlp", lambda rows: mean("mlp_out.1").expand_as(rows)),
        "L1H2": ("model.layers.1.self_attn.o_proj", head),
    }
    for line, row in enumerate(data["ablated_token"].to_numpy()):
        ids = list(texts[sequence[row]])[: positions[row] + 1]
        for term, case in cases.items():
            expected = plain(module, ids, pair) - plain(module, ids, pair, *case)
            measured = float(data["ablated_by_token"].sel(term=term)[line])
            assert measured == pytest.approx(expected, abs=2e-5), (row, term)
    np.testing.assert_allclose(data["ablated"], data["ablated_by_token"].mean("ablated_token"), atol=1e-12)
    assert bool(np.isnan(data["ablated"].sel(term="bias of the final norm")))
    assert f"set to {'its mean' if replacement == 'mean' else '0'} it loses" in result.headline()
    assert "ablation" in result.figures()
    assert {"ablated", "direct"} <= set(result.table)


def test_what_the_last_mlp_adds_is_lost_up_to_the_norms_scale(model, store):
    """Behind the last MLP there is the final norm alone, so ablation and contribution differ by its scale."""
    result = DirectLogitAttribution(ablation="zero", ablated_tokens=50, resamples=10, **PAIR).run(store, model=model)
    data = result.data.sel(term="mlp_out.2")
    assert float(np.sign(data["ablated"])) == float(np.sign(data["direct"]))
    np.testing.assert_allclose(float(data["direct"]), float(data["contribution"]), atol=1e-9)  # of all tokens


def test_neurons_are_ablated_one_by_one(model, store):
    probe = DirectLogitAttribution(parts="neurons", neurons=2, ablation="zero", ablated_tokens=3, resamples=10, **PAIR)
    data = probe.run(store, model=model).data
    neurons = [term for term in data["term"].to_numpy() if term.startswith("L2N")]
    assert len(neurons) == 2
    assert not np.isnan(data["ablated"].sel(term=neurons)).any()
    assert bool(np.isnan(data["ablated"].sel(term="other neurons of mlp_out.2")))


def test_a_direction_that_is_a_difference_of_tokens_gives_the_logit_difference(model, store, tmp_path):
    unembed = load_unembed(store.path)
    a, b = (unembed.tokens.index(text) for text in PAIR.values())
    direction = wb.Direction("resid_post.2", unembed.weight[a] - unembed.weight[b], "Monday not Tuesday")
    by_token = DirectLogitAttribution(resamples=10, **PAIR).run(store)
    along = DirectLogitAttribution(resamples=10).read(store, direction)
    np.testing.assert_allclose(along.data["contribution"], by_token.data["contribution"], atol=1e-6)
    file = direction.save(tmp_path / "d.safetensors")
    saved = DirectLogitAttribution(resamples=10, direction=str(file)).run(store)
    np.testing.assert_array_equal(saved.data["contribution"], along.data["contribution"])
    assert "Mean normed last stream along 'Monday not Tuesday'" in saved.headline()
    ablated = DirectLogitAttribution(ablation="zero", ablated_tokens=3, resamples=10)
    first, second = (
        ablated.read(store, direction, model=model),
        DirectLogitAttribution(ablation="zero", ablated_tokens=3, resamples=10, **PAIR).run(store, model=model),
    )
    np.testing.assert_allclose(first.data["ablated_by_token"], second.data["ablated_by_token"], atol=1e-6)
    random = along.data["control"].to_numpy()
    assert not np.allclose(random, along.data["contribution"], atol=1e-3)


def test_bad_settings_are_refused(model, store, tmp_path):
    for call, message in (
        (lambda: DirectLogitAttribution(ablation="remove"), "ablation must be one of zero, mean"),
        (lambda: DirectLogitAttribution(direction="d", token=" a"), "direction stands in place of tokens"),
        (lambda: DirectLogitAttribution(direction="gone").run(store), "no direction at gone"),
        (
            lambda: DirectLogitAttribution().read(store, wb.Direction("resid_post.2", torch.ones(7), "short")),
            "direction 'short' has the shape (7,), and the last residual stream (32,)",
        ),
    ):
        assert message in refused(RequestError, call)
    last_rows = record(model, TEXTS, tmp_path / "some", SITES, context=12, keep="last")
    call = lambda: DirectLogitAttribution(ablation="zero", **PAIR).run(last_rows, model=model)  # noqa: E731
    assert "ablation needs whole sequences" in refused(RequestError, call)
