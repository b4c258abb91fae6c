"""The router's back over real gRPC under random requests, cancels, deadlines, kills and drains."""

from __future__ import annotations

import asyncio
import random

from router.dispatcher import Dispatcher
from router.types import Cancel, Request
from tests.data_plane.rig import (
    VOCAB,
    RecordingSink,
    Replica,
    assert_idle,
    cluster,
    make_prompt,
    make_request,
)
from workers.errors import CancelledRequestError, DeadlineError
from workers.fake import fake_continuation
from workers.types import FinishReason


class RandomUsers:
    """Send requests, some for several choices and some in a hurry, and cancel some of them or of their choices."""

    def __init__(self, dispatcher: Dispatcher, rng: random.Random) -> None:
        self._dispatcher = dispatcher
        self._rng = rng
        self._loop = asyncio.get_running_loop()
        self._sent: list[tuple[Request, RecordingSink]] = []
        self._cancelled: set[RecordingSink] = set()

    def send(self) -> None:
        rng = self._rng
        hurried = rng.random() < 0.2
        request = make_request(
            make_prompt(rng, rng.randrange(1, 60)),
            rng.randrange(1, 30),
            timeout_s=rng.uniform(0.0, 0.3) if hurried else 30.0,
            priority=rng.randrange(3),
            n=rng.choice((1, 1, 1, 2, 3)),
        )
        sink = RecordingSink()
        cancel = self._dispatcher.submit(request, sink)
        if request.n > 1 and rng.random() < 0.5:
            self._loop.call_later(rng.expovariate(50), self._drop, cancel, sink, rng.randrange(request.n))
        if rng.random() < 0.3:
            self._cancelled.add(sink)
            self._loop.call_later(rng.expovariate(20), cancel)
        self._sent.append((request, sink))

    @staticmethod
    def _drop(cancel: Cancel, sink: RecordingSink, index: int) -> None:
        if not sink.num_ends and index not in sink.finishes:
            sink.not_wanted.add(index)
            cancel(index)

    async def outcomes(self) -> set[str]:
        """Return the kinds of ends when all have come, each right, or with the error that its client explains: what a
        replica had begun goes on at another one."""
        for request, sink in self._sent:
            await sink.wait(20.0)
            full = fake_continuation(request.prompt, request.max_tokens, VOCAB)
            for index in range(request.n):
                tokens = sink.answers.get(index, [])
                assert tokens == full[: len(tokens)]
                if sink.error is None and index not in sink.not_wanted:
                    assert tokens == full
                    assert sink.finishes[index].reason is FinishReason.LENGTH
            if isinstance(sink.error, CancelledRequestError):
                assert sink in self._cancelled
            elif sink.error is not None:
                assert isinstance(sink.error, DeadlineError)
        return {type(sink.error).__name__ for _, sink in self._sent}


async def test_random_requests_cancels_deadlines_and_kills_leave_nothing() -> None:
    """500 requests over three replicas, of which one is killed and replaced, one drained: each ends once, and every
    count returns to zero."""
    rng = random.Random(5)
    replicas = {name: Replica(name, fake_step_s=0.001) for name in ("one", "two", "three", "four")}
    async with cluster(replicas["one"], replicas["two"], replicas["three"]) as dispatcher:
        users = RandomUsers(dispatcher, rng)
        for number in range(500):
            users.send()
            if number == 150:
                await replicas["two"].kill()
            if number == 250:
                await replicas["four"].start()
                dispatcher.update_replicas([replicas[name].address for name in ("one", "three", "four")])
            if number == 350:
                asyncio.get_running_loop().create_task(replicas["three"].server.drain(10.0))
            if rng.random() < 0.3:
                await asyncio.sleep(rng.expovariate(200))
                dispatcher.check_integrity()
        outcomes = await users.outcomes()
        assert outcomes >= {"NoneType", "CancelledRequestError", "DeadlineError"}
        await assert_idle(dispatcher, replicas["one"], replicas["three"], replicas["four"])
    await replicas["four"].stop()
