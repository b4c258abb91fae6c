"""What a cluster of the real model says of itself, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from octavo.client import Client, InvalidArgumentError

from tests.cluster import ClusterProcess
from workers.native import library

pytestmark = pytest.mark.cluster


async def test_the_length_of_the_engine_is_that_of_the_router(model_cluster: ClusterProcess) -> None:
    """The model's own 8,192 tokens are not what this cluster serves."""
    async with Client(model_cluster.address) as client:
        (model,) = await client.list_models()
        assert (model.name, model.max_model_len) == (model_cluster.ready["models"][0], 1_024)
        with pytest.raises(InvalidArgumentError) as refused:
            await client.complete([5] * 1_000, max_tokens=25)
        longest = await client.complete([5] * 1_000, max_tokens=24, temperature=0.0, ignore_eos=True, timeout=150)
    assert refused.value.reason == "PROMPT_TOO_LONG"
    assert "prompt (1000 tokens) + max_tokens must be <= 1024, the model's context, is 25" in refused.value.message
    assert len(longest.token_ids) == 24


def test_how_kv_memory_was_sized_is_said_on_stderr(model_cluster: ClusterProcess) -> None:
    (replica,) = model_cluster.ready["replicas"]
    said = f"octavo: replica {replica['id']}: KV cache: 512 blocks of 16 tokens x 737,280 bytes = 0.38 GB "
    assert said + "(engine.num_blocks); one sequence of 1,024 tokens needs 64" in model_cluster.errors()


@pytest.mark.skipif(library.library() is None or not Path("/proc").exists(), reason="no C library, or no /proc")
async def test_a_replica_has_no_torch(model_cluster: ClusterProcess) -> None:
    """Neither of ours nor of what Ray and Serve import, also after answers that were drawn."""
    async with Client(model_cluster.address) as client:
        await client.complete([5] * 10, max_tokens=2, temperature=0.7, seed=1, ignore_eos=True, timeout=150)
    (pid,) = model_cluster.pids
    mapped = (Path("/proc") / str(pid) / "maps").read_text()
    assert "_kernels" in mapped
    assert "libtorch" not in mapped
