"""Labels of features: files of delphi and Neuronpedia and tables, what is saved, and where it is shown."""

import gzip
import json
import shutil
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
from command_line import run
from features_example import extracted
from refusals import refused
from warned import warned

import workbench as wb
from workbench.features.feature_store import open_features
from workbench.features.label_files import import_labels, read_labels
from workbench.features.labels import LABELS, names_of, title_of
from workbench.features.verify_folder import verify
from workbench.io.errors import DataError, RequestError
from workbench.io.parse import to_checked_json

HOSTILE = '<script>alert(1)</script> "x" & $a$ \u202e\x1b[31m'


@pytest.fixture
def copied(features, example, tmp_path):
    return open_features(shutil.copytree(features.path, tmp_path / "f"), example)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def delphi(root):
    """A run of delphi: explanations of three features, predictions on examples of two."""
    for feature, text in ((3, "days"), (7, "names of towns"), (12, "")):
        write(root / "explanations" / f"layers.1_latent{feature}.txt", json.dumps(text))
    lines = [(True, True), (True, False), (False, False), (False, False), (True, None)]
    examples = [
        {"str_tokens": ["a"], "activating": truth, "prediction": guess, "distance": 1} for truth, guess in lines
    ]
    write(root / "scores" / "fuzz" / "layers.1_latent3.txt", examples)
    write(root / "scores" / "detection" / "layers.1_latent3.txt", [{"ground_truth": True, "prediction": 1}])
    write(root / "scores" / "simulation" / "layers.1_latent7.txt", 0.25)
    write(root / "scores" / "fuzz" / "layers.1_latent12.txt", [{"activating": True, "prediction": None}])
    return root


def test_delphi_folders_give_descriptions_and_scores(copied, tmp_path):
    labels = import_labels(copied, delphi(tmp_path / "run")).labels
    assert labels.index.tolist() == [3, 7]
    assert labels["description"].tolist() == ["days", "names of towns"]
    assert labels.loc[3, "fuzz_accuracy"] == (1 / 2 + 2 / 2) / 2
    assert labels.loc[3, "fuzz_f1"] == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert labels.loc[3, "detection_f1"] == 1
    assert labels.loc[7, "simulation"] == 0.25
    assert np.isnan(labels.loc[7, "fuzz_f1"])
    assert set(labels.attrs["sources"].values()) == {"run"}
    assert read_labels(tmp_path / "run" / "scores" / "simulation", 20) == {"simulation": {7: 0.25}}


def neuronpedia(index, text, layer="1-res", scores=(), **more):
    entries = [{"value": value, "explanationScoreTypeName": name} for name, value in scores]
    return {"modelId": "demo", "layer": layer, "index": str(index), "description": text, "scores": entries} | more


