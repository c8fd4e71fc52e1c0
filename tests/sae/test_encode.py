"""Encoding: the support and the values that SAELens gives, for every architecture, in float32 and by way of bounds."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from sae_example import ARCHITECTURES, edit_config, encode64, save_sae, set_weights
from safetensors.numpy import load_file
from scipy.sparse import csr_array

from workbench.io.errors import DataError, RequestError
from workbench.io.torch_state import fast_bfloat16
from workbench.sae import choice, encode, screen
from workbench.sae.choice import Above, AbsTopK, TopK
from workbench.sae.encode import NotFinite, encoder
from workbench.sae.load import load_sae
from workbench.sae.precision import PRECISIONS

TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
D_IN, D_SAE = 24, 500
X = torch.from_numpy(np.random.default_rng(0).normal(size=(150, D_IN)).astype(np.float32) + 0.3)


def saved(folder, architecture, seed=0, **options):
    """A random autoencoder whose features are rare, so that bounds have something to leave out."""
    if architecture in TRANSCODERS:
        options |= {"apply_b_dec_to_input": False, "d_out": 5}
    save_sae(folder, architecture, d_in=D_IN, d_sae=D_SAE, seed=seed, **options)
    weights = load_file(folder / "sae_weights.safetensors")
    below = {"topk": 0, "abstopk": 0, "batchtopk": 60}.get(architecture, 9)
    rare = {name: weights[name] - below for name in ("b_enc", "b_gate") if name in weights}
    return load_sae(set_weights(folder, **rare), device="cpu")


def matrix(rows, features=D_SAE):
    """The rows as a dense matrix, after making sure that they are a CSR matrix in order without zeros."""
    indptr, feature, value = (part.numpy() for part in (rows.indptr, rows.feature, rows.value))
    sparse = csr_array((value, feature, indptr), shape=(len(indptr) - 1, features))
    sparse.check_format()
    assert sparse.has_canonical_format
    assert (value != 0).all()
    return sparse.toarray()


def assert_same(encoded, dense, slack=2e-6):
    """Same support and values; `slack`: what float32 sums in another order differ by, of the largest."""
    dense = dense.numpy()
    assert np.array_equal(encoded != 0, dense != 0)
    np.testing.assert_allclose(encoded, dense, rtol=0, atol=slack * max(1e-30, np.abs(dense).max()))


# ---- what SAELens gives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *TRANSCODERS])
def test_every_architecture_is_saelens_own(architecture, precision, tmp_path):
    sae = saved(tmp_path / "sae", architecture)
    encode = encoder(sae, precision=precision)
    encoded = encode(X)
    assert (encode.linear is None) == (architecture == "matching_pursuit")
    assert (encode.screen is not None) == (
        precision != "float32" and architecture not in ("abstopk", "matching_pursuit")
    )
    dense = sae.encode(X)
    assert 0 < (dense != 0).sum() < dense.numel() / 2
    assert_same(matrix(encoded), dense)
    if encode.screen:
        assert encoded.unsettled < len(X) / 2


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("standard", {"apply_b_dec_to_input": False}),
        ("jumprelu", {"normalize_activations": "layer_norm"}),
        ("gated", {"normalize_activations": "constant_norm_rescale"}),
        ("gated", {"reshape_activations": "hook_z"}),
        ("topk", {"rescale_acts_by_decoder_norm": True}),
        ("abstopk", {"rescale_acts_by_decoder_norm": True}),
    ],
    ids=str,
)
def test_settings_are_honoured(architecture, options, precision, tmp_path):
    plain = saved(tmp_path / "plain", architecture)
    sae = saved(tmp_path / "sae", architecture, **options)
    rows = X.reshape(150, 2, 12) if "reshape_activations" in options else X
    encoded = matrix(encoder(sae, precision=precision)(rows))
    assert_same(encoded, sae.encode(rows))
    if rows is X:
        assert not np.allclose(encoded, plain.encode(X).numpy())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_iterations": 3},
        {"residual_threshold": 2.5},
        {"stop_on_duplicate_support": False, "max_iterations": 30},
    ],
    ids=str,
)
def test_matching_pursuit_is_its_definition_in_float64(options, tmp_path):
    """Row by row; SAELens goes on with a whole batch until its last row is done."""
    options = {"apply_b_dec_to_input": False, **options}
    folder = save_sae(tmp_path / "sae", "matching_pursuit", d_in=D_IN, d_sae=60, **options)
    directions = load_file(folder / "sae_weights.safetensors")["W_dec"]
    set_weights(folder, W_dec=directions / np.linalg.norm(directions, axis=1, keepdims=True))
    x = torch.cat([X[:40], torch.zeros(2, D_IN), -X[:1], 1e-3 * X[:1]])
    encoded = encoder(load_sae(folder, device="cpu"))(x)
    expected = encode64(folder, x.numpy())
    assert_same(matrix(encoded, 60), torch.from_numpy(expected), 1e-5)
    assert len({int(count) for count in encoded.indptr.diff()}) > 1


SEQUENCES = [[150], [1, 30, 70, 49], [50, 50, 50]]


@pytest.mark.parametrize("options", [{}, {"sae_diff_type": "relu"}, {"tied_weights": False}], ids=str)
@pytest.mark.parametrize("lengths", SEQUENCES, ids=str)
def test_temporal_autoencoders_read_sequences(lengths, options, tmp_path):
    """A sequence at a time from its beginning, as SAELens' own `encode` takes it, and no row sees another sequence."""
    sae = saved(tmp_path / "sae", "temporal", kval_topk=9, **options)
    encode = encoder(sae)
    with torch.no_grad():
        dense = torch.cat([sae.module.encode(part[None])[0] for part in X.split(lengths)])
    assert_same(matrix(encode(X, lengths)), dense)
    if len(lengths) == 1:
        assert_same(matrix(encode(X)), dense)
        assert_same(matrix(encode(X)), sae.encode(X))
    else:
        assert not np.allclose(matrix(encode(X, lengths)), matrix(encode(X)))
    if not options:
        assert (dense != 0).sum(1).max() == 9
    text = refused(RequestError, lambda: encode(X, [100]))
    assert text == "lengths add up to 100 rows and there are 150; give one per sequence"
    x = X.clone()
    x[131, 5] = torch.nan
    with pytest.raises(NotFinite, match=r"^row 131 is not finite$"):
        encode(x, lengths)
    x[131] = 3e38
    with torch.no_grad():  # attention carries it to the whole sequence
        first = next(i for i, part in enumerate(x.split(lengths)) if not sae.module.encode(part[None]).isfinite().all())
    with pytest.raises(NotFinite, match=rf"^row {sum(lengths[:first])} gives features that are not finite$"):
        encode(x, lengths)


