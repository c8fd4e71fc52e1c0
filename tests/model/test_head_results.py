"""Output of each head from recorded z: its sum is the model's own output of attention."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from refusals import refused
from torch import nn
from torch.utils.data import DataLoader

import workbench as wb
from workbench.io.errors import RequestError

TEXTS = [[3, 9, 27, 81, 243], [4, 16, 64]]
LAST_BITS = {"rtol": 1e-5, "atol": 1e-6}


def recorded(module, path, sites=("z", "blocks.*.attn.o.hook_out")):
    model = wb.load_model(module)
    return model, wb.record(model, TEXTS, sites=sites, dtype="float32", out=path, show_progress=False)


def test_heads_add_up_to_the_output_of_the_projection(tiny_model, tmp_path):
    """The bias is read from the module's own parameter."""
    model, store = recorded(tiny_model, tmp_path / "a.acts")
    for layer in range(3):
        results = wb.head_results(store, layer, model)
        assert results.axes == ("row", "head", "d_model")
        assert results.shape == (8, 4, 32)
        output = store[f"blocks.{layer}.attn.o.hook_out"]
        projection = model.module.get_submodule(next(name for name in output.site.synonyms if "hook" not in name))
        bias = getattr(projection, "bias", None)
        total = results[:].sum(1) + (0 if bias is None else bias.detach())
        torch.testing.assert_close(total, output[:], rtol=1e-4, atol=1e-5)


def test_each_head_is_its_part_of_the_weights(tiny_models, tmp_path):
    """Grouped queries: 4 query heads, 2 key heads; W_O as the module stores it."""
    model, store = recorded(tiny_models["llama"], tmp_path / "a.acts")
    weight = model.module.model.layers[1].self_attn.o_proj.weight.detach()  # (d_model, head * d_head)
    results, z = wb.head_results(store, -2, model), store["z", 1][:]
    for head in range(4):
        expected = z[:, head] @ weight[:, head * 8 : head * 8 + 8].T
        torch.testing.assert_close(results[:][:, head], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[[5, 0]], results[:][[5, 0]])
    torch.testing.assert_close(results[store.where("position = 2")], results[:][[2, 7]])
    # products of other numbers of rows differ in the last bits on some processors
    blocks = torch.cat([block for _, block in results.blocks(3)])
    torch.testing.assert_close(blocks, results[:], **LAST_BITS)
    assert results[3].shape == (4, 32)
    np.testing.assert_allclose(results.to_numpy([5, 0]), results[:][[5, 0]], **LAST_BITS)
    loaded = torch.cat(list(DataLoader(results, batch_size=3)))
    torch.testing.assert_close(loaded, results[:], **LAST_BITS)
    (batch,) = wb.RowDataset({"heads": results, "z": store["z", 1]}, seed=0)
    torch.testing.assert_close(batch["heads"], results[batch["row"]], **LAST_BITS)
    assert repr(results) == "result.1 (row 8, head 4, d_model 32), computed when read"


class Gated(nn.Module):
    """A projection that is not linear in z."""

    def __init__(self, projection):
        super().__init__()
        self.projection = projection

    def forward(self, z):
        return self.projection(z * torch.sigmoid(z))


def test_a_projection_that_does_not_divide_into_heads_is_refused(tiny_models, tmp_path):
    module = copy.deepcopy(tiny_models["llama"])
    module.model.layers[1].self_attn.o_proj = Gated(module.model.layers[1].self_attn.o_proj)
    model, store = recorded(module, tmp_path / "a.acts", sites=["z"])
    text = refused(RequestError, lambda: wb.head_results(store, 1, model))
    assert "its output is not z times weights plus a bias" in text
    assert wb.head_results(store, 0, model).shape == (8, 4, 32)


def test_other_models_and_missing_sites_are_refused(tiny_models, tmp_path):
    model, store = recorded(tiny_models["llama"], tmp_path / "a.acts", sites=["z.1"])
    changed = copy.deepcopy(tiny_models["llama"])
    changed.model.layers[1].self_attn.o_proj.weight.data.mul_(2)
    text = refused(RequestError, lambda: wb.head_results(store, 1, wb.load_model(changed)))
    assert "is not the one that the store" in text
    assert "z.0 is not recorded" in refused(RequestError, lambda: wb.head_results(store, 0, model))
    with pytest.raises(IndexError, match="row 8 is out of range"):
        wb.head_results(store, 1, model)[8]
