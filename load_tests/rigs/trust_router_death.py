"""A router killed while it answers: what its clients get then, through octavo.client and nothing else.

Two routers in front of two replicas, at 50 tokens a second and stream. Clients keep as many answers open as they may;
then one of the routers gets SIGKILL. In two repetitions of three each client knows the addresses of both; in the third
both listen on one port (SO_REUSEPORT), which is all that clients know. Answers of the fake engine follow from their
prompts, so each is compared with what it must be, tokens, text and the places of its pieces:

    right      all of it, once
    lost       it ended with an error, or too early
    repeated   a piece came that had come
    wrong      anything else

How many were cut is what the router said that it was running just before; with none, nothing was measured. The gap is
how long after the kill an answer went on, of those that waited longest as many as were cut. When all is over, the
router that is left and the replicas must have nothing left. A minute and a half.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from octavo.client import CallError, Client, Delta

from load_tests.bars import Bar, at_most
from load_tests.notes import Notes, figure
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.rig_load import idle_after
from load_tests.rigs.router_model import VOCAB_SIZE, rig_model
from load_tests.rigs.router_rig import RigConfig, RouterRig
from router.tokenizer import Tokenizer
from workers.fake import fake_continuation

CLIENTS, STREAMS = 8, 8
"""Clients, and answers that each has open."""
STEP_S = 0.02
OUTPUT = range(20, 120)
PROMPT_TOKENS = 32
DURATION_S, KILL_S = 4.0, (1.0, 3.0)
"""For how long answers are begun, and from when to when the router is killed."""
ANSWER_S = 10.0
"""For one answer, whatever happens to it."""
BAD = ("lost", "repeated", "wrong")
KINDS = {"two addresses": 2, "one port": 1}
"""Of each repetition."""


@dataclass(slots=True)
class Stream:
    """One answer as it came."""

    expected: list[int]
    text_expected: str
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    has_repeated: bool = False
    """A piece came that was there."""
    is_ended: bool = False
    error: str = ""
    times: list[float] = field(default_factory=list)
    """When its pieces came."""

    def take(self, delta: Delta, now: float) -> None:
        self.has_repeated = self.has_repeated or delta.token_offset < len(self.token_ids)
        self.token_ids += delta.token_ids
        self.text += delta.text
        self.times.append(now)

    @property
    def verdict(self) -> str:
        """Return "right", "lost", "repeated" or "wrong"."""
        num_tokens = len(self.token_ids)
        if self.has_repeated or num_tokens > len(self.expected):
            return "repeated"
        if self.token_ids != self.expected[:num_tokens]:
            return "wrong"
        if self.error or not self.is_ended or num_tokens < len(self.expected):
            return "lost"
        return "right" if self.text == self.text_expected else "wrong"

    def gap_s(self, since: float) -> float | None:
        """Return how long after `since` it went on; None if it had not begun, was over, or never went on."""
        if not self.times or self.times[0] > since:
            return None
        return next((at - since for at in self.times if at > since), None)


async def measure(settings: Settings, notes: Notes) -> None:
    tokenizer, number = rig_model().tokenizer, 0
    for _ in settings.rounds():
        for kind, times in KINDS.items():
            for _ in range(1 if settings.is_quick else times):
                await _run(kind, number, settings, tokenizer, notes)
                number += 1


async def _run(kind: str, number: int, settings: Settings, tokenizer: Tokenizer, notes: Notes) -> None:
    """Let clients ask, kill a router, and note what came of all answers."""
    rng = random.Random(f"router death {number}")
    streams: list[Stream] = []
    shares_port = kind == "one port"
    config = RigConfig(replicas=2, routers=2, shares_port=shares_port, step_s=STEP_S, num_sequences=CLIENTS * STREAMS)
    with RouterRig(config) as rig:
        victim, survivor = rng.sample(list(rig.routers), 2)
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(Client(rig.addresses)) for _ in range(CLIENTS)]
            watch = await stack.enter_async_context(Client(rig.routers[victim]))
            ends_at = time.monotonic() + settings.seconds(DURATION_S, 1.5)
            async with asyncio.TaskGroup() as asking:
                for client in clients * STREAMS:
                    asking.create_task(_ask(client, tokenizer, random.Random(rng.random()), ends_at, streams))
                await asyncio.sleep(settings.seconds(rng.uniform(*KILL_S)))
                cut = (await watch.status()).router.num_running_requests
                killed_at = time.monotonic()
                await asyncio.to_thread(rig.kill, victim)
        idle_s = await idle_after(rig.routers[survivor])
    notes.add(kind, **outcome(streams, cut, killed_at), idle_s=idle_s)


async def _ask(client: Client, tokenizer: Tokenizer, rng: random.Random, ends_at: float, streams: list[Stream]) -> None:
    """Ask for one answer after the other."""
    while time.monotonic() < ends_at:
        prompt, output = rng.choices(range(300, 1_000), k=PROMPT_TOKENS), rng.choice(OUTPUT)
        expected = fake_continuation(prompt, output, VOCAB_SIZE)
        stream = Stream(expected, await tokenizer.decode(expected))
        streams.append(stream)
        try:
            async for delta in client.generate(prompt, max_tokens=output, ignore_eos=True, timeout=ANSWER_S):
                stream.take(delta, time.monotonic())
        except CallError as error:
            stream.error = f"{error.code.name}/{error.reason}"
        stream.is_ended = True


def outcome(streams: Sequence[Stream], cut: int, killed_at: float) -> dict[str, Any]:
    """Return what a run notes. `cut`: how many answers the router was giving when it was killed."""
    verdicts = Counter(stream.verdict for stream in streams)
    gaps = sorted((gap for stream in streams if (gap := stream.gap_s(killed_at)) is not None), reverse=True)[:cut]
    return {
        "sent": len(streams),
        "ended": sum(stream.is_ended for stream in streams),
        "ok": verdicts["right"],
        **{verdict: verdicts[verdict] for verdict in BAD},
        "errors": dict(Counter(stream.error for stream in streams if stream.error)),
        "cut": cut,
        "gap_p50_s": gaps[len(gaps) // 2] if gaps else None,
        "gap_max_s": gaps[0] if gaps else None,
    }


def judge(notes: Notes) -> list[Bar]:
    bars = []
    for kind in KINDS:
        counts = {verdict: notes.total(kind, verdict) for verdict in BAD}
        cut = notes.total(kind, "cut")
        bad = sum(count or 0 for count in counts.values()) if cut else None
        said = ", ".join(f"{figure(count)} {verdict}" for verdict, count in counts.items())
        detail = (
            f"{said}; {figure(notes.total(kind, 'sent'))} answers, {figure(cut)} cut by "
            f"{len(notes.of(kind, 'cut'))} kills; gap {figure(notes.median(kind, 'gap_p50_s'), 's')}, "
            f"at most {figure(notes.worst(kind, 'gap_max_s'), 's')}"
        )
        bars.append(at_most(f"router killed, {kind}: answers lost, repeated or wrong", bad, 0, detail))
    return bars


if __name__ == "__main__":
    sys.exit(main("trust_router_death", measure, judge))
