"""`octavo demo`, second act: twelve long answers at once, and a kill -9 of the replica that carries most of them.

The answers share a system prompt that no cache has. Where each of them is, the router's own decision log says while it
runs. Killed is nothing but a process that the demo's own cluster started. Afterwards the same is asked again and left
undisturbed, to compare token by token, and one request's trace is fetched that has both replicas in it.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from octavo.client import CallError, Client, GenerateOptions, Message
from octavo.v1 import status_service_pb2

from cluster.demo_placements import Placements
from cluster.demo_stream import Stream, busiest, first_differences
from cluster.demo_trace import Branch, Collector, collecting, has_moved, tree
from cluster.processes import descendants
from workers.errors import OctavoError

POLL_S = 0.02
REQUEST_TIMEOUT_S = 120.0
TRACE_TIMEOUT_S = 5.0
DUE_SHARE = 8
"""The kill comes when every answer has one of so many parts of its tokens: it is seen to run, and soon recomputed."""
LIMIT_S = 2.0
"""No stream shall stop for longer."""

SYSTEM_PROMPT = (
    "You are a storyteller who knows the world. Tell a long and lively story of several paragraphs, with names, places "
    "and details that are true. Write plain sentences without lists, headings or emoji. Do not ask questions and do "
    "not stop early."
)
SUBJECTS = (
    "the Nile",
    "the moon",
    "a lighthouse",
    "penguins",
    "the first trains",
    "Mount Everest",
    "honey bees",
    "the Silk Road",
    "volcanoes",
    "old oak trees",
    "blue whales",
    "the pyramids",
)


class NobodyKilledError(OctavoError):
    """There was no replica to kill, or it is none of the demo's own."""


