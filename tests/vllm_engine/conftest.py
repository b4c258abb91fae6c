"""A cluster whose replicas run vLLM, in an environment of its own (load_tests/engines/vllm_env.sh makes it)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from load_tests.vllm_place import vllm_environment
from tests.cluster import ClusterProcess
from tests.collector import Collector
from workers.types import ModelFiles

START_TIMEOUT_S = 900.0
"""vLLM takes half a minute for itself; on a machine with other things to do, several."""
BLOCK_SIZE = 32
"""On a CPU vLLM takes multiples of this one only."""
MAX_MODEL_LEN = 2_048
TENANT_HEADER = "octavo-tenant"


@pytest.fixture(scope="session")
def vllm_python() -> Path:
    """The interpreter of the environment that has vLLM."""
    python = vllm_environment() / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no vLLM: there is no {python}; bash load_tests/engines/vllm_env.sh makes it")
    return python


@pytest.fixture(scope="session")
def vllm_cluster(vllm_python: Path, default_model: ModelFiles, collector: Collector) -> Iterator[ClusterProcess]:
    """A router and two replicas of the default model in fp32 by vLLM, with a thread and 364 blocks each."""
    assert default_model.weights.exists()
    cluster = ClusterProcess.serve(
        *("--model", "default", "--engine", "vllm", "--replicas", "2"),
        OCTAVO_ENGINE__PYTHON=str(vllm_python),
        OCTAVO_ENGINE__DTYPE="fp32",
        OCTAVO_ENGINE__THREADS="1",
        OCTAVO_ENGINE__MAX_MODEL_LEN=str(MAX_MODEL_LEN),
        OCTAVO_ENGINE__MAX_NUM_SEQUENCES="16",
        OCTAVO_ENGINE__VLLM__BLOCK_SIZE=str(BLOCK_SIZE),
        OCTAVO_ENGINE__VLLM__ENFORCE_EAGER="true",
        OCTAVO_ENGINE__VLLM__KV_CACHE_MEMORY_BYTES=str(512 << 20),
        OCTAVO_ROUTER__TENANT_HEADER=TENANT_HEADER,
        OCTAVO_ROUTER__DRAIN_GRACE_S="5",
        OCTAVO_REPLICAS__HEALTH_CHECK_PERIOD_S="1",
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint,
        OTEL_BSP_SCHEDULE_DELAY="200",
        VLLM_LOGGING_LEVEL="WARNING",
    )
    try:
        cluster.await_ready(START_TIMEOUT_S)
        yield cluster
        assert cluster.stop() == 0
    finally:
        cluster.clean_up()
