"""A client that does as little as it can, for measuring what a router can: a closed loop over Session or Generate.

    in    {"target", "ca_file", "token", "call", "streams", "output", "prompt", "duration_s", "warm_up_s", "requests",
           "seed", "clock", "is_staggered"}
    in    a line: begin
    out   {"event": "ready"}, then {"event": "done", ...LeanCounts}
    in    end of file: stop; also when the parent died

All messages of one turn are sent as one, of an answer only token ids and ends are looked at, and Generate goes over an
HTTP/2 of our own (`lean_http2.py`). It still counts every terminal by its request. Rates and ages are those between
warm-up and end, so that neither the first tokens nor the last ones, when streams have ended, count. Nobody starts it
but `lean_crew.load`.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import grpc
import grpc.aio
import uvloop
from octavo.v1 import inference_service_pb2 as pb
from octavo.v1 import types_pb2

from load_tests.rigs.lean_http2 import Http2

DRAIN_S = 15.0
STOPS = ("no such text", "<|end|>")
_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", 64 << 20)]
_SESSION = "/octavo.v1.InferenceService/Session"
_GENERATE = "/octavo.v1.InferenceService/Generate"
_CODES = {str(code.value[0]): code.name for code in grpc.StatusCode}


@dataclass(slots=True)
class LeanCounts:
    """`tokens` and `requests` are all, those with `_timed` are of the time between warm-up and end."""

    sent: int = 0
    ended: int = 0
    ok: int = 0
    extra: int = 0
    """Terminals of requests that had ended."""
    tokens: int = 0
    tokens_timed: int = 0
    ok_timed: int = 0
    messages: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    ages: Counter[int] = field(default_factory=Counter)
    """Tokens by their age when they arrived, in ticks of the clock."""
    timed_s: float = 0.0
    cpu_s: float = 0.0


class Way(Protocol):
    """How requests get there. Calls the client back for each piece and each end."""

    async def run(self) -> None:
        """Be one closed loop until the client's time is over and all has ended."""


