"""A router's front on a loopback socket, with a back that a test plays by hand.

The tokenizer of `served_model` is byte-level without merges, so that a token id below 256 is a byte: tokens can be
written as text. 256 and 257 are special.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import tokenizers
from google.rpc import error_details_pb2, status_pb2
from octavo.v1 import inference_service_pb2 as pb
from octavo.v1 import types_pb2 as types
from octavo.v1.inference_service_pb2_grpc import InferenceServiceStub
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from router.chat import ChatTemplate
from router.config import RouterConfig
from router.model import Models, ServedModel
from router.server import RouterServer
from router.signal import ModelSignal
from router.tokenizer import Tokenizer
from router.types import (
    Attempt,
    Backlog,
    Cancel,
    Candidate,
    Decision,
    ModelStanding,
    ReplicaView,
    Request,
    Sink,
)
from workers.errors import CancelledRequestError, OctavoError
from workers.types import Finish, FinishReason, Load, ModelManifest, TokenLogprobs

END, USER = 256, 257
VOCAB_SIZE = 260
MAX_MODEL_LEN = 64
PATIENCE_S = 20.0
"""How long is waited for what comes at once, on whatever machine."""
TEMPLATE = (
    "{% for message in messages %}{{ '<|user|>' ~ message.role ~ ':' ~ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>' }}{% endif %}"
)


def byte_characters() -> list[str]:
    """The character that byte-level BPE writes for each byte."""
    alphabet = {}
    for character in pre_tokenizers.ByteLevel.alphabet():
        code = ord(character)
        if code < 256:
            alphabet[code] = character
    others = iter(range(256, 1000))
    return [alphabet.get(byte) or chr(next(others)) for byte in range(256)]


def byte_tokenizer() -> tokenizers.Tokenizer:
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<|user|>", special=True)])
    return tokenizer


def served_model(name: str = "toy", *, template: str | None = TEMPLATE) -> ServedModel:
    manifest = ModelManifest(
        name=name,
        architecture="toy",
        vocab_size=VOCAB_SIZE,
        max_model_len=MAX_MODEL_LEN,
        eos_token_ids=(END,),
        bos_token_id=None,
        weights_format="gguf",
        model_fingerprint="m",
        tokenizer_fingerprint="t",
        weights_fingerprint="w",
    )
    chat_template = None if template is None else ChatTemplate(template)
    return ServedModel(manifest=manifest, tokenizer=Tokenizer(byte_tokenizer()), chat_template=chat_template)


@dataclass
class Work:
    """A request in the hands of the test."""

    request: Request
    sink: Sink
    is_over: bool = False
    is_cancelled: bool = False
    cancelled_choices: list[int] = field(default_factory=list)
    num_finished: int = 0

    def dispatch(self, replica: str = "r1", num_cached: int = 0) -> None:
        candidates = (Candidate(replica=replica, owed_tokens=3.0),)
        decision = Decision(replica=replica, rule="only", candidates=candidates)
        self.sink.dispatched(Attempt(decision, 0.25, sent_at=time.monotonic()))
        self.sink.cached(num_cached)

    def emit(self, tokens: str | bytes | Sequence[int], index: int = 0, *, logprob: float | None = None) -> None:
        """Deliver tokens, unless the request is over: a real back would not either. Each has `logprob`, the likeliest
        at its place are itself and 0."""
        ids = list(tokens.encode()) if isinstance(tokens, str) else list(tokens)
        logprobs = [] if logprob is None else [TokenLogprobs(logprob, ((i, logprob), (0, -9.0))) for i in ids]
        if not self.is_over and index not in self.cancelled_choices:
            self.sink.tokens(index, ids, logprobs)

    def finish(
        self, reason: FinishReason = FinishReason.LENGTH, stop_token_id: int | None = None, *, index: int = 0
    ) -> None:
        """Finish a choice, and with the last one the request."""
        if self.is_over or index in self.cancelled_choices:
            return
        self.num_finished += 1
        self.sink.finished(
            index, Finish(reason=reason, stop_token_id=stop_token_id, queue_s=0.5, prefill_s=1.0, decode_s=2.0)
        )
        self._end_if_whole()

    def end(self, error: OctavoError | None) -> None:
        if not self.is_over:
            self.is_over = True
            self.sink.ended(error)

    def cancel(self, index: int | None = None) -> None:
        if index is None:
            self.is_cancelled = True
            self.end(CancelledRequestError("cancelled"))
        else:
            self.cancelled_choices.append(index)
            self._end_if_whole()

    def _end_if_whole(self) -> None:
        if self.num_finished + len(self.cancelled_choices) == self.request.n:
            self.end(None)


Script = Callable[[Work], None]


class FakeBackend:
    """Keeps what is submitted in `works`; `script`, if set, is called with each, one turn of the loop later."""

    def __init__(self) -> None:
        self.works: list[Work] = []
        self.script: Script | None = None
        self.refusal: OctavoError | None = None
        self.views = [
            ReplicaView(
                replica_id="r1",
                model="toy",
                state="ready",
                address="127.0.0.1:1",
                pid=7,
                capabilities=frozenset({"generate"}),
                load=Load(num_preemptions=1, num_drafted_tokens=9, num_accepted_tokens=5),
            )
        ]
        self._arrival = asyncio.Event()

    def submit(self, request: Request, sink: Sink) -> Cancel:
        if self.refusal is not None:
            raise self.refusal
        work = Work(request, sink)
        self.works.append(work)
        self._arrival.set()
        if self.script is not None:
            asyncio.get_running_loop().call_soon(self.script, work)
        return work.cancel

    async def work(self, index: int = 0) -> Work:
        """Wait for the request number `index`."""
        while len(self.works) <= index:
            self._arrival.clear()
            await asyncio.wait_for(self._arrival.wait(), PATIENCE_S)
        return self.works[index]

    def replicas(self) -> Sequence[ReplicaView]:
        return self.views

    def backlog(self) -> Backlog:
        return Backlog(num_queued_requests=1, num_queued_tokens=2, num_running_requests=3, max_queued_tokens=4)

    def standing(self, model: str) -> ModelStanding:
        return ModelStanding(1, 2, 0.5, 3, 4, 5)

    def signal(self, model: str) -> ModelSignal:
        return ModelSignal(num_queued=1, num_aboard=3, num_ready=1, num_turned_away_total=2)


def answering(text: str | bytes) -> Script:
    """A script that answers every request with `text`, one token at a time."""

    def script(work: Work) -> None:
        work.dispatch(num_cached=1)
        for token in text.encode() if isinstance(text, str) else text:
            work.emit([token])
        work.finish()

    return script


@dataclass
class Outcome:
    """How a request ended, whichever way it came in."""

    code: grpc.StatusCode
    reason: str = ""
    message: str = ""
    violations: dict[str, str] = field(default_factory=dict)
    retry_after_s: float | None = None
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish: types.Finish | None = None
    usage: types.Usage | None = None
    decision: types.Decision | None = None
    num_terminals: int = 1
    trailers: Mapping[str, Any] = field(default_factory=dict)
    logprobs: list[types.TokenLogprobs] = field(default_factory=list)
    received: Sequence[int] = ()
    """How many tokens of each choice the request says are there already."""
    num_received: int = 0
    """Of the first choice."""
    others: dict[int, Outcome] = field(default_factory=dict)
    """Text, tokens and finish of the choices after the first."""

    def add(self, deltas: Sequence[types.Delta]) -> None:
        for delta in deltas:
            choice = self if not delta.index else self.choice(delta.index)
            assert choice.finish is None, "a delta after the finish"
            assert delta.token_offset == choice.num_received + len(choice.token_ids)
            assert len(delta.logprobs) in (0, len(delta.token_ids))
            assert [each.chosen.token_id for each in delta.logprobs] in ([], list(delta.token_ids))
            choice.text += delta.text
            choice.token_ids.extend(delta.token_ids)
            choice.logprobs.extend(delta.logprobs)
            if delta.HasField("finish"):
                choice.finish = delta.finish

    def choice(self, index: int) -> Outcome:
        if not index:
            return self
        num_received = self.received[index] if index < len(self.received) else 0
        return self.others.setdefault(index, Outcome(grpc.StatusCode.UNKNOWN, num_received=num_received))

    @property
    def texts(self) -> list[str]:
        """Of all choices."""
        return [self.choice(index).text for index in range(1 + max(self.others, default=0))]


class Rig:
    """A running `RouterServer`, a channel to it, and requests in one line."""

    def __init__(self, server: RouterServer, backend: FakeBackend, address: str) -> None:
        self.server = server
        self.backend = backend
        self.address = address
        # A small receive window, so that a client that does not read stops the writer soon.
        options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096)]
        self.channel = grpc.aio.insecure_channel(address, options=options)
        self.stub = InferenceServiceStub(self.channel)

    async def generate(self, request: pb.GenerateRequest, **options: Any) -> Outcome:
        call = self.stub.Generate(request, **{"timeout": 10, **options})
        return await read_generate(call, received=received_counts(request))

    async def session(self, request: pb.GenerateRequest, **start: Any) -> Outcome:
        async with self.open_session() as session:
            await session.start("s", request, **start)
            return await session.outcome("s")

    async def run(self, way: str, request: pb.GenerateRequest) -> Outcome:
        """Send `request` over "generate" or "session" and return how it ended."""
        return await (self.generate(request) if way == "generate" else self.session(request))

    @contextlib.asynccontextmanager
    async def open_session(self, **options: Any) -> AsyncIterator[ClientSession]:
        session = ClientSession(self.stub.Session(**options))
        try:
            yield session
        finally:
            session.call.cancel()

    async def assert_nothing_left(self) -> None:
        """No request is left anywhere, and each that was accepted has ended once."""
        await eventually(lambda: self.server.intake.num_open == 0)
        assert self.server.intake.num_accepted == self.server.intake.num_ended == len(self.backend.works)
        assert all(work.is_over for work in self.backend.works)


def received_counts(request: pb.GenerateRequest | None) -> list[int]:
    return [len(each.ids) for each in request.received_token_ids] if request is not None else []


async def read_generate(call: Any, *, received: Sequence[int] = ()) -> Outcome:
    outcome = Outcome(grpc.StatusCode.OK, received=received, num_received=received[0] if received else 0)
    try:
        while (message := await call.read()) is not grpc.aio.EOF:
            assert outcome.usage is None, "a message after the last"
            outcome.add(message.deltas)
            if message.HasField("usage"):
                outcome.usage, outcome.decision = message.usage, message.decision
    except grpc.aio.AioRpcError as error:
        outcome.message = error.details() or ""
        _read_details(outcome, error)
    outcome.code = await call.code()
    outcome.trailers = dict(await call.trailing_metadata())
    return outcome


LATE = "Deadline Exceeded"
"""gRPC's own words: if a call's deadline passes while its status arrives, it says these with the router's trailers."""


