"""Pages in a headless Chromium: a report, an index of features, the served views of a large store."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch

import workbench as wb
from workbench.demo.run import HEAD_SITES, SITES
from workbench.experiments.benchmarks.features import FeatureStore
from workbench.experiments.benchmarks.measure import Comparison
from workbench.experiments.benchmarks.random_store import WORDS, random_store
from workbench.model.unembed import Unembed
from workbench.pages.report import section, write_report
from workbench.results.registry import find_probe
from workbench.store.manifest import SiteRecord

CONTEXT = 128
PROBES: dict[str, dict[str, Any]] = {
    "logit-lens": {},
    "attention-sinks": {"length": CONTEXT},
    "token-geometry": {},
    "massive-activations": {},
    "similarity": {},
    "hidden-sinks": {"length": CONTEXT},
}
"""Probes whose results are reported, over and over, and their settings."""
SEARCHES = ("1", "12", "word", "word1", "word12 word3", "word31999", "none of these", "")
_FIRST_FIGURE = "document.querySelector('.js-plotly-plot .main-svg')"
_REQUESTS = "performance.getEntriesByType('resource').map((one) => [one.name, one.duration])"
_FRAMES = """(async () => {
  const list = document.querySelector("#tokens"), times = [];
  let last = await new Promise(requestAnimationFrame);
  for (let frame = 0; frame < FRAMES; frame++) {
    list.scrollTop += 40;
    const now = await new Promise(requestAnimationFrame);
    times.push(now - last);
    last = now;
  }
  return { times, sequence: Number(document.querySelector("[name=sequence]").value) };
})()"""


@dataclass(frozen=True)
class Pages:
    """The report has results of six probes on the embedded model, again and again. Its processor time is that of
    reading the results, drawing their figures and writing, after the imports. A search of the index lasts from the
    change of the words to the finished layout; eight searches, of none to all of the features, each `repeats` times.
    The served store has random float16 rows, resid_post and attn_first of every layer, and an unembedding of 32,000
    tokens. A frame is scrolled by 40 pixels; a screen shows one each 16.7 ms."""

    results: int = 50
    recorded: int = 4_000
    features: int = 65_536
    feature_rows: int = 100_000
    rows: int = 100_000
    layers: int = 30
    d_model: int = 576
    heads: int = 9
    frames: int = 600
    repeats: int = 3

    def run(self, folder: Path) -> list[Comparison]:
        """Measures the three pages, in one browser."""
        return asyncio.run(self._run(folder))

    async def _run(self, folder: Path) -> list[Comparison]:
        import choreographer  # comes with kaleido, the extra `export`

        page, seconds = self._report(folder)
        index = self._index(folder)
        store = self._store(folder / "large.acts")
        async with choreographer.Browser(headless=True) as browser:
            opened = [await self._opened(browser, page) for _ in range(self.repeats)]
            subject = f"report of {self.results} results"
            return [
                _limit(2.0, f"{subject}, processor time", seconds, "s"),
                _limit(4.0, f"{subject}, without plotly's script", [page.stat().st_size / 1e6], "MB"),
                _limit(2000.0, f"{subject}, until its first figure is drawn", opened, "ms"),
                *await self._searches(browser, index),
                *await self._views(browser, store),
            ]

    def _report(self, folder: Path) -> tuple[Path, list[float]]:
        """Writes the report several times; returns the page and the seconds of processor time."""
        settings = {"sites": [*SITES, *HEAD_SITES], "context": CONTEXT, "max_rows": self.recorded}
        store = wb.record("demo", wb.demo_corpus(), out=folder / "demo.acts", show_progress=False, **settings)
        chosen = itertools.islice(PROBES.items(), self.results)
        paths = [find_probe(name)(**options).run(store).save(folder / name) for name, options in chosen]
        page, seconds = folder / "report.html", []
        for _ in range(self.repeats + 1):
            began = time.process_time()
            results = [wb.load_result(path) for path in itertools.islice(itertools.cycle(paths), self.results)]
            write_report([section(result) for result in results], page, title="Report", plotlyjs="shared")
            seconds.append(time.process_time() - began)
        return page, seconds[1:]  # the first one imports

    async def _opened(self, browser: Any, page: Path) -> float:
        async with _tab(browser, page.as_uri(), _FIRST_FIGURE) as tab:
            return await _value(tab, "performance.now()")

    def _index(self, folder: Path) -> Path:
        """Writes the index of random features, each with a label."""
        features = FeatureStore(rows=self.feature_rows, features=self.features).make(folder)
        labels = folder / "labels.csv"
        names = (f'{number},"names of days and months, {number % 97}"' for number in range(self.features))
        labels.write_text("feature,description\n" + "\n".join(names) + "\n", encoding="utf-8")
        return wb.feature_index(wb.import_labels(features, labels), folder / "index.html")

    async def _searches(self, browser: Any, page: Path) -> list[Comparison]:
        times = []
        async with _tab(browser, page.as_uri(), "document.querySelector('tbody tr')") as tab:
            for words, _ in itertools.product(SEARCHES, range(self.repeats)):
                work = f"form.words.value = {words!r}; form.dispatchEvent(new Event('input'))"
                times.append(await _value(tab, _timed(work)))
            by_label = await _value(tab, _timed("document.querySelector('th button[data-column=label]').click()"))
        subject = f"index of {self.features:,} labelled features"
        return [
            _limit(10.0, subject, [page.stat().st_size / 1e6], "MB"),
            _limit(100.0, f"{subject}, slowest of {len(times)} searches", [max(times)], "ms"),
            _limit(100.0, f"{subject}, median search", [median(times)], "ms"),
            _limit(1000.0, f"{subject}, sorted by label", [by_label], "ms"),
        ]

    async def _views(self, browser: Any, store: wb.Store) -> list[Comparison]:
        served, times, sequences = wb.serve(store), [], []
        try:
            async with _tab(browser, served.address, "document.querySelector('#sinks td')") as tab:
                opened = await _value(tab, "performance.setResourceTimingBufferSize(10000), performance.now()")
                for _ in range(self.repeats):
                    answer = await _value(tab, _FRAMES.replace("FRAMES", str(self.frames)))
                    times += answer["times"]
                    sequences.append(answer["sequence"])
                sent = await _value(tab, _REQUESTS)
            answers = {name: duration for name, duration in sent if "/sequence?" in name or "/norms?" in name}
            sizes = [_size(name) for name in answers]  # the page has no origin, so its browser does not tell
        finally:
            served.close()
        subject, late = f"{self.rows:,} tokens and {self.layers} layers served", quantiles(times, n=20)[-1]
        frames = f"95 % of {len(times)} frames, over {max(sequences)} sequences"
        return [
            _limit(2000.0, f"{subject}, until the map of sinks is drawn", [opened], "ms"),
            _limit(33.4, f"{subject}, {frames}", [late], "ms"),
            _limit(16.8, f"{subject}, median frame", [median(times)], "ms"),
            _limit(50.0, f"{subject}, median of {len(answers)} answers", [median(answers.values())], "ms"),
            _limit(20.0, f"{subject}, largest answer", [max(sizes) / 1e3], "kB"),
        ]

    def _store(self, path: Path) -> wb.Store:
        """Writes a store of random rows with residuals and sinks of every layer."""
        kinds = {
            "resid_post": ("hook_resid_post", "d_model", self.d_model),
            "attn_first": ("attn.hook_attn_first", "head", self.heads),
        }
        sites = [
            SiteRecord(f"blocks.{layer}.{place}", f"{kind}.{layer}", ("row", axis), (size,), "float16")
            for kind, (place, axis, size) in kinds.items()
            for layer in range(self.layers)
        ]
        random, gain = np.random.default_rng(0), torch.ones(self.d_model)
        weight = torch.tensor(random.random((WORDS, self.d_model), np.float32) - 0.5)
        words = tuple(f" word{number}" for number in range(WORDS))

        def draw(site: SiteRecord, size: int) -> np.ndarray:
            return random.random((size, site.shape[0]), np.float32).astype(np.float16)

        return random_store(
            path, self.rows, sites, draw, Unembed(weight, None, "none", gain, 0 * gain, 0.0, tokens=words)
        )


def _limit(limit: float, subject: str, values: Sequence[float | int], unit: str) -> Comparison:
    """A comparison with a target; whole numbers of JavaScript arrive as integers."""
    return Comparison(subject, "target", tuple(map(float, values)), (limit,) * len(values), unit, at_most=1.0)


def _size(address: str) -> int:
    """Bytes of an answer."""
    with urlopen(address, timeout=60) as answer:
        return len(answer.read())


def _timed(work: str) -> str:
    """JavaScript expression: milliseconds of some work and of the layout of the page after it."""
    end = "document.body.offsetHeight; return performance.now() - began"
    return f"(() => {{ const began = performance.now(); {work}; {end} }})()"


@asynccontextmanager
async def _tab(browser: Any, address: str, ready: str) -> AsyncIterator[Any]:
    """A tab at an address, when an expression is true in it."""
    tab = await browser.create_tab("about:blank")
    size = {"width": 1300, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    await tab.send_command("Emulation.setDeviceMetricsOverride", size)
    await tab.send_command("Page.navigate", {"url": address})
    end = time.monotonic() + 120
    while not await _value(tab, f"document.readyState == 'complete' && !!({ready})"):
        if time.monotonic() > end:
            raise RuntimeError(f"the page is not ready after 120 s: {ready}")
        await asyncio.sleep(0.005)
    yield tab
    await tab.close()


async def _value(tab: Any, script: str) -> Any:
    """Value of a JavaScript expression."""
    options = {"expression": script, "returnByValue": True, "awaitPromise": True}
    answer = (await tab.send_command("Runtime.evaluate", options))["result"]
    if "exceptionDetails" in answer:
        raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
    return answer["result"].get("value")


FULL = Pages()
QUICK = Pages(
    results=2, recorded=600, features=256, feature_rows=2_000, rows=1_024, layers=2, d_model=16, frames=20, repeats=2
)
