"""Attention sinks: planted patterns and streams, plain Hugging Face in float64, both ways of recording."""

from __future__ import annotations

import numpy as np
import pytest
from refusals import refused
from sink_example import plant, planted, previous, rows_of, run, sink_head, stream, uniform

from workbench.analysis.norms import massive_activation
from workbench.io.errors import RequestError
from workbench.probes.attention_sinks import AttentionSinks
from workbench.testing import ProbeContract


@pytest.fixture(scope="module")
def textbook(tmp_path_factory):
    """One sequence of 64; heads: uniform, all on the first token, on the previous one, on itself."""
    heads = [uniform(64), sink_head(64, 1.0), previous(64), np.eye(64)]
    return planted(tmp_path_factory.mktemp("planted") / "s", heads)


class TestContract(ProbeContract):
    probe = AttentionSinks
    settings = {"resamples": 20}  # noqa: RUF012

    @pytest.fixture
    def store(self, textbook):
        return textbook


# ---- alpha and Sink_k -----------------------------------------------------------------------------------


def test_alpha_of_textbook_heads(textbook):
    data = run(textbook).data
    alpha = data["alpha"][0].to_numpy()
    assert alpha[0, 0] == pytest.approx(sum(1 / i for i in range(1, 65)) / 64, abs=1e-6)
    assert alpha[0, 0] == pytest.approx(0.07412, abs=5e-6)
    assert alpha[0].argmax() == 0
    assert alpha[1].tolist() == [1, *[0] * 63]
    np.testing.assert_allclose(alpha[2], [2 / 64, *(1 / (64 - k) for k in range(1, 63)), 0], atol=1e-7)
    np.testing.assert_allclose(alpha[3], 1 / (64 - np.arange(64)), atol=1e-7)
    assert float(data["sequences"]) == 1


def test_the_last_positions_are_sinks_of_heads_that_are_none(textbook):
    """1/3, 1/2 and 1 of the identity, 1/3 and 1/2 of the previous token: why they are marked as unreliable."""
    data = run(textbook).data
    sink_k = data["sink_k"].to_numpy()
    assert sink_k.tolist() == [25.0, *[0.0] * 60, 50.0, 50.0, 25.0]
    assert data["reliable"].to_numpy().tolist() == [1] * 57 + [0] * 7
    assert run(textbook, min_visible=4).data["reliable"].sum() == 61
    assert run(textbook).data["sink_share"].to_numpy().tolist() == [[0, 1, 0, 0]]


def test_the_threshold_is_crossed_where_it_should_be(tmp_path):
    store = planted(tmp_path / "s", [sink_head(64, 0.2888), sink_head(64, 0.2890)])
    data = run(store).data
    np.testing.assert_allclose(data["alpha"][0, :, 0], [(1 + 63 * 0.2888) / 64, (1 + 63 * 0.2890) / 64], atol=1e-6)
    assert data["sink_share"].to_numpy().tolist() == [[0, 1]]
    assert run(store, epsilon=0.299).data["sink_share"].to_numpy().tolist() == [[1, 1]]


def test_the_threshold_itself_is_no_sink(tmp_path):
    store = planted(tmp_path / "s", [np.eye(8)])
    assert run(store, length=8, epsilon=0.5).data["sink_k"].to_numpy().tolist() == [0] * 7 + [100]
    assert run(store, length=8, epsilon=0.25).data["sink_k"].to_numpy().tolist() == [0] * 5 + [100] * 3


def test_half_of_the_heads(tmp_path):
    heads = [sink_head(64, 0.9), uniform(64)] * 2
    arrays = {f"pattern.{layer}": rows_of(heads, heads) for layer in range(2)}
    result = run(plant(tmp_path / "s", [64, 64], arrays))
    assert float(result.data["sink_k"][0]) == 50.0
    assert float(result.data["sink_share"].mean()) == 0.5


def test_the_threshold_comes_before_the_mean(tmp_path):
    """Alpha 0.5 is a sink and 0.05 is none; their mean, 0.275, is not compared with the threshold."""
    heads = [[sink_head(64, (64 * alpha - 1) / 63)] for alpha in (0.5, 0.05)]
    data = run(planted(tmp_path / "s", *heads)).data
    assert float(data["alpha"][0, 0, 0]) == pytest.approx(0.275, abs=1e-6)
    assert float(data["sink_k"][0]) == 50.0
    assert data["sink_share"].to_numpy().tolist() == [[0.5]]


def hidden_sink():
    """Ten tokens; from the fifth on, queries pay 0.3 to the first and 0.5 to the fifth."""
    pattern = np.zeros((10, 10))
    pattern[:4, 0] = 1
    for i in range(4, 10):
        keys = [k for k in range(i + 1) if k not in (0, 4)]
        pattern[i, 0], pattern[i, 4] = 0.3, 0.5
        pattern[i, keys] = 0.2 / len(keys)
    return pattern


