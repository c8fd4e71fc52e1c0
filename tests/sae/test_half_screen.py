"""Bounds by float16 and kernels in Triton: never below float64, narrower than bfloat16, and the same features."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from sae_example import encode64, save_sae, set_weights
from safetensors.numpy import load_file

from workbench.sae import half_screen, products
from workbench.sae.choice import Above, Linear, TopK
from workbench.sae.encode import encoder
from workbench.sae.half_screen import make_half_screen
from workbench.sae.kernels import kernels_for
from workbench.sae.load import load_sae
from workbench.sae.screen import make_screen


@pytest.fixture
def kernels(monkeypatch):
    """The kernels, interpreted on the CPU, in place of torch's operations."""
    pytest.importorskip("triton", reason="no Triton here: pip install triton==3.9.0 runs its kernels on the CPU")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels are compiled here: python -m workbench.experiments.benchmarks gpu checks them")
    from workbench.sae import triton_kernels

    for module in (half_screen, products):
        monkeypatch.setattr(module, "kernels_for", lambda device: triton_kernels)
    return triton_kernels


def drawn(shape: tuple[int, ...], spread: float, seed: int = 0) -> torch.Tensor:
    """Numbers of sizes that differ by up to 10 to the power `spread`."""
    random = np.random.default_rng(seed)
    return torch.from_numpy((random.normal(size=shape) * 10 ** random.uniform(-spread, 0, shape)).astype(np.float32))


# ---- bounds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0, 3, 9])
@pytest.mark.parametrize("size", [1e-12, 1, 1e15])
def test_no_bound_is_below_float64_and_none_is_lost(spread, size):
    x = drawn((40, 50), spread) * size
    x[:4] = x[:4].abs()
    weight, bias = drawn((50, 70), spread, 1) * drawn((70,), spread, 2), drawn((70,), spread, 3) * size
    weight[:, :3], weight[:, 3] = weight[:, :3].abs(), 0
    threshold, scale = drawn((70,), spread, 4).abs() * size / 10, drawn((70,), 0, 5).abs()
    for choice in (TopK(4), Above(threshold)):
        screen = make_half_screen(Linear(weight, bias, scale), choice)
        pre = (x.double() @ weight.double() + bias.double()) * scale.double()
        above = pre - threshold.double() if isinstance(choice, Above) else pre
        upper = screen.upper(x).double()
        assert (upper >= above).all()
        stored, maxima, _ = screen.bounds(x, 8)
        assert ((stored > 0) >= (above > 0)).all()
        assert torch.equal(maxima.amax(1), stored.amax(1))


def test_bounds_are_several_times_narrower_than_bfloat16s():
    x, weight = drawn((64, 768), 0), drawn((768, 256), 0, 1)
    linear, pre = Linear(weight, torch.zeros(256)), x.double() @ weight.double()
    half, whole = make_half_screen(linear, TopK(4)), make_screen(linear, TopK(4))
    positive = pre > 0
    width = [float((upper.double() - pre)[positive].mean()) for upper in (half.upper(x), whole.bounds(x))]
    assert width[1] > 4 * width[0]


def test_features_of_norms_that_float16_cannot_hold_side_by_side_have_no_bounds():
    weight = torch.ones(8, 5)
    weight[:, 1] *= 2.0**-70
    assert make_half_screen(Linear(weight, torch.zeros(5)), TopK(2)) is None
    weight[:, 1] = 0
    assert make_half_screen(Linear(weight, torch.zeros(5)), TopK(2)) is not None
    assert make_half_screen(Linear(0 * weight, torch.zeros(5)), TopK(2)) is not None


# ---- features ---------------------------------------------------------------------------------------------


