"""Memory of blocks of rows: of wide autoencoders, and where it does not suffice, played by the CPU."""

import sys
from pathlib import Path

import pytest
import torch
from sae_example import save_sae

from workbench.sae import choice, encode, screen
from workbench.sae.autoencoder import Sae
from workbench.sae.encode import OUT_OF_MEMORY, encoder
from workbench.sae.load import load_sae
from workbench.sae.precision import PRECISIONS

X = torch.randn(150, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_block_that_does_not_fit_is_halved_until_it_does(precision, tmp_path, monkeypatch):
    sae = load_sae(save_sae(tmp_path / "sae", "topk", d_in=12, d_sae=100), device="cpu")
    expected, sae_encoder = encoder(sae, precision=precision)(X), encoder(sae, precision=precision)
    tried, messages = [], []
    limited(monkeypatch, tried, 40)
    monkeypatch.setattr(encode._LOG, "info", messages.append)
    encoded = sae_encoder(X)
    assert tried == [150, 75, 30, 30, 30, 30, 30]
    tried.clear()
    sae_encoder(X)
    sae_encoder.inexperienced()(X)
    assert max(tried) <= 40
    assert messages == ["cpu ran out of memory with 150 rows in a block; the blocks are halved"]
    for name in ("indptr", "feature", "value"):
        torch.testing.assert_close(getattr(encoded, name), getattr(expected, name), rtol=0, atol=1e-5)


def test_a_block_of_a_wide_autoencoder_takes_up_to_80_mib(tmp_path, monkeypatch):
    sae = load_sae(save_sae(tmp_path / "sae", "topk", d_in=12, d_sae=100), device="cpu")

    known = {precision: encoder(sae, precision=precision) for precision in PRECISIONS}

    def rows(width, precision):
        monkeypatch.setattr(Sae, "d_sae", width)
        return known[precision].block_rows

    assert [rows(width, "float32") for width in (16_384, 24_576, 49_152, 65_536, 10**6)] == [640, 426, 425, 320, 64]
    assert [rows(width, "bfloat16") for width in (16_384, 24_576, 49_152, 131_072, 10**6)] == [1280, 853, 850, 320, 64]


def test_a_row_that_does_not_fit_ends_in_the_error(tmp_path, monkeypatch):
    encode = encoder(
        load_sae(save_sae(tmp_path / "sae", "topk", d_in=12, d_sae=100), device="cpu"), precision="float32"
    )
    limited(monkeypatch, [], 0)
    with pytest.raises(OUT_OF_MEMORY):
        encode(X)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_float32_weights_of_a_file_stay_mapped(tmp_path):
    sae = load_sae(save_sae(tmp_path / "sae", "topk", d_in=64, d_sae=1000), device="cpu")
    place = sae.W_dec.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(address, 16) for address in line.split()[0].split("-"))
        if start <= place < end:
            assert line.endswith("sae_weights.safetensors")
            return
    pytest.fail("the decoder is in no mapping")


def limited(monkeypatch, tried, most):
    """Products of more rows than `most` run out of memory; `tried` collects the rows of each."""

    def check(x):
        tried.append(len(x))
        if len(x) > most:
            raise OUT_OF_MEMORY("out of memory")

    pre, extended = choice.Linear.pre, screen.Screen.extended
    monkeypatch.setattr(choice.Linear, "pre", lambda self, x, out=None: check(x) or pre(self, x, out))
    monkeypatch.setattr(screen.Screen, "extended", lambda self, x, norm: check(x) or extended(self, x, norm))
