"""A headless Chrome for tests of pages: what they say, what they ask for, what goes wrong in them."""

from __future__ import annotations

import html
import json
import re
import subprocess
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--enable-logging=stderr")

_VISIT = """<!doctype html><meta charset="utf-8"><body>
%s
<script>
const asked = async (window, document) => { %s };
window.onload = async () => {
  const seen = [];
  for (const frame of document.querySelectorAll("iframe")) {
    const view = frame.contentWindow;
    seen.push({told: await asked(view, view.document),
               requests: view.performance.getEntriesByType("resource").map(entry => entry.name)});
  }
  const made = document.createElement("pre");
  made.textContent = JSON.stringify(seen);
  document.body.replaceChildren(made);
};
</script>"""


def chrome() -> str:
    """Path of a Chrome or Chromium; skips the test where there is none, or no kaleido, whose part looks for it."""
    pytest.importorskip("kaleido", reason="needs kaleido")
    from choreographer.browsers.chromium import Chromium

    return Chromium.find_browser(skip_local=False) or pytest.skip("needs a Chrome or Chromium")


def visit(pages: Sequence[Path], script: str, folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Opens every page in a frame of its own and runs `script` in it, a function's body with `window` and `document`.

    Of each page what the script returned as "told", and as "requests" every address that was asked for; and what went
    to the console, of all.
    """
    frames = "\n".join(
        f'<iframe src="{html.escape(page.as_uri())}" width="1400" height="900"></iframe>' for page in pages
    )
    index = folder / "visit.html"
    index.write_text(_VISIT % (frames, script))
    # pages of files are strangers to each other unless told otherwise
    options = [*OPTIONS, "--allow-file-access-from-files", "--virtual-time-budget=20000", "--dump-dom"]
    ran = subprocess.run([chrome(), *options, index.as_uri()], capture_output=True, text=True, timeout=600)
    found = re.search(r"<body><pre>(.*)</pre></body>", ran.stdout, re.DOTALL)
    assert found, (ran.stdout[-500:], ran.stderr[-2000:])
    return json.loads(html.unescape(found[1])), [line for line in ran.stderr.splitlines() if "CONSOLE" in line]


def text_boxes(drawings: Sequence[str], folder: Path) -> list[list[list[Any]]]:
    """As Chrome lays SVG files out, each text of each: itself, its distances from the edges of the picture (left, top,
    right, bottom), its width and height."""
    page = folder / "drawings.html"
    page.write_text('<!doctype html><meta charset="utf-8"><body>' + "\n".join(drawings))
    measure = """return [...document.querySelectorAll("svg.main-svg")].map(svg => {
      const page = svg.getBoundingClientRect();
      return [...svg.querySelectorAll("text")].filter(text => text.textContent.trim()).map(text => {
        const box = text.getBoundingClientRect();
        return [text.textContent, box.left - page.left, box.top - page.top, page.right - box.right,
                page.bottom - box.bottom, box.width, box.height];
      }).filter(text => text[5] > 0);
    })"""
    found, _ = visit([page], measure, folder)
    return found[0]["told"]


def overlapping(texts) -> list[tuple[str, str]]:
    """Pairs of texts that share more than a sliver."""
    boxes = [(text, left, top, left + width, top + height) for text, left, top, _, _, width, height in texts]
    found = []
    for (a, *one), (b, *two) in combinations(boxes, 2):
        wide = min(one[2], two[2]) - max(one[0], two[0])
        high = min(one[3], two[3]) - max(one[1], two[1])
        if min(wide, high) >= 3:
            found.append((a, b))
    return found
