"""Tests of chosen rows: the store holds the rows of a whole recording that SQL selects there."""

import numpy as np
import pytest
from refusals import refused
from store_example import contents

import workbench as wb
from workbench.io.errors import RequestError
from workbench.probes import AttentionSinks, LogitLens
from workbench.recording import segments as writing

SITES = ["resid_post", "pattern.1", "attn_received.1", "z.0"]
TEXTS = ["Once upon a time there was a dog.", "One day, Tom ran to the big red ball and sat on it.", "Hi."]
CHOICES = {
    "last": {"keep": "last"},
    "positions": {"keep": [0, 3, -2]},
    "where": {"where": "token IN ('.', ' the') OR position = 2"},
    "window": {"where": "lag(token) OVER (PARTITION BY sequence ORDER BY position) = ','"},
    "subquery": {"where": "token IN (SELECT token FROM tokens GROUP BY token HAVING count(*) > 1)", "keep": [4, -1]},
    "metadata": {"where": "kind = 'b' AND NOT is_special"},
}


@pytest.fixture(scope="module")
def model():
    return wb.load_model("demo", device="cpu")


@pytest.fixture(scope="module")
def texts():
    return [{"text": text, "kind": "ab"[n % 2]} for n, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def whole(model, texts, tmp_path_factory):
    return record(model, texts, tmp_path_factory.mktemp("whole") / "x")


def record(model, texts, out, **options):
    return wb.record(
        model, texts, sites=SITES, out=out, **{"context": 12, "dtype": "float32", "show_progress": False, **options}
    )


def same_rows(whole, choice):
    """The rows of the whole recording that the settings mean, by pandas where they name positions."""
    rows = whole.where(choice.get("where", "true"))
    if "keep" in choice:
        frame = whole.tokens.to_pandas()
        keep = [-1] if choice["keep"] == "last" else choice["keep"]
        ends = frame["position"] - frame.groupby("sequence")["position"].transform("size")
        rows = rows & wb.Rows(whole, np.flatnonzero(frame["position"].isin(keep) | ends.isin(keep)))
    return rows


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_chosen_rows_are_those_of_a_whole_recording(model, texts, whole, tmp_path, choice):
    store = record(model, texts, tmp_path / "x", segment_rows=3, **choice)
    expected = same_rows(whole, choice)
    assert 0 < store.rows == len(expected) < whole.rows
    for site in store.sites:
        assert np.allclose(store[site.name][:], expected[site.name], atol=1e-5), site.name  # other batches
    names = [name for name in whole.tokens.column_names if name != "row"]
    assert store.tokens.select(names).to_pylist() == expected.tokens.select(names).to_pylist()
    frame = whole.tokens.to_pandas()
    follows = frame["sequence"].eq(frame["sequence"].shift(-1))
    following = np.where(follows, frame["token_id"].shift(-1), -1)[expected.ids]
    assert store.tokens["next_token_id"].fill_null(-1).to_pylist() == following.tolist()
    assert not (store.verify()["severity"] == "error").any()
    assert record(model, texts, tmp_path / "x", segment_rows=3, **choice).rows == store.rows
    last = store.where("is_last OR position_from_end = 1")
    assert (
        last.tokens["position"].to_pylist()
        == (expected & whole.where("position_from_end < 2")).tokens["position"].to_pylist()
    )


def test_an_interrupted_recording_of_chosen_rows_resumes_to_the_same_bytes(model, texts, tmp_path, monkeypatch):
    options = {"where": "position % 3 = 1", "segment_rows": 2}
    uninterrupted = record(model, texts, tmp_path / "whole", **options)
    assert len(uninterrupted.manifest.segments) > 2
    original, runs = writing.capture, []

    def capture(*arguments):
        runs.append(1)
        if len(runs) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(writing, "capture", capture)
    with pytest.raises(KeyboardInterrupt):
        record(model, texts, tmp_path / "cut", **options)
    monkeypatch.setattr(writing, "capture", original)
    assert 0 < wb.open_store(tmp_path / "cut").rows < uninterrupted.rows
    record(model, texts, tmp_path / "cut", **options)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_chosen_rows_are_appended_and_other_choices_refused(model, texts, tmp_path):
    store = record(model, texts[:2], tmp_path / "x", keep="last")
    appended = record(model, texts[2:], tmp_path / "x", keep="last", append=True)
    assert appended.rows == store.rows + 1
    assert appended.tokens["document"].to_pylist()[-1] == 2
    assert not (appended.verify()["severity"] == "error").any()
    before = contents(tmp_path / "x")
    for choice in ({"keep": [0]}, {"where": "is_last"}, {}):
        message = refused(RequestError, lambda o=choice: record(model, texts[:2], tmp_path / "x", append=True, **o))
        assert "was recorded with other settings" in message
    assert contents(tmp_path / "x") == before
    record(model, texts, tmp_path / "all")
    message = refused(RequestError, lambda: record(model, texts, tmp_path / "all", keep="last"))
    assert "keep: none in the store, [-1] requested" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": "position > 2 AND random() < 0.5"}, "query 'position > 2 AND random() < 0.5': random() may"),
        (
            {"where": "position > year(now())"},
            "query 'position > year(now())': now() may choose other tokens each",
        ),
        ({"where": "token = 'nowhere'"}, "where=\"token = 'nowhere'\" selects none of the "),
        ({"keep": [99]}, "keep=(99,) selects none of the "),
        ({"where": "tokn = 1"}, "query 'tokn = 1': Referenced column \"tokn\" not found"),
        ({"where": "token IN (SELECT x FROM 'a.csv')"}, "query "),
        ({"where": " "}, "where is empty; give an SQL condition"),
        ({"keep": []}, "keep must be 'last' or positions, such as [0, -1], not []"),
        ({"keep": "first"}, "keep must be 'last' or positions, such as [0, -1], not 'first'"),
        ({"keep": 1.5}, "keep must be 'last' or positions, such as [0, -1], not 1.5"),
        ({"keep": [0, True]}, r"keep must be 'last' or positions, such as [0, -1], not [0, True]"),
    ],
)
def test_a_choice_that_cannot_be_made_is_one_line_and_leaves_nothing(model, texts, tmp_path, options, message):
    text = refused(RequestError, lambda: record(model, texts, tmp_path / "x", **options))
    assert text.startswith(message), text
    assert list(tmp_path.iterdir()) == []