def test_exports_of_neuronpedia_are_read_in_the_order_of_their_batches(copied, tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    lines = {
        "batch-10": [neuronpedia(4, "later"), neuronpedia(5, "five", typeName="oai", explanationModelName="gpt")],
        "batch-2": [neuronpedia(4, "four", scores=[("recall", 0.5)]), neuronpedia(9, "", embedding=[1, 2])],
    }
    for name, rows in lines.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    with warned("labels: 1 further values of labelled features are left out"):
        labels = import_labels(copied, folder).labels
    assert labels["description"].to_dict() == {4: "four", 5: "five"}
    assert (labels.loc[5, "explained_by"], labels.loc[5, "explanation_type"]) == ("gpt", "oai")
    assert labels.loc[4, "recall"] == 0.5
    whole = {"modelId": "demo", "layer": "1-res", "index": "4", "explanations": [neuronpedia(4, "inside")]}
    assert read_labels(write(tmp_path / "one.json", whole), 20)["description"] == {4: "inside"}


def test_tables_of_any_form_give_their_columns(copied, tmp_path):
    table = pd.DataFrame({"Feature": [2, 0], "topic": ["a,b", HOSTILE], "score": [0.5, None], "n": [3, 4]})
    table.to_csv(tmp_path / "x.csv", index=False)
    table.to_parquet(tmp_path / "x.parquet")
    write(tmp_path / "x.json", json.loads(table.to_json(orient="records")))
    tables = [read_labels(tmp_path / name, 20) for name in ("x.csv", "x.parquet", "x.json")]
    assert tables[0] == tables[1] == tables[2]
    assert tables[0] == {"topic": {2: "a,b", 0: HOSTILE}, "score": {2: 0.5}, "n": {2: 3, 0: 4}}
    labels = import_labels(copied, tmp_path / "x.csv").labels
    assert names_of(labels) == {0: HOSTILE, 2: "a,b"}
    assert title_of(2, labels) == "feature 2: a,b (score 0.5, n 3)"
    assert title_of(1, labels) == "feature 1"
    assert open_features(copied.path, copied.store).labels.equals(labels)


def test_headings_may_have_spaces_and_capitals(tmp_path):
    path = write(tmp_path / "a.csv", "Feature, Description, F1\n1,one,0.5\n")
    assert read_labels(path, 20) == {"description": {1: "one"}, "F1": {1: 0.5}}
    text = refused(RequestError, lambda: read_labels(path, 20, "b"))
    assert text == f"labels: {str(path)!r} names no autoencoders; leave source out"


def test_columns_are_added_and_replaced_only_on_request(copied, tmp_path):
    first = write(tmp_path / "a.csv", "feature,description,f1\n1,one,0.5\n2,two,0.25\n")
    second = write(tmp_path / "b.csv", "feature,description,note\n2,zwei,n\n3,drei,m\n")
    labelled = import_labels(copied, first)
    assert len(copied.labels.columns) == 0  # the object that was there stays as it was
    text = refused(RequestError, lambda: import_labels(labelled, second))
    assert text == "labels: description of these features is there already; give replace=True"
    merged_labels = import_labels(labelled, second, replace=True).labels
    assert merged_labels["description"].dropna().to_dict() == {2: "zwei", 3: "drei"}
    assert merged_labels["f1"].dropna().to_dict() == {1: 0.5, 2: 0.25}
    assert merged_labels.attrs["sources"] == {"f1": "a.csv", "description": "b.csv", "note": "b.csv"}
    assert wb.import_labels(labelled, first, replace=True).labels["f1"].tolist() == [0.5, 0.25]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "word,n\nx,1\n", "labels: {path}:2: no column feature, index, feature_id, feature_index, latent, "),
        ("a.csv", "feature,d\n20,x\n", "labels: {path}:2: feature 20 does not exist, the SAE has features 0 to 19"),
        ("a.csv", "feature,d\n1.5,x\n", "labels: {path}:2: feature is '1.5', no number of a feature; give "),
        ("a.csv", "feature,d\n-1,x\n", "labels: {path}:2: feature is '-1', no number of a feature"),
        ("a.csv", "feature,f1\n1,0.5\n2,inf\n", "labels: {path}:3: f1 is inf; give a finite number, or none"),
        ("a.json", '[{"feature": 1, "f1": -1e999}]', "labels: {path}[0]: f1 is -inf; give a finite number"),
        ("a.json", '[{"modelId": "m", "index": 1, "scores": [{"value": 1e999}]}]', "labels: {path}[0]: score is inf"),
        ("latents/m_latent1.txt", "Infinity", "labels: {path}: latents is inf; give a finite number, or none"),
        ("latents/m_latent1.txt", "9" * 400, "labels: {path}: latents is inf; give a finite number, or none"),
        ("a.csv", "feature\n1\n", "labels: '{path}' has numbers of features, but nothing about them; give a "),
        ("a.csv", "feature,d\n", "labels: '{path}' has none; give a folder of delphi, "),
        ("a.csv", "feature,d\n1,x,y\n", "labels: {path}:2: 3 cells, and the header has 2; "),
        ("a.json", "[1, 2", "labels: {path}:1: not JSON"),
        ("a.json", '["x"]', "labels: {path}[0]: no object with the number of a feature; give a folder of delphi, "),
        ("a.csv", "index,layer,d\n1,a,x\n1,b,y\n", "labels: '{path}' has several autoencoders; choose one with "),
        ("a.pkl", "x", "labels: '{path}' is not of a known form; give a folder of delphi, "),
        ("latents/a.txt", "x", "labels: '{path}' is not named as delphi does, HOOKPOINT_latentN.txt; give "),
        ("latents/m_latent1.txt", "not json", "labels: '{path}' is not JSON ("),
        ("latents/m_latent1.txt", "[]", "labels: '{path}' has neither an explanation nor predictions of examples; "),
        ("missing", None, "labels: '{path}' does not exist; give a file or a folder"),
    ],
)  # fmt: skip
def test_wrong_files_are_refused_in_one_line(name, content, message, copied, tmp_path):
    path = tmp_path / "in" / name
    if content is not None:
        write(path, content)
    source = path.parent if path.parent.name == "latents" else path
    text = refused(RequestError, lambda: import_labels(copied, source))
    assert text.startswith(message.format(path=path))
    assert not (copied.path / LABELS).exists()


