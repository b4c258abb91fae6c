"""What clients see when a router is cut off a replica by the network, which tells neither of them."""

from __future__ import annotations

import asyncio
import random

import pytest

from load_tests.chaos.capacity import Capacity
from load_tests.chaos.clients import PATIENT_S, Clients
from load_tests.chaos.partition import cut
from load_tests.chaos.verdict import RIGHT, Struck, verdict
from load_tests.rigs.resume_asks import fake_asks
from tests.cluster import ClusterProcess

pytestmark = pytest.mark.cluster

STREAMS = 2
CUT_S = 5.0
"""More than a router lets a replica be silent."""


async def test_answers_of_a_replica_that_the_router_does_not_reach_go_on_elsewhere(
    fake_cluster: ClusterProcess,
) -> None:
    rng = random.Random(1)
    clients = Clients(fake_cluster.address, (), rng)
    pool = await clients.learn([*fake_asks(4, 100, rng), *fake_asks(4, 300, rng)], at_once=8)
    assert all(each.ask.reference == each.answer.token_ids for each in pool)
    async with Capacity(fake_cluster.address, routers=1, replicas=2) as capacity:
        assert await capacity.restored()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(clients.run(pool, clients=4, streams=STREAMS))
            replica = None
            while replica is None or replica.num_running < STREAMS:
                await asyncio.sleep(0.1)
                (status,) = capacity.view.routers.values()
                replica = max(status.replicas, key=lambda each: each.num_running)
            struck_s = clients.now_s
            try:
                with cut(status.router.pid, replica.pid, int(replica.address.rpartition(":")[2])):
                    await asyncio.sleep(CUT_S)
                    (cut_off,) = (each for each in _states(capacity) if each[0] == replica.id)
            except PermissionError:
                pytest.skip("this system lets nobody borrow a socket of its own child")
            finally:
                clients.stop()
        assert await capacity.restored()
    fault = Struck(kind="cut", struck_s=struck_s, recovery_s=clients.now_s - struck_s)
    assert cut_off[1] == "connecting", "the router noticed"
    patient = [reply for reply in clients.replies if reply.timeout_s is None or reply.timeout_s >= PATIENT_S[0]]
    assert {verdict(reply, [fault]) for reply in patient} == {RIGHT}
    longest = max(to - since for reply in clients.replies for since, to in reply.pauses)
    assert longest > 2.0, "some answers were of the replica that was cut off"


def _states(capacity: Capacity) -> list[tuple[str, str]]:
    return [(each.id, each.state) for status in capacity.view.routers.values() for each in status.replicas]
