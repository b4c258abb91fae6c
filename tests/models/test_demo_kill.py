"""The demo's second act against a router of the test's own: what it kills, what it refuses to kill, what it reports."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from octavo.client import Completion, Delta, Usage
from octavo.client.answer import Choice
from octavo.v1 import status_service_pb2 as pb

from cluster.demo_crash import SUBJECTS, NobodyKilledError, Outcome, SecondAct, Stage, Victim
from cluster.demo_stream import Stream

FIRST, SECOND = "Worker-aaaa1111", "Worker-bbbb2222"
NUM_TOKENS = 128


class Router:
    """Looks like a Client: two replicas, of which the first is `process` and has two answers of three. When that
    is dead its answers go on at the second one, 0.1 s later; unless `is_true`, with another token."""

    def __init__(self, placements: Path, process: subprocess.Popen[bytes], *, is_true: bool = True) -> None:
        self._placements = placements
        self._process = process
        self._is_true = is_true
        self._num_begun = 0

    async def status(self) -> pb.GetStatusResponse:
        first = pb.ReplicaStatus(id=FIRST, pid=self._process.pid, dtype="fp32")
        return pb.GetStatusResponse(replicas=[first, pb.ReplicaStatus(id=SECOND, pid=1, dtype="fp32")])

    def generate(self, messages, *, request_id: str, traceparent: str, **options) -> Reply:
        assert options["max_tokens"] == NUM_TOKENS
        self._num_begun += 1
        return Reply(self, FIRST if self._num_begun % 3 else SECOND, request_id, traceparent.split("-")[1])

    async def complete(self, messages, **options) -> Completion:
        token_ids = tuple(range(NUM_TOKENS))
        return Completion(choices=(Choice("", token_ids, None),), usage=None, decision=None, request_id="", trace_id="")

    async def tokens(self, request_id: str, replica: str) -> AsyncIterator[tuple[str, int]]:
        self.place(request_id, replica)
        for number in range(NUM_TOKENS):
            await asyncio.sleep(0.005)
            if replica == FIRST and self._process.poll() is not None:
                replica = SECOND
                self.place(request_id, replica)
                await asyncio.sleep(0.1)
                number = number if self._is_true else -1  # noqa: PLW2901
            yield replica, number

    def place(self, request_id: str, replica: str) -> None:
        with self._placements.open("a") as file:
            file.write(json.dumps({"request": request_id, "replica": replica}) + "\n")


class Reply:
    """Looks like a Generation."""

    def __init__(self, router: Router, replica: str, request_id: str, trace_id: str) -> None:
        self._tokens = router.tokens(request_id, replica)
        self._replica = replica
        self.trace_id = trace_id
        self.usage: Usage | None = None

    async def __aiter__(self) -> AsyncIterator[Delta]:
        async for replica, number in self._tokens:
            self._replica = replica
            yield Delta("x", (number,))
        times = {"queue_s": 0.0, "prefill_s": 0.0, "decode_s": 0.0}
        self.usage = Usage(
            prompt_tokens=10, cached_tokens=8, generated_tokens=NUM_TOKENS, replica=self._replica, **times
        )


class Seen:
    """What a view is told."""

    def __init__(self) -> None:
        self.victims: list[Victim] = []
        self.went_on_numbers: list[int] = []
        self.is_ended = False

    def begun(self, streams) -> None:
        assert [stream.subject for stream in streams] == list(SUBJECTS)

    def killed(self, victim: Victim) -> None:
        self.victims.append(victim)

    def went_on(self, stream: Stream) -> None:
        self.went_on_numbers.append(stream.number)

    def ended(self) -> None:
        self.is_ended = True

    def outcome(self, outcome: Outcome) -> None:
        raise AssertionError("for whoever has asked for the act")


def asleep() -> Iterator[subprocess.Popen[bytes]]:
    """A process that could be killed."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


sleeper = pytest.fixture(asleep, name="sleeper")
other = pytest.fixture(asleep, name="other")


def act(folder: Path, process: subprocess.Popen[bytes], seen: Seen, *, cluster_pid: int, **router) -> SecondAct:
    placements = folder / "placements"
    client = Router(placements, process, **router)
    return SecondAct(
        client,  # type: ignore[arg-type]
        cluster_pid,
        Stage(placements, None),
        seen,
        num_tokens=NUM_TOKENS,
        note=lambda text: None,
    )


async def test_the_replica_with_most_streams_is_killed_and_all_are_accounted_for(tmp_path, sleeper):
    seen = Seen()
    outcome = await act(tmp_path, sleeper, seen, cluster_pid=os.getpid()).run()
    assert sleeper.wait() == -9
    assert seen.victims == [outcome.victim] == [Victim(FIRST, sleeper.pid, 8)]
    assert seen.is_ended
    assert {stream.number for stream in outcome.moved} == set(seen.went_on_numbers)
    assert len(seen.went_on_numbers) == 8
    assert outcome.num_identical == 12
    assert outcome.longest_pause_s >= max(stream.went_on_after_s for stream in outcome.moved) >= 0.1
    assert (outcome.prompt_tokens, outcome.cached_tokens, outcome.dtype) == (120, 96, "fp32")
    assert outcome.traced in outcome.moved
    assert outcome.trace == []


async def test_answers_that_changed_are_counted_as_such(tmp_path, sleeper):
    outcome = await act(tmp_path, sleeper, Seen(), cluster_pid=os.getpid(), is_true=False).run()
    assert outcome.num_identical == 4
    for stream, place in zip(outcome.streams, outcome.differences, strict=True):
        assert (place is None) == (stream.tokens_at_loss is None)
        assert place is None or place >= stream.tokens_at_loss


async def test_a_process_of_somebody_else_is_not_killed(tmp_path, sleeper, other):
    seen = Seen()
    with pytest.raises(NobodyKilledError, match=f"process {sleeper.pid} is none of the demo's own"):
        await act(tmp_path, sleeper, seen, cluster_pid=other.pid).run()
    assert sleeper.poll() is None
    assert (seen.victims, seen.is_ended) == ([], True)


async def test_answers_that_are_over_too_soon_are_nobodys_to_kill(tmp_path, sleeper):
    class Quick(Router):
        async def tokens(self, request_id: str, replica: str) -> AsyncIterator[tuple[str, int]]:
            self.place(request_id, replica)
            yield replica, 0

    placements = tmp_path / "placements"
    quick = Quick(placements, sleeper)
    stage = Stage(placements, None)
    with pytest.raises(NobodyKilledError, match="over before"):
        await SecondAct(quick, os.getpid(), stage, Seen(), num_tokens=NUM_TOKENS, note=str).run()  # type: ignore[arg-type]
    assert sleeper.poll() is None
