"""A report that follows its runs, served to this machine alone."""

import threading
from collections.abc import Sequence
from contextlib import suppress
from errno import EACCES, EADDRINUSE
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import socket
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

from core.config.errors import UserError
from core.report.page import page_data, page_json, page_text
from core.report.run_folder import RunFolder

LOOPBACK = "127.0.0.1"


class Feed:
    """What a page shows of runs that go on: read when somebody asks, with a version that counts changes."""

    def __init__(self, runs: Sequence[RunFolder]) -> None:
        self.runs, self._lock = list(runs), threading.Lock()
        self._version, self._data = 0, {}

    def data(self) -> dict[str, Any]:
        """What there is now."""
        with self._lock:
            if any([run.read() for run in self.runs]) or not self._data:
                self._version += 1
                self._data = page_data(self.runs, version=self._version, following=True)
            return self._data


class ReportServer(ThreadingHTTPServer):
    """Serves the page at / and its data at /data, on the loopback address. Raises `UserError`, which names another
    port, where this one is taken."""

    daemon_threads = True
    allow_reuse_address = False

    def __init__(self, feed: Feed, port: int) -> None:
        self.feed = feed
        try:
            super().__init__((LOOPBACK, port), ReportRequest)
        except OSError as error:
            if error.errno not in (EADDRINUSE, EACCES):
                raise
            raise UserError(f"port {port} is taken or not allowed: --port {free_port()} is free") from error
        except OverflowError as error:
            raise UserError(f"port {port} must be from 0 to 65535; 0 takes a free one") from error

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that left is no error."""


class ReportRequest(BaseHTTPRequestHandler):
    """ReportRequest a browser on this machine."""

    @property
    def feed(self) -> Feed:
        """What the page shows."""
        return cast(ReportServer, self.server).feed

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in (LOOPBACK, "localhost"):  # a page elsewhere whose name was made to point here
            return self._answer(403, "text/plain", "only for this machine")
        where = urlsplit(self.path)
        if where.path == "/":
            return self._answer(200, "text/html; charset=utf-8", page_text(self.feed.data()))
        if where.path != "/data":
            return self._answer(404, "text/plain", "nothing here")
        data = self.feed.data()
        known = parse_qs(where.query).get("version", [""])[0]
        if known == str(data["version"]):
            return self._answer(204, "application/json", "")
        return self._answer(200, "application/json", page_json(data))

    def _answer(self, code: int, kind: str, text: str) -> None:
        body = text.encode()
        with suppress(ConnectionError):
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not told."""


def free_port() -> int:
    """A port that nobody has at this moment."""
    with socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]