def _read_details(outcome: Outcome, error: grpc.aio.AioRpcError) -> None:
    packed = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
    if packed is None or LATE in (error.details() or ""):
        return
    assert isinstance(packed, bytes)
    status = status_pb2.Status.FromString(packed)
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    for detail in status.details:
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            assert info.domain == "octavo"
            outcome.reason = info.reason
        elif detail.Unpack(bad):
            outcome.violations = {violation.field: violation.description for violation in bad.field_violations}
        elif detail.Unpack(retry):
            outcome.retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9


CODES = {code.value[0]: code for code in grpc.StatusCode}


class ClientSession:
    """The client's end of a Session: sorts events by request."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.outcomes: dict[str, Outcome] = {}
        self.go_away: pb.GoAway | None = None
        self.num_messages = 0
        self.is_over = False

    async def send(self, **lists: Any) -> None:
        await self.call.write(pb.SessionRequest(**lists))

    async def start(self, request_id: str, request: pb.GenerateRequest | None = None, **fields: Any) -> None:
        if received := received_counts(request):
            new = Outcome(grpc.StatusCode.UNKNOWN, num_terminals=0, received=received, num_received=received[0])
            self.outcomes.setdefault(request_id, new)
        await self.send(starts=[pb.Start(request_id=request_id, request=request, **fields)])

    async def attach(self, request_id: str, have: bytes | Sequence[int] = b"", **fields: Any) -> None:
        """Attach to a request of whose answer the client has the tokens `have`."""
        self.outcomes[request_id] = Outcome(grpc.StatusCode.UNKNOWN, num_terminals=0, token_ids=list(have))
        await self.start(request_id, attach_offsets=[len(have)], **fields)

    async def cancel(self, request_id: str) -> None:
        await self.send(cancels=[pb.Cancel(request_id=request_id)])

    async def grant(self, request_id: str, tokens: int) -> None:
        await self.send(grants=[pb.Grant(request_id=request_id, tokens=tokens)])

    async def read(self) -> None:
        """Read one message. `is_over` afterwards: the router has ended the stream."""
        message = await asyncio.wait_for(self.call.read(), PATIENCE_S)
        if message is grpc.aio.EOF:
            self.is_over = True
            return
        self.num_messages += 1
        if message.HasField("go_away"):
            self.go_away = message.go_away
        for event in message.events:
            outcome = self.outcomes.setdefault(event.request_id, Outcome(grpc.StatusCode.UNKNOWN, num_terminals=0))
            if event.HasField("delta"):
                assert outcome.num_terminals == 0, "a delta after the terminal"
                outcome.add([event.delta])
            else:
                _read_terminal(outcome, event.terminal)

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self.read()
            assert not self.is_over or condition(), "the stream is over"

    async def text(self, request_id: str, text: str) -> None:
        """Read until exactly `text` of the answer has arrived."""
        await self.until(lambda: self.known(request_id).text == text)

    async def outcome(self, request_id: str) -> Outcome:
        """Read until the request's terminal."""
        await self.until(lambda: self.known(request_id).num_terminals > 0)
        return self.known(request_id)

    def known(self, request_id: str) -> Outcome:
        return self.outcomes.get(request_id) or Outcome(grpc.StatusCode.UNKNOWN, num_terminals=0)