def small_blocks(monkeypatch, size=1):
    """Lets blocks have 64 rows, or up to `size` bytes."""
    monkeypatch.setattr(encode, "_BLOCK_BYTES", size)
    monkeypatch.setattr(encode, "_FEATURE_BYTES", 0)


def test_rows_come_in_blocks_of_bounded_size(tmp_path, monkeypatch):
    sae = saved(tmp_path / "sae", "topk")
    blocks = []
    plain = choice.Linear.pre
    monkeypatch.setattr(choice.Linear, "pre", lambda self, x, out=None: blocks.append(len(x)) or plain(self, x, out))
    whole = encoder(sae, precision="float32")(X)
    assert blocks == [150]
    small_blocks(monkeypatch, 4 * D_SAE * 70)
    again = encoder(sae, precision="float32")(X)
    assert blocks == [150, 50, 50, 50]
    assert_same(matrix(whole), torch.from_numpy(matrix(again)))
    small_blocks(monkeypatch)
    assert encoder(sae, precision="float32").block_rows == 64
    assert_same(matrix(encoder(sae, precision="bfloat16")(X)), sae.encode(X))


@pytest.mark.parametrize("architecture", ["topk", "matching_pursuit", "temporal"])
def test_no_rows_have_no_features(architecture, tmp_path):
    encoded = encoder(saved(tmp_path / "sae", architecture))(X[:0])
    assert (encoded.indptr.tolist(), len(encoded.feature), len(encoded.value)) == ([0], 0, 0)


