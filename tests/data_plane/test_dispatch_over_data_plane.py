"""Requests through the router's back, over real gRPC, to fake engines: tokens, cancels, deadlines, losses, drains."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from router.dispatcher import Dispatcher
from tests.data_plane.rig import (
    RecordingSink,
    Replica,
    assert_answers,
    assert_idle,
    make_dispatcher,
    make_prompt,
    make_request,
)


@asynccontextmanager
async def cluster(*replicas: Replica, **config: float) -> AsyncIterator[Dispatcher]:
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


async def test_answers_are_the_engines_token_for_token() -> None:
    rng = random.Random(1)
    one, two = Replica("one"), Replica("two")
    async with cluster(one, two) as dispatcher:
        requests = [make_request(make_prompt(rng, rng.randrange(1, 100)), rng.randrange(1, 40)) for _ in range(60)]
        sinks = [RecordingSink() for _ in requests]
        for request, sink in zip(requests, sinks, strict=True):
            dispatcher.submit(request, sink)
        for request, sink in zip(requests, sinks, strict=True):
            assert_answers(await sink.wait(), request)
            assert len(sink.decisions) == 1
            assert sink.cached_tokens is not None
        assert {sink.decisions[0].replica for sink in sinks} == {"one", "two"}
        await assert_idle(dispatcher, one, two)
