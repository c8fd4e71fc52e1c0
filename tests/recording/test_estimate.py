"""Tests of the estimate against a recording."""

from pathlib import Path

import pytest

import workbench as wb
from workbench.io.errors import RequestError
from workbench.model.load import Model


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def sites_size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("segments/*/*.safetensors"))


@pytest.fixture(scope="module")
def tiny(tiny_models):
    return Model(tiny_models["llama"], None, "tiny")


@pytest.mark.parametrize(
    ("rows", "settings", "within"),
    [
        (6000, {"sites": ["resid_post", "pattern.1"], "context": 32, "segment_rows": 1000}, 0.03),
        (6000, {"sites": ["logits"], "context": 64, "dtype": "bfloat16", "segment_rows": 640}, 0.02),
        # 65 segments, of them 64 in a group
        (6240, {"sites": ["q.0"], "context": 16, "dtype": "float32", "segment_rows": 100}, 0.1),
    ],
)
def test_disk_is_that_of_the_recording(tiny, tmp_path, rows, settings, within):
    """Activations to the byte; the whole within a few per cent, of which the rows of the smallest store are hardest."""
    texts = [[(5 * i + j) % 300 for j in range(settings["context"])] for i in range(400)]
    wb.record(tiny, texts, out=tmp_path / "x", max_rows=rows, show_progress=False, **settings)
    plan = wb.plan(tiny, texts, rows=rows, seconds=0.1, **settings)
    assert plan.segments == wb.open_store(tmp_path / "x").manifest.segments.__len__()
    assert plan.activations == sites_size(tmp_path / "x")
    assert plan.disk == pytest.approx(size(tmp_path / "x"), rel=within)


def test_workers_divide_the_time_and_nothing_else(tiny):
    single, eight = (wb.plan(tiny, rows=1e8, workers=n, seconds=0.05, sites="resid_post", context=32) for n in (1, 8))
    assert single.disk == eight.disk
    assert single.rows == 100_000_000
    assert single.seconds == single.rows / single.rows_per_second
    assert eight.seconds == eight.rows / eight.rows_per_second / 8
    assert eight.bytes_per_second == eight.disk / eight.seconds
    assert "with 8 workers, each " in str(eight)
    assert "with 1 worker, each " in str(single)


def test_a_wider_site_takes_more_disk_and_a_deeper_one_more_time(tiny):
    def planned(sites):
        return wb.plan(tiny, rows=10_000, seconds=0.3, sites=sites, context=32)

    assert planned("resid_post.0").activations * 10 < planned("logits").activations + 10 * 4096


def test_memory_is_what_this_process_holds(tiny):
    import psutil

    plan = wb.plan(tiny, rows=1000, seconds=0.05, sites="resid_post", context=32)
    assert plan.memory >= psutil.Process().memory_info().rss * 0.9
    assert plan.gpu_memory is None
    assert plan.scratch == 28_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows must be a whole number, at least 1, not 0"),
        ({"rows": 1.5}, "rows must be a whole number, at least 1, not 1.5"),
        ({"rows": 10, "workers": 0}, "workers must be a whole number, at least 1, not 0"),
        ({"rows": 10, "sites": "resid_pots"}, "resid_pots"),
    ],
)
def test_what_cannot_be_planned_is_refused(tiny, options, message):
    with pytest.raises(RequestError, match=message):
        wb.plan(tiny, **options)


def test_the_command_prints_it(capsys):
    from workbench.cli import main as cli

    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", "demo", "--rows", "1e8", "--sites", "resid_post.0", "--workers", "8", "--seconds", "0.1"])
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert not stopped.value.code
    assert list(lines) == ["rows", "disk", "memory", "time", "writes"]
    assert lines["rows"] == "100,000,000 in at most 1,526 segments"
    assert lines["disk"].startswith("49.9 GiB: activations 47.7 GiB, tokens 2.2 GiB, ")
