"""Tests of the sparsity rules: the selection equals that of sorting, for every order and division of the rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from sae_example import save_sae
from store_example import values, write_store

from workbench.cli.main import main
from workbench.features import encoding
from workbench.features.extract import extract_features
from workbench.features.feature_store import open_features
from workbench.io.errors import RequestError
from workbench.sae.choice import TopK
from workbench.sae.load import load_sae
from workbench.sae.sparsity import Bound, FeatureChoice, MutualChoice, find_cut, sparsity_record
from workbench.store.manifest import SiteRecord
from workbench.store.reader import open_store

SITE = SiteRecord("blocks.1.hook_resid_post", "resid_post.1", ("row", "d_model"), (8,), "float32")
ROWS, FEATURES = 51, 20


def chosen(pre: np.ndarray, sparsity) -> np.ndarray:
    """Selected pre-activations (row, feature), by sorting them; ties in the order of rows, then features."""
    if isinstance(sparsity, FeatureChoice):
        quota = sparsity.k * pre.shape[0] // pre.shape[1]
        rank = np.argsort(np.argsort(-pre, axis=0, kind="stable"), axis=0)
    else:
        quota = sparsity.k * len(pre)
        rank = np.argsort(np.argsort(-pre.reshape(-1), kind="stable")).reshape(pre.shape)
    return np.where(rank < quota, np.maximum(pre, 0), 0)


def pieces(pre: np.ndarray, sizes: int):
    """The entries above 0, some rows at a time."""
    for first in range(0, len(pre), sizes):
        row, feature = np.nonzero(pre[first : first + sizes] > 0)
        yield feature.astype(np.uint16), pre[first + row, feature].astype(np.float32)


@given(
    rows=st.integers(1, 40),
    features=st.integers(1, 12),
    k=st.integers(1, 12),
    sizes=st.integers(1, 40),
    few=st.booleans(),
    mutual=st.booleans(),
    seed=st.integers(0),
)
@settings(max_examples=120, deadline=None)
def test_a_cut_is_what_sorting_gives(rows, features, k, sizes, few, mutual, seed):
    random = np.random.default_rng(seed)
    pre = random.integers(-2, 4, (rows, features)) if few else random.normal(size=(rows, features))
    pre = pre.astype(np.float32)
    if not mutual and k * rows < features:
        k = features
    sparsity = (MutualChoice if mutual else FeatureChoice)(k)
    quotas = sparsity.quotas(rows, features)
    stretches = list(pieces(pre, sizes))
    cut = find_cut(lambda: stretches, quotas)
    cut_rows = np.zeros((rows, features), np.float32)
    places = [np.argwhere(pre[first : first + sizes] > 0) + np.array([first, 0]) for first in range(0, rows, sizes)]
    for place, mask in zip(places, cut.masks(stretches), strict=True):
        cut_rows[tuple(place[mask].T)] = pre[tuple(place[mask].T)]
    assert np.array_equal(cut_rows, chosen(pre, sparsity))
    assert cut.entries == np.count_nonzero(cut_rows)


@given(seed=st.integers(0), mutual=st.booleans(), spread=st.floats(0, 3), k=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_what_a_bound_leaves_out_would_not_have_stayed(seed, mutual, spread, k):
    """Rows that grow or shrink on the way, features of any scale, and the first ones not like the rest."""
    random = np.random.default_rng(seed)
    pre = random.normal(size=(300, 6)) * np.exp(spread * random.normal(size=6)) * np.linspace(0.2, 2, 300)[:, None]
    pre = pre[:: random.choice([-1, 1])].astype(np.float32)
    sparsity = (MutualChoice if mutual else FeatureChoice)(k)
    expected, bound, rises = chosen(pre, sparsity), None, []
    for first in range(0, 300, 25):
        part = pre[first : first + 25]
        threshold = np.zeros(6, np.float32) if bound is None else bound.threshold()
        assert ((expected[first : first + 25] == 0) | (part > threshold)).all()
        rises.append(threshold)
        row, feature = np.nonzero((part > 0) & (part > threshold))
        entries = feature, part[row, feature]
        bound = bound or Bound(sparsity.quotas(300, 6), 6, entries)
        bound.add(entries)
    assert (np.diff(rises, axis=0) >= 0).all()


def test_a_bound_rises():
    """Else everything would be kept to the end: of 30,000 entries that stay at 5 a row it passes a few thousand."""
    pre = np.random.default_rng(0).normal(size=(1000, 30)).astype(np.float32)
    for sparsity in (MutualChoice(2), FeatureChoice(2)):
        bound, checks = None, 0
        for feature, value in pieces(pre, 50):
            if bound:
                on = value > np.broadcast_to(bound.threshold(), 30)[feature]
                feature, value = feature[on], value[on]
            checks += len(value)
            bound = bound or Bound(sparsity.quotas(1000, 30), 30, (feature, value))
            bound.add((feature, value))
        assert 2000 < checks < 9000


# ---- of a store -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("stores") / "x.acts"
    return open_store(write_store(path, [[7, 9], [12], [3, 1, 14], [5]], sites=(SITE,)))


@pytest.fixture(scope="module", params=["topk", "jumprelu", "gated"])
def sae(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saes") / request.param
    return load_sae(save_sae(folder, request.param, hook_name=SITE.name, model_name="demo"), device="cpu")


def pre_activations(sae) -> np.ndarray:
    """Those that SAELens' own hook point sees."""
    blocks = []
    handle = sae.module.hook_sae_acts_pre.register_forward_hook(lambda _module, _inputs, pre: blocks.append(pre))
    with torch.no_grad():
        sae.module.encode(torch.from_numpy(values(SITE, 0, ROWS)))
    handle.remove()
    return blocks[0].numpy()