def test_a_hidden_sink(tmp_path):
    store = planted(tmp_path / "s", [hidden_sink()])
    result = run(store, length=10, epsilon=0.1)
    alpha = result.data["alpha"][0, 0].to_numpy()
    assert alpha[[0, 4]] == pytest.approx([0.58, 0.50])
    rest = np.delete(alpha, [0, 4])
    assert rest.min() == pytest.approx(0.025, abs=1e-3)
    assert rest.max() == pytest.approx(0.035, abs=1e-3)
    assert np.flatnonzero(result.data["sink_k"]).tolist() == [0, 4]
    assert float(run(store, length=10, epsilon=0.1, sink=4).data["sink_share"][0, 0]) == 1
    assert result.table["peak_position"].tolist() == [0]
    assert AttentionSinks.headline(run(store, length=10, epsilon=0.1, sink=4)).startswith("Sink_5 = 100.0 % of heads")


def test_length_cuts_what_is_longer_and_leaves_out_what_is_shorter(tmp_path):
    store = planted(tmp_path / "s", [uniform(12)], [sink_head(8, 1.0)], [uniform(5)])
    data = run(store, length=8).data
    assert (int(data["sequences"]), int(data["short_sequences"])) == (2, 1)
    expected = (sum(1 / i for i in range(1, 9)) / 8 + 1) / 2
    assert float(data["alpha"][0, 0, 0]) == pytest.approx(expected, abs=1e-6)
    assert "1 sequence of fewer than 8 tokens left out" in data.attrs["note"]
    assert float(run(store, length=12, min_visible=2).data["alpha"][0, 0, 0]) == pytest.approx(
        sum(1 / i for i in range(1, 13)) / 12, abs=1e-6
    )


def test_where_selects_sequences_by_their_first_token(tmp_path):
    store = planted(tmp_path / "s", [uniform(8)], [sink_head(8, 1.0)], sources=["wiki", "web"])
    assert float(run(store, length=8, where="source = 'web'").data["alpha"][0, 0, 0]) == 1
    text = refused(RequestError, lambda: run(store, length=8, where="position = 3"))
    assert text == (
        "where 'position = 3' holds for the first token of none of 2 sequences, and the first token is what selects a "
        "sequence"
    )


# ---- the detector ---------------------------------------------------------------------------------------


def test_the_two_entropies_of_textbook_heads(textbook):
    """Over all columns, as published: the uniform head's best is column 62, the previous token's log 2 / log 64."""
    data = run(textbook, min_visible=2).data
    np.testing.assert_allclose(data["row_entropy"][0], [63 / 64, 0, 0, 0], atol=1e-6)
    column = data["column_entropy"][0].to_numpy()
    assert column[0] == pytest.approx(0.99996, abs=1e-5)
    assert column[1] == pytest.approx(1, abs=1e-6)
    assert column[2:].tolist() == pytest.approx([np.log(2) / np.log(64), 0], abs=1e-6)
    assert np.log(2) / np.log(64) == pytest.approx(0.1667, abs=5e-5)
    shares = np.array([1 / i for i in range(1, 65)])
    shares /= shares.sum()
    first = -(shares * np.log(shares)).sum() / np.log(64)
    assert first == pytest.approx(0.811, abs=5e-4)
    assert run(textbook, min_visible=64).data["column_entropy"][0, 0] == pytest.approx(first, abs=1e-6)
    assert data["detected"].to_numpy().tolist() == [[0, 1, 0, 0]]


def test_both_entropies_decide(textbook):
    assert run(textbook, row_entropy=1.0, min_visible=2).data["detected"].to_numpy().tolist() == [[1, 1, 0, 0]]
    assert run(textbook, column_entropy=0.1).data["detected"].to_numpy().tolist() == [[0, 1, 1, 0]]
    assert run(textbook, row_entropy=0.0).data["detected"].to_numpy().tolist() == [[0, 0, 0, 0]]


# ---- norms and massive activations ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top", "scale", "large", "rare"),
    [(-150, 1, 1, 1), (150, 3, 1, 0), (99, 0.1, 0, 1), (99, 3, 0, 0)],
)
def test_both_conditions_of_a_massive_activation(tmp_path, top, scale, large, rare):
    hidden = stream(0) * scale
    hidden[3, 2] = top
    data = run(plant(tmp_path / "s", [8], {"pattern.0": rows_of([uniform(8)]), "resid_post.0": hidden}), length=8).data
    names = ("massive_above_absolute", "massive_above_ratio", "massive")
    assert [float(data[name][0]) for name in names] == [large, rare, large and rare]
    massive = [float(data[f"massive_{name}"][0]) for name in ("top", "median", "position", "dimension")]
    assert massive == pytest.approx([abs(top), np.median(np.abs(hidden)), 3, 2], rel=1e-6)
    assert massive[1] == pytest.approx(0.1 * scale, rel=0.6)