def test_probes_of_rows_work_and_those_of_sequences_refuse_the_store(model, texts, whole, tmp_path):
    store = record(model, texts, tmp_path / "x", where="position > 0 AND NOT is_last")
    reference = LogitLens(where="position > 0 AND NOT is_last").run(whole)
    result = LogitLens().run(store)
    for name in ("kl", "top1", "cross_entropy"):
        if name in reference.data:
            assert np.allclose(result.data[name], reference.data[name], atol=1e-6), name
    message = refused(RequestError, lambda: AttentionSinks(length=4, min_visible=2).run(store))
    assert "needs whole sequences" in message
    assert "where='position > 0 AND NOT is_last'" in message
    assert "needs whole sequences" in refused(RequestError, lambda: store.where("true").text(2))


def test_features_are_extracted_while_chosen_rows_are_recorded(model, texts, whole, tmp_path):
    sae = wb.load_sae("demo")
    options = {"keep": [2, -1], "dtype": "float32", "context": 12, "show_progress": False}
    wb.record(model, texts, sae=sae, out=tmp_path / "x", segment_rows=2, **options)
    site = wb.record(model, texts, sites=[sae.site], out=tmp_path / "y", **options)
    (folder,) = (tmp_path / "x" / "features").iterdir()
    live, later = wb.open_features(folder), wb.extract_features(site, sae)
    rows = np.arange(site.rows)
    assert np.allclose(live[rows].toarray(), later[rows].toarray(), atol=1e-5)
    assert live[rows].nnz > 0


def test_workers_choose_the_same_rows(model, texts, tmp_path):
    from workbench.parallel.share import Share

    options = {"keep": [1, -1], "segment_rows": 2}
    record(model, texts, tmp_path / "one", **options)
    for index in (1, 0):
        record(model, texts, tmp_path / "two", workers=Share(index, 2), **options)
    first, two = wb.open_store(tmp_path / "one"), wb.open_store(tmp_path / "two")
    assert first.tokens.equals(two.tokens)
    assert np.array_equal(first["resid_post", 1][:], two["resid_post", 1][:])
