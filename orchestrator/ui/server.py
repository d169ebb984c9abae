"""Serve the live page: the standard library's HTTP server, a thread a connection, no build step and no dependency.

GET reads and changes nothing. POST plans a configuration, asks a driver to stop, or takes the token."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from cache_store.errors import SegpropError, UserError
from orchestrator.status.listing import run_dirs
from orchestrator.ui import pages
from orchestrator.ui.folder import Folder
from orchestrator.ui.guard import HEADERS, Guard, is_loopback, new_token, read_token
from orchestrator.ui.site import Answer, Query, Site, html, one

#: Seconds between two looks for one who is told of changes.
POLL_S = 1.0
#: Seconds of silence after which a word is sent, so that a connection that is gone is noticed.
SILENT_S = 15.0
#: Connections at one time, and bytes of a form.
MOST_CONNECTIONS, MOST_FORM = 64, 65536
_STATIC = Path(__file__).parent / "static"


class Server(ThreadingHTTPServer):
    """A thread a connection, at most `MOST_CONNECTIONS`; more are closed at once."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], site: Site) -> None:
        self.site = site
        self._free = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        # Not as the base class does, which asks the network for this machine's name.
        socket.socket.setsockopt(self.socket, socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of visitors who left; anything else is a mistake of ours, and is printed."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One request: who may ask, where it goes, what goes back."""

    server: Server
    #: Seconds that a visitor may take to send something, or to take something.
    timeout = 30
    server_version, sys_version = "segprop", ""

    def log_message(self, format: str, *arguments: Any) -> None:
        """Write no line for every request."""

    def do_GET(self) -> None:
        self._answer(self._get)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        self._answer(self._post)

    def _answer(self, decide: Callable[[Site, str, Query], Answer | None]) -> None:
        site = self.server.site
        try:
            split = urlsplit(self.path)
            path, query = unquote(split.path, errors="strict"), parse_qs(split.query, max_num_fields=64)
        except ValueError:
            self._send(html(site.pages.said("Not understood", "That address cannot be read."), HTTPStatus.BAD_REQUEST))
            return
        if not site.guard.knows_host(self.headers.get("Host")):
            words = "This server is not called by that name. Use its address, or start it with --host NAME.\n"
            self._send(Answer(words.encode(), "text/plain; charset=utf-8", HTTPStatus.MISDIRECTED_REQUEST))
            return
        try:
            answer = decide(site, path, query)
        except SegpropError as error:
            bad = isinstance(error, UserError)
            status = HTTPStatus.NOT_FOUND if bad else HTTPStatus.SERVICE_UNAVAILABLE
            answer = html(site.pages.said("Not possible" if bad else "Not now", error.message), status)
        if answer is not None:
            self._send(answer)

    def _get(self, site: Site, path: str, query: Query) -> Answer | None:
        if path.startswith("/static/"):
            return _static(path.removeprefix("/static/"))
        if path == "/login":
            return html(site.pages.login(_after(query), wrong=False))
        if not site.guard.lets_in(dict(self.headers.items())):
            return self._turned_away(path)
        if path == "/events":
            return self._events(site, query)
        if path.startswith("/files/"):
            return site.file(path.removeprefix("/files/"))
        if path in site.live:
            return site.shared(self.path, path, query)
        found = site.gets.get(path)
        if found is None:
            return html(site.pages.said("Not found", "There is no such page."), HTTPStatus.NOT_FOUND)
        return found(query)

    def _turned_away(self, path: str) -> Answer:
        """Lead a person to the form, and tell a program."""
        if path.startswith(("/api/", "/events", "/files/")):
            words = b"a token is needed: Authorization: Bearer TOKEN\n"
            return Answer(words, "text/plain", HTTPStatus.UNAUTHORIZED, {"WWW-Authenticate": "Bearer"})
        return _see(f"/login?after={quote(self.path)}")

    def _post(self, site: Site, path: str, query: Query) -> Answer:
        form = self._form()
        headers = dict(self.headers.items())
        if form is None or not site.guard.from_our_page(headers, form.get("word", [""])[0]):
            message = "The form did not come from a page of this server, or it was started again: load the page again."
            return html(site.pages.said("Refused", message), HTTPStatus.FORBIDDEN)
        if path == "/login":
            if site.guard.is_token(form.get("token", [""])[0]):
                return _see(_after(form), {"Set-Cookie": site.guard.set_cookie()})
            time.sleep(0.5)
            return html(site.pages.login(_after(form), wrong=True), HTTPStatus.FORBIDDEN)
        if not site.guard.lets_in(headers):
            return self._turned_away(path)
        found = site.posts.get(path)
        if found is None:
            return html(site.pages.said("Not found", "There is nothing to do here."), HTTPStatus.NOT_FOUND)
        return found(form)

    def _form(self) -> Query | None:
        """Read a form; None when it is none, or too long."""
        length = self.headers.get("Content-Length", "")
        kind = self.headers.get_content_type()
        if not length.isdecimal() or int(length) > MOST_FORM or kind != "application/x-www-form-urlencoded":
            return None
        try:
            return parse_qs(self.rfile.read(int(length)).decode(), max_num_fields=64)
        except ValueError:
            return None

    def _events(self, site: Site, query: Query) -> Answer | None:
        """Tell of changes as they come, as server-sent events, until the visitor leaves."""
        address, mark = one(query, "page"), query.get("since", [""])[0]
        split = urlsplit(address)
        if split.path not in site.live:
            raise UserError("page: does not change by itself")
        if not site.listeners.acquire(blocking=False):
            return Answer(b"too many listen\n", "text/plain", HTTPStatus.SERVICE_UNAVAILABLE, {"Retry-After": "5"})
        try:
            self._head(HTTPStatus.OK, "text/event-stream", {"X-Accel-Buffering": "no"}, None)
            self.wfile.write(b"retry: 3000\n\n")
            told = time.monotonic()
            while not site.closing.is_set():
                now = _mark_of(site, address, split.path, parse_qs(split.query, max_num_fields=64))
                if now != mark or time.monotonic() - told > SILENT_S:
                    self.wfile.write(f"data: {now}\n\n".encode() if now != mark else b": \n\n")
                    self.wfile.flush()
                    mark, told = now, time.monotonic()
                site.closing.wait(POLL_S)
        finally:
            site.listeners.release()
        return None

    def _send(self, answer: Answer) -> None:
        self._head(answer.status, answer.kind, answer.headers, len(answer.body))
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _head(self, status: int, kind: str, headers: Mapping[str, str], length: int | None) -> None:
        self.send_response(status)
        sent = {**HEADERS, "Content-Type": kind, **headers}
        if length is not None:
            sent["Content-Length"] = str(length)
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()


def _mark_of(site: Site, address: str, path: str, query: Query) -> str:
    """Return what tells whether a page has changed; of one that cannot be shown now, why."""
    try:
        return pages.mark_in(site.shared(address, path, query).body)
    except SegpropError as error:
        return pages.mark_of(error.message)


def _static(name: str) -> Answer:
    """Answer with one of our own files."""
    kinds = {"ui.js": "text/javascript; charset=utf-8", "icon.svg": "image/svg+xml"}
    if name == "ui.css":
        return Answer(pages.style().encode(), "text/css; charset=utf-8")
    if name in kinds:
        return Answer((_STATIC / name).read_bytes(), kinds[name])
    return Answer(b"no such file\n", "text/plain", HTTPStatus.NOT_FOUND)


def _after(values: Query) -> str:
    """Return where to go after the token was shown: a page of this server."""
    wanted = values.get("after", ["/"])[0]
    return wanted if wanted.startswith("/") and not wanted.startswith(("//", "/\\")) and wanted.isprintable() else "/"


def _see(address: str, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(b"", status=HTTPStatus.SEE_OTHER, headers={"Location": address, **(headers or {})})


@dataclass(frozen=True)
class Listening:
    """Where the page is served. `port` 0: any that is free."""

    host: str = "127.0.0.1"
    port: int = 8420
    token_file: Path | None = None


def open_server(place: Path, listening: Listening) -> Server:
    """Bind the address, so that it answers once `serve_forever` is called. UserError when `place` holds no run, or the
    address cannot be used."""
    if not place.is_dir():
        raise UserError(f"{place}: no such folder")
    if next(run_dirs(place), None) is None and not Folder(place).configs():
        raise UserError(f"{place}: neither a run nor a configuration in it; name a run, or a folder that holds runs")
    host = listening.host
    token = None if listening.token_file is None else read_token(listening.token_file)
    if token is None and not is_loopback(host):
        token = new_token()
    names = frozenset(() if is_loopback(host) else (host.lower(), socket.gethostname().lower()))
    site = Site(Folder(place), Guard(token, names))
    try:
        return Server((host, listening.port), site)
    except (OSError, OverflowError) as error:
        said = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{host} port {listening.port} cannot be used: {said}; --port N names another, 0 any that is free"
        ) from error


def serve(place: Path, listening: Listening) -> None:
    """Serve the page until Ctrl-C or SIGTERM. UserError as `open_server`."""
    with open_server(place, listening) as server, contextlib.suppress(KeyboardInterrupt):
        # Also where a shell has started this in the background, with SIGINT ignored.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.default_int_handler)
        host, port = listening.host, server.server_port
        shown = f"[{host}]" if ":" in host else host
        print(f"segprop ui: http://{shown}:{port}/ shows {place}; Ctrl-C ends it", flush=True)
        if server.site.guard.token is not None and listening.token_file is None:
            print(f"token: {server.site.guard.token}", flush=True)
        server.serve_forever(poll_interval=0.2)
    print("segprop ui: ended", flush=True)