def test_the_settings_of_massive_activations(tmp_path):
    hidden = np.concatenate([stream(150), stream(0.5, seed=1)])
    store = plant(tmp_path / "s", [8, 8], {"pattern.0": rows_of(*[[uniform(8)]] * 2), "resid_post.0": hidden})
    assert float(run(store, length=8).data["massive"][0]) == 0.5
    assert float(run(store, length=8, massive_absolute=200.0).data["massive_above_absolute"][0]) == 0
    assert float(run(store, length=8, massive_absolute=0.4).data["massive_above_absolute"][0]) == 1
    assert float(run(store, length=8, massive_ratio=2.0).data["massive_above_ratio"][0]) == 1
    assert float(run(store, length=8, massive_ratio=5000.0).data["massive_above_ratio"][0]) == 0


def test_the_position_of_a_massive_activation_is_that_in_its_sequence():
    assert massive_activation(stream(-7.0, position=5, dimension=1))[2:] == (5, 1)
    assert massive_activation(np.array([[1.0, -3.0], [2.0, 0.0]])) == (3, 1.5, 0, 1)


def test_norms_of_the_sink_and_of_the_others(tmp_path):
    """Values of two shared heads, read by four; the others' mean in each sequence, then over sequences."""
    norms = np.array([[1, 4, 4, 4, 4, 4, 4, 4], [3, 2, 2, 2, 2, 2, 2, 9]], float)
    value = np.zeros((16, 2, 3))
    value[:, 0, 1], value[:, 1, 2] = norms.ravel(), -2 * norms[::-1].ravel()
    residual = np.zeros((16, 5))
    residual[:, 4] = 10 * norms.ravel()
    arrays = {"pattern.0": rows_of(*[[uniform(8)] * 4] * 2), "v.0": value, "resid_post.0": residual}
    store = plant(tmp_path / "s", [8, 8], arrays)
    mean_norm = (4 + 3) / 2
    data = run(store, length=8).data
    assert data["value_norm_sink"][0].to_numpy().tolist() == [2, 2, 4, 4]
    assert data["value_norm_ratio"][0].to_numpy() == pytest.approx([2 / mean_norm] * 4)
    assert float(data["residual_norm_ratio"][0]) == pytest.approx(2 / mean_norm)
    assert float(data["residual_norm_others"][0]) == pytest.approx(10 * mean_norm)
    last = run(store, length=8, sink=1).data
    assert float(last["residual_norm_sink"][0]) == 30
    assert float(last["residual_norm_others"][0]) == pytest.approx(10 * ((1 + 24) / 7 + (3 + 10 + 9) / 7) / 2)


# ---- what is there, what is not -------------------------------------------------------------------------


def derived_arrays(kinds, lengths=(8,), heads=2):
    rows = sum(lengths)
    shape = {"resid_norm": (rows,)}
    return {f"{kind}.0": np.full(shape.get(kind, (rows, heads)), 0.5) for kind in kinds}


def test_what_was_not_recorded_is_left_out_and_said(tmp_path):
    store = plant(tmp_path / "s", [8], derived_arrays(["attn_received"]))
    result = run(store, length=8)
    assert {*result.data} == {
        *("alpha", "sink_share", "sink_k", "sink_k_low", "sink_k_high", "sink", "sink_low", "sink_high", "reliable"),
        *("sequences", "short_sequences"),
        *("clipped", "nonfinite_rows"),
    }
    assert result.data.attrs["note"] == (
        "row_entropy not computed: attn_entropy was not recorded; "
        "column_entropy not computed: attn_received_entropy was not recorded; "
        "value_norm_ratio not computed: v or v_norm was not recorded; "
        "residual_norm_ratio not computed: resid_post or resid_norm was not recorded; "
        "massive activations not computed: resid_post was not recorded; only 1 sequence"
    )
    assert AttentionSinks.headline(result) == (
        "Sink_1 = 100.0 % of heads (epsilon 0.3, T 8, 1 sequence); strongest head L0H0, alpha 0.50; only 1 sequence."
    )


