"""Every installed probe finds in the planted model what its construction says, or refuses it in one line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import truths_of_changes
import truths_of_heads
import truths_of_states
from planted_truths import PlantedStores, stream

import workbench as wb
from workbench.embedded import planted
from workbench.results.registry import installed_probes

TRUTHS = {**truths_of_heads.TRUTHS, **truths_of_states.TRUTHS, **truths_of_changes.TRUTHS}
PAGE = Path(__file__).parents[2] / "docs" / "planted-model.md"


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    return PlantedStores(tmp_path_factory.mktemp("planted"))


@pytest.mark.parametrize("probe", TRUTHS)
def test_it_finds_what_was_planted(probe, stores):
    truth = TRUTHS[probe]
    try:
        truth.check(stores)
    except AssertionError as error:
        error.add_note(f"known because {truth.why}")
        raise


def test_every_installed_probe_has_a_row_here_and_on_the_page():
    installed = {name for name, probe in installed_probes().items() if probe.value.startswith("workbench.probes.")}
    assert set(TRUTHS) == installed
    listed = re.findall(r"^\| \[([a-z-]+)\]\(\1\.md\) \|", PAGE.read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(installed)


def test_the_stream_is_what_the_tables_say(stores):
    """The float64 stream, which no weight is read for, against the recording; norms hold to 1 % (see the page)."""
    table = stores.corpus.tokens.select(["document", "token_id"]).to_pandas()
    states = stores.corpus["resid_post.0"][:].double().numpy()
    for document in (0, 1, 2):
        rows = np.flatnonzero(table["document"] == document)
        np.testing.assert_allclose(states[rows], stream(table["token_id"].to_numpy()[rows]), atol=0.02, rtol=0.02)


def test_features_are_active_exactly_where_their_words_stand(stores):
    store = stores.corpus
    features = wb.extract_features(store, wb.load_sae("planted", device="cpu"), show_progress=False)
    active = features[: store.rows].toarray() > 0
    ids = store.tokens["token_id"].to_numpy()
    for number, name in enumerate(planted.FEATURES):
        np.testing.assert_array_equal(active[:, number], np.isin(ids, planted.feature_tokens(name)), err_msg=name)
    for number, word in enumerate(planted.ORDINALS):
        np.testing.assert_array_equal(active[:, 32 + number], ids == planted.token_id(word))
    np.testing.assert_array_equal(active[:, 60], store.tokens["position"].to_numpy() == 0)
    assert not active[:, 61:].any()
    best = wb.best_features(features, "class").set_index("value")
    for name in ("day", "month", "number", "object", "name", "verb", "frame"):
        assert (best.loc[name, "feature"], best.loc[name, "f1"]) == (planted.FEATURES.index(name), 1)
