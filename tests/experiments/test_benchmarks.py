"""The page of benchmarks: a section is replaced, the others stay."""

from pathlib import Path

from workbench.experiments.benchmarks.__main__ import INTRODUCTION, page


def test_sections_are_replaced_by_name_and_stand_in_order():
    first = page("", {"reading": "## reading\n\nold\n", "memory": "## memory\n\n| a |\n"})
    again = page(first, {"reading": "## reading\n\nnew\n", "long_context": "## long_context\n\nlong\n"})
    assert again == f"{INTRODUCTION}\n\n## long_context\n\nlong\n\n## reading\n\nnew\n\n## memory\n\n| a |\n"
    assert page(again, {}) == again


def test_the_page_in_docs_is_one_of_these():
    known = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page(known, {}) == known
