"""A port that answers ``GET /metrics`` over HTTP with Prometheus text, and the other end: who asks such a port.

No TLS, no credentials, one answer a connection, a few connections at a time; whoever is idle or slow is cut off. Its
thread sleeps until somebody asks, and for a moment when the process has no descriptor left to answer with. Knows text,
not what is in it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import urlsplit

from cluster.telemetry_text import CONTENT_TYPE

PATH: Final = "/metrics"
MAX_CONNECTIONS: Final = 8
IDLE_S: Final = 5.0
PAUSE_S: Final = 1.0
"""After a connection that could not be accepted for want of descriptors or memory. It still waits, so that the next
try would be at once; asyncio's servers pause as long."""
MAX_BYTES: Final = 32 * 1024 * 1024
"""Of an answer."""
_WANT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

_log = logging.getLogger(__name__)


class MetricsPort:
    """Serves what `text` returns, one call at a time. `is_shared`: others of this machine may listen on the same port,
    and each connection goes to one of them. Raises OSError if it cannot listen there."""

    def __init__(self, host: str, port: int, text: Callable[[], str], *, is_shared: bool = False) -> None:
        self._server = _Server(host.strip("[]"), port, text, is_shared=is_shared)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._run, name="octavo-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Listen no more."""
        self._server.is_stopped.set()
        with contextlib.suppress(OSError):
            self._server.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread, which no timer does
        self._thread.join(1.0)
        self._server.server_close()

    def _run(self) -> None:
        while not self._server.is_stopped.is_set():
            self._server.handle_request()


def fetch(address: str, timeout_s: float) -> str:
    """Return what a port's address says. Raises OSError if it does not within `timeout_s`, whatever it does instead."""
    end = time.monotonic() + timeout_s
    url = urlsplit(address)
    host, port = url.hostname, url.port
    if host is None or port is None:
        raise OSError(f"{address} is no address")
    with socket.create_connection((host, port), timeout=timeout_s) as connection:
        connection.sendall(f"GET {url.path} HTTP/1.0\r\nHost: {url.netloc}\r\n\r\n".encode())
        parts, size = [], 0
        while part := _received(connection, end):
            parts.append(part)
            size += len(part)
            if size > MAX_BYTES:
                raise OSError(f"{address} says more than {MAX_BYTES} bytes")
    head, _, body = b"".join(parts).partition(b"\r\n\r\n")
    if head.split(b" ", 2)[1:2] != [b"200"]:
        raise OSError(f"{address} answers {head[:60]!r}")
    return body.decode(errors="replace")


def _received(connection: socket.socket, end: float) -> bytes:
    left_s = end - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("timed out")
    connection.settimeout(left_s)
    return connection.recv(65536)


class _Server(ThreadingHTTPServer):
    def __init__(self, host: str, port: int, text: Callable[[], str], *, is_shared: bool) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.allow_reuse_port = is_shared
        self._text, self._turn = text, threading.Lock()
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.is_stopped = threading.Event()
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # HTTPServer's own asks the DNS what this machine is called.
        socketserver.TCPServer.server_bind(self)

    def text(self) -> bytes:
        with self._turn:
            return self._text().encode()

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in _WANT and not self.is_stopped.is_set():
                _log.warning("no connection is accepted for %g s: %s", PAUSE_S, error)
                self.is_stopped.wait(PAUSE_S)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started, which would have given the place back
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("no answer to %s", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = IDLE_S

    def do_GET(self) -> None:  # http.server's name
        if self.path.partition("?")[0] != PATH:
            self.send_error(404)
            return
        text = self.server.text()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def version_string(self) -> str:
        return "octavo"

    def log_message(self, format: str, *args: Any) -> None:  # http.server's name
        """Say nothing of each request."""
