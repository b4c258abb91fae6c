"""What is fuzzed: a router and a replica with the fake engine, behind real ports, in a process that tells of itself.

    in    {"secret"}                              once
    out   {"router", "replica"}                   addresses; both serve
    in    {"replicas": [[id, address], ...]}      these are there as well, from now on
    out   {}
    in    {"tell": true}
    out   what `_Fuzzed.tell` returns
    in    end of file: end, also when the parent died

Nobody starts it but `FuzzedServer`, which talks to it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import uvloop

from cluster.grpc_environment import process_environment
from load_tests import process_tree
from load_tests.rigs.fuzz_model import small_manifest, small_model
from load_tests.rigs.fuzz_samples import MODEL
from load_tests.rigs.fuzz_tally import LoggedErrors
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.hello import RouterIdentity
from router.link import LinkTimes
from router.server import RouterServer
from router.types import ReplicaAddress
from workers.config import EngineConfig
from workers.data_plane import DataPlaneServer, DataPlaneTimes
from workers.fake import FakeEngine
from workers.handshake import ClusterKeys
from workers.thread import EngineThread

ROOT: Final = Path(__file__).parents[2]
REPLICA: Final = "good"
NUM_BLOCKS: Final = 256
STOP_S: Final = 10.0
ANSWER_S: Final = 60.0
"""Who says nothing for so long is as good as gone, and is ended: a loop that turns no more would hold up all."""


class FuzzedServer:
    """The parent's side; starts when entered, and is over when left."""

    def __init__(self) -> None:
        self.secret = secrets.token_bytes(32)
        self.router = self.replica = ""
        """Addresses."""
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "load_tests.rigs.fuzz_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=process_environment(),
        )
        try:
            addresses = self._ask({"secret": self.secret.hex()})
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.router, self.replica = addresses["router"], addresses["replica"]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def tell(self) -> dict[str, Any]:
        """Return what it tells of itself. Raises RuntimeError if it is gone, or silent for `ANSWER_S`."""
        return await asyncio.to_thread(self._ask, {"tell": True})

    async def set_replicas(self, others: dict[str, str]) -> None:
        """Let the router know of `others` beside the good one: addresses by their ids."""
        await asyncio.to_thread(self._ask, {"replicas": list(others.items())})

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
        end = threading.Timer(ANSWER_S, process.kill)
        end.start()
        try:
            line = process.stdout.readline()
        finally:
            end.cancel()
        if not line:
            raise RuntimeError(f"the fuzzed process is gone, it says above why; or it said nothing for {ANSWER_S:g} s")
        answer: dict[str, Any] = json.loads(line)
        return answer


class _Fuzzed:
    """The child's side."""

    def __init__(self, keys: ClusterKeys, errors: LoggedErrors) -> None:
        config = EngineConfig(engine="fake", num_blocks=NUM_BLOCKS, fake_step_s=0.000_5)
        self._errors = errors
        self._engine = FakeEngine(config, manifest=small_manifest(), hash_key=keys.prefix_hash)
        self._replica = DataPlaneServer(
            replica_id=REPLICA, key=keys.data_plane, times=DataPlaneTimes(hello_s=0.5, heartbeat_s=0.2)
        )
        self._thread = EngineThread(self._engine, self._replica.notify)
        router = RouterConfig(session_grace_s=0.2, default_timeout_s=10.0, max_message_bytes=4 << 20)
        identity = RouterIdentity(router_id="fuzzed", epoch=time.time_ns(), keys=keys)
        # A replica that was refused is tried again at once: it has more to say.
        times = LinkTimes(attach_s=1.0, min_backoff_s=0.001, max_backoff_s=0.004, silence_s=2.0)
        self._dispatcher = Dispatcher(router, identity, link_times=times)
        self._server = RouterServer(
            router, {MODEL: small_model()}, self._dispatcher, router_id="fuzzed", version="fuzz"
        )

    async def start(self) -> dict[str, Any]:
        await self._replica.start(self._thread)
        self._dispatcher.start()
        self.set_replicas([])
        port = self._server.bind("127.0.0.1", 0)
        await self._server.start()
        while not any(view.state == "ready" for view in self._dispatcher.replicas()):  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.01)
        return {"router": f"127.0.0.1:{port}", "replica": self._replica.address}

    def set_replicas(self, others: list[tuple[str, str]]) -> None:
        known = [(REPLICA, self._replica.address), *others]
        self._dispatcher.update_replicas([ReplicaAddress(replica_id=name, address=address) for name, address in known])

    def tell(self) -> dict[str, Any]:
        """Return what is left, what is wrong with the books, what was logged, and the memory in MiB."""
        backlog = self._dispatcher.backlog()
        return {
            "left": {
                "answers": self._server.intake.num_open,
                "ended short of accepted": self._server.intake.num_accepted - self._server.intake.num_ended,
                "entries": self._server.sessions.num_known,
                "sessions": self._server.sessions.num_open,
                "queued": backlog.num_queued_requests,
                "running": backlog.num_running_requests,
                "works": self._replica.num_works,
                "blocks": NUM_BLOCKS - self._thread.load().num_free_blocks,
                "strange routers": self._replica.num_routers - 1,
            },
            "integrity": self._integrity(),
            "errors": self._errors.texts,
            "failure": repr(self._thread.failure) if self._thread.failure else "",
            "memory_mib": process_tree.pss_bytes(os.getpid()) / 2**20,
        }

    def _integrity(self) -> str:
        try:
            self._dispatcher.check_integrity()
            if self._replica.num_works == 0:  # the engine's thread has nothing to do then
                self._engine.check_integrity()
        except AssertionError as error:
            return f"books do not agree: {error!r}"
        return ""

    async def stop(self) -> None:
        await self._server.stop()
        await self._dispatcher.stop()
        await self._replica.stop()
        self._thread.close()
        await asyncio.to_thread(self._thread.join, 2.0)


async def _serve() -> None:
    errors = LoggedErrors()
    logging.getLogger().addHandler(errors)
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    job = json.loads(await lines.readline())
    fuzzed = _Fuzzed(ClusterKeys.derive(bytes.fromhex(job["secret"])), errors)
    print(json.dumps(await fuzzed.start()), flush=True)
    while line := await lines.readline():
        question = json.loads(line)
        answer: dict[str, Any] = {}
        if "tell" in question:
            answer = fuzzed.tell()
        else:
            fuzzed.set_replicas([(name, address) for name, address in question["replicas"]])
        print(json.dumps(answer), flush=True)
    await fuzzed.stop()


def main() -> None:
    """Serve until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which closes our standard input
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve())


if __name__ == "__main__":
    main()
