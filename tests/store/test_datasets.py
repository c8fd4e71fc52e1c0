"""Rows as datasets of torch and of Hugging Face: every row once, in the order that the seed determines, unchanged."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from refusals import refused
from torch.utils.data import DataLoader

import workbench as wb
from workbench.io.errors import RequestError

SITES = ["resid_post.0", "resid_post.2", "z.1", "attn_entropy.1", "resid_norm.1"]


@pytest.fixture(scope="module")
def store(tiny_models, tmp_path_factory):
    """16 sequences of 40 tokens in 6 segments."""
    ids = np.random.default_rng(0).integers(2, 300, (16, 40)).tolist()
    out = tmp_path_factory.mktemp("datasets") / "a.acts"
    model = wb.load_model(tiny_models["llama"])
    return wb.record(model, ids, sites=SITES, out=out, context=40, segment_rows=130, show_progress=False)


def gathered(batches):
    """Rows and activations of all batches, in their order."""
    batches = list(batches)
    return torch.cat([batch["row"] for batch in batches]), torch.cat([batch["activations"] for batch in batches])


def loader(dataset, workers=0):
    return DataLoader(dataset, batch_size=None, num_workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_pass_has_each_row_once_with_its_values(store, workers, shuffle):
    array = store["resid_post", 2]
    dataset = wb.RowDataset(
        array, batch_rows=33, shuffle=shuffle, seed=3, columns=["token_id"], block_rows=16, buffer_bytes=96 * 64
    )
    rows, values = gathered(loader(dataset, workers))
    assert sorted(rows.tolist()) == list(range(640))
    assert torch.equal(values, array[rows])
    if not workers:
        assert (rows.tolist() == list(range(640))) is not shuffle
        again, _ = gathered(loader(dataset))
        assert torch.equal(rows, again)


def test_shuffling_mixes_all_rows_of_the_buffer(store):
    rows, _ = gathered(wb.RowDataset(store["resid_post", 0], columns="token_id", seed=0, batch_rows=64))
    assert abs(np.corrcoef(np.arange(640), rows)[0, 1]) < 0.12  # 3 standard deviations of 640 independent places
    neighbours = (rows[1:] - rows[:-1]).abs() == 1
    assert neighbours.sum() < 10


@pytest.mark.parametrize("workers", [0, 2])
def test_without_a_seed_the_order_is_torchs_and_another_in_each_pass(store, workers):
    dataset = wb.RowDataset(store["resid_post", 0], columns="token_id", batch_rows=64, block_rows=16)
    batches = loader(dataset, workers)
    orders = []
    for _ in range(2):
        torch.manual_seed(7)
        orders.append([gathered(batches)[0].tolist() for _ in range(2)])
    assert orders[0] == orders[1]
    assert orders[0][0] != orders[0][1]
    assert sorted(orders[0][0]) == sorted(orders[0][1])


def test_selected_rows_several_layers_and_several_arrays(store):
    rows = store.where("position > 30")
    layers = store["resid_post", [0, 2]]
    rows_read = torch.cat(list(wb.RowDataset(layers, rows, shuffle=False, batch_rows=50)))
    assert torch.equal(rows_read, rows["resid_post", [0, 2]])
    dataset = wb.RowDataset({"z": store["z", 1], "norm": store["resid_norm", 1]}, rows, columns=["token", "is_last"])
    (batch,) = dataset
    assert torch.equal(batch["z"], store["z", 1][batch["row"]])
    assert torch.equal(batch["norm"], store["resid_norm", 1][batch["row"]])
    assert batch["is_last"].dtype == torch.bool
    assert batch["token"] == store.tokens["token"].take(batch["row"].numpy()).to_pylist()


def test_an_array_is_a_dataset_of_torch_by_itself(store):
    for array in (store["resid_post", 2], store["resid_post", [0, 2]]):
        batches = DataLoader(array, batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(0))
        order = torch.randperm(640, generator=_sampler_generator())
        assert torch.equal(torch.cat(list(batches)), array[order])


def _sampler_generator():
    """Generator of DataLoader's sampler: the loader draws its base seed from the given one first."""
    generator = torch.Generator().manual_seed(0)
    torch.empty((), dtype=torch.int64).random_(generator=generator)
    return generator


