"""NaN, infinite and clipped activations in every probe: refused, left out as if not selected, or named."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import xarray as xr
from planted import linear_unembed, planted_store
from refusals import refused
from sink_example import rows_of, sink_head

from workbench.io.errors import RequestError
from workbench.probes import AttentionSinks, FutureLens, LogitLens, TokenErasure, TunedLens

DOCUMENTS, LENGTH, WIDTH, VOCAB = 12, 10, 6, 8
BAD = (37, 38, 94)
"""Rows in the middle of documents 3 and 9."""
QUICK = {
    LogitLens: {},
    TunedLens: {"epochs": 1, "batch": 32},
    TokenErasure: {"offsets": (-2, -1, 0), "epochs": 1, "early": 0, "late": 1, "resamples": 20},
    FutureLens: {"horizons": 1, "direct_vocab": 0, "top_k": 2},
}


def store_of(path, change, dtype="float32"):
    draw = np.random.default_rng(0)
    ids = draw.integers(0, VOCAB, (DOCUMENTS, LENGTH))
    sites = {f"resid_post.{layer}": draw.normal(size=(ids.size, WIDTH)) for layer in range(2)}
    change(sites)
    unembed = linear_unembed(draw.normal(size=(VOCAB, WIDTH)))
    return planted_store(path, ids.tolist(), sites, unembed, dtype=dtype, segments=3)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    def change(sites):
        sites["resid_post.0"][BAD[:2], 1] = np.nan
        sites["resid_post.1"][BAD[2], :] = np.inf

    return store_of(tmp_path_factory.mktemp("damaged") / "x.acts", change)


@pytest.mark.parametrize("probe", QUICK)
def test_nonfinite_values_are_refused_in_one_line(damaged, probe):
    text = refused(RequestError, lambda: probe(**QUICK[probe]).run(damaged))
    assert text.startswith("resid_post.0 has 2 NaN or infinite values in 2 of the ")
    assert "allow_nonfinite" in text


@pytest.mark.parametrize("probe", QUICK)
def test_rows_without_them_are_read_though_their_segment_has_some(damaged, probe):
    result = probe(**QUICK[probe], where=f"document NOT IN ({BAD[0] // LENGTH}, {BAD[2] // LENGTH})").run(damaged)
    assert int(result.data["nonfinite_rows"]) == 0


@pytest.mark.parametrize("probe", QUICK)
def test_left_out_rows_are_as_if_they_were_not_selected(damaged, probe):
    settings = QUICK[probe]
    allowed = probe(**settings, allow_nonfinite=True).run(damaged)
    without = probe(**settings, where=f"row NOT IN {BAD}").run(damaged)
    counted = ["nonfinite_rows"]
    xr.testing.assert_equal(allowed.data.drop_vars(counted), without.data.drop_vars(counted))
    assert int(allowed.data["nonfinite_rows"]) == 3
    left_out = "3 rows with NaN or infinite values left out (resid_post.0 and resid_post.1)"
    assert left_out in allowed.data.attrs["note"]
    assert left_out in allowed.headline()


def test_a_model_whose_later_layers_are_nan_agrees_with_nothing(tmp_path):
    """argmax of NaN equals argmax of NaN, so that lens and model seemed to agree from the first such layer on."""

    def change(sites):
        sites["resid_post.1"][:] = np.nan

    store = store_of(tmp_path / "x.acts", change)
    assert "resid_post.1 has 720 NaN" in refused(RequestError, lambda: LogitLens().run(store))
    message = refused(RequestError, lambda: LogitLens(allow_nonfinite=True).run(store))
    assert message.startswith("every row that is read has a NaN or infinite value (resid_post.1)")


def test_a_nonfinite_row_ends_the_reach_of_the_future_lens(damaged):
    """With three horizons the two rows before it have fewer targets, and none is a row with such a value."""
    data = FutureLens(**QUICK[FutureLens] | {"horizons": 3}, held_out=0.4, allow_nonfinite=True).run(damaged).data
    bad = set(BAD)
    rows = [r for r in range(DOCUMENTS * LENGTH) if r % LENGTH and r not in bad]  # the first of a sequence is not read
    for n in range(3):
        reaching = [r for r in rows if r % LENGTH + n < LENGTH and not bad & set(range(r, r + n + 1))]
        known = sum(int(data[name][n]) for name in ("training_rows", "validation_rows", "rows"))
        assert known == len(reaching)


def test_clipped_values_are_named_in_note_table_and_headline(tmp_path):
    def change(sites):
        sites["resid_post.1"][[4, 5, 50], 0] = [1e5, -1e5, 103_792]

    store = store_of(tmp_path / "x.acts", change, dtype="float16")
    result = LogitLens().run(store)
    assert result.data["clipped"].values.tolist() == [0, 3]
    assert result.table.groupby("layer")["clipped"].first().tolist() == [0, 3]
    for text in (result.data.attrs["note"], result.headline()):
        assert "3 values are clipped to ±65,504 (resid_post.1)" in text
    assert "clipped" not in LogitLens(where="row BETWEEN 10 AND 40").run(store).headline()


# Attention sinks


def sinks(path, spoil, dtype="float32"):
    """Three documents of one head that attends to the first token; the residual stream is 0.1, at that token 5."""
    pattern, stream = rows_of(*[[sink_head(8, 0.9)]] * 3), np.full((24, 4), 0.1)
    stream[::8] = 5.0
    sites = {"pattern.0": pattern, "resid_post.0": stream}
    spoil(sites)
    return planted_store(path, [range(8)] * 3, sites, dtype=dtype)


def test_heads_of_nan_are_not_heads_without_a_sink(tmp_path):
    def spoil(sites):
        sites["pattern.0"][9, 0, 0] = np.nan

    store = sinks(tmp_path / "x.acts", spoil)
    assert "pattern.0 has 1 NaN" in refused(RequestError, lambda: AttentionSinks(length=8).run(store))
    result = AttentionSinks(length=8, allow_nonfinite=True).run(store)
    assert int(result.data["sequences"]) == 2
    assert float(result.data["sink"]) == 100
    assert "not recorded" not in result.data.attrs["note"].replace("v or v_norm was not recorded", "")


def test_a_clipped_massive_activation_is_a_lower_bound(tmp_path):
    def spoil(sites):
        sites["resid_post.0"][0, 2] = 103_792

    result = AttentionSinks(length=8).run(sinks(tmp_path / "x.acts", spoil, "float16"))
    assert result.data["clipped"].values.tolist() == [1]
    assert result.table["clipped"].tolist() == [1]
    assert "1 value is clipped to ±65,504 (resid_post.0): sizes there are lower bounds" in result.headline()


def test_sequences_that_are_all_nonfinite_are_refused(tmp_path):
    def spoil(sites):
        sites["resid_post.0"][[3, 12, 20]] = np.inf

    store = sinks(tmp_path / "x.acts", spoil)
    text = refused(RequestError, lambda: AttentionSinks(length=8, allow_nonfinite=True).run(store))
    assert text.startswith("every sequence has a NaN or infinite value in its first 8 tokens")


def test_what_was_recorded_is_not_called_missing(tmp_path):
    """Norms of 0 give a ratio of 0 / 0: NaN, but recorded."""

    def spoil(sites):
        sites["resid_post.0"][:] = 0

    result = AttentionSinks(length=8).run(sinks(tmp_path / "x.acts", spoil))
    assert np.isnan(result.data["residual_norm_ratio"]).all()
    assert "resid_post or resid_norm was not recorded" not in result.data.attrs["note"]
    assert result.headline()


def test_every_probe_has_the_setting():
    probes = [*QUICK, AttentionSinks]
    assert all("allow_nonfinite" in {field.name for field in dataclasses.fields(probe)} for probe in probes)