def test_half_precision_rows_count_as_float32(tmp_path):
    sae = saved(tmp_path / "sae", "topk")
    assert_same(matrix(encoder(sae)(X.half())), sae.encode(X.half().float()))


def test_a_hook_of_the_users_is_called(tmp_path):
    """The product and choice knows nothing of it, so the autoencoder itself encodes."""
    sae = saved(tmp_path / "sae", "jumprelu")
    sae.module.hook_sae_acts_pre.register_forward_hook(lambda _module, _inputs, pre: pre + 8)
    encode = encoder(sae)
    assert encode.linear is None
    assert_same(matrix(encode(X)), sae.encode(X))
    text = refused(RequestError, lambda: encoder(sae, TopK(3)))
    assert text == "SAE 'sae' (jumprelu) has no pre-activations to select from; leave sparsity out"


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
@pytest.mark.parametrize("way", ["medium", "newer"])
def test_lower_precision_asked_of_torch_changes_nothing(way, tmp_path):
    sae = saved(tmp_path / "sae", "topk")
    expected = matrix(encoder(sae)(X))
    matmul, mkldnn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = matmul.fp32_precision, mkldnn.fp32_precision
    if way == "medium":
        torch.set_float32_matmul_precision(way)
    else:
        matmul.fp32_precision, mkldnn.fp32_precision = "tf32", "bf16"
    matmul.allow_bf16_reduced_precision_reduction = False, False
    try:
        assert np.array_equal(matrix(encoder(sae)(X)), expected)
        assert (matmul.fp32_precision, mkldnn.fp32_precision) == ("tf32", "bf16")
        assert not matmul.allow_bf16_reduced_precision_reduction_split_k
        matmul.allow_bf16_reduced_precision_reduction = True
        encoder(sae)(X)
        assert matmul.allow_bf16_reduced_precision_reduction
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision, mkldnn.fp32_precision = before
        matmul.allow_bf16_reduced_precision_reduction = True