@pytest.mark.parametrize("sparsity", [TopK(4), MutualChoice(4), FeatureChoice(4)], ids=repr)
def test_a_rule_applies_to_a_store_as_a_whole(sparsity, store, sae, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "SEGMENT_ROWS", 13)
    features = extract_features(store, sae, out=tmp_path / "f", sparsity=sparsity, show_progress=False)
    pre, dense = pre_activations(sae), features[:].toarray()
    if isinstance(sparsity, TopK):
        expected = np.where((-pre).argsort(1).argsort(1) < 4, np.maximum(pre, 0), 0)
    else:
        expected = chosen(pre, sparsity)
    assert np.array_equal(dense != 0, expected != 0)
    np.testing.assert_allclose(dense, expected, rtol=1e-4, atol=1e-4)
    active = dense != 0
    if isinstance(sparsity, TopK):
        assert active.sum(1).max() == 4
    elif isinstance(sparsity, MutualChoice):
        assert active.sum() == 4 * ROWS
        assert active.sum(1).max() > 4  # a row may have more than its share
    else:
        assert (active.sum(0) == np.minimum(4 * ROWS // FEATURES, (pre > 0).sum(0))).all()
    half = extract_features(store, sae, out=tmp_path / "h", sparsity=sparsity, dtype="float16", show_progress=False)
    assert np.array_equal(half[:].indices, features[:].indices)


def test_another_sparsity_rule_makes_other_features(store, sae, tmp_path):
    def extract(**settings):
        return extract_features(store, sae, show_progress=False, **settings)

    allocated = extract(out=tmp_path / "f", sparsity=MutualChoice(3))
    assert allocated.record.sae.name == f"{sae.name}-mutual-choice-3"
    assert allocated.record.sae.config["allocation"] == {"choice": "mutual-choice", "k": 3}
    assert extract(out=tmp_path / "f", sparsity=MutualChoice(3)).record == allocated.record
    for rule in (None, MutualChoice(4), FeatureChoice(3), TopK(3)):
        text = refused(RequestError, lambda rule=rule: extract(out=tmp_path / "f", sparsity=rule))
        assert text.startswith(f"features f exist and differ: SAE is {sae.name}-mutual-choice-3 (")
    assert sparsity_record(TopK(5)) == {"choice": "topk", "k": 5}


def test_sparsity_rules_out_of_range_are_refused(store, sae, tmp_path):
    for kind in (TopK, MutualChoice, FeatureChoice):
        assert refused(RequestError, lambda kind=kind: kind(0)) == "k must be a whole number, at least 1, not 0"
    assert refused(RequestError, lambda: FeatureChoice(1).quotas(3, 20)) == (
        "FeatureChoice: k 1 on 3 rows leaves less than one entry for each of 20 features; k must be at least 7"
    )
    pursuit = load_sae(save_sae(tmp_path / "mp", "matching_pursuit", hook_name=SITE.name), device="cpu")
    text = refused(RequestError, lambda: extract_features(store, pursuit, sparsity=MutualChoice(3)))
    assert text == "SAE 'mp' (matching_pursuit) has no pre-activations to select from; leave sparsity out"


def test_the_command_allocates(store, tmp_path, capsys):
    save_sae(tmp_path / "sae", "topk", hook_name=SITE.name, model_name="demo")
    command = [
        "features",
        str(store.path),
        "--sae",
        str(tmp_path / "sae"),
        "--out",
        str(tmp_path / "f"),
        "--device",
        "cpu",
    ]
    for extra, message in (
        (["--sparsity", "mutual-choice"], "--sparsity mutual-choice needs a --k"),
        (["--k", "3"], "--sparsity sae takes no --k"),
        (["--sparsity", "topk", "--k", "0"], "--k must be a whole number, at least 1, not 0"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*command, *extra])
        assert (stopped.value.code, capsys.readouterr().err) == (2, f"workbench: {message}\n")
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--sparsity", "mutual-choice", "--k", "2"])
    assert stopped.value.code == 0
    assert open_features(tmp_path / "f", store).record.entries == 2 * ROWS
