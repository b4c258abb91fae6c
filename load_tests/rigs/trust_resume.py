"""Answers whose replica is killed, frozen or drained in their middle: what their clients read, and how long they wait.

Real model: `octavo serve`, two replicas of one thread in fp32, 200 requests, 64 at once: the oracle's prompts, greedy
and seeded, with penalties and stop strings, half over Session and half over Generate. Asked undisturbed, again in
another order (where stop strings come in, which are taken from the first answers), and once for each fault. Judged:
every answer's text, token ids and finish are those of the undisturbed run; enough answers of every kind were cut in
their middle for that to say something; greedy ones are the reference's. Requests whose answers rounding could change
are not asked (`resume_margin.py`). A drain is given 0.1 s, so that what runs has to go over.

Fake engine at 50 tokens/s: 64 streams, a kill -9 and a freeze, several rounds. The gap of a stream is the longest time
between two arrivals of its tokens; judged is the 99th percentile over the streams that another replica went on with. A
frozen replica goes on while others answer in its place: that nothing of it reaches a client is what the same judging of
every answer says, and that every piece of the Generate calls begins where the answer was.

About 8 minutes on two cores; --quick: less than three, most of it for starting and ending two clusters.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
from octavo.client import Client, Finish, FinishReason

from load_tests.bars import Bar, at_least, at_most
from load_tests.notes import Notes
from load_tests.rigs import resume_faults as faults
from load_tests.rigs.attached_process import AttachedProcess, attached
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.resume_asks import KINDS, Ask, fake_asks, oracle_asks, until_stop, with_stops
from load_tests.rigs.resume_crowd import Crowd
from load_tests.rigs.resume_stream import Answer, Stream, compared
from load_tests.rigs.router_rig import ROOT
from load_tests.server import ServerProcess

ORACLE = ROOT / "tests" / "oracle" / "answers.json"
REQUESTS, AT_ONCE, LENGTHS = 200, 64, (24, 48)
QUICK_REQUESTS, QUICK_AT_ONCE, QUICK_LENGTHS = 24, 12, (12, 16)
STREAMS, STEP_S, FAKE_TOKENS = 64, 0.02, 450
MAX_DEAD_S, MAX_SILENT_S = 2.0, 5.0
MIN_CUT = 8
"""Answers that a fault must cut for its run to say something: a quarter of what a replica answers at once."""
START_S = 900.0
"""The model may have to be fetched and packed first."""
DUE_S = 120.0
ANSWERS, AGAIN = "undisturbed", "undisturbed, in another order"
FAULTS: Mapping[str, faults.Fault] = {"drain": faults.drain, "SIGSTOP": faults.freeze, "kill -9": faults.kill}
GAPS: Mapping[str, faults.Fault] = {"gap, SIGSTOP": faults.freeze, "gap, kill -9": faults.kill}
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled"}
REAL = ENVIRONMENT | {
    "OCTAVO_ENGINE__DTYPE": "fp32",
    "OCTAVO_ENGINE__THREADS": "1",
    "OCTAVO_ENGINE__NUM_BLOCKS": "2048",
    "OCTAVO_ROUTER__DRAIN_GRACE_S": "0.1",
}
FAKE = ENVIRONMENT | {"OCTAVO_ENGINE__FAKE_STEP_S": str(STEP_S), "OCTAVO_ENGINE__MAX_NUM_SEQUENCES": str(STREAMS)}


@dataclass(frozen=True, slots=True)
class Cluster:
    """`octavo serve`, and how its clients reach it."""

    client: Client
    channel: grpc.aio.Channel
    ray_address: str


async def measure(settings: Settings, notes: Notes) -> None:
    async with serving((), REAL) as cluster:
        with attached("load_tests.rigs.replica_scaler", cluster.ray_address, ENVIRONMENT) as scaler:
            await _texts(cluster, scaler, settings, notes)
    async with serving(("--model", "fake", "--engine", "fake"), FAKE) as cluster:
        for number in settings.rounds():
            for what, fault in GAPS.items():
                await _gaps(cluster, what, fault, settings, notes, random.Random(number))


@asynccontextmanager
async def serving(options: Sequence[str], variables: Mapping[str, str]) -> AsyncIterator[Cluster]:
    """A cluster of two replicas for the scope."""
    command = (sys.executable, "-m", "cluster.cli", "serve", "--port", "0", "--replicas", str(faults.REPLICAS))
    with tempfile.TemporaryDirectory(prefix="octavo-bench-") as folder:
        process = ServerProcess((*command, *options), variables, Path(folder) / "log")
        try:
            ready = json.loads(await asyncio.to_thread(process.await_line, "{", START_S))
            async with Client(ready["address"]) as client, grpc.aio.insecure_channel(ready["address"]) as channel:
                yield Cluster(client, channel, ready["ray_address"])
        finally:
            await asyncio.to_thread(process.stop)


async def _texts(cluster: Cluster, scaler: AttachedProcess, settings: Settings, notes: Notes) -> None:
    number, at_once, lengths = (
        (QUICK_REQUESTS, QUICK_AT_ONCE, QUICK_LENGTHS) if settings.is_quick else (REQUESTS, AT_ONCE, LENGTHS)
    )
    asks = oracle_asks(json.loads(ORACLE.read_text()), number, lengths)

    def is_due(crowd: Crowd) -> bool:
        return crowd.num_ended >= number // 5 and 4 * len(crowd.speaking()) >= 3 * at_once

    async def run(what: str, asks: Sequence[Ask], fault: faults.Fault) -> tuple[list[Stream], dict[str, Any]]:
        rng = random.Random(what)
        return await _run(cluster, asks, rng, fault, at_once=at_once, is_due=is_due, scaler=scaler)

    first, figures = await run(ANSWERS, asks, faults.none)
    expected = [stream.answer for stream in first]
    notes.add(ANSWERS, **compared(first, expected), not_reference=_not_reference(first), **figures)

    asks = with_stops(asks, [answer.text for answer in expected])
    again, figures = await run(AGAIN, asks, faults.none)
    expected = [stopped(ask, answer, stream.answer) for ask, answer, stream in zip(asks, expected, again, strict=True)]
    notes.add(AGAIN, **compared(again, expected), **figures)

    for what, fault in FAULTS.items():
        streams, figures = await run(what, asks, fault)
        notes.add(what, **compared(streams, expected), **figures)


def stopped(ask: Ask, whole: Answer, answer: Answer) -> Answer:
    """Return what should answer `ask`: `whole`, its answer without a stop string, as far as that. With which token the
    string ends only `answer` tells."""
    if not ask.stop:
        return whole
    token_ids = whole.token_ids[: len(answer.token_ids)]
    return Answer(token_ids, until_stop(whole.text, ask.stop), Finish(FinishReason.STOP, stop=ask.stop))


async def _gaps(
    cluster: Cluster, what: str, fault: faults.Fault, settings: Settings, notes: Notes, rng: random.Random
) -> None:
    number = STREAMS // 4 if settings.is_quick else STREAMS
    asks = fake_asks(number, FAKE_TOKENS, rng)

    def is_due(crowd: Crowd) -> bool:
        speaking = crowd.speaking()
        return len(speaking) == number and all(len(stream.token_ids) > 0.5 / STEP_S for stream in speaking)

    streams, figures = await _run(cluster, asks, rng, fault, at_once=number, is_due=is_due)
    expected = [
        Answer(ask.reference or (), stream.text, stream.finish) for ask, stream in zip(asks, streams, strict=True)
    ]
    notes.add(what, **compared(streams, expected), **figures)


async def _run(
    cluster: Cluster,
    asks: Sequence[Ask],
    rng: random.Random,
    fault: faults.Fault,
    *,
    at_once: int,
    is_due: Callable[[Crowd], bool],
    scaler: AttachedProcess | None = None,
) -> tuple[list[Stream], dict[str, Any]]:
    """Ask all in random order, with a fault when it is due; wait until all have ended and two replicas are ready.

    Return the streams in the order of `asks`, and figures of the fault.
    """
    order = rng.sample(range(len(asks)), len(asks))
    crowd = Crowd(cluster.client, cluster.channel, [asks[i] for i in order], at_once=at_once)
    await faults.await_ready(cluster.client)
    began = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(crowd.run())
        if fault is not faults.none:
            await crowd.until(lambda: is_due(crowd), DUE_S)
        figures = await fault(faults.Scene(cluster.client, crowd, scaler))
    figures["wall_s"] = round(time.monotonic() - began, 1)
    await faults.await_ready(cluster.client)
    figures["until_ready_s"] = round(time.monotonic() - began - figures["wall_s"], 1)
    streams = dict(zip(order, crowd.streams, strict=True))
    return [streams[i] for i in range(len(asks))], figures


def _not_reference(streams: Sequence[Stream]) -> int:
    return sum(
        stream.ask.reference is not None and stream.ask.reference != tuple(stream.token_ids) for stream in streams
    )


def percentile(values: Sequence[float], share: float) -> float | None:
    """Return the smallest value that `share` of them do not exceed; None of none."""
    return sorted(values)[math.ceil(share * len(values)) - 1] if values else None


def judge(notes: Notes) -> list[Bar]:
    return [*_judge_answers(notes), *_judge_cuts(notes), *_judge_gaps(notes), _judge_thaw(notes)]


def _judge_answers(notes: Notes) -> list[Bar]:
    sent = {what: notes.total(what, "sent") or 0 for what in (ANSWERS, AGAIN, *FAULTS)}
    reference = notes.total(ANSWERS, "not_reference")
    bars = [
        at_least("resume: requests of the real model in each run", min(sent.values()), REQUESTS),
        at_most("resume: greedy answers that are not the reference's", reference, 0),
    ]
    for what in (AGAIN, *FAULTS):
        bars.append(at_most(f"resume, {what}: other answers", notes.total(what, "wrong"), 0, _told(notes, what)))
    return bars


def _judge_cuts(notes: Notes) -> list[Bar]:
    bars = []
    kinds = Counter[str]()
    for what in FAULTS:
        cut, in_stop = notes.total(what, "cut"), notes.total(what, "cut_in_stop") or 0
        detail = f"{in_stop:g} of them in the middle of their stop string"
        bars.append(at_least(f"resume, {what}: answers cut in their middle", cut, MIN_CUT, detail))
        kinds["in a stop string"] += int(in_stop)
        for each in notes.of(what, "cut_kinds"):
            kinds.update(each)
    different = sum(count > 0 for count in kinds.values())
    detail = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return [*bars, at_least("resume: kinds of answers that were cut", different, len(KINDS) + 1, detail)]


def _judge_gaps(notes: Notes) -> list[Bar]:
    bars = []
    for what, name, limit in (("gap, kill -9", "dead", MAX_DEAD_S), ("gap, SIGSTOP", "silent", MAX_SILENT_S)):
        gaps = [gap for run in notes.of(what, "gaps_s") for gap in run]
        detail = f"{len(gaps)} streams in {len(notes.of(what, 'gaps_s'))} rounds"
        if gaps:
            detail += f", p50 {percentile(gaps, 0.5):.3g} s, longest {max(gaps):.3g} s"
        bars.append(at_most(f"resume: p99 gap of a {name} replica's streams, s", percentile(gaps, 0.99), limit, detail))
        bars.append(at_most(f"resume, {what}: other answers", notes.total(what, "wrong"), 0, _told(notes, what)))
    return bars


def _judge_thaw(notes: Notes) -> Bar:
    """Without a stream that ran when the replica thawed, late tokens had nobody to reach."""
    frozen = ("SIGSTOP", "gap, SIGSTOP")
    running = {what: notes.total(what, "running_at_thaw") or 0 for what in frozen}
    wrong = sum(notes.total(what, "wrong") or 0 for what in frozen) if all(running.values()) else None
    detail = f"{sum(running.values()):g} of its streams ran elsewhere when it thawed"
    return at_most("resume: answers that a thawed replica's late tokens changed", wrong, 0, detail)


def _told(notes: Notes, what: str) -> str:
    wrongs, examples = Counter[str](), [each for run in notes.of(what, "examples") for each in run]
    for each in notes.of(what, "wrongs"):
        wrongs.update(each)
    sent = notes.total(what, "sent") or 0
    return "; ".join([f"{sent:g} requests", *(f"{count} {kind}" for kind, count in wrongs.items()), *examples])


if __name__ == "__main__":
    sys.exit(main("trust_resume", measure, judge))
