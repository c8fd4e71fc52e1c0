"""Linked views of a store in a browser on this machine.

The server listens on the loopback interface alone. Every address begins with a random token; requests with another
token, another host or another origin are refused, so that no page of another site reads the store. It answers GET
alone, and changes nothing.
"""

from __future__ import annotations

import json
import logging
import secrets
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hmac import compare_digest
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl

from workbench.features.feature_store import Features, feature_folders, open_features
from workbench.figures.markup import escape, inert
from workbench.io.checks import check
from workbench.io.errors import RequestError, WorkbenchError
from workbench.pages.linked_view import ANSWERS, LinkedView
from workbench.store.reader import Store, StoreOrPath, opened

_LOG = logging.getLogger(__name__)
_FOLDER = Path(__file__).parent
_HOST = "127.0.0.1"
_FILES = {
    "": ("linked_view.html", "text/html"),
    "view.js": ("linked_view.js", "text/javascript"),
    "view.css": ("linked_view.css", "text/css"),
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; frame-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self' http://127.0.0.1:* http://localhost:*"
)
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Served:
    """A running server of linked views. As the last line of a notebook cell it shows the page."""

    address: str
    """Address of the page, with its secret token."""
    server: ThreadingHTTPServer

    def close(self) -> None:
        """Stops the server."""
        self.server.shutdown()
        self.server.server_close()

    def _repr_html_(self) -> str:
        frame = f'<iframe src="{escape(self.address)}" style="width:100%;height:46rem;border:0"></iframe>'
        return inert(f'{frame}<p><a href="{escape(self.address)}" target="_blank">open in a tab</a></p>')


def serve(store: StoreOrPath, features: Features | Sequence[Features] | None = None, *, port: int = 0) -> Served:
    """Serves linked views of a store to browsers on this machine, until the process ends or `close` is called.

    A cell of the map of sinks shows that head over the text; a token shows its lens column, its features and its
    neighbours; a feature shows its page; selected tokens are shown as SQL and Python.

    Args:
        store: The store, or its path; only what is looked at is read.
        features: Features of the store; of several folders of them, the reader chooses. None: all inside the store that
            can be opened; a warning names the others.
        port: Port on the loopback interface; 0: a free one.

    Raises:
        RequestError: An empty store, features of another store, or a port that is taken.
    """
    check("port", port, at_least=0, at_most=65_535, whole=True)
    store = opened(store)
    if not store.rows:
        raise RequestError(f"store {str(store.path)!r} has no rows; record some texts first")
    folders = _inside(store) if features is None else (features,) if isinstance(features, Features) else features
    for folder in folders:
        if folder.store.path != store.path:
            raise RequestError(
                f"features belong to {str(folder.store.path)!r}, not to {str(store.path)!r}; open those of this store"
            )
    token = secrets.token_urlsafe(24)
    handler = partial(_Handler, LinkedView(store, tuple(folders)), token)
    try:
        server = _Server((_HOST, port), handler)
    except OSError as error:
        raise RequestError(f"port {port} cannot be used: {error.strerror}; give another, or 0 for a free one") from None
    threading.Thread(target=server.serve_forever, daemon=True, name="workbench-serve").start()
    return Served(f"http://{_HOST}:{server.server_address[1]}/{token}/", server)


def _inside(store: Store) -> list[Features]:
    """The features inside a store, but for those that cannot be opened."""
    opened = []
    for folder in feature_folders(store.path):
        try:
            opened.append(open_features(folder, store))
        except WorkbenchError as error:
            _LOG.warning(f"features {folder.name} are not shown: {error}")
    return opened


class _Server(ThreadingHTTPServer):
    """Threads end with the process, and a browser that leaves before its answer is written is no error."""

    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(error := sys.exception(), ConnectionError):
            _LOG.warning(f"a request failed: {type(error).__name__}: {error}")


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server_version, sys_version = "workbench", ""
    protocol_version = "HTTP/1.1"

    def __init__(self, view: LinkedView, token: str, *arguments: object) -> None:
        self._view, self._token = view, token
        super().__init__(*arguments)  # pyright: ignore[reportArgumentType]  # request, address, server

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        _, token, *rest = [*path.split("/"), ""]
        name = "/".join(rest).removesuffix("/")
        if not self._is_ours(name) or not compare_digest(token.encode(), self._token.encode()):
            self._send(403, "text/plain", b"the address needs the token that `workbench serve` printed")
        elif name in _FILES:
            file, kind = _FILES[name]
            self._send(200, kind, (_FOLDER / file).read_bytes())
        else:
            self._answer(name, dict(parse_qsl(query)))

    def _is_ours(self, name: str) -> bool:
        """True for requests to this host by its own name (a foreign one may point here), from our own pages.

        The page itself may also be opened by a link or a frame of another one, such as a notebook.
        """
        port = self.connection.getsockname()[1]
        hosts = {f"{_HOST}:{port}", f"localhost:{port}"}
        origin = self.headers.get("Origin")
        same_origin = origin is None or origin in {f"http://{host}" for host in hosts}
        near = name == "" or self.headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin")
        return self.headers.get("Host") in hosts and same_origin and near

    def _answer(self, name: str, query: Mapping[str, str]) -> None:
        try:
            if name == "card":
                page = self._view.card(*(_number(key, query.get(key, "")) for key in ("folder", "feature")))
                self._send(200, "text/html", page.encode("utf-8", "replace"))
                return
            if name not in ANSWERS:
                raise RequestError(f"no answer {name!r}; there are {', '.join(ANSWERS)}")
            answer, names = ANSWERS[name]
            values = [query.get(key, "") if key == "site" else _number(key, query.get(key, "")) for key in names]
            self._send(200, "application/json", json.dumps(answer(self._view, *values)).encode())
        except WorkbenchError as error:
            self._send(400, "application/json", json.dumps({"error": str(error)}).encode())
        except Exception as error:  # a damaged file, for example; the server goes on
            _LOG.warning(f"request {name!r} failed: {type(error).__name__}: {error}")
            self._send(500, "application/json", json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())

    def _send(self, code: int, kind: str, content: bytes) -> None:
        self.send_response(code)
        headers = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(content))}
        for name, value in {**headers, **_HEADERS, "Content-Security-Policy": _POLICY}.items():
            self.send_header(name, value)
        try:
            self.end_headers()
            self.wfile.write(content)
        except ConnectionError:  # the page was left before its answer came
            self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        """Logs nothing: addresses hold the token."""


def _number(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise RequestError(f"{name} must be a whole number, not {text[:40]!r}")
    return int(text)
