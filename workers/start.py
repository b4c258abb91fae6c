"""How far a replica's start has come, told while it lasts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol

STARTING: Final = "starting"
FETCHING: Final = "fetching"
LOADING: Final = "loading"
PACKING: Final = "packing"
WARMING: Final = "warming"
READY: Final = "ready"
FAILED: Final = "failed"
AGAIN_S: Final = 5.0
"""Who says nothing for much longer is taken for dead."""
MAX_STORED_S: Final = 5.0
"""Ray keeps processes in store. How long this one had been there is not known, so no more than this is counted of the
time before it became a replica."""


class Progress(Protocol):
    """Picklable; called in the replica's process, off its event loop, one call at a time and in order."""

    def __call__(self, replica_id: str, stage: str, *, age_s: float, detail: str) -> None:
        """A replica whose start began `age_s` ago has come to `stage`, one of the above; `detail` says why it has
        FAILED. May block, must not raise."""


def untold(replica_id: str, stage: str, *, age_s: float, detail: str) -> None:
    """A `Progress` that nobody hears."""


class Start:
    """One replica's start. `told` is the scope of it: what it raises is told, and so is its end."""

    def __init__(self, replica_id: str, progress: Progress) -> None:
        self._replica_id = replica_id
        self._progress = progress
        self._began_at = time.monotonic() - min(_process_age_s(), MAX_STORED_S)
        self._stage = STARTING
        self._teller = ThreadPoolExecutor(1, thread_name_prefix="start")

    def reach(self, stage: str, detail: str = "") -> None:
        """A stage begins. From any thread, within `told`."""
        self._stage = stage
        age_s = time.monotonic() - self._began_at
        self._teller.submit(self._progress, self._replica_id, stage, age_s=age_s, detail=detail)

    @contextlib.asynccontextmanager
    async def told(self) -> AsyncIterator[None]:
        self.reach(STARTING)
        again = asyncio.create_task(self._repeat())
        try:
            yield
        except BaseException as error:
            self.reach(FAILED, str(error) or type(error).__name__)
            raise
        else:
            self.reach(READY)
        finally:
            again.cancel()
            self._teller.shutdown(wait=False)

    async def _repeat(self) -> None:
        while True:
            await asyncio.sleep(AGAIN_S)
            self.reach(self._stage)


def _process_age_s() -> float:
    """Return how old this process is; 0 where the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