@dataclass(frozen=True, slots=True)
class Victim:
    replica: str
    pid: int
    num_streams: int
    """Which it carried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    streams: Sequence[Stream]
    victim: Victim
    differences: Sequence[int | None]
    """Of each stream, the first token that the undisturbed run has otherwise; None where it has none."""
    dtype: str
    total_s: float
    """From the first question to the last token, the kill in between."""
    undisturbed_s: float
    """The same of the other run."""
    traced: Stream | None
    """One that another replica went on with."""
    trace: Sequence[Branch]
    """Its spans; none where they were not collected."""

    @property
    def num_identical(self) -> int:
        return sum(place is None for place in self.differences)

    @property
    def longest_pause_s(self) -> float:
        return max(stream.longest_pause_s for stream in self.streams)

    @property
    def moved(self) -> list[Stream]:
        return [stream for stream in self.streams if stream.has_moved]

    @property
    def prompt_tokens(self) -> int:
        return sum(stream.usage.prompt_tokens for stream in self.streams if stream.usage)

    @property
    def cached_tokens(self) -> int:
        return sum(stream.usage.cached_tokens for stream in self.streams if stream.usage)


class CrashView(Protocol):
    """What the second act shows, in this order; `went_on` comes once for each stream that lost its replica."""

    def begun(self, streams: Sequence[Stream]) -> None:
        """The streams change while they run, until `ended`."""

    def killed(self, victim: Victim) -> None: ...

    def went_on(self, stream: Stream) -> None: ...

    def ended(self) -> None:
        """In any case, also of an act that failed."""

    def outcome(self, outcome: Outcome) -> None: ...


@dataclass(frozen=True, slots=True)
class Stage:
    """What the cluster of a second act is started with."""

    placements: Path
    collector: Collector | None
    variables: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def staged(environ: Mapping[str, str]) -> Iterator[Stage]:
    """For the life of the cluster. It computes in fp32 unless `environ` says otherwise, for there an answer that goes
    on elsewhere is what an undisturbed run answers."""
    with tempfile.TemporaryDirectory(prefix="octavo-demo-") as folder, collecting(environ) as collector:
        placements = Path(folder) / "placements"
        variables = {"OCTAVO_ROUTER__DECISION_LOG": str(placements)}
        if not environ.keys() & {"OCTAVO_ENGINE__DTYPE", "OCTAVO_CONFIG"}:
            variables["OCTAVO_ENGINE__DTYPE"] = "fp32"
        if collector is not None:
            variables |= collector.variables
        yield Stage(placements, collector, variables)


class SecondAct:
    """`cluster_pid`: of the `octavo serve` whose replicas these are. `note` gets what it does that cannot be seen."""

    def __init__(
        self,
        client: Client,
        cluster_pid: int,
        stage: Stage,
        view: CrashView,
        *,
        num_tokens: int,
        note: Callable[[str], None],
    ) -> None:
        self._client = client
        self._cluster_pid = cluster_pid
        self._stage = stage
        self._view = view
        self._num_tokens = num_tokens
        self._note = note
        self._dtype = ""
        self._streams = [
            Stream(number, subject, f"demo-{secrets.token_hex(6)}") for number, subject in enumerate(SUBJECTS, 1)
        ]

    async def run(self) -> Outcome:
        """Raises CallError when an answer fails, NobodyKilledError."""
        began = time.monotonic()
        victim = await self._disturbed()
        middle = time.monotonic()
        self._note("asking the same again, undisturbed")
        answers = await asyncio.gather(*(self._undisturbed(stream.subject) for stream in self._streams))
        end = time.monotonic()
        moved = [stream for stream in self._streams if stream.went_on_after_s is not None]
        traced = max(moved, key=lambda stream: stream.longest_pause_s, default=None)
        return Outcome(
            streams=self._streams,
            victim=victim,
            differences=first_differences([stream.token_ids for stream in self._streams], answers),
            dtype=self._dtype,
            total_s=middle - began,
            undisturbed_s=end - middle,
            traced=traced,
            trace=await self._trace(traced),
        )

    async def _disturbed(self) -> Victim:
        self._view.begun(self._streams)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow())
                killing = group.create_task(self._kill())
                for stream in self._streams:
                    group.create_task(self._read(stream))
        except* (CallError, NobodyKilledError) as errors:
            raise errors.exceptions[0] from None
        finally:
            self._view.ended()
        return killing.result()

    async def _read(self, stream: Stream) -> None:
        generation = self._client.generate(
            _messages(stream.subject),
            timeout=REQUEST_TIMEOUT_S,
            request_id=stream.request_id,
            traceparent=f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01",
            **self._options(),
        )
        stream.trace_id = generation.trace_id
        async for delta in generation:
            if stream.took(delta, time.monotonic()):
                self._view.went_on(stream)
        assert generation.usage is not None, "an answer that ended well has its usage"
        stream.ended(generation.usage)

    async def _undisturbed(self, subject: str) -> tuple[int, ...]:
        answer = await self._client.complete(_messages(subject), timeout=REQUEST_TIMEOUT_S, **self._options())
        return answer.token_ids

    async def _follow(self) -> None:
        """Tell the streams where they are."""
        placements, streams = Placements(self._stage.placements), {each.request_id: each for each in self._streams}
        while not all(stream.is_ended for stream in self._streams):
            for placement in await asyncio.to_thread(placements.read):
                stream = streams.get(placement.request_id)
                if stream is not None and not stream.is_ended:
                    stream.placed(placement.replica)
            await asyncio.sleep(POLL_S)

    async def _kill(self) -> Victim:
        """Kill the replica with most streams, once all of them speak."""
        while not all(map(self._is_due, self._streams)):  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(POLL_S)
        found = _replica(await self._client.status(), busiest(self._streams))
        if found is None:
            raise NobodyKilledError("the answers were over before their replica could be killed; ask for longer ones")
        if not await asyncio.to_thread(is_descendant, found.pid, self._cluster_pid):
            raise NobodyKilledError(f"process {found.pid} is none of the demo's own cluster: it is not killed")
        lost = [stream for stream in self._streams if stream.replica == found.id and not stream.is_ended]
        for stream in lost:
            stream.lost()
        os.kill(found.pid, signal.SIGKILL)
        victim = Victim(found.id, found.pid, len(lost))
        self._view.killed(victim)
        self._dtype = found.dtype or found.engine
        return victim

    def _is_due(self, stream: Stream) -> bool:
        return stream.is_ended or (stream.replica != "" and len(stream.token_ids) >= self._num_tokens // DUE_SHARE)

    async def _trace(self, stream: Stream | None) -> list[Branch]:
        collector = self._stage.collector
        if stream is None or collector is None:
            return []
        return tree(await asyncio.to_thread(collector.await_trace, stream.trace_id, has_moved, TRACE_TIMEOUT_S))

    def _options(self) -> GenerateOptions:
        """Greedy, and so that a small model does not tell the same sentence again and again."""
        return {"max_tokens": self._num_tokens, "temperature": 0.0, "repetition_penalty": 1.1}


def is_descendant(pid: int, ancestor: int) -> bool:
    """Say whether process `ancestor` has started `pid`, or somebody whom it started. Linux only: elsewhere never."""
    return pid in {process.pid for process in descendants(ancestor)}


def _replica(status: status_service_pb2.GetStatusResponse, name: str) -> status_service_pb2.ReplicaStatus | None:
    return next((each for each in status.replicas if each.id == name), None)


def _messages(subject: str) -> list[Message]:
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": f"Tell me a long story about {subject}."},
    ]