def test_several_autoencoders_need_a_choice(tmp_path):
    rows = [neuronpedia(1, "here", "0-res"), neuronpedia(1, "there", "1-res")]
    path = write(tmp_path / "a.json", rows)
    assert read_labels(path, 20, "1-res")["description"] == {1: "there"}
    text = refused(RequestError, lambda: read_labels(path, 20, "2-res"))
    assert text == f"labels: {str(path)!r} has no source '2-res', but 0-res, 1-res; nearest: 1-res, 0-res"


def findings(path):
    return [row for row in verify(path).to_dict("records") if row["file"] != "features.json"]


def test_damaged_and_foreign_labels_are_refused_and_verified(copied, tmp_path):
    import_labels(copied, write(tmp_path / "a.csv", "feature,description\n1,one\n"))
    path = copied.path / LABELS
    sound = path.read_text()
    record = json.loads(sound)

    def problem(text):
        path.write_text(text)
        (finding,) = findings(copied.path)
        assert finding["file"] == LABELS
        return refused((DataError, RequestError), lambda: open_features(copied.path, copied.store).labels)

    assert problem(sound.replace("one", "two")).startswith(f"{path} is damaged or was edited: its checksum differs; ")
    assert problem("{").startswith(f"{path} is not JSON")
    assert "format version 2; upgrade" in problem(json.dumps(record | {"version": 2}))
    foreign = to_checked_json({key: value for key, value in record.items() if key != "checksum"} | {"sae": "other"})
    assert problem(foreign) == f"{path}: these labels are of another SAE; remove it and import the labels again"
    path.write_text(sound)
    assert findings(copied.path) == []


def test_tables_name_features_by_their_description(copied, tmp_path):
    plain = wb.feature_statistics(copied)
    assert "description" not in plain
    feature = int(copied.counts.argmax())
    labelled = import_labels(copied, write(tmp_path / "a.csv", f"feature,description\n{feature},one\n"))
    neighbour = next(f for f in range(20) if f != feature and feature in wb.coactivation(copied, f)["feature"].tolist())
    tables = (
        wb.feature_statistics(labelled),
        wb.coactivation(labelled, neighbour),
        labelled.enrichment("position > 3"),
        wb.best_features(labelled, "position", least=2),
    )
    for table in tables:
        named = table.set_index("feature")["description"].dropna()
        assert set(named.items()) <= {(feature, "one")}
    assert all(tables[n]["description"].notna().any() for n in (0, 1, 2))
    pd.testing.assert_frame_equal(tables[0].drop(columns="description"), plain)


def test_matches_splits_and_probes_show_the_words_of_every_feature(copied, tmp_path):
    feature = int(np.argmax(copied.counts))
    labelled = import_labels(copied, write(tmp_path / "a.csv", f"feature,description\n{feature},one\n"))
    match = wb.match_features(labelled, labelled).set_index("feature").loc[feature]
    assert (match["description"], match["match"], match["match_description"]) == ("one", feature, "one")
    splits = wb.feature_splits(labelled, labelled, least=1).set_index("feature").loc[feature]
    assert splits["description"] == "one"
    assert f"one ({feature})" in splits["features_description"].split("; ")
    rows = copied.rows_of(feature)[0]
    active = np.isin(np.arange(len(copied)), rows).astype(str)
    probes = wb.sparse_probe(labelled, {"active": active}, k=[1], least=1, resamples=10, show_progress=False).table
    assert set(probes["features_description"]) == {f"one ({feature})"}


def test_cells_are_read_as_people_write_them(copied, tmp_path):
    assert read_labels(write(tmp_path / "a.csv", "feature , description\n 3 , days\n"), 20) == {
        "description": {3: " days"}
    }
    for content, message in (
        ("Feature,Description,DESCRIPTION\n3,days,weeks\n", ":2: two columns are called 'description'; rename one"),
        ("feature,description\n,days\n", ":2: feature is empty, no number of a feature; give a whole number"),
    ):
        path = write(tmp_path / "b.csv", content)
        assert refused(RequestError, lambda path=path: read_labels(path, 20)) == f"labels: {path}{message}"


