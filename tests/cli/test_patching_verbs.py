"""Verbs of patching, attribution and steering: what they save is what Python gives."""

from __future__ import annotations

import numpy as np
from command_line import run

import workbench as wb
from workbench.probes import ActivationPatching


def test_patch_saves_the_result_of_a_task(tmp_path):
    out = tmp_path / "result"
    settings = ("--pairs", 4, "--layers", 0, 1, "--no-controls-too", "--resamples", 20)
    code, text, _ = run("patch", "demo", "facts", "--out", out, *settings)
    assert code == 0
    assert text.startswith("PromptPairs('facts', 4 pairs")
    model = wb.load_model("demo", device="cpu")
    probe = ActivationPatching(layers=(0, 1), controls_too=False, resamples=20)
    expected = probe.run_pairs(model, wb.prompt_pairs("facts", model, 4))
    np.testing.assert_allclose(wb.load_result(out).data["denoising"], expected.data["denoising"], atol=1e-6)


def test_attribute_estimates_patching_for_a_task(tmp_path):
    settings = ("--pairs", 4, "--layers", 1, "--exact-pairs", 2, "--resamples", 20)
    code, text, _ = run("attribute", "demo", "facts", "--out", tmp_path / "r", *settings)
    assert code == 0
    assert "Estimated patching of resid_post (gradient of the corrupt run)" in text
    assert wb.load_result(tmp_path / "r").data.sizes["exact_pair"] == 2


def test_wrong_requests_are_refused_in_one_line(tmp_path):
    for arguments, message in (
        (("patch", "demo", "fact", "--out", tmp_path / "x"), "task must be one of ioi"),
        (("patch", "demo", "ioi", "--out", tmp_path / "x"), "no pair of 'ioi' fits the tokenizer"),
        (("attribute", tmp_path / "gone", "--out", tmp_path / "x"), "gone"),
        (("attribute", "demo", "fact", "--out", tmp_path / "x"), "task must be one of ioi"),
        (("steer", tmp_path / "gone", "--out", tmp_path / "x"), "gone"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, ""), arguments
        assert message in err
        assert err.count("\n") == 1
