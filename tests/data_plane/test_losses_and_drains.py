"""Replicas that are lost, drain or leave, a router that drains or stops, and attempts that are over."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest
from octavo.internal.v1 import data_plane_pb2 as pb
from octavo.names import Reason

from tests.data_plane.rig import (
    KEYS,
    RecordingSink,
    Replica,
    assert_answers,
    assert_idle,
    cluster,
    make_request,
    until,
)
from workers.data_plane import DataPlaneServer
from workers.errors import UnavailableError


def was_sent(sink: RecordingSink, times: int) -> bool:
    return len(sink.decisions) == times


async def test_a_request_that_loses_every_replica_is_given_up() -> None:
    async with cluster() as dispatcher:
        sink = RecordingSink()
        dispatcher.submit(make_request(range(20)), sink)
        for number in range(1, 4):
            replica = await Replica(f"replica-{number}").start()
            replica.hold()
            dispatcher.update_replicas([replica.address])
            await until(partial(was_sent, sink, number))
            await replica.kill()
        await sink.wait()
        assert isinstance(sink.error, UnavailableError)
        assert sink.error.reason == Reason.REPLICA_LOST
        assert sink.token_ids == []


async def test_a_replica_that_ends_every_work_at_once_is_given_up_as_well() -> None:
    """Its engine has stopped, but its streams live: with the least load of all it was sent the request for ever."""
    replica = Replica("one")
    async with cluster(replica) as dispatcher:
        replica.thread.close()
        sink = RecordingSink()
        dispatcher.submit(make_request(range(20)), sink)
        await sink.wait()
        assert isinstance(sink.error, UnavailableError)
        assert sink.error.reason == Reason.REPLICA_LOST
        assert [decision.attempt for decision in sink.decisions] == [1, 2, 3]


async def test_a_broken_stream_is_attached_again() -> None:
    """The replica is well, only the connection broke: its works are aborted there, and sent again."""
    replica = Replica("one", fake_step_s=0.002)
    async with cluster(replica) as dispatcher:
        request, sink = make_request(range(30), 500), RecordingSink()
        dispatcher.submit(request, sink)
        await until(lambda: bool(sink.token_ids))
        port = int(replica.server.address.rpartition(":")[2])
        await replica.server.stop(0.0)
        replica.server = await _server_again(replica, port)
        assert_answers(await sink.wait(), request)
        assert [decision.replica for decision in sink.decisions] == ["one", "one"]
        await assert_idle(dispatcher, replica)


async def _server_again(replica: Replica, port: int) -> DataPlaneServer:
    """Another server over the same engine, at the same port."""
    server = DataPlaneServer(replica_id=replica.replica_id, key=KEYS.data_plane, port=port)
    replica.thread._notify = server.notify
    await server.start(replica.thread)
    return server


async def test_drain_of_a_replica_finishes_what_runs_and_takes_nothing_new() -> None:
    one, two = Replica("one", fake_step_s=0.002), Replica("two", fake_step_s=0.002)
    async with cluster(one) as dispatcher:
        running = make_request(range(20), 300)
        sink = RecordingSink()
        dispatcher.submit(running, sink)
        await until(lambda: bool(sink.token_ids))
        await two.start()
        dispatcher.update_replicas([one.address, two.address])
        draining = asyncio.create_task(one.server.drain(30.0))
        await until(lambda: dispatcher.replicas()[0].state == "draining")
        late = [make_request(range(i, 20 + i)) for i in range(8)]
        late_sinks = [RecordingSink() for _ in late]
        for request, late_sink in zip(late, late_sinks, strict=True):
            dispatcher.submit(request, late_sink)
        for request, late_sink in zip(late, late_sinks, strict=True):
            assert_answers(await late_sink.wait(), request)
            assert late_sink.decisions[0].replica == "two"
        assert await draining
        assert_answers(await sink.wait(), running)
        dispatcher.update_replicas([two.address])
    await two.stop()


async def test_work_that_crosses_the_announcement_of_a_drain_is_placed_again() -> None:
    one, two = Replica("one"), Replica("two")
    async with cluster(one) as dispatcher:
        await until(lambda: dispatcher.replicas()[0].state == "ready")
        one.server._ledger.is_draining = True  # and the router has not heard of it
        request, sink = make_request(range(20)), RecordingSink()
        dispatcher.submit(request, sink)
        await until(lambda: len(sink.decisions) == 1)
        await two.start()
        dispatcher.update_replicas([two.address])
        assert_answers(await sink.wait(), request)
        assert sink.decisions[-1].replica == "two"
        assert sink.decisions[-1].attempt == len(sink.decisions) > 1
    await two.stop()


async def test_a_replica_that_leaves_the_set_finishes_its_work_and_is_let_go() -> None:
    replica = Replica("one", fake_step_s=0.002)
    async with cluster(replica) as dispatcher:
        request, sink = make_request(range(20), 400), RecordingSink()
        dispatcher.submit(request, sink)
        await until(lambda: bool(sink.token_ids))
        dispatcher.update_replicas([])
        assert [view.state for view in dispatcher.replicas()] == ["draining"]
        assert_answers(await sink.wait(), request)
        await until(lambda: not dispatcher.replicas() and replica.server.num_routers == 0)


async def test_a_draining_router_refuses_and_waits() -> None:
    replica = Replica("one", fake_step_s=0.002)
    async with cluster(replica) as dispatcher:
        request, sink = make_request(range(10), 30), RecordingSink()
        dispatcher.submit(request, sink)
        await until(lambda: bool(sink.token_ids))
        draining = asyncio.create_task(dispatcher.drain(30.0))
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError) as refusal:
            dispatcher.submit(make_request(range(10)), RecordingSink())
        assert refusal.value.reason == Reason.DRAINING
        assert await draining
        assert_answers(sink, request)
        assert await dispatcher.drain(0.0)


async def test_stop_ends_what_a_drain_left() -> None:
    replica = Replica("one", fake_step_s=0.01)
    async with cluster(replica) as dispatcher:
        sinks = [RecordingSink() for _ in range(3)]
        for sink in sinks:
            dispatcher.submit(make_request(range(10), 900), sink)
        assert not await dispatcher.drain(0.05)
        await dispatcher.stop()
        for sink in sinks:
            assert isinstance(sink.error, UnavailableError)
            assert sink.error.reason == Reason.DRAINING
        await until(lambda: replica.server.num_works == 0)


async def test_an_attempt_that_is_over_is_not_heard() -> None:
    """Fencing: what a replica says of a work that the router took away from it changes nothing."""
    replica = Replica("one")
    async with cluster(replica) as dispatcher:
        replica.hold()
        request, sink = make_request(range(10), 3), RecordingSink()
        dispatcher.submit(request, sink)
        await until(lambda: bool(dispatcher._flights.aboard))
        link = dispatcher._fleet._present["one"]
        [flight] = dispatcher._flights.aboard
        late = pb.WorkDelta(work_id=flight.work_id, token_ids=[1, 2, 3], finish=pb.Finish(reason="length"))
        tokens = pb.WorkTokens(work_ids=[flight.work_id], num_tokens=[2], token_ids=[8, 9])
        dispatcher._lose(flight, "taken away", Reason.REPLICA_LOST)
        dispatcher.link_delivered(link, pb.StepBatch(deltas=[late], tokens=tokens))
        assert sink.token_ids == []
        replica.go_on()
        assert_answers(await sink.wait(), request)
        assert [decision.attempt for decision in sink.decisions] == [1, 2]