def test_layers_that_lack_something_are_nan_and_said(tmp_path):
    arrays = {f"pattern.{layer}": rows_of([uniform(8)]) for layer in (0, 2)}
    arrays |= {"v.2": np.ones((8, 1, 2)), "resid_post.1": stream(1.0), "resid_post.2": stream(1.0)}
    result = run(plant(tmp_path / "s", [8], arrays), length=8)
    data = result.data
    assert data["layer"].to_numpy().tolist() == [0, 1, 2]
    assert np.isnan(data["alpha"][1]).all()
    assert np.isnan(data["value_norm_ratio"][:, 0]).to_numpy().tolist() == [True, True, False]
    assert np.isnan(data["massive"]).to_numpy().tolist() == [True, False, False]
    assert "value_norm_ratio is NaN at layers 0, 1: v or v_norm was not recorded there" in data.attrs["note"]
    assert result.table["layer"].tolist() == [0, 2]
    assert "residual norm" in AttentionSinks.headline(result)
    assert AttentionSinks.figures(result)["sinks"].data[0].y == ("0", "2")


def test_layers_with_different_numbers_of_heads(tmp_path):
    arrays = {"pattern.0": rows_of([sink_head(8, 1.0)]), "pattern.1": rows_of([uniform(8)] * 3)}
    result = run(plant(tmp_path / "s", [8], arrays), length=8)
    assert float(result.data["sink_k"][0]) == pytest.approx(100 * (1 + 3) / 4)  # uniform over 8: 0.34
    assert float(result.data["alpha"][0, 0, 0]) == 1
    assert len(result.table) == 4
    assert np.isnan(result.data["alpha"][0, 1:]).all()


def test_the_source_with_more_layers_is_read(tmp_path):
    arrays = {"pattern.0": rows_of([sink_head(8, 1.0)] * 2), **derived_arrays(["attn_received"])}
    assert run(plant(tmp_path / "a", [8], arrays), length=8).data.attrs["source"] == "pattern"
    arrays["attn_received.1"] = arrays["attn_received.0"]
    assert run(plant(tmp_path / "b", [8], arrays), length=8).data.attrs["source"] == "derived"


@pytest.mark.parametrize(
    ("kinds", "lengths", "settings", "text"),
    [
        (["resid_norm"], [8], {}, "attn_received.0 is not recorded in {path}; recorded are 1: resid_norm.0; to add it: "
         "workbench add {path} --sites attn_received.0"),
        (["attn_received"], [8, 5], {}, "length 64: no sequence has as many tokens, the longest of 2 has 8; give "
         "length 8, or record longer texts"),
        (["attn_received"], [8, 5], {"length": 5}, "length 5: attn_received was summed over whole sequences, of up to "
         "8 tokens; give length 8, or record with context=5, or record pattern"),
        (["attn_received"], [8], {"length": 8, "domain": "source"}, "attn_first.0 is not recorded in {path}; recorded "
         "are 1: attn_received.0; to add it: workbench add {path} --sites attn_first.0"),
        (["attn_received", "attn_first"], [8], {"length": 8, "domain": "source", "sink": 2}, "sink 2: attn_first has "
         "the attention to position 0 only; for domains record pattern"),
        (["attn_received", "attn_first"], [8], {"length": 8, "domain": "sauce"}, "domain 'sauce' is not a column of "
         "the token table; nearest: source, sequence, sequence_length; columns: row, sequence, position, document, "
         "token_id, token, char_start, char_end, is_special, sequence_length, position_from_end, is_last, source"),
        (["attn_received", "attn_first"], [8], {"length": 8, "domain": "position"}, "domain 'position' has no value "
         "that all tokens of a sequence share"),
    ],
)  # fmt: skip
def test_refusals(tmp_path, kinds, lengths, settings, text):
    store = plant(tmp_path / "s", lengths, derived_arrays(kinds, lengths))
    settings = {"min_visible": 2} | settings
    assert refused(RequestError, lambda: run(store, **settings)) == text.format(path=store.path)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"length": 2}, "length must be at least 3, not 2"),
        ({"min_visible": 1}, "min_visible must be at least 2, not 1"),
        ({"resamples": 0}, "resamples must be at least 1, not 0"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"epsilon": 1.5}, "epsilon must be from 0 to 1, not 1.5"),
        ({"row_entropy": -0.1}, "row_entropy must be from 0 to 1, not -0.1"),
        ({"column_entropy": float("nan")}, "column_entropy must be from 0 to 1, not nan"),
        ({"massive_absolute": -1.0}, "massive_absolute must be at least 0, not -1.0"),
        ({"massive_ratio": float("nan")}, "massive_ratio must be at least 0, not nan"),
        ({"sink": 63}, "sink must be from 0 to 62, before the last of 64 tokens"),
        ({"sink": -1}, "sink must be from 0 to 62, before the last of 64 tokens"),
        ({"min_visible": 65}, "min_visible is 65 and no key is seen by more than 64 tokens"),
    ],
)
def test_settings_out_of_range(settings, text):
    assert refused(RequestError, lambda: AttentionSinks(**settings)) == text