def test_labels_that_are_not_utf_8_can_be_shown(copied, tmp_path):
    """A lone surrogate would end every later print and page."""
    path = tmp_path / "a.csv"
    path.write_bytes(b"feature,description\n3,caf\xe9\n4,tea\n")
    with warned("labels: 1 text not UTF-8 in "):
        labels = import_labels(copied, path).labels
    assert labels["description"].tolist() == ["caf\ufffd", "tea"]


def other_layer(source, fits):
    return nullcontext() if fits else warned(f"labels: the files are of {source!r}, and these features of blocks.1.")


@pytest.mark.parametrize(
    ("source", "fits"),
    [("1-res-jb", True), ("2-res-jb", True), ("0-res-jb", False), ("12-res", False), ("res-3", True), ("", True)],
)
def test_labels_of_another_layer_are_warned_of(source, fits, copied, tmp_path):
    """The features are of resid_post.1, which is resid_pre.2 as well; a name without a layer fits."""
    path = write(tmp_path / "a.json", [{"modelId": "m", "layer": source, "index": 3, "description": "days"}])
    with other_layer(source, fits):
        assert import_labels(copied, path).labels["description"].tolist() == ["days"]


@pytest.mark.parametrize(("hookpoint", "fits"), [("layers.1", True), ("model.layers.2.mlp", True), ("h.11", False)])
def test_delphis_hookpoint_of_another_layer_is_warned_of(hookpoint, fits, copied, tmp_path):
    write(tmp_path / "explanations" / f"{hookpoint}_latent3.txt", '"days"')
    with other_layer(hookpoint, fits):
        assert import_labels(copied, tmp_path).labels["description"].tolist() == ["days"]


@pytest.mark.parametrize("prediction", ["maybe", [1], {"a": 1}])
def test_predictions_of_delphi_that_are_none_are_refused(prediction, tmp_path):
    path = write(tmp_path / "scores" / "fuzz" / "l_latent3.txt", [{"activating": True, "prediction": prediction}])
    assert refused(RequestError, lambda: read_labels(tmp_path, 20)) == (
        f"labels: {str(path)!r}: an example has {(True, prediction)!r} as truth and prediction, expected True or "
        "False; run delphi again"
    )


def test_pages_views_and_commands_show_labels_as_text(copied, example, tmp_path):
    feature = int(copied.counts.argmax())
    content = f'feature,description,f1\n{feature},"{HOSTILE.replace(chr(34), chr(34) * 2)}",0.75\n'
    labelled = import_labels(copied, write(tmp_path / "a.csv", content))
    page = wb.feature_page(labelled, feature, tmp_path / "page.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &#34;x&#34; &amp; &#36;a&#36; \\u202e\\x1b[31m</p>" in page
    assert "<script" not in page
    assert "f1 0.75" in page
    neighbour = next(f for f in range(20) if f != feature and feature in wb.coactivation(copied, f)["feature"].tolist())
    assert "&lt;script&gt;" in wb.feature_page(labelled, neighbour, tmp_path / "other.html").read_text()
    view = wb.TokenView(example, features=labelled)
    view.colour, view.feature = "feature", feature
    picture = view._repr_mimebundle_()[0]["text/html"]
    assert f"feature {feature}: &lt;script&gt;" in picture
    assert "<script" not in picture
    code, out, err = run("top", labelled.path, feature, "--k", 1)
    assert (code, err) == (0, "")
    assert f'feature {feature}: <script>alert(1)</script> "x" & $a$ \\u202e\\x1b[31m (f1 0.75)\n' in out
    assert "1 features: description, f1" in labelled._repr_html_()


def test_the_command_imports_labels(store, sae, tmp_path):
    folder = extracted(store, sae).path
    command = ("labels", store.path, write(tmp_path / "a.csv", "feature,description\n2,two\n"))
    assert run(*command) == (0, "labels    1 of 20 features: description\n", "")
    message = "workbench: labels: description of these features is there already; give --replace\n"
    assert run(*command) == (2, "", message)
    assert run(*command, "--replace")[0] == 0
    assert names_of(open_features(folder, store).labels) == {2: "two"}
    code, out, err = run("labels", store.path, tmp_path / "missing.csv")
    assert (code, out) == (2, "")
    assert err == f"workbench: labels: '{tmp_path / 'missing.csv'}' does not exist; give a file or a folder\n"