def test_precision_is_the_devices(tmp_path, monkeypatch):
    sae = saved(tmp_path / "sae", "topk")
    for features, capability, screened in (
        ({}, "AVX512", False),
        ({"avx512_bf16": True}, "AVX512", True),
        ({"amx_bf16": True}, "AVX512", True),
        ({"amx_bf16": True, "avx512_bf16": True}, "AVX2", False),  # ATEN_CPU_CAPABILITY=avx2
        ({"bf16": True}, "DEFAULT", True),  # ARM
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda answer=features: answer, raising=False)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda answer=capability: answer)
        assert fast_bfloat16(torch.device("cpu")) is screened
        assert (encoder(sae).screen is not None) is screened
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    assert not fast_bfloat16(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    assert fast_bfloat16(torch.device("cuda"))


def test_rows_that_bounds_do_not_settle_are_soon_encoded_without(tmp_path, monkeypatch):
    """Every feature the same: no bound tells them apart. After one block none is tried for 4 blocks, then for 8, also
    across calls; when bounds pay off, they stay."""
    sae = planted(tmp_path / "sae", "topk", np.hstack([np.ones((8, 200)), -np.eye(8)]), k=7)
    small_blocks(monkeypatch)
    tried = []
    plain = screen.Screen.extended
    monkeypatch.setattr(screen.Screen, "extended", lambda self, x, norm: tried.append(len(x)) or plain(self, x, norm))
    sae_encoder = encoder(sae, precision="bfloat16")
    hopeless, easy = torch.ones(64, 8), torch.full((64, 8), -1.0)  # 200 equal features, or 8
    for expected in [1, 0, 0, 0, 0, 1] + 8 * [0] + [1]:
        tried.clear()
        encoded = sae_encoder(hopeless)
        assert len(tried) == expected
        assert encoded.unsettled == 64
        assert_top(matrix(encoded, 208), np.where(np.arange(208) < 200, 8.0, 0) * np.ones((64, 1)), 7)
    tried.clear()
    encoded = sae_encoder(easy.repeat(18, 1))
    assert len(tried) == 2  # 16 blocks without
    assert encoded.unsettled == 16 * 64
    assert_top(matrix(encoded, 208), np.where(np.arange(208) < 200, 0, 1.0) * np.ones((18 * 64, 1)), 7)
    assert sae_encoder(torch.cat([easy, hopeless, hopeless])).unsettled == 128


# ---- other choices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk"])
def test_another_choice_is_made_of_the_same_pre_activations(architecture, precision, tmp_path):
    sae = saved(tmp_path / "sae", architecture)
    captured = {}
    with torch.no_grad():
        handle = sae.module.hook_sae_acts_pre.register_forward_hook(lambda _m, _i, pre: captured.update(pre=pre))
        sae.module.encode(X)
        handle.remove()
    pre = captured["pre"].numpy()
    rank = (-pre).argsort(1).argsort(1)
    assert_same(
        matrix(encoder(sae, TopK(7), precision)(X)), torch.from_numpy(np.where(rank < 7, np.maximum(pre, 0), 0))
    )
    threshold = torch.linspace(0, 20, D_SAE)
    encoded = encoder(sae, Above(threshold), precision)(X)
    assert_same(matrix(encoded), torch.from_numpy(pre * (pre > threshold.numpy())))
    size = np.abs(pre)
    chosen_entries = (-size).argsort(1).argsort(1) < 7
    assert_same(matrix(encoder(sae, AbsTopK(7), precision)(X)), torch.from_numpy(np.where(chosen_entries, pre, 0)))


def test_a_choice_out_of_range_is_refused(tmp_path):
    sae = saved(tmp_path / "sae", "topk")
    assert refused(RequestError, lambda: TopK(0)) == "k must be a whole number, at least 1, not 0"
    text = refused(RequestError, lambda: encoder(sae, precision="int4"))
    assert text == "precision must be float32 or bfloat16, not 'int4'"
    assert refused(RequestError, lambda: encoder(sae, TopK(501))).startswith("k is 501, but SAE 'sae' has only 500")
    edit_config(tmp_path / "sae", k=501)
    text = refused(DataError, lambda: load_sae(tmp_path / "sae", device="cpu"))
    assert text == "SAE 'sae': k is 501, but it has only 500 features; correct its settings"


# ---- rows made to go wrong --------------------------------------------------------------------------------


def planted(folder, architecture, weight, bias=0.0, **settings):
    """An autoencoder of these encoder weights (d_in, feature)."""
    settings = {"apply_b_dec_to_input": False, **settings}
    save_sae(folder, architecture, d_in=weight.shape[0], d_sae=weight.shape[1], **settings)
    return load_sae(set_weights(folder, W_enc=weight, b_enc=np.full(weight.shape[1], bias)), device="cpu")


def assert_top(encoded, pre, k):
    """k entries a row where so many are above 0, each its pre-activation, none smaller than one left out."""
    pre = np.maximum(pre, 0)
    assert np.array_equal((encoded != 0).sum(1), np.minimum(k, (pre > 0).sum(1)))
    slack = 1e-6 * pre.max(1, keepdims=True, initial=1e-30)
    assert (np.abs(np.where(encoded != 0, encoded - pre, 0)) <= slack).all()
    least = np.sort(pre, 1)[:, -k:].min(1, keepdims=True)
    assert (np.where(encoded != 0, pre, np.inf) >= least - slack).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ties_at_the_last_place_take_any_of_them(precision, tmp_path):
    weight = np.tile(np.random.default_rng(1).normal(size=(8, 8)), 25)
    sae = planted(tmp_path / "sae", "topk", weight, k=7)
    x = np.random.default_rng(2).integers(-3, 4, (50, 8)).astype(np.float32)
    encoded = encoder(sae, precision=precision)(torch.from_numpy(x))
    assert_top(matrix(encoded, 200), x.astype(np.float64) @ weight.astype(np.float32), 7)
    assert encoded.unsettled == 0


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES[:-1], *TRANSCODERS])
def test_rows_below_every_threshold_are_empty(architecture, precision, tmp_path):
    sae = saved(tmp_path / "sae", architecture, apply_b_dec_to_input=False)
    biases = [name for name, _ in sae.module.named_parameters() if name.startswith("b_") and name != "b_dec"]
    low = dict.fromkeys(biases, np.full(D_SAE, -1e4))
    low = load_sae(set_weights(tmp_path / "sae", **low), device="cpu")
    encoded = matrix(encoder(low, precision=precision)(X))
    assert_same(encoded, low.encode(X))
    assert (encoded != 0).any() == (architecture == "abstopk")
    rows = torch.zeros(5, D_IN)
    zero = load_sae(set_weights(tmp_path / "sae", **dict.fromkeys(biases, np.zeros(D_SAE))), device="cpu")
    assert matrix(encoder(zero, precision=precision)(rows)).any() == bool(zero.encode(rows).any())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("gap", [1e-3, 1e-5])
