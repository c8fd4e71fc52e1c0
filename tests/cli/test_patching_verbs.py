"""Verbs of patching, attribution, steering and patchscopes: what they save is what Python gives."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
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


def test_counts_that_cannot_be_met_are_refused_before_the_model_is_loaded(tmp_path):
    for option, limit in (("--pairs", "from 1 to 100000"), ("--resamples", "at most 100000")):
        code, _, err = run("patch", "no-model", "facts", "--out", tmp_path / "r", option, "1e9")
        assert code == 2
        assert err.startswith(f"workbench: {option} must be {limit}, not 1000000000")
        assert len(err.splitlines()) == 1


def test_attribute_estimates_patching_for_a_task(tmp_path):
    settings = ("--pairs", 4, "--layers", 1, "--exact-pairs", 2, "--resamples", 20)
    code, text, _ = run("attribute", "demo", "facts", "--out", tmp_path / "r", *settings)
    assert code == 0
    assert "Estimated patching of resid_post (gradient of the corrupt run)" in text
    assert wb.load_result(tmp_path / "r").data.sizes["exact_pair"] == 2


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    out = tmp_path_factory.mktemp("patchscope") / "s.acts"
    text = "Once upon a time there was a cat."
    model = wb.load_model("demo", device="cpu")
    return wb.record(model, [text], sites=["resid_post"], out=out, dtype="float32", show_progress=False)


def test_patchscope_lists_and_saves_what_python_gives(store, tmp_path):
    options = ("--where", "position > 2", "--limit", 2, "--prompt", "the _ and the _", "--placeholder", "_")
    options += ("--into", "resid_post.0", "--tokens", " cat", "--top-k", 2, "--new-tokens", 3, "--seed", 1)
    code, text, _ = run("patchscope", store.path, "resid_post.2", *options, "--out", tmp_path / "scope")
    assert code == 0
    rows = store.where("position > 2")[:2]
    settings = {"placeholder": "_", "into": "resid_post.0", "tokens": (" cat",), "top_k": 2, "new_tokens": 3, "seed": 1}
    expected = wb.patchscope(rows, "resid_post.2", "the _ and the _", **settings, device="cpu").table
    saved = pd.read_csv(tmp_path / "scope" / "patchscope.csv", keep_default_na=False)
    pd.testing.assert_frame_equal(saved, expected, check_dtype=False, rtol=1e-6)
    *lines, end, folder = text.splitlines()
    assert len(lines) == 1 + len(expected)
    assert "  ".join(lines[0].split()) == "  ".join(" ".join(expected.columns).split())
    positions = wb.patchscope(rows, "resid_post.2", "the _ and the _", placeholder="_").prompt.positions
    assert end == (
        f"2 of {len(store.where('position > 2'))} rows of resid_post.2, put into resid_post.0 at positions "
        f"{positions[0]}, {positions[1]} of 'the _ and the _'"
    )
    assert folder == f"table  {tmp_path / 'scope'}"


def test_patchscope_has_the_identity_prompt_by_default(store):
    code, text, _ = run("patchscope", store.path, "resid_post.1", "--limit", 1, "--top-k", 1)
    assert code == 0
    assert text.splitlines()[0].split() == ["row", "token", "kind", "top_token_1", "top_probability_1"]
    assert text.rstrip().endswith("of 'cat->cat; 1124->1124; hello->hello; ?'")


def test_patchscope_refuses_wrong_requests_in_one_line(store, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for options, message in (
        (("resid_post.9",), "resid_post.9"),
        (("resid_post.1", "--where", "position > 99"), "--where 'position > 99' selects no row; choose another"),
        (("resid_post.1", "--where", "nonsense"), "nonsense"),
        (("resid_post.1", "--limit", 0), "--limit must be a whole number, at least 1, not 0"),
        (("resid_post.1", "--into", "resid_pst.0"), "resid_pst.0"),
        (("resid_post.1", "--placeholder", "zebra"), "--placeholder 'zebra' is not in the prompt"),
        (("resid_post.1", "--tokens", "xyzzy"), "--tokens: 'xyzzy' is"),
        (("resid_post.1", "--top-k", 0), "--top-k must be a whole number, at least 1"),
        (("resid_post.1", "--out", tmp_path / "full"), "full"),
        (("resid_post",), "resid_post"),
    ):
        code, out, err = run("patchscope", store.path, *options)
        assert (code, out) == (2, ""), options
        assert message in err, options
        assert err.count("\n") == 1


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
