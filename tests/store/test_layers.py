"""Several layers of a store as one array."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from store_example import HALF, MODEL, part_of, values, write_segment, writing

from workbench.store.reader import Rows, Store, open_store

SITES = tuple(replace(HALF, name=f"blocks.{n}.hook_resid_post", short=f"resid_post.{n}") for n in (0, 1, 3))
SEGMENTS = [[3, 2], [4]]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    path = tmp_path_factory.mktemp("layers") / "x.acts"
    with writing(path, model=replace(MODEL, n_layers=4), sites=SITES) as writer:
        writer.begin(part_of(SEGMENTS), append=False)
        for lengths in SEGMENTS:
            write_segment(writer, lengths)
    return open_store(path)


def expected(rows) -> np.ndarray:
    return np.stack([values(site, 0, 9) for site in SITES], 1)[rows]


@pytest.mark.parametrize("rows", [slice(None), slice(1, 7, 2), 4, [8, 0, -1], [[0, 1], [2, 3]], slice(5, 5)])
def test_layers_are_the_second_axis(store, rows):
    array = store["resid_post", :]
    assert array.shape == (9, 3, 3)
    assert array.axes == ("row", "layer", "d_model")
    assert array.layers == (0, 1, 3)
    index = rows if not isinstance(rows, list) else np.array(rows)
    np.testing.assert_array_equal(
        array[rows].numpy(),
        expected(index)
        if not isinstance(rows, list)
        else np.moveaxis(np.stack([values(site, 0, 9)[index] for site in SITES]), 0, np.ndim(index)),
    )


def test_slices_lists_and_negative_layers_name_layers_of_the_model(store):
    assert store["resid_post", 0:2].layers == (0, 1)
    assert store["resid_post", [3, -4]].layers == (3, 0)
    assert store["resid_post", -1].site.short == "resid_post.3"
    torch.testing.assert_close(store["resid_post", [3, 0]][:][:, 1], store["resid_post", 0][:])


def test_rows_and_numpy_read_several_layers(store):
    rows = Rows(store, np.array([7, 2]))
    np.testing.assert_array_equal(rows["resid_post", 0:2].numpy(), expected([2, 7])[:, :2])
    np.testing.assert_array_equal(np.asarray(store["resid_post", :]), expected(slice(None)))
    blocks = [block for _, block in store["resid_post", :].blocks(4)]
    np.testing.assert_array_equal(torch.cat(blocks).numpy(), expected(slice(None)))
