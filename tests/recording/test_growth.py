"""Sites that are added to a finished store and deleted from it."""

import os

import pytest
import torch
from recorded_operations import MORE, TEXTS, recorded, tiny_model
from refusals import refused
from store_example import contents

from workbench.io.errors import RequestError
from workbench.recording.record import record
from workbench.store.growth import delete_sites
from workbench.store.manifest import read_manifest
from workbench.store.reader import open_store

FEW, ALL = ["resid_post.1"], ["resid_post.1", "pattern.0", "resid_mid"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def assert_same_arrays(store, expected):
    assert [site.label for site in store.sites] == [site.label for site in expected.sites]
    for site in expected.sites:
        torch.testing.assert_close(store[site.label][:], expected[site.label][:], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["texts", "None"])
def test_a_grown_store_has_the_arrays_of_one_recorded_at_once(model, tmp_path, kind):
    store = recorded(model, tmp_path / "s", sites=FEW)
    before = {name: data for name, data in contents(store.path).items() if "manifest" not in name}
    if kind == "texts":
        store = recorded(model, store.path, sites=ALL)
    else:
        store = record(model, None, out=store, sites=ALL[1:], show_progress=False)
    assert_same_arrays(store, recorded(model, tmp_path / "once", sites=ALL))
    after = contents(store.path)
    assert {name: after[name] for name in before} == before
    assert store.verify().empty
    assert recorded(model, store.path, sites=FEW).manifest == store.manifest
    assert contents(store.path) == after


def test_appended_stores_grow_from_their_own_tokens_in_a_type_of_their_own(model, tmp_path):
    path = tmp_path / "s"
    recorded(model, path, sites=FEW)
    recorded(model, path, MORE, sites=FEW, append=True)
    assert "sites are added with texts=None, in a shell by workbench add" in refused(
        RequestError, lambda: recorded(model, path, sites=ALL)
    )
    fingerprint = read_manifest(path).fingerprint
    store = record(model, None, out=path, sites="resid_mid", dtype="float16", show_progress=False)
    assert store["resid_mid", 0].dtype == torch.float16
    assert store.manifest.fingerprint == fingerprint
    more = recorded(model, tmp_path / "one", MORE, sites=["resid_mid.0"], dtype="float16")
    torch.testing.assert_close(store["resid_mid", 0][-more.rows :], more["resid_mid", 0][:], rtol=0, atol=0)
    assert store.verify().empty


def test_a_store_does_not_grow_by_another_model_or_other_texts(model, tmp_path):
    path = recorded(model, tmp_path / "s", sites=FEW).path
    before = contents(path)
    changed = tiny_model()
    with torch.no_grad():
        changed.module.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    requests = {
        "the model is not the recorded one: its weights": lambda: recorded(changed, path, sites=ALL),
        "holds other texts": lambda: recorded(model, path, TEXTS[:-1], sites=ALL),
        "the texts differ from the recorded ones": lambda: recorded(model, path, [*TEXTS[:-1], [20, 22]], sites=ALL),
        "context: 8 in the store, 16 requested": lambda: recorded(model, path, sites=ALL, context=16),
        "float32 in the store": lambda: recorded(model, path, sites=FEW, dtype="float16"),
        "append: .* does not have resid_mid.0": lambda: recorded(
            model, path, MORE, sites=["resid_post.1", "resid_mid.0"], append=True
        ),
        "texts: None stands for": lambda: record(model, None, out=tmp_path / "none", sites=ALL),
    }
    for message, request in requests.items():
        with pytest.raises(RequestError, match=message):
            request()
    assert contents(path) == before


def test_deleted_sites_are_gone_and_can_be_added_again(model, tmp_path):
    once = recorded(model, tmp_path / "once", sites=ALL)
    store = recorded(model, tmp_path / "s", sites=ALL)
    fingerprint = store.manifest.fingerprint
    smaller = store.delete_sites(["resid_mid", "pattern.0"])
    assert [site.label for site in smaller.sites] == FEW
    assert not list(store.path.rglob("resid_mid*"))
    assert smaller.verify().empty
    assert smaller.manifest.fingerprint == fingerprint
    grown = recorded(model, store.path, sites=ALL)
    assert_same_arrays(grown, once)
    assert grown.verify().empty
    assert grown.delete_sites("resid_mid.1").verify().empty


def test_deleting_refuses_unknown_sites_all_sites_and_unfinished_stores(model, tmp_path):
    path = recorded(model, tmp_path / "s").path
    before = contents(path)
    assert "sites: resid_pots is not recorded" in refused(RequestError, lambda: delete_sites(path, ["resid_pots"]))
    assert "all sites" in refused(RequestError, lambda: delete_sites(path, ["resid_post", "pattern.0"]))
    assert contents(path) == before


def test_files_of_an_abandoned_addition_are_not_read_and_removed(model, tmp_path):
    store = recorded(model, tmp_path / "s", sites=FEW)
    folder = store.path / "segments" / "00000"
    os.link(folder / "resid_post.1.safetensors", folder / "resid_mid.0.safetensors")
    (folder / "segment.1.json").write_text("{}")
    assert set(store.verify()["severity"]) == {"note"}
    grown = recorded(model, store.path, sites=["pattern.0"])
    assert grown.verify().empty
    assert open_store(store.path).manifest == grown.manifest
