"""Tests of several architectures, compared with independent readings, and of the page about all of them."""

import functools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from workbench.experiments.architectures import __main__ as command
from workbench.experiments.architectures import sweep
from workbench.experiments.architectures.sweep import Check, check, format_error
from workbench.recording import segments

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"

HEADS = {"pattern", "z", "mlp_post"}
ADAPTED = {
    "llama": HEADS,
    "gpt2": HEADS,  # learned positions, fused q, k and v
    "gpt_neox": HEADS,  # attention and MLP in parallel
    "gemma2": HEADS,  # soft-caps, norms behind attention and MLP
    "gemma3_text": HEADS,  # global and local layers
    "mistral": HEADS,  # a window of 8 over sequences of up to 11
    "gpt_oss": {"pattern", "z"},  # sinks, a mixture of experts
    "cohere": HEADS,  # scales its logits
    "bloom": HEADS,  # ALiBi, and no AttentionInterface
    "gptj": HEADS,
    "opt": HEADS,  # an MLP that is no module
    "olmo2": HEADS,  # norms behind only
    "deepseek_v3": HEADS,  # latent attention, one dense layer before the experts
    "qwen3_next": {"pattern", "z"},  # linear and full attention
    "mamba": set(),  # none
}
STRUCTURAL = ["bart", "persimmon", "ministral"]


checked = functools.cache(check)


@pytest.mark.parametrize("model_type", ADAPTED)
def test_what_is_recorded_is_what_independent_readings_say(model_type):
    architecture = checked(model_type)
    assert architecture.failure is None
    assert architecture.adapter is not None
    assert {"resid_post", "logits", *ADAPTED[model_type]} <= {*architecture.kinds}
    compared = {"resid_post", "logits", *(ADAPTED[model_type] & {"pattern"})}
    if not any("TransformerBridge" in remark for remark in architecture.remarks):
        compared |= ADAPTED[model_type]
    assert compared <= architecture.errors.keys()
    assert max(architecture.errors.values()) <= sweep.TOLERANCE
    assert architecture.lens <= sweep.LENS_TOLERANCE


@pytest.mark.parametrize("model_type", STRUCTURAL)
def test_a_model_without_adapter_is_recorded_by_structure(model_type):
    architecture = check(model_type)
    assert architecture.failure is None
    assert architecture.adapter is None
    assert architecture.kinds == ("resid_post", "logits") or architecture.kinds == ("resid_pre", "resid_post", "logits")
    assert architecture.errors.keys() == {"resid_post", "logits"}
    assert max(architecture.errors.values()) <= sweep.TOLERANCE
    assert architecture.lens <= sweep.LENS_TOLERANCE


def test_the_bridge_reads_most_of_them():
    """Otherwise nothing would be said about z and mlp_post."""
    compared = checked("llama").errors.keys()
    assert {"q", "k", "v", "rot_q", "z", "attn_out", "ln1", "ln2", "mlp_pre", "mlp_post"} <= compared


# ---- a comparison that cannot fail is none --------------------------------------------------------------


def spoil(monkeypatch, kinds, change):
    """Lets the recorder get `change(site, tensor, first)` instead of these kinds of site."""
    original = segments.capture

    def spoiled(module, sites, ids, mask, receive):
        def worse(site, tensor, first):
            hit = site.short.split(".")[0] in kinds
            receive(site, change(site, tensor, first) if hit else tensor, first)

        original(module, sites, ids, mask, worse)

    monkeypatch.setattr(segments, "capture", spoiled)


@pytest.mark.parametrize("kinds", [["resid_post", "pattern", "logits"], ["q", "z", "ln2", "mlp_post"]])
def test_small_errors_are_found(monkeypatch, kinds):
    spoil(monkeypatch, kinds, lambda _site, tensor, _first: tensor * (1 + 1e-4))
    failure = check("llama").failure
    assert sorted(re.findall(r"(\w+) differs by", failure)) == sorted(kinds)


def test_a_wrong_last_block_is_found_by_its_lens(monkeypatch):
    spoil(monkeypatch, ["resid_post"], lambda site, x, _first: x + 0.1 * x.roll(1, -1) if site.layer == 3 else x)
    assert re.fullmatch(r"the lens differs from the logits by \d+e-?\d+", check("llama").failure)


def test_positions_out_of_place_are_found(monkeypatch):
    spoil(monkeypatch, ["z"], lambda _site, tensor, _first: tensor.roll(1, 1))
    assert check("llama").failure.startswith("z differs by ")


def test_attention_to_the_future_is_found(monkeypatch):
    def leak(_site, tensor, _first):
        tensor = tensor.clone()
        tensor[:, 0, :, 1] = 0.5
        return tensor

    spoil(monkeypatch, ["pattern"], leak)
    assert check("llama").failure.startswith("pattern differs by 5e-1")


def test_padding_that_reaches_a_row_is_found(monkeypatch):
    """Each reading is of a sequence alone, so a batch whose mask is lost gives other numbers."""
    original = segments.capture

    def maskless(module, sites, ids, mask, receive):
        original(module, sites, ids.flip(1), torch.ones_like(mask), lambda s, x, first: receive(s, x.flip(1), first))

    monkeypatch.setattr(segments, "capture", maskless)
    assert not check("llama").passed


def test_a_type_that_cannot_be_built_or_recorded_is_an_answer():
    unbuilt = check("musicgen")
    assert (unbuilt.passed, unbuilt.kinds) == (False, ())
    assert unbuilt.failure.startswith("cannot build a tiny 'musicgen': ")
    streams = check("deepseek_v4")
    assert (streams.passed, streams.adapter) == (False, "DeepSeekV4ArchitectureAdapter")
    assert streams.failure.startswith("no resid_post: ")


