"""GGUF files: the weights, tokenizer and activations of the checkpoint they were made from; what cannot be read."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import halves, heads_of, interleaved, write
from refusals import refused

import workbench as wb
from workbench.io.errors import RequestError

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'interp-workbench[gguf]'")

TEXT = "Once upon a time Tom had a day"


@pytest.fixture(scope="module")
def files(tiny_models, tiny_tokenizer, tmp_path_factory) -> Path:
    """A folder with the tiny Llama in float32, with its tokenizer, and in blocks of 8 bits, without."""
    folder = tmp_path_factory.mktemp("gguf")
    write(folder / "whole.gguf", tiny_models["llama"], tiny_tokenizer)
    write(folder / "blocks.gguf", tiny_models["llama"], kind=gguf.GGMLQuantizationType.Q8_0)
    return folder


def test_a_file_is_the_checkpoint_it_was_made_from(files, tiny_models, tiny_tokenizer, tmp_path):
    model = wb.load_model(files / "whole.gguf", device="cpu")
    assert (model.name, model.architecture, model.dtype) == ("whole.gguf", "LlamaForCausalLM", torch.float32)
    weights = model.module.state_dict()
    assert weights.keys() == tiny_models["llama"].state_dict().keys()
    for name, weight in tiny_models["llama"].state_dict().items():
        assert torch.equal(weights[name], weight), name
    assert model.tokenizer is not None
    ids = tiny_tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert model.tokenizer(TEXT, add_special_tokens=False)["input_ids"] == ids
    sites = ["resid_post", "pattern", "mlp_out"]
    settings = {"sites": sites, "dtype": "float32", "show_progress": False}
    from_file = wb.record(files / "whole.gguf", [ids], out=tmp_path / "one", **settings)
    two = wb.record(wb.Model(tiny_models["llama"], None, "tiny"), [ids], out=tmp_path / "two", **settings)
    assert [site.label for site in from_file.sites] == [site.label for site in two.sites]
    for site in from_file.sites:
        torch.testing.assert_close(from_file[site.label][:], two[site.label][:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("checkpoint", torch.float32)])
@pytest.mark.parametrize("folder", [False, True])
def test_blocks_become_the_numbers_they_stand_for(files, tiny_models, tmp_path, dtype, expected, folder):
    path = files / "blocks.gguf"
    if folder:
        path = Path(shutil.copytree(files, tmp_path / "one", ignore=lambda *_: ["whole.gguf"]))
    model = wb.load_model(path, device="cpu", dtype=dtype)
    assert model.dtype == expected
    assert model.tokenizer is None
    assert not hasattr(model.module.config, "quantization_config")
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, weight in tiny_models["llama"].state_dict().items():
        whole, heads = weight.numpy(), heads_of(tiny_models["llama"], name)
        if whole.ndim == 2 and whole.shape[1] % 32 == 0:
            ordered = whole if heads is None else interleaved(whole, heads)
            near = gguf.quants.dequantize(gguf.quants.quantize(ordered, kind), kind)
            near = near if heads is None else halves(near, heads)
            assert 0 < np.abs(near - whole).max() < 0.02
            whole = near
        assert np.array_equal(model.module.state_dict()[name].numpy(), whole), name


def test_the_dtype_is_the_one_asked_for(files):
    exact = wb.load_model(files / "blocks.gguf", device="cpu").module.state_dict()
    for dtype in (torch.bfloat16, torch.float16):
        model = wb.load_model(files / "blocks.gguf", device="cpu", dtype=dtype)
        assert model.dtype == dtype
        assert all(torch.equal(weight, exact[name].to(dtype)) for name, weight in model.module.state_dict().items())
        assert model.loading is not None
        assert model.loading.load("cpu").fingerprint() == model.fingerprint()


def test_files_that_cannot_be_read_are_refused_in_a_line(files, tiny_models, tmp_path, monkeypatch):
    store = wb.record(wb.Model(tiny_models["llama"], None, "m"), [[3, 4]], out=tmp_path / "s", show_progress=False)
    before = sorted((path, path.stat().st_mtime_ns) for path in store.path.rglob("*"))

    def refusal(path: Path) -> str:
        text = refused(RequestError, lambda: wb.record(path, [[3, 4, 5]], out=store.path, append=True))
        assert sorted((path, path.stat().st_mtime_ns) for path in store.path.rglob("*")) == before
        assert str(path) in text
        return text

    assert "holds 2 GGUF files (blocks.gguf, whole.gguf); name one of them" in refusal(files)
    mammoth = write(tmp_path / "other.gguf", tiny_models["llama"], architecture="mammoth")
    assert "architecture 'mammoth', which transformers does not read from GGUF; give the folder" in refusal(mammoth)
    whole = (files / "whole.gguf").read_bytes()
    for number, damaged in enumerate((b"", b"GGUF", b"a text", whole[: len(whole) // 2], whole[:100])):
        path = tmp_path / f"damaged{number}.gguf"
        path.write_bytes(damaged)
        assert "is no GGUF file, or a damaged one (" in refusal(path)
    part = Path(shutil.copy(files / "whole.gguf", tmp_path / "m-00001-of-00003.gguf"))
    assert "is part 1 of 3 of a split GGUF file; join the parts with" in refusal(part)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert refusal(files / "whole.gguf").endswith("which the package gguf reads: pip install 'interp-workbench[gguf]'")
