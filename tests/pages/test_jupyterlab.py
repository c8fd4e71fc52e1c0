"""The quickstart in a real JupyterLab, in a real browser: all cells run, figures are drawn, the view reacts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from browser import PATIENCE, chromium, end_process

from workbench.figures.themed import DARK_FILTER

pytest.importorskip("jupyterlab", reason="needs jupyterlab: pip install 'interp-workbench[notebook]'")
pytest.importorskip("anywidget", reason="needs anywidget: pip install 'interp-workbench[notebook]'")

ROOT = Path(__file__).parents[2]
FOUND = "jupyterapp.shell.currentWidget"
ALL_CELLS = 'document.querySelectorAll(".jp-Notebook .jp-CodeCell").length'
DONE = f"""{ALL_CELLS} > 5 && {FOUND}.content.model.cells.length > 5 &&
  [...Array({FOUND}.content.model.cells.length).keys()].map((n) => {FOUND}.content.model.cells.get(n))
  .filter((cell) => cell.type == "code").every((cell) => cell.executionCount)"""
ASK = """new Promise((done) => {
  let said = "";
  const future = %s.sessionContext.session.kernel.requestExecute({ code: %s });
  future.onIOPub = (message) => {
    if (message.header.msg_type == "stream") said += message.content.text;
    if (message.header.msg_type == "error") said += message.content.evalue;
  };
  future.done.then(() => done(said));
})"""


def without_outputs(path: Path) -> dict[str, Any]:
    book = json.loads(path.read_text())
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            cell |= {"outputs": [], "execution_count": None}
    return book


@pytest.fixture
def lab(tmp_path):
    """Address of a JupyterLab of its own, which knows only the quickstart and asks nothing of the network."""
    (tmp_path / "quickstart.ipynb").write_text(json.dumps(without_outputs(ROOT / "notebooks" / "quickstart.ipynb")))
    tracker = tmp_path / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text(json.dumps({"windowingMode": "none"}))  # every cell is in the page, seen or not
    news = tracker.parents[1] / "apputils-extension" / "notification.jupyterlab-settings"
    news.parent.mkdir()
    news.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    places = ("CONFIG", "DATA", "RUNTIME")
    environment = {f"JUPYTER_{place}_DIR": str(tmp_path / place.lower()) for place in places}
    environment |= {"JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"), "IPYTHONDIR": str(tmp_path / "ipython")}
    environment |= {
        "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]]),
    }
    inherited = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    log = tmp_path / "lab.log"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"]
    command += ["--ServerApp.port=0", "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token=ours"]
    with log.open("w") as output:
        server = subprocess.Popen(
            command, cwd=tmp_path, env={**inherited, **environment}, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            end = time.monotonic() + PATIENCE
            while not (address := re.search(r"http://127\.0\.0\.1:(\d+)/", log.read_text())):
                if server.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"JupyterLab did not start: {log.read_text()[-2000:]}")
                time.sleep(0.2)
            yield f"http://127.0.0.1:{address[1]}"
        finally:
            end_process(server)


def figures_follow_the_theme(page, tmp_path) -> None:
    """A figure is filtered on the dark theme alone, and the output that carries the rule takes no room."""
    plot = ".jp-RenderedPlotly .js-plotly-plot, .jp-RenderedPlotly.js-plotly-plot"
    page.run(f"document.querySelector('{plot}').scrollIntoView({{ block: 'center' }})")
    filters = {}
    for theme in ("JupyterLab Dark", "JupyterLab Light"):
        page.run(
            f"jupyterapp.commands.execute('apputils:change-theme', {{ theme: {json.dumps(theme)} }}).then(() => null)"
        )
        page.wait(f"document.body.dataset.jpThemeLight == '{str('Light' in theme).lower()}'")
        filters[theme] = page.run(
            f"getComputedStyle(document.querySelector('{plot}').closest('.jp-RenderedPlotly')).filter"
        )
        page.picture(tmp_path / f"{theme}.png")
    assert filters == {"JupyterLab Dark": DARK_FILTER, "JupyterLab Light": "none"}
    hidden = "[...document.querySelectorAll('.workbench-figure')].map((sign) => sign.offsetParent === null)"
    assert set(page.run(hidden)) == {True}


def test_the_quickstart_in_jupyterlab(lab, tmp_path):
    with chromium() as page:

        def python(code: str) -> str:
            return page.run(ASK % (FOUND, json.dumps(code))).strip()

        page.size(1300, 1000)
        page.open(f"{lab}/lab/tree/quickstart.ipynb?token=ours")
        page.wait(f"window.jupyterapp && {FOUND}?.sessionContext?.session?.kernel && {ALL_CELLS} > 5")
        page.run("jupyterapp.commands.execute('notebook:run-all-cells').then(() => null)")
        page.wait(DONE, 4 * PATIENCE)
        assert (
            page.run("document.querySelectorAll('.jp-OutputArea [data-mime-type*=error], .jp-mod-error').length") == 0
        )
        page.wait("document.querySelector('.js-plotly-plot .main-svg')")
        page.wait("document.querySelector('.workbench-tokens .token')")
        assert page.run("document.querySelectorAll('.workbench-card').length") >= 4
        # a selection made in Python is seen
        page.wait("document.querySelector('.workbench-tokens .foot').textContent.includes('3 selected')")
        # what is clicked and moved is known to Python
        page.mouse(".workbench-tokens .token:nth-child(5)")
        page.wait("document.querySelector('.workbench-tokens .foot').textContent.includes('4 selected')")
        assert python("print(view.rows[4] in view.selection.ids, len(view.selection))") == "True 4"
        before = page.run("document.querySelector('.workbench-tokens .token:nth-child(9)').style.backgroundColor")
        page.run("document.querySelector('.workbench-tokens input[name=layer]').focus()")
        page.key("ArrowRight", 39)
        page.wait("document.querySelector('.workbench-tokens .control:nth-child(3) output').textContent == '1'")
        after = page.run("document.querySelector('.workbench-tokens .token:nth-child(9)').style.backgroundColor")
        assert python("print(view.layer)") == "1"
        assert before != after
        # another sequence is read by Python and shown by the page
        page.run("document.querySelector('.workbench-tokens input[name=sequence]').focus()")
        page.key("ArrowRight", 39)
        rows = json.loads(python("import json; print(json.dumps(store.where('sequence = 1').ids.tolist()))"))
        page.wait(f"document.querySelector('.workbench-tokens .token').dataset.row == {rows[0]}")
        assert page.run("document.querySelectorAll('.workbench-tokens .token').length") == len(rows)
        # and what Python sets is shown
        python("view.colour, view.feature = 'feature', 7")
        page.wait("document.querySelector('.workbench-tokens .foot').textContent.startsWith('feature 7')")
        figures_follow_the_theme(page, tmp_path)
        # JupyterLab keeps a picture of each figure, which readers of the saved file see
        page.wait(f"JSON.stringify({FOUND}.content.model.toJSON()).includes('image/png')")
        outside = [address for address in page.requests if not address.startswith((lab, lab.replace("http", "ws")))]
        assert outside == []
