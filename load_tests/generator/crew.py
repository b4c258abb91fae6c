"""The processes of one run: started together, begun at one instant, merged at the end, and none of them left.

Bounded in time: what has not reported when the scenario's time is over is killed, by its pid.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from load_tests.generator.child import MAX_LINE_BYTES
from load_tests.generator.scenario import Scenario
from load_tests.generator.tally import Group, Tally

ROOT = Path(__file__).parents[2]
READY_S = 60.0
LEAD_S = 0.2
"""Between the word to begin and the beginning."""
REPORT_S = 20.0
"""For the last word of a process after its time is over."""


class CrewError(Exception):
    """A run that did not come about: the target does not answer, or a process of ours failed."""


@dataclass(slots=True)
class Progress:
    """What is known while it runs."""

    elapsed_s: float = 0.0
    num_open: int = 0
    num_tokens: int = 0
    all: Group = field(default_factory=Group)


@dataclass(frozen=True, slots=True)
class Outcome:
    tally: Tally
    cpu_s: tuple[float, ...]
    """Of each process, while it drove."""


class Crew:
    """`table` and `folder` are what `read_scenario` returned, `scenario` what they say. Of several targets each process
    has one, in turn."""

    def __init__(
        self,
        table: Mapping[str, Any],
        folder: Path,
        scenario: Scenario,
        *targets: str,
        show: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self._jobs = [
            {"table": table, "folder": str(folder), "target": target, "index": index, "count": scenario.processes}
            for index, target in zip(range(scenario.processes), itertools.cycle(targets), strict=False)
        ]
        self._limit_s = scenario.arrivals.duration_s + scenario.limits.drain_s + REPORT_S
        self._show = show
        self._progress: dict[int, dict[str, Any]] = {}
        self._start_at = 0.0
        self._is_stopped = False
        self._processes: list[asyncio.subprocess.Process] = []

    async def run(self) -> Outcome:
        """Raises CrewError. Cancelled, it stops the processes and raises CancelledError."""
        try:
            for job in self._jobs:
                self._processes.append(await _start(job))
            async with asyncio.timeout(READY_S):
                await asyncio.gather(*map(self._await_ready, self._processes))
            self._start_at = time.monotonic() + LEAD_S
            for process in self._processes:
                await _tell(process, {"start_at": self._start_at})
            async with asyncio.timeout(LEAD_S + self._limit_s):
                reports = await asyncio.gather(*(self._await_done(*each) for each in enumerate(self._processes)))
        except TimeoutError:
            raise CrewError("the processes of the generator did not report in time") from None
        except CrewError:
            if self._is_stopped and not self._start_at:
                raise CrewError("stopped before it began") from None
            raise
        finally:
            await asyncio.gather(*map(_end, self._processes))
        tallies = [Tally.from_json(report["tally"]) for report in reports]
        for tally in tallies[1:]:
            tallies[0].merge(tally)
        return Outcome(tallies[0], tuple(report["cpu_s"] for report in reports))

    def stop(self) -> None:
        """End early: `run` returns what has been counted by then."""
        self._is_stopped = True
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()

    async def _await_ready(self, process: asyncio.subprocess.Process) -> None:
        await _hear(process)

    async def _await_done(self, index: int, process: asyncio.subprocess.Process) -> dict[str, Any]:
        while (event := await _hear(process))["event"] != "done":
            self._progress[index] = event
            self._show(self._merged())
        return event

    def _merged(self) -> Progress:
        progress = Progress(elapsed_s=time.monotonic() - self._start_at)
        for event in self._progress.values():
            progress.num_open += event["open"]
            progress.num_tokens += event["tokens"]
            progress.all.merge(Group.from_json(event["all"]))
        return progress


async def _start(job: dict[str, Any]) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "load_tests.generator.child"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        limit=MAX_LINE_BYTES,
    )
    await _tell(process, job)
    return process


async def _tell(process: asyncio.subprocess.Process, message: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(message).encode() + b"\n")
    with suppress(ConnectionError):  # it ended; `_hear` says so
        await process.stdin.drain()


async def _hear(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise CrewError(f"a process of the generator ended with code {await process.wait()}; it says above why")
    event: dict[str, Any] = json.loads(line)
    if event["event"] == "failed":
        raise CrewError(event["message"])
    return event


async def _end(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(5):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