def check_encoding(folder, architecture: str, rows: int, d_sae: int, seed: int = 0, **options) -> int:
    """Compares with float64 NumPy; returns the number of rows that were not settled by bounds."""
    path = save_sae(folder, architecture, d_in=24, d_sae=d_sae, seed=seed, **options)
    weights = load_file(path / "sae_weights.safetensors")
    rare = {name: weights[name] - 12 for name in ("b_enc", "b_gate") if name in weights and "topk" not in architecture}
    sae = load_sae(set_weights(path, **rare), device="cpu")
    x = drawn((rows, 24), 0, seed) + 0.3
    bounded = encoder(sae, precision="bfloat16")
    bounded = replace(bounded, screen=make_half_screen(bounded.linear, bounded.choice))
    encoded = bounded(x)
    dense = np.zeros((rows, d_sae))
    dense[np.repeat(np.arange(rows), np.diff(encoded.indptr)), encoded.feature] = encoded.value
    expected = encode64(path, x.numpy())
    assert np.array_equal(dense != 0, expected != 0)
    np.testing.assert_allclose(dense, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert len(expected.nonzero()[0]) > rows
    return encoded.unsettled


ENCODINGS = [("topk", {}), ("topk", {"k": 40}), ("topk", {"rescale_acts_by_decoder_norm": True}), ("standard", {})]
ENCODINGS += [("jumprelu", {}), ("gated", {})]


@pytest.mark.parametrize(("architecture", "options"), ENCODINGS)
def test_features_are_those_of_float64(architecture, options, tmp_path):
    assert check_encoding(tmp_path / "sae", architecture, 90, 1000, **options) < 9


def test_rows_whose_first_candidates_do_not_decide_are_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(half_screen, "_SLACK", 0.0)
    assert check_encoding(tmp_path / "sae", "topk", 90, 1000) < 9


def test_any_small_autoencoder(tmp_path):
    for seed in range(12):
        check_encoding(tmp_path / str(seed), ("topk", "jumprelu", "standard")[seed % 3], 12, 30 + 7 * seed, seed)


# ---- kernels ----------------------------------------------------------------------------------------------


def test_a_cpu_and_a_gpu_without_triton_use_torchs_operations():
    assert kernels_for(torch.device("cpu")) is None
    assert kernels_for(torch.device("cuda")) is None or torch.cuda.is_available()


@pytest.mark.parametrize(("architecture", "options"), [*ENCODINGS[:2], ("jumprelu", {})])
def test_features_found_by_kernels_are_those_of_float64(architecture, options, tmp_path, kernels):
    assert check_encoding(tmp_path / "sae", architecture, 10, 300, **options) < 4


@pytest.mark.parametrize(("shape", "size"), [((33, 70, 300), 32), ((5, 64, 128), 1), ((40, 3, 130), 128)])
def test_the_kernel_of_bounds_is_its_definition_in_float64(shape, size, kernels):
    rows, d_in, features = shape
    x, weight = drawn((rows, d_in), 2).half(), drawn((features, d_in), 2, 1).half()
    row_terms, terms = drawn((3, rows), 1, 2).abs(), drawn((4, features), 1, 3)
    terms[:3].abs_()
    stored, maxima = kernels.bounds_with_maxima(x, weight, row_terms, terms, size)
    (norm, rounding, scale), (error, length, relative, below) = row_terms.double()[:, :, None], terms.double()
    expected = x.double() @ weight.double().T + norm * error + rounding * length
    expected = (expected * relative + scale * below).clamp(min=0).numpy()
    np.testing.assert_allclose(stored.double(), expected, rtol=2**-10, atol=1e-5)
    turned = (part.T.contiguous().T for part in (x, weight, row_terms, terms))
    assert torch.equal(kernels.bounds_with_maxima(*turned, size)[0], stored)
    padded = np.pad(stored.numpy(), ((0, 0), (0, -features % size)))
    np.testing.assert_array_equal(maxima, padded.reshape(rows, -1, size).max(2))
    tiny = kernels.bounds_with_maxima(0 * x, weight, row_terms, torch.full((4, features), 1e-12), size)[0]
    assert (tiny == 2.0**-24).all()


def test_the_kernel_of_candidates_is_numpys_choice(kernels):
    bounds = drawn((21, 2500), 0).half()
    least = torch.linspace(0.5, 4, 21).half()
    candidates, count = kernels.candidates(bounds, least, 100)
    for row, places in enumerate(candidates.numpy()):
        (expected,) = np.nonzero(bounds[row].numpy() >= least[row].numpy())
        assert count[row] == len(expected)
        np.testing.assert_array_equal(places, np.pad(expected, (0, 100), constant_values=-1)[:100])


def test_the_kernel_of_pairs_is_float64s_product_and_leaves_pairs_out(kernels):
    x, weight = drawn((9, 301), 2), drawn((40, 301), 2, 1)
    random = np.random.default_rng(0)
    row, feature = (torch.from_numpy(random.integers(low, high, 77)) for low, high in ((0, 9), (-1, 40)))
    expected = (x.double()[row] * weight.double()[feature]).sum(1) * (feature >= 0)
    np.testing.assert_allclose(kernels.pair_products(x, weight, row, feature), expected, rtol=0, atol=1e-4)
    assert len(kernels.pair_products(x, weight, row[:0], feature[:0])) == 0
    turned = (part.T.contiguous().T for part in (x, weight))
    assert torch.equal(kernels.pair_products(*turned, row, feature), kernels.pair_products(x, weight, row, feature))
    alone = kernels.pair_products(x, weight, row[5:6], feature[5:6])
    assert alone[0] == kernels.pair_products(x, weight, row, feature)[5]


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from workbench.sae import triton_kernels as kernels

half, single, sizes = "*fp16", "*fp32", dict.fromkeys(("rows", "features", "d_in", "groups", "most", "pairs"), "i32")
types = dict.fromkeys(("out", "maxima", "bounds", "least"), half)
types |= {**sizes, "row_terms": single, "feature_terms": single, "products": single, "ids": "*i32", "count": "*i32"}
types |= {"row": "*i64", "feature": "*i64"}
for capability in (80, 90):
    for kernel, of_rows, constants, options in (
        (kernels._bounds, half, {"GROUP": 32, **kernels._TILE}, kernels._OPTIONS),
        (kernels._candidates, half, {"BLOCK": kernels._SCAN}, {}),
        (kernels._pairs, single, {"PAIRS": kernels._PAIRS, "WIDTH": kernels._PAIR_WIDTH}, {}),
    ):
        names = {"x": of_rows, "weight": of_rows, **types, **dict.fromkeys(constants, "constexpr")}
        source = ASTSource(kernel, {name: names[name] for name in kernel.arg_names}, constants)
        compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        print(capability, kernel.__name__, compiled.metadata.shared, "mma" in compiled.asm["ptx"])
"""


def test_kernels_compile_for_gpus_that_are_not_here(tmp_path):
    pytest.importorskip("triton", reason="no Triton here: pip install triton==3.9.0 compiles its kernels")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    compiled = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    lines = [line.split() for line in compiled.stdout.splitlines()]
    assert len(lines) == 6, compiled.stderr
    assert [line[1] for line in lines if line[3] == "True"] == ["_bounds", "_bounds"]  # on matrix units
    assert max(int(line[2]) for line in lines) <= 99 << 10  # bytes of shared memory that every GPU since 2020 has
