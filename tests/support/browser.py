"""A headless Chromium driven over its DevTools protocol: console, requests, screenshots and input of a page."""

from __future__ import annotations

import atexit
import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 300
"""Timeout in seconds for anything on a busy machine."""
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--no-first-run",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-extensions",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
    "--remote-allow-origins=*",
)


def find_chrome() -> str:
    """Returns the path of a Chrome or Chromium; skips the test without one."""
    path = os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, NAMES)), None)
    return path or pytest.skip("needs Chromium or Chrome on the PATH, or BROWSER_PATH")


def require_export() -> None:
    """Skips the test where figures cannot be rendered: without kaleido or without Chrome."""
    pytest.importorskip("kaleido", reason="needs kaleido")
    find_chrome()


class Connection:
    """A DevTools connection to a browser or a tab; `events` holds every event since it was opened."""

    def __init__(self, address: str) -> None:
        websocket = pytest.importorskip("websocket", reason="needs websocket-client, which comes with jupyterlab")
        self._socket = websocket.create_connection(address, timeout=PATIENCE)
        self._number = itertools.count(1)
        self.events: list[dict[str, Any]] = []

    def close(self) -> None:
        self._socket.close()

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a DevTools command and returns its result."""
        number = next(self._number)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") != number:
                self.events.append(message)
            elif "error" in message:
                raise RuntimeError(f"{method}: {message['error']}")
            else:
                return message["result"]


class Page(Connection):
    """One tab."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.ask(f"{domain}.enable")
        self.ask("Emulation.setFocusEmulationEnabled", enabled=True)

    def run(self, script: str) -> Any:
        """Returns the value of a JavaScript expression, awaited if it is a promise."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = PATIENCE) -> None:
        """Waits until an expression is true. A question on which the page is left has no answer: it is asked again."""
        end = time.monotonic() + seconds
        while not self._holds(script):
            if time.monotonic() > end:
                raise TimeoutError(f"{script} is {self.run(script)!r} after {seconds} s")
            time.sleep(0.1)

    def _holds(self, script: str) -> bool:
        try:
            return bool(self.run(f"!!({script})"))
        except RuntimeError as error:
            if "Inspected target navigated or closed" not in str(error):
                raise
            return False

    def open(self, address: str) -> None:
        self.ask("Page.navigate", url=address)
        self.wait("document.readyState == 'complete'")

    def size(self, width: int, height: int, *, mobile: bool = False) -> None:
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)

    def media(self, scheme: str) -> None:
        """Emulates the preferred colour scheme: light or dark."""
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def key(self, key: str, code: int, *, text: str = "", modifiers: int = 0) -> None:
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.ask("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": text} if text else {}))
        self.ask("Input.dispatchKeyEvent", type="keyUp", **event)

    def mouse(self, selector: str, kind: str = "click") -> None:
        """Moves to the middle of the element at `selector` (kind "move"), or clicks there."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{element}.scrollIntoView({{block: 'center'}})")
        box = self.run(f"{element}.getBoundingClientRect().toJSON()")
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        if kind == "click":
            for half in ("mousePressed", "mouseReleased"):
                self.ask("Input.dispatchMouseEvent", type=half, x=x, y=y, button="left", clickCount=1)

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot")["data"]))

    def pdf(self) -> bytes:
        return base64.b64decode(self.ask("Page.printToPDF", printBackground=True)["data"])

    @property
    def console(self) -> list[tuple[str, str]]:
        """(kind, text) of all console messages, uncaught exceptions and violations of the page's policy."""
        messages = []
        for event in self.events:
            details = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                messages.append(("error", details["exceptionDetails"]["exception"].get("description", "exception")))
            elif event.get("method") == "Runtime.consoleAPICalled":
                text = " ".join(str(part.get("value", part.get("description"))) for part in details["args"])
                messages.append((details["type"], text))
            elif event.get("method") == "Log.entryAdded":
                messages.append((details["entry"]["level"], details["entry"]["text"]))
        return messages

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings of the console."""
        return [text for kind, text in self.console if kind in ("error", "warning", "assert")]

    @property
    def requests(self) -> list[str]:
        """Requested addresses, without those of the page's own data."""
        sent = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [address for address in sent if not address.startswith(("data:", "blob:"))]