def test_arrays_become_numpy_in_float32(store):
    array = store["resid_post", 2]
    assert array.to_numpy().dtype == np.float32
    assert np.array_equal(array.to_numpy([5, 1]), array[[5, 1]].float().numpy())
    assert array.to_numpy(slice(3), dtype=np.float16).dtype == np.float16
    assert store["resid_post", [0, 2]].to_numpy(slice(7)).shape == (7, 2, 32)


def test_a_dataset_of_hugging_face_holds_the_same_rows(store):
    dataset = wb.to_hf_dataset(store, SITES)
    assert dataset.num_rows == 640
    assert dataset.column_names[-5:] == SITES
    assert dataset["token"][:5] == store.tokens["token"][:5].to_pylist()
    for label in SITES:
        read = dataset.with_format("torch")[label][:]
        assert torch.equal(read.float(), store[label][:].float()), label
    rows = store.where("position = 3")
    row_dataset = wb.to_hf_dataset(rows, "z.1", columns=["row", "position"])
    assert row_dataset.column_names == ["row", "position", "z.1"]
    assert np.array_equal(np.array(row_dataset["z.1"][:]), rows["z", 1].float().numpy())
    assert row_dataset["row"][:] == rows.ids.tolist()


def test_a_dataset_of_a_whole_store_is_its_files(store):
    column = wb.to_hf_dataset(store, "resid_post.2", columns=()).data.column("resid_post.2")
    addresses = [store["resid_post", 2].view(segment).__array_interface__["data"][0] for segment in range(6)]
    assert [chunk.flatten().buffers()[1].address for chunk in column.chunks] == addresses


def test_bfloat16_becomes_float32(tiny_models, tmp_path):
    model = wb.load_model(tiny_models["llama"])
    store = wb.record(model, [[3, 4, 5]], sites=["z.1"], dtype="bfloat16", out=tmp_path / "b", show_progress=False)
    expected = store["z", 1][:].float().numpy()
    assert np.array_equal(store["z", 1].to_numpy(), expected)
    for rows in (store, store.where("true")):
        assert np.array_equal(np.array(wb.to_hf_dataset(rows, "z.1")["z.1"][:], np.float32), expected)
    (batch,) = wb.RowDataset(store["z", 1], shuffle=False)
    assert batch.dtype == torch.bfloat16


def test_wrong_requests_are_refused(store, tmp_path):
    array = store["resid_post", 0]
    copied = store.save(tmp_path / "other.acts")
    wrong = {
        "batch_rows must be a whole number, at least 1, not 0": {"batch_rows": 0},
        "seed must be a whole number, at least 0, not -1": {"seed": -1},
        "columns: 'tokn' is no column of the tokens; nearest: token": {"columns": "tokn"},
        "rows: no row is selected": {"rows": store.where("false")},
        f"these rows are of {copied.path}": {"rows": copied.where("true")},
    }
    for message, options in wrong.items():
        assert message in refused(RequestError, lambda options=options: wb.RowDataset(array, **options))
    assert "arrays is empty" in refused(RequestError, lambda: wb.RowDataset({}))
    mixed = {"a": array, "b": copied["resid_post", 0]}
    assert "arrays are of different stores" in refused(RequestError, lambda: wb.RowDataset(mixed))
    named = {"token": array}
    assert "also the name of an array" in refused(RequestError, lambda: wb.RowDataset(named, columns="token"))
    assert "z.0 is not recorded" in refused(RequestError, lambda: wb.to_hf_dataset(store, "z.0"))
    assert "columns: 'x'" in refused(RequestError, lambda: wb.to_hf_dataset(store, "z.1", columns="x"))
