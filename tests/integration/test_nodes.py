"""Many nodes: a replica that does not fit has Ray bring a node, and one that nobody needs has it taken away again."""

from __future__ import annotations

import asyncio

import pytest
from octavo.client import Client

from load_tests.rigs.elastic_load import Crowd, constant, outcome
from load_tests.rigs.elastic_watch import Watch
from load_tests.rigs.fake_nodes import ENVIRONMENT, HEAD, FakeNodes
from tests.cluster import ClusterProcess

pytestmark = pytest.mark.cluster
SEQUENCES = 4
CONFIG = f"""
model = "fake"
[engine]
engine = "fake"
fake_step_s = 0.02
max_num_sequences = {SEQUENCES}
[resources]
num_cpus = 1.0
[scaling]
min_replicas = 1
max_replicas = 2
downscale_delay_s = 1.0
"""
UP_S, DOWN_S = 60.0, 60.0


async def test_load_alone_brings_a_node_and_its_end_takes_it_away() -> None:
    with FakeNodes(max_nodes=2, idle_s=1.0) as nodes:
        (nodes.directory / "cluster.toml").write_text(CONFIG)
        options = ("--ray-address", nodes.address, "--config", str(nodes.directory / "cluster.toml"))
        cluster = ClusterProcess.serve(*options, **ENVIRONMENT)
        try:
            cluster.await_ready()
            assert nodes.nodes().keys() == {HEAD}
            async with Client(cluster.address) as client, Watch(client, nodes) as watch:
                async with Crowd(client, tokens=50) as crowd:
                    load = asyncio.create_task(crowd.follow(constant(3 * SEQUENCES), UP_S))
                    assert await watch.until(lambda sample: len(sample.ready) == 2, UP_S)
                    load.cancel()
                    assert {replica.node_id for replica in (await client.status()).replicas} == set(nodes.nodes())
                assert await watch.until(lambda sample: sample.num_nodes == 1 and len(sample.states) == 1, DOWN_S)
            assert outcome(crowd.streams)["wrong"] == 0
            assert await asyncio.to_thread(cluster.stop) == 0
        finally:
            cluster.clean_up()
    assert nodes.processes() == []