def test_a_near_tie_at_the_last_place_is_told_apart(gap, precision, tmp_path):
    """Two hundred features closer to each other than bfloat16 tells, and float32 does."""
    random = np.random.default_rng(3)
    x = random.normal(size=(40, 64)).astype(np.float32)
    direction = random.normal(size=(64, 1))
    ladder = 1 + gap * random.permutation(200)
    sae = planted(tmp_path / "sae", "topk", direction * ladder, k=9)
    encoded = encoder(sae, precision=precision)(torch.from_numpy(x))
    weight = (direction * ladder).astype(np.float32).astype(np.float64)
    pre = x.astype(np.float64) @ weight
    expected = ((-pre).argsort(1).argsort(1) < 9) & (pre > 0)
    assert np.array_equal(matrix(encoded, 200) != 0, expected)
    assert (encoded.unsettled > 0) == (precision != "float32")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_pre_activation_at_its_threshold_is_off(precision, tmp_path):
    """Whole numbers, exact in any order: SAELens keeps what is above the threshold, and what is at it not."""
    random = np.random.default_rng(4)
    weight, x = random.integers(-2, 3, (16, 300)), random.integers(-2, 3, (60, 16)).astype(np.float32)
    sae = planted(tmp_path / "sae", "jumprelu", weight, bias=1.0)
    sae = load_sae(set_weights(tmp_path / "sae", threshold=np.full(300, 17.0)), device="cpu")
    pre = x @ weight + 1
    assert (pre == 17).sum() > 20
    assert np.array_equal(matrix(encoder(sae, precision=precision)(torch.from_numpy(x)), 300), pre * (pre > 17))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *TRANSCODERS])
def test_a_row_that_is_not_finite_is_named(architecture, tmp_path):
    encode = encoder(saved(tmp_path / "sae", architecture))
    for value in (np.nan, np.inf, -np.inf):
        x = X.clone()
        x[131, 5] = value
        with pytest.raises(NotFinite, match=r"^row 131 is not finite$") as raised:
            encode(x)
        assert (raised.value.row, raised.value.features) == (131, False)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES[:-1], *TRANSCODERS])
def test_features_that_are_not_finite_are_named_by_row(architecture, precision, tmp_path, monkeypatch):
    small_blocks(monkeypatch)  # several blocks: the row is that of all rows
    sae = saved(tmp_path / "sae", architecture)
    x = X.clone()
    x[131] *= 3e38 / 10
    assert not sae.encode(x).isfinite().all()
    with pytest.raises(NotFinite, match=r"^row 131 gives features that are not finite$"):
        encoder(sae, precision=precision)(x)
    x[131] = X[131] * 1e30  # large, and nothing overflows
    assert_same(matrix(encoder(sae, precision=precision)(x)), sae.encode(x))
    zero = saved(tmp_path / "zero", architecture, normalize_activations="constant_norm_rescale")
    x[131] = 0  # divided by its norm
    with pytest.raises(NotFinite, match=r"^row 131 gives features"):
        encoder(zero, precision=precision)(x)


