"""The page of benchmarks: a section is replaced, the others stay. Sizes come from the command line."""

import argparse
import itertools
from pathlib import Path

import pytest

from workbench.experiments.benchmarks.__main__ import INTRODUCTION, main, page
from workbench.experiments.benchmarks.__main__ import _with_sizes as sized
from workbench.experiments.benchmarks.measure import Comparison, median_interval, paired_until, processor
from workbench.experiments.benchmarks.reading import Reading


def test_sections_are_replaced_by_name_and_stand_in_order():
    first = page("", {"reading": "## reading\n\nold\n", "memory": "## memory\n\n| a |\n"})
    again = page(first, {"reading": "## reading\n\nnew\n", "long_context": "## long_context\n\nlong\n"})
    assert again == f"{INTRODUCTION}\n\n## long_context\n\nlong\n\n## reading\n\nnew\n\n## memory\n\n| a |\n"
    assert page(again, {}) == again


def test_a_section_of_another_processor_stands_beside_the_first():
    known = page("", {"memory": "## memory\n\n| a |\n", "reading": "## reading\n\nold\n"})
    beside = page(known, {"reading, AMD EPYC": "## reading, AMD EPYC\n\nnew\n"})
    assert beside == f"{INTRODUCTION}\n\n## reading\n\nold\n\n## reading, AMD EPYC\n\nnew\n\n## memory\n\n| a |\n"
    assert page(beside, {}) == beside


def test_the_page_in_docs_is_one_of_these():
    known = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page(known, {}) == known


def test_sizes_are_flags_and_the_section_gives_the_command(tmp_path):
    out = tmp_path / "page.md"
    options = ["--write", str(out), "--scratch", str(tmp_path), "--date", "2026-01-01"]
    main(["import_time", "--repeats", "2", *options])
    text = out.read_text()
    assert "\nrepeats 2.\n" in text
    assert "`python -m workbench.experiments.benchmarks import_time --repeats 2`, 2026-01-01, " in text
    assert page(text, {}) == text


def test_a_section_beside_has_the_processor_and_no_second_description(tmp_path):
    out = tmp_path / "page.md"
    main(["import_time", "--repeats", "2", "--write", str(out), "--scratch", str(tmp_path), "--beside"])
    assert f"## import_time, {processor()}\n\nrepeats 2.\n\n| " in out.read_text()


def test_a_size_may_be_several_numbers():
    settings = sized(argparse.ArgumentParser(), {"reading": Reading()}, ["--gathers", "10", "20", "--rows", "4096"])
    assert settings["reading"] == Reading(gathers=(10, 20), rows=4096)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["readings"], "no benchmark 'readings'"), (["reading", "--layers", "2"], "unrecognized arguments: --layers 2")],
)
def test_unknown_names_and_sizes_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_interval_of_a_median_has_the_ranks_of_the_tables():
    for number, low, high in ((5, 1, 5), (6, 1, 6), (9, 2, 8), (20, 6, 15)):
        assert median_interval([float(value) for value in range(number, 0, -1)]) == (low, high)


def test_pairs_are_repeated_until_the_ratio_is_known():
    assert paired_until(0.05, 60, lambda: 2.0, lambda: 4.0) == ((2.0,) * 9, (4.0,) * 9)
    noise = itertools.cycle((1.0, 9.0))
    values, references = paired_until(0.05, 14, lambda: next(noise), lambda: 1.0)
    assert (values, references) == ((1.0, 9.0) * 7, (1.0,) * 14)
    cells = Comparison("a", "b", values, references, "rows/s", paired=True).cells()
    assert cells[4:6] == ("5 times", "95 % CI [1.00, 9.00]")
