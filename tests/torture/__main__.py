"""Long trials of reliability, and the page that states their counts.

`python tests/torture` (`make torture`) runs every section that has no result of the present sources in build/torture,
so that an interrupted run goes on, and writes docs/reliability.md. `--mutations` and `--crash-points` make it shorter;
the page says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workbench.experiments.demo_model.made_of import fingerprint, made_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
BUILD = ROOT / "build" / "torture"
MUTATIONS = 10_000

TITLES = {"extraction": "`extract_features`", "saving": "`Result.save`", "exporting": "`wb.export`"}
TITLES |= {"delphi_export": "`export_delphi`", "sweeping": "`workbench sweep`", "recording": "`record`"}
TITLES |= {"appending": "`record(append=True)`", "recording_once": "`record_once`"}
TITLES |= {
    "adding_sites": "`record` of more sites",
    "deleting_sites": "`workbench rm --sites`",
    "merging": "`wb.merge`",
}
TITLES |= {"packing": "`workbench pack`", "removing": "`workbench rm`", "lens_saving": "`save` of a lens"}
TITLES |= {"while_recording": "`record` with an SAE"}

TEXT = (Path(__file__).parent / "reliability.md").read_text(encoding="utf-8")


def main() -> int:
    """Runs the sections and writes the page; 1 if a trial failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=MUTATIONS, help="damages of each file")
    parser.add_argument("--crash-points", type=int, default=0, help="calls tried for each fault; 0: every one")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    sources = source_fingerprint()
    key = {"sources": sources, "mutations": options.mutations, "crash points": options.crash_points}
    results = {name: run_section(name, files, key) for name, files in sections().items()}
    PAGE.write_text(page(results, key), encoding="utf-8")
    failed = [name for name, result in results.items() if result["status"]]
    print(f"{PAGE.relative_to(ROOT)} written; " + (f"failed: {', '.join(failed)}" if failed else "nothing failed"))
    return 1 if failed else 0


def sections() -> dict[str, list[str]]:
    """Returns the files of tests of each section: every file of this folder, and every one that damages files."""
    long = {path.stem.removeprefix("test_"): [str(path)] for path in sorted(Path(__file__).parent.glob("test_*.py"))}
    tests = sorted((ROOT / "tests").glob("*/test_*.py"))
    return long | {f"damaged {path.parent.name} {path.stem}": [str(path)] for path in tests if damages(path)}


def damages(path: Path) -> bool:
    """Returns True for a file of tests that uses the fuzz helper."""
    return "fuzz(" in path.read_text(encoding="utf-8")


def source_fingerprint() -> str:
    """Returns a fingerprint of the package and of its tests."""
    folders = ("workbench", "probes", "experiments", "tests")
    return fingerprint(sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")))


def run_section(name: str, files: list[str], key: dict[str, Any]) -> dict[str, Any]:
    """Returns the result of a section: read if an earlier run of the same sources has it, else after running it."""
    place = BUILD / f"{name.replace(' ', '-')}.json"
    if place.is_file() and (known := json.loads(place.read_text()))["key"] == key:
        return known
    trials = place.with_suffix(".jsonl")
    trials.write_text("")
    print(f"{name} ...", flush=True)
    limits = {"WORKBENCH_MUTATIONS": str(key["mutations"]), "WORKBENCH_CRASH_POINTS": str(key["crash points"])}
    arguments = ["-q", "-p", "no:cacheprovider", "-m", "not torture" if name.startswith("damaged") else "torture"]
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", *arguments, *files]
    process = subprocess.run(command, cwd=ROOT, env={**os.environ, **limits, "WORKBENCH_TRIALS": str(trials)})
    result = {
        "key": key,
        "status": process.returncode,
        "seconds": round(time.monotonic() - start),
        "date": datetime.now(UTC).date().isoformat(),
        "trials": [json.loads(line) for line in trials.read_text().splitlines()],
    }
    place.write_text(json.dumps(result))
    return result


def page(results: dict[str, dict[str, Any]], key: dict[str, Any]) -> str:
    """Returns docs/reliability.md."""
    trials = [trial for result in results.values() for trial in result["trials"]]
    crashes = [trial for trial in trials if trial["kind"] == "crash points"]
    damages = [trial for trial in trials if trial["kind"] == "mutations"]
    settings = {
        "seconds": sum(result["seconds"] for result in results.values()),
        "date": max((result["date"] for result in results.values()), default=""),
        "CPU": platform.machine(),
        "cores": os.cpu_count() or 1,
        "mutations of each file": key["mutations"],
        "calls of each fault": key["crash points"] or "all",
    }
    problems = sum(trial["problems"] for trial in trials)
    return TEXT.format(
        made_of=made_of({"sources": key["sources"]}, settings),
        calls=f"{key['crash points']} calls of each operation" if key["crash points"] else "every call",
        mutations=f"{key['mutations']:,}",
        crashes=crash_table(crashes),
        damages=damage_table(damages),
        trials=f"{sum(sum(trial['counts'].values()) for trial in trials):,}",
        problems=f"{problems:,}",
    )


def crash_table(trials: Iterable[dict[str, Any]]) -> str:
    """Returns a line for each operation: trials by fault, and problems."""
    faults = ("kill", "interrupt", "full", "error", "limit")
    lines = [
        "| operation | killed | Ctrl-C | disk full | I/O error | file limit | lost or other |",
        "|---|" + "---:|" * 6,
    ]
    totals: dict[str, Counter[str]] = {}
    for trial in trials:
        total = totals.setdefault(TITLES.get(trial["name"], trial["name"]), Counter())
        total.update(trial["counts"])
        total["problems"] += trial["problems"]
    for name, total in totals.items():
        lines.append(f"| {name} | " + " | ".join(f"{total[fault]:,}" for fault in (*faults, "problems")) + " |")
    return "\n".join(lines)


def damage_table(trials: Iterable[dict[str, Any]]) -> str:
    """Returns a line for each file: damages, refusals, answers, and exceptions of other libraries."""
    lines = ["| file | damaged | refused in one line | read | other exceptions |", "|---|" + "---:|" * 4]
    totals: dict[str, Counter[str]] = {}
    for trial in trials:
        folder = trial["test"].split("/")[1] if "/" in trial["test"] else "tests"
        total = totals.setdefault(f"{folder}: `{trial['name']}`", Counter())
        total["all"] += sum(trial["counts"].values()) + trial["problems"]
        total["read"] += trial["counts"].get("answer", 0)
        total["problems"] += trial["problems"]
    for name, total in sorted(totals.items()):
        refused = total["all"] - total["read"] - total["problems"]
        lines.append(f"| {name} | {total['all']:,} | {refused:,} | {total['read']:,} | {total['problems']:,} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
