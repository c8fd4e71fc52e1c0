"""Stores for the token view, and the view on a page without Jupyter."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np

import workbench as wb

HOSTILE = "<img src=x onerror=alert(1)></script><script>document.title='owned'</script> \u202e \0 \"'& \U0001f642"


def hostile_store(folder: Path) -> wb.Store:
    """Markup and invisible characters, and two texts of the demo."""
    texts = [HOSTILE, *wb.demo_corpus()[:2]]
    return wb.record(wb.load_model("demo"), texts, sites=["resid_post", "z.1"], out=folder / "view.acts")


def foreign_store(folder: Path) -> wb.Store:
    """Texts of other scripts without BOS, at two of four layers."""
    texts = ["Привет\nмир\n\nend", "a שלום 123 עולם b", "emoji 👩 日本\u00a0x\u3000y"]
    sites = ["resid_post.1", "resid_post.3"]
    return wb.record(wb.load_model("demo"), texts, sites=sites, bos="never", out=folder / "view.acts")


def sequence_rows(store, sequence):
    return np.flatnonzero(store.tokens["sequence"].to_numpy() == sequence)


def values(view):
    return np.frombuffer(view.values, np.float32).reshape(len(view.layers), -1)


# A model of the page that stands for Jupyter's

MODEL = """
const state = STATE, heard = {};
for (const name of BINARY) {
  state[name] = new DataView(Uint8Array.from(atob(state[name]), (char) => char.charCodeAt(0)).buffer);
}
window.sent = {};
window.model = {
  get: (name) => state[name],
  set: (name, value) => {
    state[name] = window.sent[name] = value;
    (heard["change:" + name] ?? []).forEach((does) => does());
  },
  save_changes: () => {},
  on: (name, does) => (heard[name] ??= []).push(does),
  off: () => {},
};
window.answer = (name, value) => { state[name] = value; (heard["change:" + name] ?? []).forEach((does) => does()); };
render({ model, el: document.getElementById("here") });
"""


def page_of(view, folder):
    """The widget's own script and style, with its state, on a page."""
    state = {name: value for name, value in view.get_state().items() if not name.startswith("_")}
    binary = [name for name, value in state.items() if isinstance(value, bytes | memoryview)]
    state |= {name: base64.b64encode(state[name]).decode() for name in binary}
    state_text = json.dumps(state, default=str).replace("<", "\\u003c")
    script = view._esm.replace("export default { render };", "") + MODEL
    script = script.replace("STATE", state_text).replace("BINARY", json.dumps(binary))
    path = folder / "view.html"
    head = f'<!doctype html><meta charset="utf-8"><title>view</title><style>{view._css}</style>'
    path.write_text(f'{head}<div id="here"></div><script>{script}</script>')
    return path.as_uri()
