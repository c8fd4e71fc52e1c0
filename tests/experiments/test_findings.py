"""The page of what every probe finds: every probe answers, and a model's words are no markup there."""

from dataclasses import replace

import pytest

import workbench as wb
from workbench.embedded import demo_corpus
from workbench.experiments.controls import random_copy
from workbench.experiments.demo_model.made_of import read_made_of
from workbench.experiments.findings import __main__ as command
from workbench.experiments.findings import measure
from workbench.experiments.findings.__main__ import DEMO, page, speech
from workbench.experiments.findings.measure import KEPT, OTHER_INPUTS, Finding, Subject, findings, probes_of_texts
from workbench.results.registry import installed_probes


def test_a_probe_of_each_kind_of_store_answers_and_once(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "REPEATS", 8)
    briefly = {"ablation_tokens": 100, "ablation_controls": 1, "resamples": 20}
    settings = DEMO | {"induction-heads": briefly, "feed-forward-maps": {"row_limit": 1, "length": 16}}
    subject = Subject("demo", wb.load_model("demo", device="cpu"), demo_corpus()[:10], 1200, settings)
    names = ["logit-lens", "attention-sinks", "induction-heads", "feed-forward-maps", "vocabulary-keys"]
    findings_by_probe = findings(subject, tmp_path, names)
    assert list(findings_by_probe) == names
    assert not [
        finding
        for finding in findings_by_probe.values()
        if finding.headline.startswith("not run") or not finding.headline
    ]
    repeats = wb.random_repeats(subject.model.tokenizer, sequences=8)
    rows = dict.fromkeys(names, 1200) | {"induction-heads": sum(map(len, repeats))}
    assert {name: finding.rows for name, finding in findings_by_probe.items()} == rows
    assert min(finding.seconds for finding in findings_by_probe.values()) > 0
    lens = findings_by_probe["logit-lens"]
    text = (tmp_path / KEPT).read_text()
    (tmp_path / KEPT).write_text(text.replace(lens.headline, "kept"))
    assert findings(subject, tmp_path, ["logit-lens"]) == {"logit-lens": replace(lens, headline="kept")}
    two_layers = replace(subject, settings={"logit-lens": {"layers": (0, 1)}})
    assert findings(two_layers, tmp_path, ["logit-lens"])["logit-lens"].headline not in ("kept", lens.headline)


def test_the_page_has_every_installed_probe_but_those_of_other_inputs():
    assert {*probes_of_texts(), *OTHER_INPUTS} == {*installed_probes()}
    assert not {*probes_of_texts()} & {*OTHER_INPUTS}


def test_quoted_and_narrated_text_cover_a_story():
    text = 'He said: "Go!" She: "No." End'
    spans = speech(text)
    assert "".join(text[span["start"] : span["end"]] for span in spans) == text
    assert [text[span["start"] : span["end"]] for span in spans if span["value"] == "quoted"] == ["Go!", "No."]
    assert speech('a " b') == [{"start": 0, "end": 5, "value": "narrated"}]


def test_a_random_copy_has_the_shape_and_none_of_the_weights():
    model = wb.load_model("demo", device="cpu")
    copies = [random_copy(model) for _ in range(2)]
    assert copies[0].fingerprint() == copies[1].fingerprint() != model.fingerprint()
    assert copies[0].config_fingerprint() == model.config_fingerprint()
    assert copies[0].tokenizer is model.tokenizer


def test_the_page_has_a_line_for_each_model_and_probe_and_no_markup_of_theirs():
    text = page(
        {"a": {"lens": Finding("head 0.1 | <b>", 1_999, 2.26, 30.0)}, "b": {"lens": Finding("not run: no")}},
        rows=2_000,
        fingerprints={"model a": "0" * 16},
        count="two",
        real="",
    )
    assert "on two trained models" in text
    assert "| a | head 0.1 &#124; &lt;b&gt; | 1,999 | 2.3 | 30 |\n| b | not run: no | | | |\n" in text
    assert "2,000 tokens" in text
    assert read_made_of(text) == {"model a": "0" * 16}


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        ([], "--shared: none/corpora/tinystories_1000.jsonl does not exist; name a folder with models/ and corpora/"),
        (["--model", "here"], "--shared: none/corpora/tinystories_1000.jsonl does not exist"),
        (["--model", "here", "--text", "no.txt"], "--text: no.txt does not exist; name a file of texts"),
        (["--model", "no", "--text", "here"], "--model: no does not exist; name the folder of a model"),
    ],
)
def test_a_missing_input_is_refused_in_one_line_before_anything_runs(tmp_path, monkeypatch, capsys, arguments, refusal):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(SystemExit, match="2"):
        command.main(["--shared", "none", "--write", "page.md", *arguments])
    assert f"error: {refusal}" in capsys.readouterr().err
