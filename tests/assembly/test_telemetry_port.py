"""The port that tells metrics, who asks such ports, and what becomes of those that do not answer."""

from __future__ import annotations

import contextlib
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from cluster import telemetry_merge, telemetry_port
from cluster.telemetry_merge import MergedMetrics
from cluster.telemetry_port import MAX_CONNECTIONS, MetricsPort, fetch

HOST = "127.0.0.1"
TEXT = "# HELP up Whether.\n# TYPE up gauge\nup 1.0\n"


@contextlib.contextmanager
def port(text: Callable[[], str] = lambda: TEXT) -> Iterator[str]:
    listening = MetricsPort(HOST, 0, text)
    try:
        yield f"http://{HOST}:{listening.port}/metrics"
    finally:
        listening.stop()


@contextlib.contextmanager
def peer(act: Callable[[socket.socket], object]) -> Iterator[str]:
    """A server that does with its first connection whatever `act` does, and then nothing until the end."""
    over = threading.Event()

    def run() -> None:
        connection, _ = listening.accept()
        with connection, contextlib.suppress(OSError):
            act(connection)
            over.wait(10)

    with socket.create_server((HOST, 0)) as listening:
        thread = threading.Thread(target=run)
        thread.start()
        yield f"http://{HOST}:{listening.getsockname()[1]}/metrics"
        over.set()
        thread.join(10)


def drip(connection: socket.socket) -> None:
    """Say something all the time, and never all of it."""
    while True:
        connection.sendall(b"H")
        time.sleep(0.01)


def test_it_tells_what_the_text_is_now_and_nothing_else() -> None:
    texts = iter(["one ü", "two"])
    with port(lambda: next(texts)) as address:
        with urlopen(address) as answer:
            assert answer.read().decode() == "one ü"
            assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert fetch(address + "?x=y", 5) == "two"
        with pytest.raises(HTTPError, match="404"):
            urlopen(address.removesuffix("metrics"))
        with pytest.raises(OSError, match="404"):
            fetch(address + "/other", 5)


def test_when_it_has_stopped_nobody_listens() -> None:
    with port() as address:
        assert fetch(address, 5) == TEXT
    with pytest.raises(ConnectionRefusedError):
        fetch(address, 5)
    assert not any(thread.name == "octavo-metrics" for thread in threading.enumerate())


def test_a_port_may_be_shared_if_all_of_its_listeners_say_so() -> None:
    first = MetricsPort(HOST, 0, lambda: TEXT, is_shared=True)
    try:
        second = MetricsPort(HOST, first.port, lambda: TEXT, is_shared=True)
        second.stop()
        with pytest.raises(OSError, match="in use"):
            MetricsPort(HOST, first.port, lambda: TEXT)
    finally:
        first.stop()


def test_who_is_idle_keeps_nobody_else_out_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.telemetry_port._Handler.timeout", 0.2)
    with port() as address, contextlib.ExitStack() as idle:
        number = int(address.rpartition(":")[2].removesuffix("/metrics"))
        for _ in range(MAX_CONNECTIONS + 2):
            idle.enter_context(socket.create_connection((HOST, number)))
        end = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError):
                if fetch(address, 5) == TEXT:
                    return
            assert time.monotonic() < end


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """This process has no descriptor left for anything new."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Accepts:
    """Counts how often a port tries to take a connection."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num = 0
        self.first = threading.Event()
        accept = telemetry_port._Server.get_request

        def get_request(server: telemetry_port._Server) -> tuple[socket.socket, object]:
            self.num += 1
            self.first.set()
            return accept(server)

        monkeypatch.setattr(telemetry_port._Server, "get_request", get_request)


def test_without_descriptors_it_pauses_and_then_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that cannot be accepted stays where it is, so the port tried again at once, and took a core."""
    accepts = Accepts(monkeypatch)
    with port() as address, socket.socket() as client:
        client.settimeout(10)
        with no_descriptors():
            client.connect((HOST, int(address.rpartition(":")[2].removesuffix("/metrics"))))
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            assert accepts.first.wait(10)
            time.sleep(0.2)
            assert accepts.num < 5
        with client.makefile() as answer:
            assert answer.read().endswith(TEXT)


def test_it_stops_during_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry_port, "PAUSE_S", 60.0)
    accepts = Accepts(monkeypatch)
    with socket.socket() as client, port() as address, no_descriptors():
        client.connect((HOST, int(address.rpartition(":")[2].removesuffix("/metrics"))))
        assert accepts.first.wait(10)
    assert not any(thread.name == "octavo-metrics" for thread in threading.enumerate())


def test_threads_that_cannot_be_started_take_no_places(monkeypatch: pytest.MonkeyPatch) -> None:
    with port() as address:
        with monkeypatch.context() as broken:
            broken.setattr(threading.Thread, "start", no_thread)
            for _ in range(MAX_CONNECTIONS + 1):
                with pytest.raises(OSError, match=r"answers b''|reset|Broken"):
                    fetch(address, 5)
        assert fetch(address, 5) == TEXT


def no_thread(thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize(
    "act",
    [
        lambda _: None,
        drip,
        lambda connection: connection.sendall(b"HTTP/1.0 500 No\r\n\r\n"),
        lambda connection: connection.close(),
    ],
    ids=["silent", "dripping", "silent after a line", "closing"],
)
def test_whoever_does_not_answer_is_given_up_in_time(act: Callable[[socket.socket], object]) -> None:
    with peer(act) as address:
        began = time.monotonic()
        with pytest.raises(OSError, match=r"timed out|answers|reset"):
            fetch(address, 0.2)
        assert time.monotonic() - began < 5


def test_who_is_silent_is_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry_merge, "TIMEOUT_S", 1.5)
    missed: list[int] = []
    with contextlib.ExitStack() as peers:
        well = peers.enter_context(port())
        targets = {
            "well": well,
            "other": peers.enter_context(port(lambda: "<html>")),
            "silent": peers.enter_context(peer(lambda _: None)),
            "gone": f"http://{HOST}:1/metrics",
            "nowhere": "",
            "me": f"http://{HOST}:1/never/asked",
        }
        text = MergedMetrics("me", lambda: TEXT, lambda: targets, missed.append)()
        assert [line for line in text.splitlines() if line.startswith("up")] == [
            'up{instance="me"} 1.0',
            'up{instance="well"} 1.0',
        ]
        assert missed == [4]
        assert MergedMetrics("me", lambda: TEXT, dict, missed.append)().count("up{") == 1
        assert missed == [4]
