"""The page of what every probe finds: every probe answers, and a model's words are no markup there."""

from dataclasses import replace

import workbench as wb
from workbench.demo.run import SETTINGS as QUICK
from workbench.embedded import demo_corpus
from workbench.experiments.controls import random_copy
from workbench.experiments.demo_model.made_of import read_made_of
from workbench.experiments.findings import measure
from workbench.experiments.findings.__main__ import DEMO, page, speech
from workbench.experiments.findings.measure import KEPT, OTHER_INPUTS, Subject, headlines
from workbench.results.registry import installed_probes


def test_every_probe_answers_on_the_embedded_model_and_once(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "REPEATS", 8)
    brief = {"row_limit": 8, "training_rows": 16, "prompt_tokens": 2}
    settings = DEMO | {"future-prompts": DEMO["future-prompts"] | brief}
    settings |= {"under-trained-tokens": QUICK["under-trained-tokens"]}
    settings |= {"token-characters": {"row_limit": 200, "epochs": 1}, "fiber-bundle": {"row_limit": 50}}
    settings |= {"future-lens": {"epochs": 1, "horizons": 1}, "tuned-lens": {"epochs": 1}}
    settings |= {"induction-heads": {"ablation_tokens": 100, "ablation_controls": 1, "resamples": 20}}
    settings |= {"next-token-law": {"rows_per_dimension": 1}, "linear-probes": {"label": "concept", "least": 5}}
    settings |= {"masked-sinks": {"row_limit": 50, "layers_too": False, "heads": 1}}
    settings |= {"zero-tuning": {"row_limit": 50, "gammas": (0.5, 1.0)}}
    settings |= {"attention-calibration": {"row_limit": 100, "first": 0, "threshold": 0.1}}
    settings |= {"stages": {"row_limit": 50, "control": False}}
    settings |= {"feed-forward-maps": {"row_limit": 1, "length": 16}}
    settings |= {"over-squashing": {"draws": 1, "longest": 16}}
    settings |= {"jacobian-lens": {"prompts": 1, "length": 20}}
    settings |= {"token-microscope": {"rows_per_dimension": 1, "epochs": 1, "dimension_rows": 100}}
    subject = Subject("demo", wb.load_model("demo", device="cpu"), demo_corpus()[:10], 1200, settings)
    lines = headlines(subject, tmp_path)
    assert list(lines) == [name for name in installed_probes() if name not in OTHER_INPUTS]
    assert not [text for text in lines.values() if text.startswith("not run") or not text]
    text = (tmp_path / KEPT).read_text()
    (tmp_path / KEPT).write_text(text.replace(lines["logit-lens"], "kept"))
    assert headlines(subject, tmp_path, ["logit-lens"]) == {"logit-lens": "kept"}
    two_layers = replace(subject, settings={"logit-lens": {"layers": (0, 1)}})
    assert headlines(two_layers, tmp_path, ["logit-lens"])["logit-lens"] not in ("kept", lines["logit-lens"])


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
        {"a": {"lens": "head 0.1 | <b>"}, "b": {"lens": "none"}},
        rows=2_000,
        fingerprints={"model a": "0" * 16},
        count="two",
        real="",
    )
    assert "on two trained models" in text
    assert "| a | head 0.1 &#124; &lt;b&gt; |\n| b | none |\n" in text
    assert "2,000 tokens" in text
    assert read_made_of(text) == {"model a": "0" * 16}