def test_a_crash_is_an_answer(monkeypatch):
    def crash(*_args, **_kwargs):
        raise MemoryError("too\nmuch")

    monkeypatch.setattr(sweep.wb, "record", crash)
    architecture = check("llama")
    assert architecture.failure == "MemoryError: too much"
    assert architecture.adapter == "LlamaArchitectureAdapter"


# ---- what a difference is -------------------------------------------------------------------------------


def test_a_difference_is_relative_to_the_largest_value_or_to_one():
    zeros, small, large = torch.zeros(2, 3), torch.full((2, 3), 0.25), torch.full((2, 3), 8.0)
    assert sweep._difference(small, zeros) == 0.25
    assert sweep._difference(large - 2, large) == 0.25
    assert sweep._difference(torch.ones(2, 4, 3), torch.ones(4, 2, 3)) == 0  # heads before positions
    assert sweep._difference(torch.ones(2, 4, 3), torch.ones(2, 12)) == 0  # heads in one axis
    assert sweep._difference(zeros, torch.zeros(2, 2)) == float("inf")
    assert sweep._difference(zeros, zeros / 0) == float("inf")


@pytest.mark.parametrize(
    ("error", "text"),
    [(0.0, "0"), (3.4e-7, "3e-7"), (9.6e-7, "1e-6"), (2.2, "2e0"), (4e10, "4e10"), (float("inf"), "inf")],
)
def test_errors_have_one_digit(error, text):
    assert format_error(error) == text


# ---- the page -------------------------------------------------------------------------------------------

GOOD = Check("llama", "LlamaArchitectureAdapter", ("resid_post", "z"), {"resid_post": 3e-7, "ln1": 2e-7}, 0.0)
STRUCTURE = Check("xlstm", None, ("resid_post", "logits"), {"resid_post": 3e-7, "logits": 0.0}, "no <norm> | there")
BAD = replace(GOOD, model_type="bad", errors={"resid_post": 0.5}, remarks=("odd",), failure="resid_post differs")
REFUSED = Check("xlm", failure="its blocks cannot be told")


def tables(text):
    """The page's tables as lists of rows by heading."""
    by_heading = {}
    for part in text.split("\n## ")[1:]:
        heading, _, rest = part.partition("\n")
        lines = [line for line in rest.splitlines() if line.startswith("|")]
        by_heading[heading] = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return by_heading


def test_the_page_counts_and_tabulates():
    text = command.page([GOOD, STRUCTURE, BAD, REFUSED])
    assert "- Through TransformerLens' adapters: 1 of 2 types pass.\n" in text
    assert "- By structure (residual stream and logits only): 1 of 1 types pass.\n" in text
    assert "- Not recordable: 1 types.\n" in text
    by_heading = tables(text)
    head, rule, *rows = by_heading["Through TransformerLens' adapters"]
    assert ["type", "adapter", "sites", *command.COLUMNS, "others", "lens", "remark"] == head
    assert set(rule) == {"---"}
    assert rows == [
        ["llama", "Llama", "resid_post z", "3e-7", "-", "-", "-", "-", "2e-7", "0", ""],
        [
            "bad",
            "Llama",
            "resid_post z",
            "5e-1",
            "-",
            "-",
            "-",
            "-",
            "-",
            "0",
            "FAILS: resid_post differs; odd",
        ],
    ]
    expected = ["xlstm", "resid_post logits", "3e-7", "0", "-", "no lens: no &lt;norm&gt; \\| there"]
    assert by_heading["By structure"][2:] == [expected]
    assert by_heading["Not recordable"][2:] == [["xlm", "its blocks cannot be told"]]


def test_the_command_writes_the_page(tmp_path, monkeypatch, capsys):
    answers = {"llama": GOOD, "xlm": REFUSED}
    monkeypatch.setattr(command, "check", answers.__getitem__)
    monkeypatch.setattr(torch, "set_num_threads", lambda _n: None)
    out = tmp_path / "docs" / "page.md"
    assert command.main(["--types", "llama", "xlm", "--out", str(out)]) == 0
    assert out.read_text() == command.page([GOOD, REFUSED])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "1/2 llama: passes\n2/2 xlm: its blocks cannot be told\n"
    assert command.main(["--types", "llama"]) == 0
    assert capsys.readouterr().out == command.page([GOOD])


def test_the_command_refuses_types_there_are_not(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--types", "llama", "lama"])
    assert stopped.value.code == 2
    assert "transformers has no causal language model of type lama" in capsys.readouterr().err


def test_the_page_in_the_docs_holds_what_is_promised():
    text = PAGE.read_text()
    adapted, structural = (
        [row for row in rows[2:] if "FAILS" not in row[-1]]
        for rows in (tables(text)["Through TransformerLens' adapters"], tables(text)["By structure"])
    )
    assert len(adapted) >= 65
    assert len(structural) >= 25
    assert f"adapters: {len(adapted)} of " in text
    assert f"only): {len(structural)} of " in text
    assert all(row[3] != "-" for row in adapted), "resid_post was compared"
    names = {row[0] for row in adapted}
    assert {*ADAPTED} <= names
    assert {*STRUCTURAL} <= {row[0] for row in structural}
    rows = sum(len(rows) - 2 for rows in tables(text).values())
    assert rows == len(command.causal_lm_types()), "written for another version of transformers? run `make docs`"
