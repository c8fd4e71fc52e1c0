"""Arguments in messages: the library spells them as Python does, the command line as a shell does."""

from __future__ import annotations

import pytest
from command_line import refused

import workbench as wb
from workbench.cli.arguments import parse
from workbench.cli.options import options_of
from workbench.cli.recording_verbs import Record
from workbench.cli.spelling import shell_spelling

OPTIONS = tuple(options_of(Record))


@pytest.mark.parametrize(
    ("python", "shell"),
    [
        ("max_rows must be at least 1, not 0", "--max-rows must be at least 1, not 0"),
        ("bos='always', but there is none; use bos='model'", "--bos always, but there is none; use --bos model"),
        ("pass trust_remote_code=True if you do", "pass --trust-remote-code if you do"),
        ("give packed=False", "give --no-packed"),
        ("pass span_column=None to read no spans", "pass --span-column None to read no spans"),
        ("as in metadata=['source', 'a b'] or metadata=()", "as in --metadata source 'a b' or --metadata"),
        ("pass tokenizer= or give lists", "pass --tokenizer or give lists"),
        ("out=/a b is not empty; choose another out", "--out /a b is not empty; choose another --out"),
        ("sae_site and sae_force are for sae; give it too", "--sae-site and --sae-force are for sae; give it too"),
        ("context=3, which is short.", "--context 3, which is short."),
        # no argument of the command, or none at all
        ("give model=, the directory", "give model=, the directory"),
        ("column 'max_rows' and \"sae_id\" of a/max_rows.txt", "column 'max_rows' and \"sae_id\" of a/max_rows.txt"),
        ("the sites that it has", "the sites that it has"),
        ("--max-rows is too many", "--max-rows is too many"),
        ("", ""),
    ],
)
def test_a_message_in_both_spellings(python, shell):
    assert shell_spelling(python, OPTIONS) == shell
    assert shell_spelling(shell, OPTIONS) == shell
    assert shell_spelling(python, ()) == python


def test_the_same_error_from_python_and_from_a_shell(tmp_path):
    with pytest.raises(wb.RequestError, match=r"^segment_rows must be at least 1, not -3$"):
        wb.Recording(segment_rows=-3)
    ask = ("record", "demo", "a text", "--out", tmp_path / "o")
    assert refused(*ask, "--segment-rows", -3).startswith("--segment-rows must be at least 1, not -3; see ")
    refused_device = refused(*ask, "--device", "tpu9")
    assert refused_device.startswith("--device 'tpu9' cannot be used here: ")


@pytest.mark.parametrize(
    ("written", "rows"),
    [("1e6", 10**6), ("1_000", 1000), ("2.5e3", 2500), ("7", 7), ("None", None), ("9007199254740993", 2**53 + 1)],
)
def test_a_whole_number_is_read_exactly(written, rows):
    command = parse(Record, "workbench record", ["m", "t", "--out", "o", f"--max_rows={written}"])
    assert command.recording.max_rows == rows


def test_lists_with_commas_spaces_and_repeated():
    for words in (["--sites", "a,b", "c"], ["--sites=a", "--sites", "b,c"], ["--sites", "a", "b", "c"]):
        assert parse(Record, "workbench record", ["m", "t, u", "--out", "o", *words]).recording.sites == ("a", "b", "c")
    command = parse(Record, "workbench record", ["--out=o", "m", "--metadata", "--", "t, u", "--v"])
    assert (command.recording.metadata, command.text) == ((), ("t, u", "--v"))
