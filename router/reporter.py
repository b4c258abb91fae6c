"""Tells the cluster's scaling how it stands with this router, every `REPORT_PERIOD_S`, and keeps what it answers.

A signal that is silent costs nothing but the outlook: the router goes on, asks again, and says so once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from router.self_report import SelfReport
from router.signal import REPORT_PERIOD_S, SignalLine

_log = logging.getLogger(__name__)


class Reporter:
    """`about` says how it stands, and is told what was heard; `after` is awaited after each try."""

    def __init__(
        self,
        line: SignalLine,
        about: SelfReport,
        *,
        after: Callable[[], Awaitable[None]],
        period_s: float = REPORT_PERIOD_S,
    ) -> None:
        self._line = line
        self._about = about
        self._after = after
        self._period_s = period_s
        self._is_silent = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Report on the running loop until `stop`."""
        self._task = asyncio.create_task(self._run(), name="signal")

    async def stop(self) -> None:
        """Report no more. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            await self._tell()
            self._about.sample()
            await self._after()
            due = max(due + self._period_s, loop.time())  # what took longer is not made up for
            await asyncio.sleep(due - loop.time())

    async def _tell(self) -> None:
        try:
            self._about.outlook.heard(await self._line.report(self._about.report()))
        except (ConnectionError, TimeoutError) as error:
            if not self._is_silent:
                _log.warning("the number of replicas stays as it is: %s", error)
            self._is_silent = True
        except Exception:
            # Ours; but requests are served without a signal, too.
            _log.exception("reporting has failed")
        else:
            self._is_silent = False
