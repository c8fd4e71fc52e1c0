"""k-sparse probes against dense float64 NumPy, planted labels, and shuffled ones."""

import numpy as np
import pytest
from command_line import run
from refusals import refused
from scipy.sparse import csr_array

from workbench.analysis import sparse_probe as module
from workbench.analysis.logistic import fit_logistic
from workbench.analysis.sparse_probe import sparse_probe
from workbench.io.errors import RequestError


def newton(x, y, penalty=1.0):
    """Coefficients and intercept of the balanced, penalised logistic regression, by Newton's method."""
    x = np.column_stack([x, np.ones(len(x))])
    weight = len(y) / (2 * np.where(y, y.sum(), (~y).sum()))
    ridge = penalty * np.diag([*[1.0] * (x.shape[1] - 1), 0.0])
    beta = np.zeros(x.shape[1])
    for _ in range(200):
        p = 1 / (1 + np.exp(-x @ beta))
        gradient = x.T @ (weight * (p - y)) + ridge @ beta
        step = np.linalg.solve(x.T @ ((weight * p * (1 - p))[:, None] * x) + ridge, gradient)
        beta = beta - step * min(1.0, 5 / np.abs(step).max())
    return beta[:-1], beta[-1]


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_logistic_regression_equals_newtons_method(scale):
    draw = np.random.default_rng(0)
    x = draw.normal(size=(200, 4)) * [scale, 1, 0.1, 1] * (draw.random((200, 4)) < 0.5)
    y = x[:, 0] / scale + x[:, 1] + draw.normal(size=200) > 0.8
    expected = newton(x, y)
    weight = draw.integers(1, 4, 200)
    for rows in (x, csr_array(x)):
        fitted = fit_logistic(rows, y)
        np.testing.assert_allclose(fitted[0], expected[0], rtol=1e-3, atol=1e-4)
        assert fitted[1] == pytest.approx(expected[1], abs=1e-3)
        repeated = newton(np.repeat(x, weight, axis=0), np.repeat(y, weight))
        weighted = fit_logistic(rows, y, weight)
        np.testing.assert_allclose(weighted[0], repeated[0], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def features(feature_stores):
    return feature_stores["middle"][0]


def test_a_probe_equals_dense_numpy(features, monkeypatch):
    monkeypatch.setattr(module, "_CELLS", 40)  # several groups of features
    x = features[:].toarray().astype(np.float64)
    tokens = features.store.tokens.to_pandas()
    text = ~tokens["is_special"].to_numpy()
    label = np.where(tokens["position"] % 3 == 0, "third", None)
    probes = sparse_probe(features, {"third": label}, k=(1, 3), least=5, held_out=0.5, seed=3, show_progress=False)
    assert probes.documents == (2, 2)
    known = np.random.default_rng(3).permutation(np.unique(tokens["document"]))
    test = text & tokens["document"].isin(known[:2]).to_numpy()
    train, truth = text & ~test, label == "third"
    gap = np.abs(x[train & truth].mean(0) - x[train & ~truth].mean(0))
    with np.errstate(invalid="ignore"):
        order = np.argsort(-np.nan_to_num(gap / x[train].std(0)), kind="stable")
    for line in probes.table.itertuples():
        chosen = order[: line.k]
        assert line.features == tuple(chosen)
        coefficients, intercept = newton(x[train][:, chosen], truth[train])
        predicted = x[test][:, chosen] @ coefficients + intercept > 0
        hits = (predicted & truth[test]).sum()
        assert line.f1 == pytest.approx(2 * hits / (predicted.sum() + truth[test].sum()))
        assert line.accuracy == pytest.approx((predicted == truth[test]).mean())
        share = truth[test].mean()
        assert (line.tokens, line.always_f1) == (truth[test].sum(), pytest.approx(2 * share / (1 + share)))
        assert line.f1_low <= line.f1 <= line.f1_high
    assert probes.shuffled == {"third": "tokens"}


def test_a_planted_label_is_found_and_a_shuffled_one_is_not(features):
    counts = features.counts
    feature = int(np.argsort(-np.where(counts < 0.6 * len(features), counts, 0))[0])
    rows, values = features.rows_of(feature)
    label = np.zeros(len(features), bool)
    label[rows[values > np.median(values)]] = True
    probes = sparse_probe(features, {"planted": label}, k=(1, 2, 5), least=4, held_out=0.5, show_progress=False)
    line = probes.table[probes.table["value"] & (probes.table["k"] == 1)].iloc[0]
    assert line["features"] == (feature,)
    assert line["f1"] > 0.85
    assert line["shuffled_f1"] < 0.75
    figure = probes.figure("planted")
    assert {trace.name for trace in figure.data} == {"True", "True, shuffled", "False", "False, shuffled"}
    drawn = next(trace for trace in figure.data if trace.name == "True")
    np.testing.assert_allclose(drawn.y, probes.table[probes.table["value"]]["f1"])


def test_documents_are_shuffled_where_a_document_has_one_value(features):
    document = features.store.tokens["document"].to_numpy()
    probes = sparse_probe(
        features, {"kind": np.where(document % 2, "a", "b")}, k=[2], least=2, held_out=0.5, seed=1, show_progress=False
    )
    assert probes.shuffled == {"kind": "documents"}


def test_probes_that_cannot_be_trained_are_refused(features):
    rows = len(features)
    for labels, settings, message in (
        ("nothing", {}, "labels: no column 'nothing'"),
        ({"a": np.arange(rows) < 8}, {"least": 5}, "labels: no value has 5 tokens, and some in training"),
        ({"a": [None] * rows}, {}, "labels: no value has 20 tokens"),
        ("token", {"k": [0]}, "k must be a whole number, from 1 to 64, not 0"),
        ("token", {"k": []}, "k is empty"),
        ("token", {"held_out": 1.0}, "held_out must be above 0 and below 1, not 1.0"),
    ):
        text = refused(RequestError, lambda a=labels, s=settings: sparse_probe(features, a, **s))
        assert text.startswith(message)


def test_probes_on_the_command_line(features, tmp_path):
    out = tmp_path / "out"
    options = ("--k", "1", "2", "--least", "4", "--held-out", "0.5", "--out", str(out))
    code, text, err = run("sparse-probe", str(features.path), "token", *options)
    assert (code, err) == (0, "")
    assert "test documents" in text
    assert {path.name for path in out.iterdir()} == {"probes.csv", "figure"}
