"""Replicas with the fake engine behind real data ports, a router's back in front of them, and sinks that remember."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.hello import RouterIdentity
from router.link import LinkTimes, ReplicaLink
from router.types import Attempt, Decision, ReplicaAddress, Request
from workers.config import EngineConfig
from workers.data_plane import DataPlaneServer, DataPlaneTimes
from workers.errors import OctavoError
from workers.fake import FakeEngine, fake_continuation, fake_manifest
from workers.handshake import ClusterKeys
from workers.metrics import ReplicaMetrics
from workers.peer_tls import server_credentials
from workers.step_telemetry import StepTelemetry
from workers.thread import EngineThread
from workers.types import Finish, FinishReason, SamplingParams, TokenLogprobs

SECRET = bytes(range(32))
KEYS = ClusterKeys.derive(SECRET)
VOCAB = 1_000
PATIENCE_S = 20.0
"""How long is waited for what comes soon, on whatever machine."""
TIMES = DataPlaneTimes(heartbeat_s=0.1)
FAST = LinkTimes(attach_s=2.0, min_backoff_s=0.01, max_backoff_s=0.1)
ROUTER = RouterIdentity(router_id="router-1", epoch=7, keys=KEYS)

_numbers = itertools.count(1)


class Replica:
    """A fake engine on its thread behind a data port. `await start()`; later `stop()` or `kill()`."""

    def __init__(
        self,
        replica_id: str,
        *,
        keys: ClusterKeys = KEYS,
        times: DataPlaneTimes = TIMES,
        is_encrypted: bool = False,
        **engine: Any,
    ) -> None:
        settings: dict[str, Any] = {
            "engine": "fake",
            "block_size": 4,
            "num_blocks": 256,
            "chunk_tokens": 64,
            "max_num_sequences": 32,
        }
        self.replica_id = replica_id
        self.engine = FakeEngine(
            EngineConfig(**(settings | engine)),
            manifest=fake_manifest(vocab_size=VOCAB, max_model_len=1_000),
            hash_key=keys.prefix_hash,
        )
        self.server = DataPlaneServer(
            replica_id=replica_id,
            key=keys.data_plane,
            times=times,
            credentials=server_credentials(keys.data_plane_tls) if is_encrypted else None,
        )
        self.thread = EngineThread(self.engine, self.server.notify)
        self._may_go_on = threading.Event()
        self.metrics: ReplicaMetrics | None = None
        """Told of steps, if this replica is `traced`."""

    @property
    def address(self) -> ReplicaAddress:
        return ReplicaAddress(
            replica_id=self.replica_id,
            address=self.server.address,
            node_id="node-1",
            is_encrypted=self.server.is_encrypted,
        )

    async def start(self, *, is_traced: bool = False) -> Replica:
        """`is_traced`: its steps are watched, as where spans are exported."""
        steps = StepTelemetry(self.thread.watch(), self.metrics, self.replica_id) if is_traced else None
        await self.server.start(self.thread, steps)
        return self

    def hold(self) -> None:
        """Have the engine stand still before its next step, until `go_on` or the end: for what a test does meanwhile
        there is as much time as it takes."""
        step, self._may_go_on = self.engine.step, threading.Event()

        def step_later() -> bool:
            self._may_go_on.wait()
            return step()

        self.engine.step = step_later  # type: ignore[method-assign]

    def go_on(self) -> None:
        self._may_go_on.set()

    async def kill(self) -> None:
        """End it as a crash would: streams break, nothing is said."""
        await self.server.stop(0.0)
        await self._close_engine()

    async def stop(self) -> None:
        await self.server.stop()
        await self._close_engine()

    async def _close_engine(self) -> None:
        self.thread.close()
        self.go_on()
        assert await asyncio.to_thread(self.thread.join, PATIENCE_S)


class RecordingSink:
    """Remembers an answer and asserts the order of its calls."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []
        self.attempts: list[Attempt] = []
        self.cached_tokens: int | None = None
        self.token_ids: list[int] = []
        """Of the first choice, as `finish`; those of all are in `answers` and `finishes`."""
        self.answers: dict[int, list[int]] = {0: self.token_ids}
        self.num_deliveries = 0
        self.logprobs: list[TokenLogprobs] = []
        self.finishes: dict[int, Finish] = {}
        self.not_wanted: set[int] = set()
        """Choices that the test has cancelled."""
        self.error: OctavoError | None = None
        self.num_ends = 0
        self.ended_at = 0.0
        self.done = asyncio.Event()
        self.on_tokens: Callable[[], None] = lambda: None

    @property
    def finish(self) -> Finish | None:
        return self.finishes.get(0)

    def dispatched(self, attempt: Attempt) -> None:
        decision = attempt.decision
        assert not self.num_ends
        assert attempt.queue_s >= attempt.wait.duration_s >= 0
        self.attempts.append(attempt)
        assert decision.attempt == len(self.decisions) + 1
        self.decisions.append(decision)

    def cached(self, num_tokens: int) -> None:
        assert not self.num_ends
        assert not self.token_ids or len(self.decisions) > 1
        self.cached_tokens = num_tokens

    def tokens(self, index: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        assert not self.num_ends
        assert index not in self.finishes
        assert index not in self.not_wanted
        assert token_ids
        self.answers.setdefault(index, []).extend(token_ids)
        self.logprobs += logprobs
        self.num_deliveries += 1
        self.on_tokens()

    def known(self, index: int) -> Sequence[int]:
        return self.answers.get(index, [])

    def finished(self, index: int, finish: Finish) -> None:
        assert not self.num_ends
        assert index not in self.finishes
        assert index not in self.not_wanted
        self.finishes[index] = finish

    def ended(self, error: OctavoError | None) -> None:
        self.num_ends += 1
        assert self.num_ends == 1
        self.ended_at = time.monotonic()
        assert error is not None or self.finishes or self.not_wanted
        self.error = error
        self.done.set()

    async def wait(self, timeout_s: float = PATIENCE_S) -> RecordingSink:
        async with asyncio.timeout(timeout_s):
            await self.done.wait()
        return self


def make_request(prompt: Sequence[int], max_tokens: int = 8, *, timeout_s: float = 30.0, **fields: Any) -> Request:
    now = time.monotonic()
    defaults: dict[str, Any] = {
        "request_id": f"request-{next(_numbers)}",
        "model": "fake",
        "prompt": list(prompt),
        "sampling": SamplingParams(temperature=0.0),
        "max_tokens": max_tokens,
        "deadline": now + timeout_s,
        "accepted_at": now,
    }
    return Request(**(defaults | fields))


def make_prompt(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(num_tokens)]


def make_dispatcher(*, times: LinkTimes = FAST, identity: RouterIdentity = ROUTER, **config: Any) -> Dispatcher:
    return Dispatcher(RouterConfig(**config), identity, rng=random.Random(1), link_times=times)


@asynccontextmanager
async def cluster(*replicas: Replica, **config: Any) -> AsyncIterator[Dispatcher]:
    """A started dispatcher in front of started replicas; at the end everything must be idle and ends."""
    dispatcher = make_dispatcher(**config)
    dispatcher.start()
    for replica in replicas:
        await replica.start()
    dispatcher.update_replicas([replica.address for replica in replicas])
    try:
        yield dispatcher
        await assert_idle(dispatcher)
    finally:
        await dispatcher.stop()
        for replica in replicas:
            await replica.stop()
    dispatcher.check_integrity()


@asynccontextmanager
async def ready_cluster(*replicas: Replica) -> AsyncIterator[Dispatcher]:
    """The same once all are ready."""
    async with cluster(*replicas) as dispatcher:
        await until(lambda: all(view.state == "ready" for view in dispatcher.replicas()))
        yield dispatcher


async def until(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    """Wait for what must come true by itself."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  what it waits for is in another thread
            await asyncio.sleep(0.005)


def assert_answers(sink: RecordingSink, request: Request) -> None:
    """The whole answer came, token for token, and ended well."""
    assert sink.error is None, sink.error
    assert sink.num_ends == 1
    assert sink.token_ids == fake_continuation(request.prompt, request.max_tokens, VOCAB)
    assert sink.finish is not None
    assert sink.finish.reason is FinishReason.LENGTH


async def assert_idle(dispatcher: Dispatcher, *replicas: Replica) -> None:
    """Nothing is left anywhere: no permit, work, deadline, count or block."""
    dispatcher.check_integrity()
    backlog = dispatcher.backlog()
    assert (backlog.num_queued_requests, backlog.num_queued_tokens, backlog.num_running_requests) == (0, 0, 0)
    for replica in replicas:
        await until(partial(_has_nothing, replica))
    for link in dispatcher._fleet._present.values():
        if link.can_send:
            await until(partial(_owes_nothing, link))
            assert link.state.num_uncounted == 0
            assert link.state.num_expected == 0


def _has_nothing(replica: Replica) -> bool:
    return replica.server.num_works == 0 and replica.thread.load().num_free_blocks == 256


def _owes_nothing(link: ReplicaLink) -> bool:
    return link.state.num_running == 0 and link.state.owed_tokens == 0
