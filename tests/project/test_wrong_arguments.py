"""Arguments of another kind, as users give them, are refused in one line; one name stands for a sequence of one.

The functions are called without the checks of beartype, which the other tests have and users do not.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from refusals import refused, unchecked

import workbench as wb
from workbench.analysis.logit_contributions import _token_ids
from workbench.analysis.patch_pairs import pairs_of
from workbench.features.extract import _check_choices
from workbench.features.feature_store import Features
from workbench.features.other_formats import _checked_ids
from workbench.features.promoted import check_sae
from workbench.features.queries import feature_quantiles, label_columns
from workbench.io.checks import whole_number
from workbench.io.errors import RequestError
from workbench.model.load import Model, check_model
from workbench.model.reload import recorded_model
from workbench.model.row_changes import changeable_place
from workbench.model.row_records import _direction
from workbench.probes import JacobianLens, TunedLens
from workbench.recording.generation import Sampling
from workbench.recording.record import _features, _workers
from workbench.results.registry import installed_probes
from workbench.sae.choice import TopK
from workbench.sae.decoder import decoder_directions
from workbench.sae.feature_record import _number
from workbench.sae.site import matching_site
from workbench.sites.settings import _names
from workbench.store.layers import select_layers
from workbench.store.query import select_rows
from workbench.store.selected_rows import Rows

STORE = "store must be a store (wb.open_store) or its path, not 5"
MODEL = "model must be a loaded model, such as wb.load_model('demo'), not 'demo'"
ROWS = "must be rows of a store, such as store.where('position > 0'), not 5"


def plain(function):
    """The function without checks of its annotations."""
    return inspect.unwrap(function)


@pytest.fixture(scope="module")
def at(tiny_models, tiny_tokenizer, tmp_path_factory):
    model = Model(tiny_models["llama"], tiny_tokenizer, "tiny-llama")
    store = wb.record(
        model, ["the little day was Monday"], out=tmp_path_factory.mktemp("wrong") / "x.acts", show_progress=False
    )
    return SimpleNamespace(model=model, store=store, rows=store.where("row > 0"))


LAYERS = "layers of resid_post must be a number, a slice or a list of numbers, not"
NUMBER = "layer must be a whole number, from -3 to 2, not"
SAE = "sae must be a loaded SAE, such as wb.load_sae('demo'), not 'demo'"

CALLS = [
    (lambda _: unchecked(wb.Recording, context=16.5), "context must be a whole number, not 16.5"),
    (lambda _: unchecked(wb.Recording, unembed="no"), "unembed must be True or False, not 'no'"),
    (lambda _: unchecked(Sampling, max_new_tokens=3, top_k=2.5), "top_k must be a whole number, not 2.5"),
    (lambda _: whole_number("k", 2.5, at_least=1), "k must be a whole number, at least 1, not 2.5"),
    (lambda _: plain(recorded_model)(5), STORE),
    (lambda _: plain(matching_site)(5, "demo"), STORE),
    (lambda at: plain(matching_site)(at.store, "demo"), SAE),
    (lambda _: plain(wb.head_results)(5, 0), STORE),
    (lambda at: plain(wb.head_results)(at.store, 3), f"{NUMBER} 3"),
    (lambda at: plain(wb.attn_scores)(at.store, -99), f"{NUMBER} -99"),
    (lambda at: plain(wb.compare)(5, at.store), STORE.replace("store must", "stores must", 1)),
    (lambda _: plain(wb.to_hf_dataset)(5, "resid_post.0"), "rows must be a store (wb.open_store) or its path"),
    (lambda _: plain(wb.export)(5, "e"), "source must be a result, a store, the path of one, or a figure, not 5"),
    (lambda _: plain(wb.export)("x.acts", "e"), "result 'x.acts': no result.json there"),
    (lambda _: plain(wb.generate)("demo", ["a"]), MODEL),
    (lambda _: plain(wb.intervene)("demo", wb.SkipBlock(0)), MODEL),
    (lambda _: plain(wb.neuron_dictionary)("demo", 0), MODEL),
    (lambda at: plain(check_model)(at.model.module), "such as wb.load_model('demo'), not LlamaForCausalLM"),
    (lambda at: plain(recorded_model)(at.store, at.model.module), "or a name, not LlamaForCausalLM"),
    (lambda at: plain(wb.generate)(at.model, ["a"], bos="zork"), "bos must be one of model, always, never, not 'zork'"),
    (lambda _: plain(pairs_of)([]), "pairs must be checked pairs, such as wb.prompt_pairs('ioi', model), not []"),
    (lambda at: plain(wb.mean_difference)(5, at.rows, "resid_post", 0), f"a {ROWS}"),
    (lambda _: plain(wb.principal_directions)(5, "resid_post", 0), f"rows {ROWS}"),
    (lambda at: plain(select_rows)(at.store.path, at.store.manifest, 5), "query must be a text, such as"),
    (lambda at: plain(Rows.__and__)(at.rows, 5), "rows combine with rows, such as store.where('position > 0'), not 5"),
    (lambda at: plain(Rows.sample)(at.rows, 3, -1), "seed must be a whole number, at least 0, not -1"),
    (lambda at: plain(Rows.text)(at.rows, 1.5), "context must be a whole number, at least 0, not 1.5"),
    (lambda at: plain(select_layers)(at.store.path, at.store.manifest, "resid_post", "10"), f"{LAYERS} '10'"),
    (lambda at: plain(select_layers)(at.store.path, at.store.manifest, "resid_post", 1.0), f"{LAYERS} 1.0"),
    (lambda at: plain(changeable_place)(at.model, ("resid_post", 0)), "site must be the name of one, such as"),
    (lambda _: plain(_names)("sites", ("resid_post", 0)), "sites must be names, such as resid_post.3, not 0"),
    (lambda _: plain(_workers)(2), "workers is 2; give wb.RayWorkers(2)"),
    (lambda _: plain(_direction)("a.safetensors", None), "'a.safetensors'; load its file: wb.load_direction(path)"),
    (lambda at: plain(check_sae)(at.store, None), "features must be opened features, such as wb.open_features("),
    (lambda _: plain(Features.rows_of)(None, "0"), "feature must be the number of one, not '0'"),
    (lambda _: plain(wb.load_sae)("demo", 3), "sae_id must be a path (a text or a pathlib.Path), not 3"),
    (lambda at: plain(_features)("demo", None, "float32", False), SAE),
    (lambda _: plain(wb.import_labels)("x", "y.csv"), "features must be opened features, such as wb.open_features("),
    (
        lambda _: plain(_check_choices)(None, "float32", 3, None, None),
        "sparsity must be a rule, such as TopK(32), not 3",
    ),
    (lambda _: unchecked(TopK, k=1.5), "k must be a whole number, at least 1, not 1.5"),
    (lambda _: plain(_checked_ids)(None, [1.5]), "ids must be numbers of features, not 1.5"),
    (lambda _: plain(decoder_directions)(None, [1.7]), "feature must be the number of one, not 1.7"),
    (lambda _: plain(feature_quantiles)(None, 0.5), "quantiles must be numbers from 0 to 1, such as (0.1, 0.9), not"),
    (lambda _: plain(_token_ids)(None, 1.5, None), "tokens must be tokens, as texts or ids, not 1.5"),
    (lambda _: plain(wb.Feature.place.fget)(SimpleNamespace(sae="demo", site=None)), SAE),
    (lambda _: plain(_number)("3"), "value must be a number, not '3'"),
    (lambda _: plain(_number)(torch.ones(2)), "value is a tensor of shape (2,); give one number"),
    (lambda at: plain(label_columns)(at.store, {"x": 5}), "labels: x is 5; give a list or array of one value per row"),
    (lambda at: plain(label_columns)(at.store, []), "labels is empty; name columns of the token table, or give values"),
    (
        lambda at: plain(label_columns)(at.store, {"x": [[1]] * at.store.rows}),
        "labels: a value of x is list<item: int64>; give one number or text per row",
    ),
    (lambda at: plain(wb.sae_metrics)(at.store, None, model="demo"), MODEL),
    (lambda at: plain(wb.sae_metrics)(at.store, None, seed=-1), "seed must be a whole number, at least 0"),
    (lambda _: plain(wb.feature_effect)(None, None, 0, seed=-1), "seed must be a whole number, at least 0"),
    (lambda _: plain(wb.random_repeats)("demo"), "tokens must be a tokenizer, such as model.tokenizer, or ids"),
    (lambda _: plain(wb.random_repeats)(range(9), period=5), "period must be the smallest and the largest one"),
]


@pytest.mark.parametrize(("call", "message"), CALLS)
def test_it_is_refused_in_one_line(call, message, at):
    assert message in refused(RequestError, lambda: call(at))


def test_a_whole_number_may_be_written_as_a_float():
    assert type(whole_number("k", 2.0, at_least=1)) is int
    assert unchecked(wb.Recording, context=np.float64(16)).context == 16


def test_one_stands_for_a_sequence_of_one(at, tmp_path):
    options = {"sites": ["resid_post.0"], "dtype": "float32", "show_progress": False}
    change = wb.Add("resid_post.0", torch.ones(32))
    first_store, second_store = (
        plain(wb.record)(at.model, ["the day"], out=tmp_path / name, interventions=records, **options)
        for name, records in (("one", change), ("several", [change]))
    )
    np.testing.assert_array_equal(first_store["resid_post", 0][:], second_store["resid_post", 0][:])
    compared = wb.compare(first_store, second_store, sites="resid_post", probes="logit-lens")
    assert compared.sites["site"].tolist() == ["resid_post.0"]
    assert set(compared.not_run) <= {"logit-lens"}


def test_numbers_of_random_draws_have_a_limit():
    """Of every installed probe, before anything is read."""
    counts = (
        "resamples",
        "permutations",
        "shuffles",
        "draws",
        "controls_drawn",
        "ablation_controls",
        "seeds",
        "random",
    )
    probes = [entry.load() for entry in installed_probes().values()]
    places = [(probe, name) for probe in probes for name in counts if hasattr(probe, name)]
    assert {name for _, name in places} == set(counts)
    for probe, name in places:
        text = refused(RequestError, lambda probe=probe, name=name: probe(**{name: 10**9}))
        assert text == f"{name} must be at most 100000, not 1000000000"


@pytest.mark.parametrize(
    ("probe", "name", "limit"),
    [
        ("attribution-patching", "steps", "from 0 to 10000"),
        ("future-lens", "horizons", "from 1 to 1000"),
        ("induction-heads", "copying_tokens", "from 2 to 10000"),
        ("neurons", "top", "from 1 to 1000"),
        ("next-token-law", "folds", "from 2 to 100"),
        ("tuned-lens", "epochs", "from 0 to 10000"),
    ],
)
def test_counts_that_would_never_end_are_refused(probe, name, limit):
    kind = installed_probes()[probe].load()
    assert f"{limit}, not 1000000000" in refused(RequestError, lambda: kind(**{name: 10**9}))


def test_more_top_tokens_than_the_vocabulary_has_are_refused_before_a_fit(at):
    for probe in (TunedLens(top_k=10**9), JacobianLens(top_k=10**9)):
        text = refused(RequestError, lambda probe=probe: probe.run(at.store, model=at.model))
        assert text == f"top_k must be at most {at.model.vocab}, not 1000000000"
