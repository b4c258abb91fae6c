"""One run from a scenario's table to a report: ask for the replicas, let the crew drive, compute the figures."""

from __future__ import annotations

import asyncio
import os
import platform
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from octavo.client import CallError, Client

from load_tests.generator.crew import Crew, CrewError, Progress
from load_tests.generator.figures import compute_figures
from load_tests.generator.report import Report, describe_arrivals, judge
from load_tests.generator.scenario import parse_scenario


async def run_scenario(
    table: Mapping[str, Any], folder: Path, *targets: str, show: Callable[[Progress], None] = lambda _: None
) -> Report:
    """Run the scenario of `table` (see `read_scenario`). SIGINT ends it early, with a report of what there was.

    `targets`: a router, or several in front of the same replicas, of which each process sends to another.

    Raises CrewError when the target does not answer.
    """
    scenario = parse_scenario(table, folder)
    load, date = os.getloadavg()[0], time.strftime("%Y-%m-%d %H:%M:%S")
    replicas = await _replicas(targets[0])
    crew = Crew(table, folder, scenario, *targets, show=show)
    interrupts: list[int] = []

    def interrupt() -> None:
        interrupts.append(1)
        crew.stop()

    loop = asyncio.get_running_loop()
    with suppress(ValueError, RuntimeError):  # not in the main thread
        loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        outcome = await crew.run()
    finally:
        with suppress(ValueError, RuntimeError):
            loop.remove_signal_handler(signal.SIGINT)
    figures = compute_figures(
        outcome.tally, arrivals_s=scenario.arrivals.duration_s, cpu_s=outcome.cpu_s, replicas=replicas
    )
    return Report(
        scenario=scenario.name,
        about=scenario.about,
        seed=scenario.seed,
        target=", ".join(targets),
        call=scenario.call.kind,
        arrivals=describe_arrivals(scenario),
        date=date,
        machine=f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        load_before=round(load, 2),
        is_whole=not interrupts,
        arrivals_s=scenario.arrivals.duration_s,
        figures=figures,
        verdicts=judge(scenario.thresholds, figures),
        table=table,
        tally=outcome.tally,
    )


async def _replicas(target: str) -> list[str]:
    """Return the replicas that the router knows, none if it does not tell. Raises CrewError if nobody is there."""
    async with Client(target) as client:
        try:
            status = await client.status()
        except CallError as error:
            raise CrewError(f"{target} does not answer: {error}") from error
        return [replica.id for replica in status.replicas]
