"""What tests of several folders share: running clusters and the default model."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from cluster.models import fetch_model
from tests.cluster import ClusterProcess, running
from tests.collector import Collector
from workers.errors import ModelFileError
from workers.types import ModelFiles

if not Path("/dev/nvidiactl").exists():  # triton asks when it is imported, which the tests of any folder may do first
    os.environ["TRITON_INTERPRET"] = "1"


# Examples are not timed: how long one takes says more of this machine than of what is tested.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """An OTLP collector in this process."""
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="session")
def stall_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where to write by how many seconds a step of `fake_cluster` is to take longer."""
    return tmp_path_factory.mktemp("stall") / "seconds"


@pytest.fixture(scope="session")
def fake_cluster(collector: Collector, stall_file: Path) -> Iterator[ClusterProcess]:
    """A router and two replicas of the engine `fake`, 5 ms a step, whose every span goes to `collector`."""
    with running(
        *("--model", "fake", "--engine", "fake", "--replicas", "2"),
        OCTAVO_ENGINE__FAKE_STEP_S="0.005",
        OCTAVO_ENGINE__NUM_BLOCKS="1024",
        OCTAVO_ENGINE__STALL_FILE=str(stall_file),
        OCTAVO_ROUTER__DRAIN_GRACE_S="5",
        OCTAVO_ROUTER__SESSION_GRACE_S="1",
        OCTAVO_REPLICAS__HEALTH_CHECK_PERIOD_S="1",
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint,
        OTEL_BSP_SCHEDULE_DELAY="200",
        OTEL_METRIC_EXPORT_INTERVAL="1000",
    ) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def default_model() -> ModelFiles:
    """The files of the embedded default model, fetched into the user's cache if they are not there."""
    try:
        return fetch_model("default")
    except ModelFileError as error:
        pytest.skip(f"the default model cannot be fetched: {error}")


@pytest.fixture(scope="session")
def model_cluster(default_model: ModelFiles) -> Iterator[ClusterProcess]:
    """A router and one replica of the default model in fp32, for sequences of 1,024 tokens at most."""
    assert default_model.weights.exists()
    with running(
        *("--model", "default", "--replicas", "1"),
        OCTAVO_ENGINE__DTYPE="fp32",
        OCTAVO_ENGINE__NUM_BLOCKS="512",
        OCTAVO_ENGINE__MAX_MODEL_LEN="1024",
        OCTAVO_ROUTER__DRAIN_GRACE_S="5",
        OMP_NUM_THREADS="2",
    ) as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def our_loggers() -> Iterator[None]:
    """Gives logging back after tests that set it up as a process of ours does, the command line's among them."""
    loggers = [logging.getLogger(name) for name in ("cluster", "router", "workers", "octavo", "opentelemetry")]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
