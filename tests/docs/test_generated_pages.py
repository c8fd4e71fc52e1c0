"""Generated pages and pictures are of the model, SAE and texts that ship, and of the pinned versions."""

import json
import re
from pathlib import Path

import pytest

from workbench.experiments.architectures.__main__ import MADE_OF
from workbench.experiments.demo_model.made_of import embedded, fingerprint, made_of, read_made_of
from workbench.experiments.pictures.__main__ import EMERGENCE, IOI, PICTURES, RECORD, TRAINING
from workbench.experiments.pictures.costs import NAME as COSTS
from workbench.experiments.pictures.costs import costs, figure

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
WRITE = "run `make docs`"


@pytest.mark.parametrize("page", ["demo-model.md", "findings.md"])
def test_a_page_states_the_fingerprints_of_what_ships(page):
    stated = read_made_of((DOCS / page).read_text(encoding="utf-8"))
    assert {name: stated.get(name) for name in embedded()} == embedded(), f"docs/{page} is of another model: {WRITE}"


def test_the_pictures_are_of_what_ships():
    assert json.loads((DOCS / "images" / RECORD).read_text()) == embedded(), f"docs/images: {WRITE}"
    assert {path.stem for path in (DOCS / "images").glob("*.png")} - {COSTS, EMERGENCE, IOI, *TRAINING} == {*PICTURES}


def test_the_costs_of_interventions_are_those_of_the_page():
    page = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    known = costs(page)
    assert len(known) >= 10
    assert all(low <= ratio <= high for ratio, low, high in known.values())
    points = figure(page).data[0]
    assert dict(zip(points.y, points.x, strict=True)) == {name: ratio for name, (ratio, _, _) in known.items()}


def test_the_page_of_architectures_states_the_pinned_versions():
    pins = dict(re.findall(r"^([\w.-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    page = (DOCS / "architectures.md").read_text(encoding="utf-8")
    for name in MADE_OF[:2]:
        assert f"{name} {pins[name]}" in page, f"docs/architectures.md is of another version of {name}: {WRITE}"


def test_the_card_has_two_seeds():
    page = (DOCS / "demo-model.md").read_text(encoding="utf-8")
    stated = read_made_of(page)
    assert {"model, seed 1", "SAE, seed 1"} <= stated.keys()
    assert "| seed 0 (shipped) | seed 1 |" in page


def test_the_page_of_reliability_states_what_was_tried_and_no_problem():
    page = (DOCS / "reliability.md").read_text(encoding="utf-8")
    assert "sources" in read_made_of(page)
    assert " trials ended with 0 problems." in page
    rows = [line.split("|")[1:-1] for line in page.splitlines() if re.match(r"\|.*\d \|$", line)]
    assert len(rows) > 10
    assert {row[-1].strip() for row in rows} == {"0"}


def test_another_file_has_another_fingerprint(tmp_path):
    for name, text in (("a", "x"), ("b", "y")):
        (tmp_path / name).write_text(text)
    first, second, both = ([tmp_path / name for name in names] for names in ("a", "b", "ab"))
    assert len({fingerprint(first), fingerprint(second), fingerprint(both)}) == 3


def test_a_page_gives_back_the_fingerprints_it_was_made_of():
    prints = {"model demo": "0" * 16, "SAE, seed 1": "a" * 16}
    assert read_made_of(f"# Title\n\n{made_of(prints, {'rows': 20000})}\ntext\n") == prints
    assert read_made_of("# Title\n") == {}
