"""The gallery: every figure of every result twice, text of models inert, older pictures gone."""

import re

import numpy as np
import pytest
from planted import linear_unembed, planted_store
from refusals import refused

import workbench as wb
from workbench.experiments.pictures import gallery as module
from workbench.experiments.pictures import gallery_results as results_module
from workbench.experiments.pictures.gallery import KIND, PAGE, PICTURES, gallery, main
from workbench.probes import LogitLens

WORDS = ["a", "<script>alert(1)</script>", "</figure>", "d"]


@pytest.fixture
def result(tmp_path):
    """The folder of a result whose tokens are markup."""
    rng = np.random.default_rng(0)
    sites = {f"resid_post.{layer}": rng.normal(size=(12, 4)) for layer in range(2)}
    unembed = linear_unembed(rng.normal(size=(4, 4)), WORDS)
    store = planted_store(tmp_path / "x.acts", [[0, 1, 2, 3, 2, 1]] * 2, sites, unembed)
    return LogitLens(top_k=2).run(store).save(tmp_path / "results" / "lens")


def test_a_page_shows_each_figure_on_screen_and_in_print(result, tmp_path, monkeypatch, capsys):
    drawn = {}

    def render(figures, formats, scale):
        drawn.update(figures)
        return {(name, kind): f"{name} {scale}".encode() for name in figures for kind in formats}

    monkeypatch.setattr(module, "render", render)
    docs = tmp_path / "docs"
    (docs / PICTURES).mkdir(parents=True)
    (docs / PICTURES / f"old.{KIND}").touch()
    (docs / "logit-lens.md").touch()
    main([str(result.parent), "--docs", str(docs)])
    assert capsys.readouterr().out == f"wrote  {docs / PAGE}\n"
    page = (docs / PAGE).read_text()
    figures = wb.load_result(result).figures()
    assert page.count("<figure>") == page.count("</figure>") == len(figures)
    assert "<script" not in page
    assert "## [Logit lens](logit-lens.md)" in page
    sources = re.findall(r'src="([^"]+)"', page)
    assert sorted(sources) == sorted(path.relative_to(docs).as_posix() for path in (docs / PICTURES).iterdir())
    assert len(sources) == 2 * len(figures)
    screen, printed = (drawn[f"demo-logit-lens-grid-{kind}"] for kind in ("screen", "print"))
    assert (screen.layout.title.text, printed.layout.title.text) == (figures["grid"].layout.title.text, None)


def test_without_results_it_says_what_to_name(tmp_path):
    assert refused(wb.RequestError, lambda: gallery([tmp_path], tmp_path / "docs")).startswith("no result in ")


def test_without_named_results_every_model_runs_once(result, tmp_path, monkeypatch, capsys):
    lens, runs = wb.load_result(result), []

    def demo(folder, *, model, rows, print_line):
        runs.append((model, rows))
        (folder / "results").mkdir(parents=True)
        (folder / "report.html").touch()

    def refuse():
        raise wb.RequestError("days are no single tokens")

    monkeypatch.setattr(results_module, "demo", demo)
    monkeypatch.setattr(wb, "load_model", lambda source: source)
    monkeypatch.setattr(results_module, "_further", lambda *_: iter([("lens", lambda: lens), ("steering", refuse)]))
    monkeypatch.setattr(module, "render", lambda figures, formats, scale: {})
    command = ["--models", "demo", "planted", "--folder", str(tmp_path / "made"), "--docs", str(tmp_path)]
    main(command)
    assert runs == [("demo", None), ("planted", 2_000)]
    out = capsys.readouterr().out
    assert out.count(f"lens            {lens.headline()}") == 2
    assert "steering        not run: days are no single tokens" in out
    assert wb.load_result(tmp_path / "made" / "planted" / "results" / "lens").headline() == lens.headline()
    main(command)  # what is there is not run again
    assert len(runs) == 2
    assert "lens  " not in capsys.readouterr().out