def end_process(process: subprocess.Popen) -> None:
    """Terminates a process, and kills it after 30 s."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@cache
def _browser() -> str:
    """Starts the browser that all tests of this process share, and returns its address."""
    path = find_chrome()
    profile = tempfile.mkdtemp(prefix="chromium-")
    port = Path(profile, "DevToolsActivePort")
    browser = subprocess.Popen(
        [path, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def end() -> None:
        end_process(browser)
        shutil.rmtree(profile, ignore_errors=True)

    atexit.register(end)
    deadline = time.monotonic() + PATIENCE
    while not (port.is_file() and port.read_text().count("\n")):
        if browser.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{path} did not start")
        time.sleep(0.05)
    return f"127.0.0.1:{port.read_text().split()[0]}"


@contextmanager
def chromium() -> Iterator[Page]:
    """One empty tab with a profile of its own. Skips the test without Chromium or websocket-client."""
    find_chrome()
    pytest.importorskip("websocket", reason="needs websocket-client, which comes with jupyterlab")
    address = _browser()
    with urlopen(f"http://{address}/json/version", timeout=PATIENCE) as answer:
        browser = Connection(json.load(answer)["webSocketDebuggerUrl"])
    profile = browser.ask("Target.createBrowserContext")["browserContextId"]
    tab = browser.ask("Target.createTarget", url="about:blank", browserContextId=profile)["targetId"]
    page = Page(f"ws://{address}/devtools/page/{tab}")
    try:
        yield page
    finally:
        page.close()
        browser.ask("Target.disposeBrowserContext", browserContextId=profile)
        browser.close()


def visit(files: Sequence[Path], script: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Opens HTML files one after another and runs `script`, the body of an async function, in each.

    Returns for each file the "value" of the script and the addresses of its "requests", its own included; and all
    console messages.
    """
    visits = []
    with chromium() as page:
        page.size(1400, 900)
        for file in files:
            earlier = len(page.requests)
            page.open(file.as_uri())
            value = page.run(f"(async () => {{ {script} }})()")
            visits.append({"value": value, "requests": page.requests[earlier:]})
        return visits, [text for _, text in page.console]


def draw_for_print(figures: Sequence[Any], folder: Path) -> list[str]:
    """Returns the SVG drawings of figures for print, as `export` makes them, but all in one tab.

    Export loads plotly again for each picture, which takes most of its time.
    """
    from plotly.offline import get_plotlyjs

    import workbench.pages.figure_export as export

    (folder / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    listed = ",".join(figure.to_json().replace("<", "\\u003c") for figure in figures)
    scripts = ((folder / "plotly.min.js").as_uri(), Path(export.__file__).with_name("print.js").as_uri())
    page = folder / "print.html"
    page.write_text(
        '<!doctype html><meta charset="utf-8"><head></head><body>'
        + "".join(f'<script src="{address}"></script>' for address in scripts)
        + f"<script>const FIGURES = [{listed}]</script>",
        encoding="utf-8",
    )
    draw = """const drawings = [];
    for (const figure of FIGURES) {
      const { width, height } = figure.layout;
      const picture = { format: "svg", width, height, imageDataOnly: true, setBackground: "" };
      drawings.push(await Plotly.toImage(figure, picture));
    }
    return drawings;"""
    visits, console = visit([page], draw)
    # plotly itself asks for the contrast of a bar's number where a colour scale gives the colour
    assert [text for text in console if "Invalid color specifier" not in text] == []
    return visits[0]["value"]


def print_pdf(file: Path) -> bytes:
    """Returns an HTML file as PDF."""
    with chromium() as page:
        page.open(file.as_uri())
        return page.pdf()


def text_boxes(drawings: Sequence[str], folder: Path) -> list[list[list[Any]]]:
    """Returns the texts of each SVG drawing as Chrome lays them out.

    Each text is [text, left, top, right, bottom, width, height], with distances from the edges of the drawing. The
    drawings stay in `folder` as drawings.html.
    """
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
    visits, _ = visit([page], measure)
    return visits[0]["value"]


def overlapping(texts: Sequence[Sequence[Any]]) -> list[tuple[str, str]]:
    """Returns pairs of texts whose boxes overlap by 3 pixels or more."""
    boxes = [(text, left, top, left + width, top + height) for text, left, top, _, _, width, height in texts]
    pairs = []
    for (a, *first), (b, *two) in combinations(boxes, 2):
        wide = min(first[2], two[2]) - max(first[0], two[0])
        high = min(first[3], two[3]) - max(first[1], two[1])
        if min(wide, high) >= 3:
            pairs.append((a, b))
    return pairs
