"""Time of `import workbench`."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from workbench.experiments.benchmarks.measure import Comparison, interleaved

_HEAVY = ("torch", "transformers", "transformer_lens", "pyarrow", "duckdb", "plotly", "pandas", "numpy")


@dataclass(frozen=True)
class ImportTime:
    """Fresh interpreters, with the files in the page cache; the reference is an interpreter that imports nothing."""

    repeats: int = 10

    def run(self, folder: Path) -> list[Comparison]:
        """Times `import workbench` in fresh interpreters."""
        _run_python(f"import sys, workbench; loaded = sys.modules.keys() & {_HEAVY}; assert not loaded, loaded")
        seconds = interleaved(
            self.repeats, {"import": lambda: _run_python("import workbench"), "bare": lambda: _run_python("pass")}
        )
        subject, reference = "import workbench", "interpreter that imports nothing"
        return [Comparison(subject, reference, seconds["import"], seconds["bare"], "s", by="difference", at_most=0.3)]


def _run_python(program: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True)
    return time.perf_counter() - began


FULL = ImportTime()
QUICK = ImportTime(repeats=3)
