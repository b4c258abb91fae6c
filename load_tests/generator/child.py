"""One process of a load generator: lines of JSON in, lines of JSON out, one event loop.

    in    {"table", "folder", "target", "index", "count"}     what to do
    out   {"event": "ready"}                                  connected; or "failed", with a message
    in    {"start_at"}                                        CLOCK_MONOTONIC, the same in all processes of a machine
    out   {"event": "progress", ...}                          twice a second
    in    end of file                                         stop now; also when the parent died
    out   {"event": "done", "tally", "cpu_s"}

Nobody starts it but `Crew`.
"""

from __future__ import annotations

import asyncio
import json
import selectors
import signal
import sys
import time
from pathlib import Path
from typing import Any

from octavo.client import CallError

from load_tests.generator.caller import make_caller
from load_tests.generator.driver import Driver, Part
from load_tests.generator.scenario import parse_scenario

PROGRESS_S = 0.5
MAX_LINE_BYTES = 64 * 1024 * 1024


def main() -> None:
    """Do one job."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which closes our standard input
    # epoll waits in whole milliseconds and would send half a millisecond late on average; select does not.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(_run())


async def _run() -> None:
    lines = asyncio.StreamReader(limit=MAX_LINE_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    job = json.loads(await lines.readline())
    scenario = parse_scenario(job["table"], Path(job["folder"]))
    caller = make_caller(job["target"], scenario.call)
    driver = Driver(scenario, Part(job["index"], job["count"]), caller)
    await caller.open()
    try:
        await driver.warm_up()
        _say(event="ready")
        order = await lines.readline()
        if order:
            await _drive(driver, json.loads(order)["start_at"], lines)
    except CallError as error:
        _say(event="failed", message=f"{job['target']} does not answer: {error}")
    finally:
        await caller.close()


async def _drive(driver: Driver, start_at: float, lines: asyncio.StreamReader) -> None:
    cpu_s = time.process_time()
    watching = asyncio.create_task(_stop_at_end(driver, lines))
    telling = asyncio.create_task(_tell(driver))
    try:
        await driver.run(start_at)
    finally:
        watching.cancel()
        telling.cancel()
        await asyncio.gather(watching, telling, return_exceptions=True)
    _say(event="done", tally=driver.tally.to_json(), cpu_s=time.process_time() - cpu_s)


async def _stop_at_end(driver: Driver, lines: asyncio.StreamReader) -> None:
    while await lines.readline():
        pass
    driver.stop()


async def _tell(driver: Driver) -> None:
    while True:
        await asyncio.sleep(PROGRESS_S)
        tally = driver.tally
        _say(event="progress", open=driver.num_open, tokens=sum(tally.arrived.values()), all=tally.all.to_json())


def _say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    main()
