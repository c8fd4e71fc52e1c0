"""Saved future lenses: what a fitted map predicts, predicted again from a folder, and refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
from planted import linear_unembed, planted_store
from refusals import refused

import workbench as wb
from workbench.io.errors import DataError, RequestError
from workbench.probes.future_lens import FutureLens
from workbench.probes.tuned_lens import TunedLens

VOCAB = 5
QUICK = {"horizons": 3, "top_k": 2}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The state of layer 0 is the token two places on; logits are the last states, the next token."""
    ids = np.random.default_rng(0).integers(0, VOCAB, (24, 14))
    first, final = (np.eye(VOCAB)[np.roll(ids, -n, axis=1)].reshape(ids.size, VOCAB) for n in (2, 1))
    sites = {"resid_post.0": first, "resid_post.1": 9 * final}
    return planted_store(tmp_path_factory.mktemp("m") / "x.acts", ids.tolist(), sites, linear_unembed(np.eye(VOCAB)))


@pytest.mark.parametrize("method", ["linear", "direct"])
def test_a_saved_lens_predicts_the_planted_future(method, store, tmp_path):
    """Targets from the token table; numbers of the probe from its own result."""
    probe = FutureLens(**QUICK, epochs=20, learning_rate=0.1)
    lens = probe.fit(store, method)
    again = wb.load_lens(lens.save(tmp_path / "lens"))
    assert isinstance(again, wb.TrainedFutureLens)
    assert (again.layers, again.horizons, again.method) == ((0, 1), 3, method)
    assert again.made_of["method"] == f"future lens, {method}"
    rows = store.where("position BETWEEN 1 AND 10")
    table = again.read(store, 0, 1, rows=rows)
    ids = store.tokens["token_id"].to_numpy()
    assert list(table["row"]) == rows.ids.tolist()
    assert (table["predicted_id"].to_numpy() == ids[rows.ids + 2]).mean() > 0.99
    assert table.equals(lens.read(store, -2, 1, rows=rows))
    data = probe.run(store).data.isel(horizon=0).dropna("row")
    if int(data["best_layer"]) == 0 and data["method"].to_numpy()[int(data["best_method"])] == method:
        predictions = again.read(store, 0, 0, rows=store.where("true")[data["row"].to_numpy()])
        np.testing.assert_allclose(predictions["probability"], data["top_probability"], rtol=1e-5)


def test_ranks_are_of_falling_probability(store):
    table = FutureLens(**QUICK).fit(store).read(store, 0, 2, top_k=VOCAB)
    assert len(table) == VOCAB * store.rows
    by_row = table["probability"].to_numpy().reshape(-1, VOCAB)
    np.testing.assert_allclose(by_row.sum(1), 1, rtol=1e-5)
    assert (np.diff(by_row, axis=1) <= 0).all()


def test_wrong_requests_and_damaged_folders_are_refused(store, tmp_path):
    lens = FutureLens(**QUICK).fit(store)
    assert refused(RequestError, lambda: FutureLens(**QUICK).fit(store, "ridge")).startswith("method must be")
    assert "layer 7 has no map; the lens has layers 0, 1" in refused(RequestError, lambda: lens.read(store, 7))
    assert refused(RequestError, lambda: lens.read(store, 0, 3)).startswith("horizon must be")
    other_store = planted_store(
        tmp_path / "o.acts", [[0, 1]], {"resid_post.0": np.eye(2, 3)}, linear_unembed(np.eye(3))
    )
    assert "read a store of the lens's model" in refused(RequestError, lambda: lens.read(other_store, 0))
    folder = lens.save(tmp_path / "lens")
    assert "not empty" in refused(RequestError, lambda: lens.save(folder))
    maps = (folder / "maps.safetensors").read_bytes()
    (folder / "maps.safetensors").write_bytes(maps[:-1] + bytes([maps[-1] ^ 1]))
    assert "damaged" in refused(DataError, lambda: wb.load_lens(folder))
    record = json.loads((folder / "lens.json").read_text())
    (folder / "lens.json").write_text(json.dumps(record | {"format": "x"}))
    assert "format is 'x'" in refused(DataError, lambda: wb.load_lens(folder))


def test_a_future_lens_is_no_tuned_lens(store, tmp_path):
    tuned = TunedLens(epochs=0).fit(store).save(tmp_path / "tuned")
    assert isinstance(wb.load_lens(tuned), wb.TrainedLens)
