"""One replica of vLLM in several processes, each with a part of every layer: here on a CPU, as on GPUs of one node."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from octavo.client import Client

from tests.cluster import ClusterProcess
from tests.oracle.answers import committed_answers
from tests.vllm_engine.conftest import BLOCK_SIZE, START_TIMEOUT_S
from workers.types import ModelFiles
from workers.vllm_engine.guard import descendants

pytestmark = [pytest.mark.cluster, pytest.mark.exact]

NUM_PARTS = 3
"""The default model has nine heads and three of keys and values."""


async def test_a_model_in_three_parts_says_what_transformers_says(vllm_python: Path, default_model: ModelFiles) -> None:
    cluster = ClusterProcess.serve(
        *("--model", "default", "--engine", "vllm", "--replicas", "1"),
        OCTAVO_ENGINE__PYTHON=str(vllm_python),
        OCTAVO_ENGINE__DTYPE="fp32",
        OCTAVO_ENGINE__THREADS="1",
        OCTAVO_ENGINE__MAX_MODEL_LEN="1024",
        OCTAVO_ENGINE__MAX_NUM_SEQUENCES="8",
        OCTAVO_ENGINE__VLLM__TENSOR_PARALLEL_SIZE=str(NUM_PARTS),
        OCTAVO_ENGINE__VLLM__BLOCK_SIZE=str(BLOCK_SIZE),
        OCTAVO_ENGINE__VLLM__ENFORCE_EAGER="true",
        OCTAVO_ENGINE__VLLM__KV_CACHE_MEMORY_BYTES=str(128 << 20),
        VLLM_LOGGING_LEVEL="WARNING",
    )
    entries = [entry for entry in committed_answers() if len(entry.prompt) < 200][:8]
    try:
        cluster.await_ready(START_TIMEOUT_S)
        (replica,) = cluster.ready["replicas"]
        commands = [(Path("/proc") / str(pid) / "cmdline").read_bytes() for pid in descendants(replica["pid"])]
        assert sum(b"VLLM::Worker" in command for command in commands) == NUM_PARTS
        async with Client(cluster.address) as client:
            answers = await asyncio.gather(
                *(
                    client.complete(
                        entry.prompt, max_tokens=24, temperature=0.0, ignore_eos=True, timeout=START_TIMEOUT_S
                    )
                    for entry in entries
                )
            )
        for entry, answer in zip(entries, answers, strict=True):
            assert answer.token_ids == tuple(entry.answer[:24]), entry.name
        assert cluster.stop() == 0
    finally:
        cluster.clean_up()