def _read_terminal(outcome: Outcome, terminal: pb.Terminal) -> None:
    outcome.num_terminals += 1
    outcome.code = CODES[terminal.code]
    outcome.reason = terminal.reason
    outcome.message = terminal.message
    outcome.violations = {violation.field: violation.description for violation in terminal.field_violations}
    outcome.usage = terminal.usage
    outcome.decision = terminal.decision
    if terminal.HasField("retry_delay"):
        outcome.retry_after_s = terminal.retry_delay.ToNanoseconds() / 1e9


@contextlib.asynccontextmanager
async def running(models: Models | None = None, *, router_id: str = "router-1", **config: Any) -> AsyncIterator[Rig]:
    backend = FakeBackend()
    server = RouterServer(
        RouterConfig(**config),
        models or {"toy": served_model()},
        backend,
        router_id=router_id,
        version="0.0",
    )
    port = server.bind("127.0.0.1", 0)
    await server.start()
    rig = Rig(server, backend, f"127.0.0.1:{port}")
    try:
        yield rig
    finally:
        await rig.channel.close()
        await server.stop()


def text_request(text: str = "hi", **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=types.Prompt(text=text), **fields)


async def eventually(holds: Callable[[], bool] | Callable[[], Awaitable[bool]], timeout_s: float = PATIENCE_S) -> None:
    """Wait until `holds()`; for what a test cannot await."""
    async with asyncio.timeout(timeout_s):
        while True:
            result = holds()
            if result if isinstance(result, bool) else await result:
                return
            await asyncio.sleep(0.005)