def test_weights_that_are_not_finite_are_left_to_the_autoencoder(tmp_path):
    sae = saved(tmp_path / "sae", "standard")
    sae.module.W_enc.data[3, 7] = torch.nan
    assert encoder(sae).linear is None
    with pytest.raises(NotFinite, match=r"^row 0 gives features that are not finite$"):
        encoder(sae)(X)


# ---- the bound --------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0),
    d_in=st.integers(1, 70),
    spread=st.floats(0, 4),
    shift=st.sampled_from([0, 1, 1000]),
    scaled=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_a_bound_is_never_below(seed, d_in, spread, shift, scaled):
    """Against float64: coordinates of very different sizes, and sums that cancel."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(20, d_in)) * np.exp(spread * random.normal(size=d_in)) + shift
    weight = random.normal(size=(d_in, 50)) * np.exp(spread * random.normal(size=50))
    weight[:, 1::2] = -weight[:, ::2] * (1 + 1e-3 * random.normal(size=25))
    bias, threshold = random.normal(size=50), np.exp(random.normal(size=50))
    scale = np.exp(random.normal(size=50))
    x, weight, bias, threshold, scale = (part.astype(np.float32) for part in (x, weight, bias, threshold, scale))
    linear = choice.Linear(*map(torch.from_numpy, (weight, bias)), torch.from_numpy(scale) if scaled else None)
    bound = screen.make_screen(linear, Above(torch.from_numpy(threshold)))
    bounds = bound.bounds(torch.from_numpy(x)).double().numpy()
    double = partial(np.asarray, dtype=np.float64)
    exact = (double(x) @ double(weight) + bias) * (double(scale) if scaled else 1) - threshold
    assert (bounds + np.abs(bounds) / 256 >= exact).all()
    size = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(weight, axis=0) + np.abs(bias)
    assert (bounds - exact <= 0.02 * (size * (scale if scaled else 1) + threshold)).all()


@given(
    seed=st.integers(0),
    architecture=st.sampled_from(["standard", "gated", "topk", "jumprelu"]),
    precision=st.sampled_from(PRECISIONS),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 120)),
    few=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_any_small_autoencoder(seed, architecture, precision, shape, few, loose):
    """Weights of a few values give ties, and pre-activations of 0, at every place."""
    rows, d_in, d_sae = shape
    random = np.random.default_rng(seed)

    def numbers(*shape):
        return (random.integers(-2, 3, shape) / 2 if few else random.normal(size=shape)).astype(np.float32)

    module = loose[architecture](d_in, d_sae, int(random.integers(1, d_sae + 1)))
    for name, part in module.named_parameters():
        part.data.copy_(torch.from_numpy(numbers(*part.shape) * (0 if name == "r_mag" and few else 1)))
    sae = load_sae("demo", device="cpu")
    sae = replace(sae, module=module.eval().requires_grad_(False))
    x = torch.from_numpy(numbers(rows, d_in))
    encoded = matrix(encoder(sae, precision=precision)(x), d_sae)
    dense = sae.encode(x)
    if architecture == "topk":
        with torch.no_grad():
            pre = module.process_sae_in(x).double() @ module.W_enc.double() + module.b_enc.double()
        k = module.cfg.k
        if few:
            assert_top(encoded, pre.numpy(), k)
        assert np.allclose(np.sort(encoded, 1), np.sort(dense.numpy(), 1), rtol=0, atol=1e-5)
    elif few:
        assert np.array_equal(encoded, dense.numpy())
    else:
        np.testing.assert_allclose(encoded, dense, rtol=0, atol=2e-6 * max(1.0, float(dense.max())) * d_in**0.5)


@pytest.fixture(scope="module")
def loose():
    """Modules of each architecture by their sizes, without files."""
    from sae_lens.registry import get_sae_class

    def of(architecture):
        kind, config = get_sae_class(architecture)
        return lambda d_in, d_sae, k: kind(
            config(d_in=d_in, d_sae=d_sae, **({"k": k} if architecture == "topk" else {}))
        )

    return {architecture: of(architecture) for architecture in ("standard", "gated", "topk", "jumprelu")}