class LeanClient:
    def __init__(self, job: dict[str, Any]) -> None:
        self.counts = LeanCounts()
        self.streams: int = job["streams"]
        self._clock = job["clock"]
        self._job = job
        self._rng = random.Random(job["seed"])
        self._num_made = 0
        self._timed_from = self._ends_at = 0.0
        self.is_stopped = False

    def begin(self) -> None:
        now = time.monotonic()
        self._timed_from, self._ends_at = now + self._job["warm_up_s"], now + self._job["duration_s"]
        self.counts.timed_s = self._job["duration_s"] - self._job["warm_up_s"]

    @property
    def goes_on(self) -> bool:
        """Whether an end is followed by another request."""
        is_enough = 0 < self._job["requests"] <= self.counts.sent
        return not (self.is_stopped or is_enough) and time.monotonic() < self._ends_at

    def request(self) -> tuple[str, pb.GenerateRequest]:
        """Return the next request and its name; count it as sent."""
        self.counts.sent += 1
        self._num_made += 1
        prompt = self._rng.choices(range(300, 1_000), k=self._job["prompt"])
        request = pb.GenerateRequest(
            prompt=types_pb2.Prompt(token_ids=types_pb2.TokenIds(ids=prompt)),
            sampling=types_pb2.Sampling(temperature=0.0),
            max_tokens=self._output(),
            ignore_eos=True,
            stop=STOPS,
        )
        return f"{self._job['seed']}-{self._num_made}", request

    def _output(self) -> int:
        """Return how many tokens the request just counted asks for."""
        output: int = self._job["output"]
        if not self._job["is_staggered"] or self._num_made > self.streams:
            return output
        return max(1, output * self._num_made // self.streams)

    def arrived(self, ids: Any, now: float) -> None:
        """Count the tokens of one delta."""
        counts = self.counts
        counts.tokens += len(ids)
        if not self._timed_from <= now < self._ends_at:
            return
        counts.tokens_timed += len(ids)
        if self._clock is not None:
            first, ticks, ticks_per_s = self._clock
            tick, ages = int(now * ticks_per_s) + first, counts.ages
            for token_id in ids:
                ages[(tick - token_id) % ticks] += 1

    def ended(self, code: str, now: float) -> None:
        counts = self.counts
        counts.ended += 1
        if code == "OK":
            counts.ok += 1
            counts.ok_timed += self._timed_from <= now < self._ends_at
        else:
            counts.errors[code] += 1


class SessionWay:
    """All streams over one Session, with one task that writes."""

    def __init__(self, client: LeanClient, channel: grpc.aio.Channel, token: str = "") -> None:
        self._client = client
        self._call = channel.stream_stream(
            _SESSION,
            request_serializer=pb.SessionRequest.SerializeToString,
            response_deserializer=pb.SessionResponse.FromString,
        )(metadata=(("authorization", f"Bearer {token}"),) if token else ())
        self._open: set[str] = set()
        self._starts: list[pb.Start] = []
        self._wake = asyncio.Event()

    async def run(self) -> None:
        writer = asyncio.create_task(self._write())
        try:
            for _ in range(self._client.streams):
                self._start()
            self._wake.set()
            while self._open and (message := await self._call.read()) is not grpc.aio.EOF:
                self._take(message)
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            self._call.cancel()

    def _take(self, message: pb.SessionResponse) -> None:
        client, now = self._client, time.monotonic()
        client.counts.messages += 1
        for event in message.events:
            if event.HasField("delta"):
                client.arrived(event.delta.token_ids, now)
            elif event.request_id in self._open:
                self._open.remove(event.request_id)
                code = event.terminal.code
                client.ended("OK" if code == 0 else event.terminal.reason or str(code), now)
                if client.goes_on:
                    self._start()
            else:
                client.counts.extra += 1
        if self._starts:
            self._wake.set()

    def _start(self) -> None:
        name, request = self._client.request()
        self._open.add(name)
        self._starts.append(pb.Start(request_id=name, request=request))

    async def _write(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            starts, self._starts = self._starts, []
            await self._call.write(pb.SessionRequest(starts=starts))


class GenerateWay:
    """A call for each request, `streams` at a time, all over one connection. Listens to it."""

    def __init__(self, client: LeanClient, target: str, *, ca_file: str = "", token: str = "") -> None:
        self._client = client
        self._target = target
        self._ca_file = ca_file
        self._token = token
        self._num_open = 0
        self._all_ended = asyncio.Event()
        self._connection: Http2

    async def run(self) -> None:
        self._connection = await Http2.connect(self._target, self, ca_file=self._ca_file, token=self._token)
        try:
            for _ in range(self._client.streams):
                self._call()
            await self._all_ended.wait()
        finally:
            self._connection.close()

    def _call(self) -> None:
        self._num_open += 1
        self._connection.call(_GENERATE, self._client.request()[1].SerializeToString())

    def arrived(self, stream: int, message: bytes) -> None:
        client, now = self._client, time.monotonic()
        client.counts.messages += 1
        for delta in pb.GenerateResponse.FromString(message).deltas:
            client.arrived(delta.token_ids, now)

    def ended(self, stream: int, status: str) -> None:
        self._num_open -= 1
        self._client.ended(_CODES.get(status, status), time.monotonic())
        if self._client.goes_on:
            self._call()
        elif not self._num_open:
            self._all_ended.set()


async def _run() -> None:
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    job = json.loads(await lines.readline())
    async with open_channel(job["target"], job["ca_file"]) as channel:
        await asyncio.wait_for(channel.channel_ready(), 10.0)
        client = LeanClient(job)
        way: Way
        if job["call"] == "session":
            way = SessionWay(client, channel, job["token"])
        else:
            way = GenerateWay(client, job["target"], ca_file=job["ca_file"], token=job["token"])
        _say(event="ready")
        if not await lines.readline():
            return
        watching = asyncio.create_task(_stop_at_end(client, lines))
        cpu_s = time.process_time()
        client.begin()
        try:
            await asyncio.wait_for(way.run(), job["duration_s"] + DRAIN_S)
        except (TimeoutError, grpc.aio.AioRpcError) as error:
            client.counts.errors[f"the client gave up: {error!r:.200}"] += 1
        watching.cancel()
    counts = client.counts
    counts.cpu_s = time.process_time() - cpu_s
    _say(event="done", **{name: getattr(counts, name) for name in counts.__slots__})


def open_channel(target: str, ca_file: str = "") -> grpc.aio.Channel:
    """Return a channel with a connection of its own, with TLS if `ca_file` has whom to trust."""
    if not ca_file:
        return grpc.aio.insecure_channel(target, options=_OPTIONS)
    credentials = grpc.ssl_channel_credentials(Path(ca_file).read_bytes())
    return grpc.aio.secure_channel(target, credentials, options=_OPTIONS)


async def _stop_at_end(client: LeanClient, lines: asyncio.StreamReader) -> None:
    while await lines.readline():
        pass
    client.is_stopped = True


def _say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run())
