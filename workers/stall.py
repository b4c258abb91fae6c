"""A fault for tests of the whole cluster: one step of an engine takes longer, when a file says so.

    echo 0.5 > FILE        the next step of whichever replica sees it first takes half a second more

The file is gone when that has begun. An engine whose configuration names no file has none of this.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Final

from workers.plan import Runner, StepPlan, Ticket, verifies_drafts

MAX_STALL_S: Final = 60.0

_log = logging.getLogger(__name__)


class StallingRunner:
    """`runner`, but for what `file` says."""

    def __init__(self, runner: Runner, file: Path) -> None:
        self._runner = runner
        self._file = file
        self.verifies_drafts = verifies_drafts(runner)

    def launch(self, plan: StepPlan) -> Ticket:
        if (stall_s := self._take()) > 0:
            _log.warning("step %d is held up for %g s, as %s says", plan.number, stall_s, self._file)
            time.sleep(stall_s)
        return self._runner.launch(plan)

    def close(self) -> None:
        self._runner.close()

    def _take(self) -> float:
        """Return for how long this step is held up; whoever removes the file is the one."""
        try:
            stall_s = float(self._file.read_text())
            self._file.unlink()
        except (OSError, ValueError):  # not there, another replica's by now, or half written
            return 0.0
        return min(stall_s, MAX_STALL_S)
