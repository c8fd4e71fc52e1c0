"""Attention sinks: domains, figures and headlines of planted patterns."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm
from scipy.stats import t as student
from sink_example import plant, planted, rows_of, run, sink_head, stream, uniform

import workbench as wb
from workbench.analysis import sequences as store_sequences
from workbench.probes.attention_sinks import AttentionSinks

# ---- domains --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_domains(tmp_path_factory):
    """Head 0 pays 0.9 in web and 0.1 in wiki, head 1 some 0.5 in both, more or less by document."""
    draw = np.random.default_rng(0)
    sequences, sources = [], []
    for index in range(24):
        source = ("web", "wiki")[index % 2]
        noise = draw.uniform(-0.05, 0.05, 2)
        sequences.append([sink_head(16, c) for c in ((0.9 if source == "web" else 0.1) + noise[0], 0.5 + noise[1])])
        sources.append(source)
    sources[0] = None
    documents = [index // 2 * 2 + index % 2 for index in range(24)]
    path = tmp_path_factory.mktemp("domains") / "s"
    return planted(path, *sequences, documents=documents, sources=sources), sequences, sources


def test_attention_to_the_sink_in_each_domain(two_domains):
    store, sequences, sources = two_domains
    result = run(store, length=16, domain="source", resamples=300)
    data = result.data
    assert data["domain"].to_numpy().tolist() == ["web", "wiki"]
    assert data["documents"].to_numpy().tolist() == [11, 12]
    for d, name in enumerate(("web", "wiki")):
        for head in range(2):
            paid = [s[head][1:, 0].mean() for s, source in zip(sequences, sources, strict=True) if source == name]
            assert float(data["attention"][d, 0, head]) == pytest.approx(np.mean(paid), abs=1e-6)
            low, high = float(data["attention_low"][d, 0, head]), float(data["attention_high"][d, 0, head])
            assert low < np.mean(paid) < high
            deviation = np.std(paid) / np.sqrt(len(paid))  # 1.96 of it each way, were they normal
            assert high - low == pytest.approx(3.92 * deviation, rel=0.25)
    gap = data["attention"][:, 0, 0].to_numpy()
    assert float(data["gap"][0, 0]) == pytest.approx(gap[0] - gap[1])
    assert (data["gap_low"] <= data["gap"]).all()
    assert (data["gap"] <= data["gap_high"]).all()
    assert float(data["gap_low"][0, 0]) > 0.7
    assert float(data["gap_low"][0, 1]) < 0.02  # a head that does not care
    line = result.table.set_index("head").loc[0]
    assert (line["gap_most"], line["gap_least"]) == ("web", "wiki")
    assert "1 sequence without a single source left out of the comparison" in data.attrs["note"]
    assert data.attrs["few"] == ""
    assert (
        list(result.table["attention_web"]) == data["attention"][0, 0, result.table["head"].to_numpy()].values.tolist()
    )


def test_a_domain_of_one_document_is_not_ranked(tmp_path):
    """It attends most, and nobody knows what another document of its kind would do."""
    heads = [[sink_head(8, c)] for c in (0.2, 0.3, 0.5, 0.6, 0.99)]
    sources = ["web", "web", "wiki", "wiki", "code"]
    result = run(planted(tmp_path / "s", *heads, documents=[0, 1, 2, 3, 4], sources=sources), length=8, domain="source")
    line = result.table.iloc[0]
    assert (line["gap_most"], line["gap_least"]) == ("wiki", "web")
    assert line["gap"] == pytest.approx(0.3, abs=1e-6)
    assert np.isnan(result.data["attention_low"].sel(domain="code")).all()
    assert "1 of fewer than 2 documents takes no part in the gap" in result.headline()
    alone = run(
        planted(tmp_path / "t", *heads[::2], documents=[0, 1, 2], sources=sources[::2]), length=8, domain="source"
    )
    assert np.isnan(alone.data["gap"]).all()
    assert alone.table["gap_most"].tolist() == [""]
    assert "domains" not in alone.figures()


def test_the_figure_of_domains_says_dormant_only_where_intervals_lie_on_both_sides(two_domains):
    store, _, _ = two_domains
    titles = [
        run(store, length=16, domain="source", resamples=50, epsilon=epsilon).figure("domains").layout.title.text
        for epsilon in (0.3, 0.02)
    ]
    assert titles[0].startswith("Active in one domain, dormant in another: 1 of 2 heads")
    assert titles[1].startswith("Attention by domain")


def test_the_figure_of_single_heads_counts_those_it_was_chosen_among(tmp_path):
    """Attention of two layers, whole patterns of one of them."""
    arrays = {f"attn_received.{layer}": np.full((8, 3), 0.5) for layer in range(2)}
    arrays["pattern.1"] = rows_of([uniform(8)] * 3)
    result = run(plant(tmp_path / "s", [8], arrays), length=8, examples=2)
    subtitle = result.figure("attention").layout.title.subtitle.text
    assert subtitle.endswith("the menu has 2 of 3 heads whose patterns were recorded, those with the largest alpha")


def test_the_table_has_the_massive_activations_of_each_layer(tmp_path):
    arrays = {f"pattern.{layer}": rows_of([uniform(8)]) for layer in range(2)}
    arrays |= {"resid_post.0": stream(1.0), "resid_post.1": stream(2000.0, position=3, dimension=4)}
    result = run(plant(tmp_path / "s", [8], arrays), length=8)
    line = result.table.set_index("layer").loc[1]
    assert (line["massive"], line["massive_top"], line["massive_position"], line["massive_dimension"]) == (
        1,
        2000,
        3,
        4,
    )
    assert (
        "massive activations in 100 % of sequences: the largest of a sequence is 2,000 on average, 20,000 times the "
        "median (layer 1, position 3, dimension 4)"
    ) in result.headline()


def test_draws_are_of_documents_and_reproducible(two_domains):
    store, _, _ = two_domains
    once, again, of_another_seed, fewer = (
        run(store, length=16, domain="source", **settings).data["attention_low"].to_numpy()
        for settings in ({"resamples": 50}, {"resamples": 50}, {"resamples": 50, "seed": 1}, {"resamples": 20})
    )
    assert (once == again).all()
    assert (once != of_another_seed).any()
    assert (once != fewer).any()


def test_the_metric_has_an_interval_over_documents(tmp_path):
    """One of four documents has no sink: three of four sequences, and a bootstrap of these four, written out, with
    the percentiles for so few (Hesterberg 2015)."""
    heads = [[sink_head(16, c)] for c in (0.9, 0.9, 0.0, 0.9)]
    store = planted(tmp_path / "s", *heads, documents=[0, 1, 2, 3])
    data = run(store, length=16, resamples=4000).data
    draws = np.random.default_rng(7).integers(0, 4, (40_000, 4))
    tail = norm.cdf(-math.sqrt(4 / 3) * student.ppf(0.975, 3))
    low, high = np.quantile(np.array([100, 100, 0, 100])[draws].mean(1), [tail, 1 - tail])
    assert [float(data[name]) for name in ("sink", "sink_low", "sink_high")] == [75, low, high]
    assert float(data["sink"]) == float(data["sink_k"][0])
    alone = run(planted(tmp_path / "alone", *heads, documents=[0, 0, 0, 0]), length=16).data
    assert float(alone["sink"]) == 75
    assert np.isnan([alone["sink_low"], alone["sink_high"]]).all()
    elsewhere = run(store, length=16, sink=3).data
    assert float(elsewhere["sink"]) == float(elsewhere["sink_k"][3]) == 0


def test_one_document_has_no_interval_and_one_domain_no_gap(tmp_path):
    heads = [[sink_head(8, c)] for c in (0.2, 0.4)]
    store = planted(tmp_path / "s", *heads, documents=[0, 0], sources=["a<b>", "a<b>"])
    result = run(store, length=8, domain="source")
    assert float(result.data["attention"][0, 0, 0]) == pytest.approx(0.3, abs=1e-6)
    assert np.isnan(result.data["attention_low"]).all()
    assert np.isnan(result.data["gap"]).all()
    assert result.data.attrs["few"] == "only 2 sequences; fewer than 10 documents in 1 of 1 domain"
    assert "gap not computed: all sequences have the same source" in result.data.attrs["note"]
    assert AttentionSinks.headline(result).endswith(result.data.attrs["few"] + ".")
    assert list(AttentionSinks.figures(result)) == ["sinks", "positions", "attention"]


def test_a_sink_elsewhere_is_paid_by_those_behind_it(tmp_path):
    heads = [[sink_head(8, c, sink=3)] for c in (0.25, 0.75)]
    store = planted(tmp_path / "s", *heads, documents=[0, 1], sources=["web", "wiki"])
    data = run(store, length=8, domain="source", sink=3).data
    np.testing.assert_allclose(data["attention"][:, 0, 0], [0.25, 0.75], atol=1e-6)


def test_blocks_of_any_size_give_the_same(two_domains, monkeypatch):

    store, _, _ = two_domains
    whole = run(store, length=16).data
    monkeypatch.setattr(store_sequences, "_BLOCK_BYTES", 1)  # one sequence at a time
    pieces = run(store, length=16).data
    for name in whole:
        np.testing.assert_allclose(pieces[name], whole[name], rtol=1e-12, err_msg=name)


# ---- figures --------------------------------------------------------------------------------------------


def test_figures_are_made_of_the_saved_result_alone(two_domains, tmp_path):
    store, _, sources = two_domains
    arrays = {"pattern.0": np.asarray(store["pattern", 0]), "resid_post.0": np.tile(stream(150), (48, 1))}
    sources = [source or "<b>$x$" for source in sources]
    full = plant(tmp_path / "s", [16] * 24, arrays, documents=list(range(24)), sources=sources)
    result = run(full, length=16, domain="source", resamples=20)
    result.save(tmp_path / "result")
    again = wb.load_result(tmp_path / "result")
    assert again.headline() == result.headline()
    figures = again.figures()
    assert list(figures) == ["sinks", "positions", "norms", "domains", "attention"]
    assert {name: figure.to_json() for name, figure in result.figures().items()} == {
        name: figure.to_json() for name, figure in figures.items()
    }
    np.testing.assert_allclose(figures["sinks"].data[0].z, result.data["alpha"][:, :, 0])
    reliable, unreliable = figures["positions"].data
    assert (len(reliable.x), len(unreliable.x)) == (9, 7)
    np.testing.assert_allclose([*reliable.y, *unreliable.y], result.data["sink_k"])
    np.testing.assert_allclose(figures["norms"].data[1].y, result.data["residual_norm_sink"])
    domains = figures["domains"].data
    assert [trace.name.partition(" (")[0] for trace in domains] == ["&lt;b&gt;&#36;x&#36;", "web", "wiki"]
    assert domains[1].x == ("L0H0", "L0H1")
    table = result.table.nlargest(12, "gap")
    np.testing.assert_allclose(domains[1].y, table["attention_web"])


def test_the_headline_tells_metric_head_and_norms(tmp_path):
    value = np.ones((8, 2, 1))
    value[0] = [[0.57], [1]]
    residual = np.ones((8, 4))
    residual[0] = 4.7
    arrays = {"pattern.0": rows_of([sink_head(8, 0.9), uniform(8)]), "v.0": value, "resid_post.0": residual}
    text = AttentionSinks.headline(run(plant(tmp_path / "s", [8], arrays), length=8, epsilon=0.5))
    assert text == (
        "Sink_1 = 50.0 % of heads (epsilon 0.5, T 8, 1 sequence); strongest head L0H0, alpha 0.91; the "
        "sink's value norm in L0H0 is 0.57 times the others'; its residual norm is 4.7 times the others' at layer 0; "
        "no massive activations: the largest of a sequence is 4.7 on average, 5 times the median (layer 0, position 0, "
        "dimension 0); only 1 sequence."
    )
