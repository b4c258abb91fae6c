"""Tenants that send at a rate of their own whatever comes back, each over a Session of its own: one process for some.

    in    {"target", "header", "tenants": {NAME: requests a second}, "prompt", "output", "timeout_s", "seed"}
    in    {"duration_s"}                               send for so long, wait until all has ended; again and again
    out   {"event": "ready"}, then for each {"event": "done", ...TenantCounts}
    in    end of file: end; also when the parent died

Poisson arrivals, made before the phase begins. A request counts from when it was due, so that a client or a router
that falls behind shows. As lean as `lean_client.py`: token ids, of an answer only its first token and its end are
looked at, all that is due goes in one message.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
from google.protobuf.duration_pb2 import Duration
from octavo.v1 import inference_service_pb2 as pb
from octavo.v1 import types_pb2
from octavo.v1.inference_service_pb2_grpc import InferenceServiceStub

DRAIN_S = 15.0
_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 64 << 20)]


@dataclass(slots=True)
class TenantCounts:
    """Of one phase, of all tenants of this process."""

    sent: int = 0
    ended: int = 0
    extra: int = 0
    """Terminals of requests that had ended, or were never sent."""
    ok: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    first_s: list[float] = field(default_factory=list)
    """From when it was due to its first token, of each request that had one."""
    total_s: list[float] = field(default_factory=list)
    """The same to the end of its answer, of each that was answered."""
    late_s: float = 0.0
    """How much later than due a request was handed to gRPC, at most."""
    cpu_s: float = 0.0


class Tenant:
    """One Session, and what is live on it."""

    def __init__(self, job: dict[str, Any], name: str, stub: Any) -> None:
        self._job = job
        self._rate: float = job["tenants"][name]
        self._rng = random.Random(f"{job['seed']} {name}")
        self._call = stub.Session(metadata=((job["header"], name),))
        self._due: dict[str, float] = {}
        """When each live request was due."""
        self._unseen: set[str] = set()
        """Those that had no token yet."""
        self._num_made = 0
        self._all_ended = asyncio.Event()
        self._counts = TenantCounts()
        self._reading = asyncio.create_task(self._read())

    async def run(self, duration_s: float, counts: TenantCounts) -> None:
        """Send for `duration_s`, and wait until all has ended."""
        self._counts = counts
        plan = self._plan(duration_s)
        start, number = time.monotonic() + 0.05, 0
        while number < len(plan):
            await asyncio.sleep(max(start + plan[number][0] - time.monotonic(), 0.001))
            elapsed_s, starts = time.monotonic() - start, []
            while number < len(plan) and plan[number][0] <= elapsed_s:
                after_s, request = plan[number]
                counts.late_s = max(counts.late_s, elapsed_s - after_s)
                self._due[request.request_id] = start + after_s
                self._unseen.add(request.request_id)
                starts.append(request)
                number += 1
            counts.sent += len(starts)
            if starts:
                await self._call.write(pb.SessionRequest(starts=starts))
        self._all_ended.clear()
        if self._due:
            await asyncio.wait_for(self._all_ended.wait(), DRAIN_S)

    async def close(self) -> None:
        self._call.cancel()
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    def _plan(self, duration_s: float) -> list[tuple[float, pb.Start]]:
        """Return what is sent: seconds after the beginning, and the request."""
        plan, after_s = [], self._rng.expovariate(self._rate)
        while after_s < duration_s:
            plan.append((after_s, self._start()))
            after_s += self._rng.expovariate(self._rate)
        return plan

    def _start(self) -> pb.Start:
        self._num_made += 1
        prompt = types_pb2.TokenIds(ids=self._rng.choices(range(300, 1_000), k=self._job["prompt"]))
        request = pb.GenerateRequest(
            prompt=types_pb2.Prompt(token_ids=prompt), max_tokens=self._job["output"], ignore_eos=True
        )
        timeout = Duration(seconds=self._job["timeout_s"])
        return pb.Start(request_id=str(self._num_made), request=request, timeout=timeout)

    async def _read(self) -> None:
        while (message := await self._call.read()) is not grpc.aio.EOF:
            now, counts = time.monotonic(), self._counts
            for event in message.events:
                name = event.request_id
                if event.HasField("terminal"):
                    self._unseen.discard(name)
                    due = self._due.pop(name, None)
                    if due is None:
                        counts.extra += 1
                        continue
                    counts.ended += 1
                    if event.terminal.code == 0:
                        counts.ok += 1
                        counts.total_s.append(now - due)
                    else:
                        counts.errors[event.terminal.reason or str(event.terminal.code)] += 1
                elif name in self._unseen and event.delta.token_ids:
                    self._unseen.remove(name)
                    counts.first_s.append(now - self._due[name])
            if not self._due:
                self._all_ended.set()


async def _run() -> None:
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    job = json.loads(await lines.readline())
    async with grpc.aio.insecure_channel(job["target"], options=_OPTIONS) as channel:
        await asyncio.wait_for(channel.channel_ready(), 10.0)
        tenants = [Tenant(job, name, InferenceServiceStub(channel)) for name in job["tenants"]]
        _say(event="ready")
        while line := await lines.readline():
            counts, cpu_s = TenantCounts(), time.process_time()
            phases = (tenant.run(json.loads(line)["duration_s"], counts) for tenant in tenants)
            for error in await asyncio.gather(*phases, return_exceptions=True):
                if error is not None:
                    counts.errors[f"the client gave up: {error!r:.200}"] += 1
            counts.cpu_s = time.process_time() - cpu_s
            _say(event="done", **{name: getattr(counts, name) for name in counts.__slots__})
        for tenant in tenants:
            await tenant.close()


def _say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    asyncio.run(_run())
