"""The benchmark of a GPU runs on the CPU with tiny sizes, and its checks find planted errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from workbench.experiments.benchmarks import gpu_checks
from workbench.experiments.benchmarks.__main__ import main
from workbench.sae.encode import Encoder
from workbench.sae.screen import Screen

CPU = torch.device("cpu")


def test_a_dry_run_writes_the_section_and_meets_all_that_concerns_numbers(tmp_path):
    out = tmp_path / "page.md"
    main(["gpu", "--dry-run", "--write", str(out), "--scratch", str(tmp_path), "--date", "2026-01-01"])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.read_text().splitlines()]
    rows = {row[0]: row for row in lines if len(row) == 8}
    checks = [name for name in rows if "wrong entries" in name or name.startswith("d ")]
    checks += ["recorded values", "features in one alone", "L0 and explained variance"]
    assert len(checks) > 20
    assert {rows[name][-1] for name in checks} == {"met"}
    for subject in ("topk 64x512x8", "jumprelu 64x512x8", "recording, 1 resid_post sites"):
        assert rows[subject][2].endswith("rows/s")
    assert any(name.startswith("topk 64x512x8, aten::") for name in rows)


def test_a_wrong_feature_and_a_low_bound_are_counted(tmp_path, monkeypatch):
    encode, bounds = Encoder.__call__, Screen.bounds

    def shifted(*arguments):
        rows = encode(*arguments)
        return replace(rows, feature=torch.cat([(rows.feature[:1] + 1) % 1024, rows.feature[1:]]))

    monkeypatch.setattr(Encoder, "__call__", shifted)
    monkeypatch.setattr(Screen, "bounds", lambda *arguments: bounds(*arguments) * 0.99)
    assert [comparison.values for comparison in gpu_checks.exactness(tmp_path, CPU, 4, ["topk"])] == [(2.0,), (2.0,)]
    low, _ = gpu_checks.bounds(CPU, (64,), 8)
    assert low.values[0] > 0
    assert low.verdict == "missed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_one_line_says_so(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["gpu", "--scratch", str(tmp_path)])
    assert "error: device 'cuda' cannot be used here" in capsys.readouterr().err
