"""The benchmark of pages at its tiny sizes: a report, an index and served views in a browser."""

from __future__ import annotations

import pytest
from browser import require_export

from workbench.experiments.benchmarks.__main__ import main

pytestmark = pytest.mark.torture


def test_pages_are_measured_in_a_browser(tmp_path):
    require_export()
    out = tmp_path / "page.md"
    main(["pages", "--quick", "--write", str(out), "--scratch", str(tmp_path)])
    lines = [line.split(" | ")[0].strip("| ") for line in out.read_text().splitlines() if line.startswith("| ")]
    assert lines[2:5] == [
        f"report of 2 results, {part}"
        for part in ("processor time", "without plotly's script", "until its first figure is drawn")
    ]
    assert lines[5:9] == [
        "index of 256 labelled features",
        *(f"index of 256 labelled features, {part}" for part in ("slowest of 16 searches", "median search")),
        "index of 256 labelled features, sorted by label",
    ]
    served = "1,024 tokens and 2 layers served, "
    assert [line.startswith(served) for line in lines[9:]] == [True] * 5
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("benchmarks-")]
