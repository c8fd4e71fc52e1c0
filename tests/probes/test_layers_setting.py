"""The setting `layers` of probes: which have it, why others have not, and that it leaves the other numbers alone."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from refusals import refused

import workbench as wb
from workbench.io.errors import RequestError
from workbench.probes import (
    ActiveDormant,
    AttentionSinks,
    HiddenSinks,
    InductionHeads,
    MaskedSinks,
    SuccessorHeads,
    ValueAwareImportance,
    ZeroTuning,
)
from workbench.results.registry import find_probe, installed_probes

WITHOUT = {
    "attention-calibration": "its settings first and last name the layers",
    "function-vectors": "heads of all layers compete for the vector",
    "over-squashing": "a deviation at one layer is made by all layers before it",
}
"""Probes whose results have an axis `layer` and which have no setting `layers`, with the reason."""

SITES = ["attn_received", "attn_first", "attn_entropy", "pattern", "v", "z", "resid_post"]
QUICK = {"length": 24, "resamples": 20}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    model = wb.load_model("demo", device="cpu")
    ids = wb.random_repeats(model.tokenizer, sequences=4, period=(10, 14), filler=(1, 3))
    days = [f"Monday Tuesday Wednesday {n} one two three four Once upon a time there was a day" for n in range(4)]
    out = tmp_path_factory.mktemp("layers") / "a.acts"
    return model, wb.record(
        model, [*ids, *model.tokenizer(days)["input_ids"]], sites=SITES, out=out, show_progress=False
    )


def test_every_probe_with_results_by_layer_has_the_setting_or_a_reason():
    without = set()
    for name in installed_probes():
        probe = find_probe(name)
        by_layer = any("layer" in variable.dims for variable in probe.variables)
        if by_layer and "layers" not in {field.name for field in fields(probe)}:
            without.add(name)
    assert without == WITHOUT.keys()


@pytest.mark.parametrize(
    ("probe", "settings", "over_heads"),
    [
        (AttentionSinks, QUICK, {"sink", "sink_low", "sink_high", "sink_k"}),
        (ActiveDormant, QUICK | {"sink": 0}, set()),
        (HiddenSinks, QUICK | {"length": 20}, {"position_share", "heads_share"}),
        (ValueAwareImportance, QUICK | {"effect_sequences": 2}, set()),
        (InductionHeads, {"ablated": 0, "copying_tokens": 20, "resamples": 20}, set()),
        (SuccessorHeads, {"permutations": 20, "min_pairs": 2}, {"null_macro", "p_value", "p_family"}),
    ],
)
def test_one_layer_has_the_numbers_that_it_has_among_all(recorded, probe, settings, over_heads):
    """Every variable over (layer, head) or (layer); `over_heads` and what is not by layer are of the chosen heads."""
    model, store = recorded
    all_layers = probe(**settings).run(store, model=model).data
    subset = probe(**settings, layers=(-1, 1)).run(store, model=model).data
    last = model.site_map.n_layers - 1
    assert subset["layer"].to_numpy().tolist() == [1, last]
    compared = 0
    for name in map(str, subset.data_vars):
        if (
            "layer" in subset[name].dims
            and name not in over_heads
            and not name.startswith(("gap", "wins", "null", "p_"))
        ):
            np.testing.assert_allclose(
                subset[name], all_layers[name].sel(layer=[1, last]), rtol=1e-6, atol=1e-9, err_msg=name
            )
            compared += 1
    assert compared >= 2
    if "layers" in probe().__dict__ and probe in (AttentionSinks, HiddenSinks):
        assert f"heads of layers 1, {last} alone, of {last + 1} layers" in subset.attrs["note"]


def test_probes_that_change_the_model_change_these_layers_alone(recorded):
    model, store = recorded
    settings = {"row_limit": 40, "resamples": 20, "layers": (0,)}
    hidden = MaskedSinks(later=4, heads=1, draws=1, where=None, **settings).run(store, model=model).data
    assert hidden["layer"].to_numpy().tolist() == [0]
    alone = hidden["loss_layer"].sel(layer=0)  # NaN for the kind other_head, which is not run by layer
    np.testing.assert_allclose(hidden["loss"][:2], alone[:2], rtol=1e-5, atol=1e-7)
    tuned = ZeroTuning(gammas=(0.5, 1.0), **settings).run(store, model=model).data
    assert tuned["layer"].to_numpy().tolist() == [0]


@pytest.mark.parametrize("probe", [AttentionSinks, InductionHeads, SuccessorHeads, ZeroTuning])
def test_a_layer_that_is_not_there_is_refused_by_name(recorded, probe):
    model, store = recorded
    text = refused(RequestError, lambda: probe(layers=(0, 99)).run(store, model=model))
    assert text.startswith("layers: layer 99 ")
    assert "0, 1" in text


def test_the_source_that_has_the_layer_is_read(tmp_path):
    """Patterns at two layers, derived attention at one more: the source with most layers lacks the last one."""
    model = wb.load_model("demo", device="cpu")
    last = model.site_map.n_layers - 1
    sites = ["pattern.0", "pattern.1", f"attn_received.{last}"]
    ids = [list(range(5, 29))]
    store = wb.record(model, ids, sites=sites, out=tmp_path / "a.acts", show_progress=False)
    data = AttentionSinks(**QUICK, layers=(last,)).run(store).data
    assert data.attrs["source"] == "derived"
    assert data["layer"].to_numpy().tolist() == [last]
    assert AttentionSinks(**QUICK).run(store).data["layer"].to_numpy().tolist() == [0, 1]
