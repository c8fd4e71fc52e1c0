"""The token microscope: planted linear steps, moved tokens, kept contexts, classes, and every setting."""

from __future__ import annotations

import numpy as np
import pytest
from planted import linear_unembed, planted_store
from refusals import refused

from workbench.analysis.token_classes import TOKEN_CLASSES, token_classes
from workbench.io.errors import RequestError
from workbench.probes import TokenMicroscope
from workbench.probing import document_folds
from workbench.testing import ProbeContract

D, DOCUMENTS, LENGTH = 10, 20, 50
DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(DOCUMENTS * LENGTH, D)) * np.linspace(3, 1, D)
MAP = DRAW.normal(size=(D, D))
ALL = {"where": None, "resamples": 50, "dimension_rows": 300}


def store_of(path, *layers, ids=None, columns=None, words=None):
    ids = DRAW.integers(0, 6, (DOCUMENTS, LENGTH)).tolist() if ids is None else ids
    sites = {f"resid_post.{layer}": values for layer, values in enumerate(layers)}
    return planted_store(path, ids, sites, linear_unembed(np.eye(6, D), words), columns=columns)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A linear step, a linear one with noise, and one to nothing that has to do with it."""
    linear = X @ MAP + 5
    noisy = linear + 4 * DRAW.normal(size=X.shape)
    return store_of(tmp_path_factory.mktemp("m") / "s", X, linear, noisy, DRAW.normal(size=X.shape))


class TestContract(ProbeContract):
    probe = TokenMicroscope
    settings = {"resamples": 20, "epochs": 2, "dimension_rows": 100}  # noqa: RUF012

    @pytest.fixture
    def store(self, store):
        return store


def normalised(x):
    x = x - x.mean(0)
    return x / np.linalg.norm(x)


def test_linearity_of_planted_steps(store):
    """The floor of independent Gaussians is d / (n - 1)."""
    data = TokenMicroscope(**ALL, epochs=0).run(store).data
    assert float(data["noise"]) == pytest.approx(D / (len(X) - 1))
    states = [store["resid_post", layer][:].double().numpy() for layer in range(4)]
    for layer in range(3):
        x, y = normalised(states[layer]), normalised(states[layer + 1])
        fit, *_ = np.linalg.lstsq(x, y, rcond=None)
        assert float(data["linearity"][layer]) == pytest.approx(1 - ((x @ fit - y) ** 2).sum(), abs=1e-9)
        errors = np.linalg.norm(x @ fit - y, axis=1)
        np.testing.assert_allclose(data["nonlinearity"][layer], errors, atol=1e-6)
        np.testing.assert_allclose(
            data["nonlinearity_relative"][layer], errors / np.linalg.norm(y, axis=1), rtol=1e-3, atol=1e-5
        )
        step = normalised(y - x)
        fit, *_ = np.linalg.lstsq(x, step, rcond=None)
        assert float(data["linearity_step"][layer]) == pytest.approx(1 - ((x @ fit - step) ** 2).sum(), abs=1e-9)
        assert float(data["linearity_shuffled"][layer]) == pytest.approx(D / (len(X) - 1), abs=0.008)
    assert float(data["linearity"][0]) == pytest.approx(1, abs=1e-9)
    assert float(data["linearity"][2]) == pytest.approx(D / (len(X) - 1), abs=0.006)
    assert float(data["linearity_heldout"][0]) == pytest.approx(1, abs=1e-9)
    assert abs(float(data["linearity_heldout"][2])) < 0.03
    assert float(data["linearity_heldout"][1]) < float(data["linearity"][1])
    assert np.isnan(data["linearity"][3])
    for layer, state in enumerate(states):
        values = np.linalg.svd(normalised(state), compute_uv=False) ** 2
        assert float(data["anisotropy"][layer]) == pytest.approx(values[0] / values.sum(), rel=1e-9)
    assert float(data["isotropic_anisotropy"]) == pytest.approx((1 + (D / len(X)) ** 0.5) ** 2 / D)
    assert float(data["anisotropy"][3]) == pytest.approx(float(data["isotropic_anisotropy"]), abs=0.01)


def test_maps_of_layers_without_full_rank_are_the_smallest_ones(tmp_path):
    flat = X.copy()
    flat[:, -3:] = flat[:, :3] @ DRAW.normal(size=(3, 3))
    after = flat @ MAP + DRAW.normal(size=X.shape)
    store = store_of(tmp_path / "s", flat, after)
    data = TokenMicroscope(**ALL, folds=4, epochs=0).run(store).data
    x, y = (normalised(store["resid_post", layer][:].double().numpy()) for layer in (0, 1))
    document = store.tokens["document"].to_numpy()
    fold = document_folds(document, 4, 0)
    lost = 0.0
    for test_fold in range(4):
        rest = fold != test_fold
        fit = np.linalg.pinv(x[rest], rcond=1e-5) @ y[rest]
        lost += ((x[~rest] @ fit - y[~rest]) ** 2).sum()
    assert float(data["linearity_heldout"][0]) == pytest.approx(1 - lost, abs=1e-7)
    fit = np.linalg.pinv(x, rcond=1e-5) @ y
    np.testing.assert_allclose(data["nonlinearity"][0], np.linalg.norm(x @ fit - y, axis=1), atol=1e-6)
    assert float(data["linearity"][0]) == pytest.approx(1 - ((x @ fit - y) ** 2).sum(), abs=1e-7)


def test_a_moved_token_has_the_largest_nonlinearity(tmp_path):
    y = X @ MAP
    y[417] += 30
    result = TokenMicroscope(**ALL, epochs=0).run(store_of(tmp_path / "s", X, y))
    assert int(result.data["nonlinearity"][0].to_numpy().argmax()) == 417
    assert int(result.table["nonlinearity"].idxmax()) == 417


def test_the_dimension_is_that_of_the_papers_estimator(tmp_path):
    cube = np.random.default_rng(0).random((1000, 5)) @ np.linalg.qr(DRAW.normal(size=(D, 5)))[0].T
    data = TokenMicroscope(**{**ALL, "dimension_rows": 1000}, epochs=0).run(store_of(tmp_path / "s", cube, X)).data
    assert float(data["intrinsic_dimension"][0]) == pytest.approx(5, abs=0.5)
    line = np.outer(np.random.default_rng(0).random(1000), np.arange(1, D + 1))
    data = TokenMicroscope(**ALL, epochs=0).run(store_of(tmp_path / "t", line, X)).data
    assert float(data["intrinsic_dimension"][0]) == pytest.approx(1, abs=0.15)
    assert float(data["anisotropy"][0]) == pytest.approx(1, abs=1e-9)  # rank 1


@pytest.fixture(scope="module")
def remembering(tmp_path_factory):
    """States that hold the token before exactly on tokens 0 to 2 and not at all on tokens 3 to 5, which also step
    far from linearly; the two tokens before that are held nowhere."""
    ids = np.random.default_rng(3).integers(0, 6, (DOCUMENTS, LENGTH))
    before = np.roll(ids, 1, axis=1)
    forgets = (ids > 2).ravel()
    states = np.zeros((ids.size, D))
    states[np.arange(ids.size), before.ravel()] = 3
    states[forgets, :6] = 0
    states += 0.05 * DRAW.normal(size=states.shape)
    after = states @ MAP + np.where(forgets[:, None], 3, 0.1) * DRAW.normal(size=states.shape)
    columns = {"kind": ["forgets" if forgetting else "keeps" for forgetting in forgets]}
    path = tmp_path_factory.mktemp("memory") / "s"
    return store_of(path, states, after, ids=ids.tolist(), columns=columns)


MEMORY = {"offsets": (-1,), "memory_layer": 0, "epochs": 40, "learning_rate": 0.1, "label": "kind", "resamples": 100}


def test_contextual_memory_is_low_where_the_context_is_kept(remembering):
    data = TokenMicroscope(**MEMORY).run(remembering).data
    keeps = data.sel({"class": "keeps"})
    lost = data.sel({"class": "forgets"})
    assert float(keeps["class_memory"]) < 0.15
    assert float(lost["class_memory"]) == pytest.approx(np.log(6), abs=0.15)
    assert float(data["memory_unigram"]) == pytest.approx(np.log(6), abs=0.05)
    assert float(lost["class_nonlinearity"]) > 5 * float(keeps["class_nonlinearity"])
    assert float(data["correlation"]) > 0.8
    assert float(data["correlation_low"]) > 0.7
    assert abs(float(data["correlation_within"])) < 0.2  # all of it lies between the classes
    assert int(data["memory_rows"]) == int(data["contextual_memory"].notnull().sum()) == 6 * (LENGTH - 1)
    assert float(data["coverage"]) == 1
    far = TokenMicroscope(**{**MEMORY, "offsets": (-2,)}).run(remembering).data
    assert float(far["class_memory"].sel({"class": "keeps"})) == pytest.approx(np.log(6), abs=0.15)
    data = TokenMicroscope(**{**MEMORY, "held_out": 0.5}).run(remembering).data
    assert int(data["memory_rows"]) == 10 * (LENGTH - 1)


def test_the_correlation_is_pearsons_over_tokens(remembering):
    result = TokenMicroscope(**MEMORY).run(remembering)
    table = result.table.dropna(subset=["contextual_memory"])
    pearson = np.corrcoef(table["nonlinearity"], table["contextual_memory"])[0, 1]
    assert float(result.data["correlation"]) == pytest.approx(pearson, abs=1e-6)
    means = table.groupby("class")[["nonlinearity", "contextual_memory"]].transform("mean")
    within = np.corrcoef(*(table[["nonlinearity", "contextual_memory"]] - means).to_numpy().T)[0, 1]
    assert float(result.data["correlation_within"]) == pytest.approx(within, abs=1e-6)


def test_settings_matter(store, tmp_path):
    first = TokenMicroscope(epochs=0).run(store).data
    assert int(first["rows"]) == DOCUMENTS * (LENGTH - 1)  # first tokens are left out
    assert TokenMicroscope(epochs=0, detail=7).run(store).data.sizes["row"] == 7
    assert "contextual_memory" in first
    assert "correlation" not in first
    two = TokenMicroscope(epochs=0, folds=2).run(store).data["linearity_heldout"]
    assert float(two[1]) != float(first["linearity_heldout"][1])
    second = TokenMicroscope(epochs=0, seed=4, dimension_rows=100).run(store).data
    assert float(second["linearity_shuffled"][0]) != float(first["linearity_shuffled"][0])
    assert float(second["intrinsic_dimension"][0]) != float(first["intrinsic_dimension"][0])
    two_layers = TokenMicroscope(epochs=0, layers=(0, 2)).run(store)
    assert "steps from layers 0 span several blocks" in two_layers.headline()
    assert int(TokenMicroscope(**{**ALL, "epochs": 1}).run(store).data["memory_layer"]) == 1
    massive = X.copy()
    massive[::LENGTH] = 1e4
    massive_store = store_of(tmp_path / "s", massive, np.where(massive > 1e3, massive, DRAW.normal(size=X.shape)))
    assert float(TokenMicroscope(where=None, epochs=0).run(massive_store).data["linearity"][0]) > 0.999
    assert float(TokenMicroscope(epochs=0).run(massive_store).data["linearity"][0]) < 0.05


def test_refusals_say_what_to_do(store, tmp_path):
    few = TokenMicroscope(where="document < 1", epochs=0)
    assert "49 tokens are too few for maps of 10 dimensions" in refused(
        RequestError, lambda: TokenMicroscope(where="document < 1 AND position > 0", epochs=0).run(store)
    )
    assert few.run(store).data["linearity_heldout"].isnull().all()  # one document
    assert "label='pos' is no column" in refused(RequestError, lambda: TokenMicroscope(label="pos").run(store))
    assert "memory_layer 9 was not read" in refused(RequestError, lambda: TokenMicroscope(memory_layer=9).run(store))
    flat = store_of(tmp_path / "s", X, 0 * X)
    assert "resid_post.1 is the same for all" in refused(RequestError, lambda: TokenMicroscope().run(flat))
    assert "two layers" in refused(RequestError, lambda: TokenMicroscope(layers=(1,)).run(store))
    for setting in ({"offsets": ()}, {"offsets": (1,)}, {"folds": 1}, {"held_out": 0.7}, {"rows_per_dimension": 0}):
        refused(RequestError, lambda setting=setting: TokenMicroscope(**setting))


def test_classes_of_tokens_by_their_text(tmp_path):
    words = ["<s>", " The", " un", "likely", " to", "\n", ",", " 12", " was", " cat", "'s", " an", "swer"]
    ids = [list(range(13))]
    path = tmp_path / "s"
    store = planted_store(path, ids, {"resid_post.0": np.zeros((13, 2))}, linear_unembed(np.eye(13, 2), words))
    names, index = token_classes(store, np.arange(1, 13))
    assert names == TOKEN_CLASSES
    assert [names[name] for name in index] == [
        *("determiner", "other word", "piece of a word", "preposition", "newline", "punctuation", "number"),
        *("auxiliary", "other word", "other word", "other word", "piece of a word"),
    ]
