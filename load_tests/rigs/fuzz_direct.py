"""Fuzzes what is behind the sockets, without them: a process that sends itself messages and tells what became of them.

    python -m load_tests.rigs.fuzz_direct '{"seed": 1, "messages": 100000}'      prints one line of JSON

    Generate, Tokenize, ...   the real servicers, over a call that is only pretended and a back that answers at once;
                              what is accepted goes on to the replica's form of a work, which must take it
    Session                   the same, many messages a call
    AttachRequest             a replica's books over the fake engine, stepped by hand
    AttachResponse            what a router believes of a replica, and its conversions

Several times as many messages as over sockets in the same time. One process, one core.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import random
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Final

from google.protobuf.message import Message
from octavo.internal.v1 import data_plane_pb2 as data
from octavo.v1 import inference_service_pb2 as pb
from octavo.v1.model_service_pb2 import DetokenizeRequest, TokenizeRequest

from load_tests import process_tree
from load_tests.rigs.fuzz_local import InstantBackend, LocalAbortError, LocalContext
from load_tests.rigs.fuzz_model import small_manifest, small_model
from load_tests.rigs.fuzz_samples import MODEL, NUMBERS, TEXTS, of_kind
from load_tests.rigs.fuzz_tally import FuzzTally, LoggedErrors, name_of
from load_tests.rigs.message_mutator import Mutator, parsed
from router import status
from router.config import RouterConfig
from router.finish_errors import error_of
from router.identity import Identities
from router.intake import Intake
from router.replica_state import ReplicaState
from router.roster import Roster
from router.servicer import InferenceServicer
from router.services import ModelServicer
from router.sessions import Sessions
from router.wire import from_finish, from_logprobs, from_tokens
from workers.config import EngineConfig
from workers.fake import FakeEngine
from workers.types import FinishReason
from workers.work_ledger import AttachedRouter, BadDispatchError, WorkLedger

SHARES: Final = {
    pb.GenerateRequest: 30,
    pb.SessionRequest: 24,
    TokenizeRequest: 6,
    DetokenizeRequest: 6,
    data.AttachRequest: 18,
    data.AttachResponse: 16,
}
BATCH: Final = 200
"""Messages, after which replicas and routers of the data plane are new, as after a broken stream."""
SESSION_MESSAGES: Final = 20
SESSION_S: Final = 0.02
"""How long a Session may wait for grants that never come."""
GOOD_EVERY: Final = 5_000
SETTLE_S: Final = 8.0
NUM_BLOCKS: Final = 128
MAX_STEPS: Final = 20_000


class Front:
    """The public port's servicers."""

    def __init__(self, tally: FuzzTally) -> None:
        self._tally = tally
        config = RouterConfig(session_grace_s=0.05, default_timeout_s=2.0)
        models, backend = {MODEL: small_model()}, InstantBackend()
        self.intake = Intake(config, models, backend, router_id="direct")
        identities = Identities()
        self.sessions = Sessions(self.intake, identities)
        self._inference = InferenceServicer(self.intake, self.sessions)
        self._models = ModelServicer(models, backend, self.intake.validator)

    async def take(self, kind: type[Message], message: bytes) -> None:
        """Serve a call with one request."""
        found = parsed(kind, message)
        context: Any = LocalContext()
        calls: dict[type[Message], Callable[..., Awaitable[Any]]] = {
            pb.GenerateRequest: self._inference.Generate,
            TokenizeRequest: self._models.Tokenize,
            DetokenizeRequest: self._models.Detokenize,
        }
        with suppress(LocalAbortError):
            if found is None:
                await status.abort(context, status.undecodable())
            await calls[kind](found, context)
        self._tally.ended(kind.__name__, context.code, [message], context.text)

    async def hold_session(self, messages: Sequence[bytes]) -> None:
        context: Any = LocalContext([parsed(pb.SessionRequest, each) or status.undecodable() for each in messages])
        with suppress(LocalAbortError, TimeoutError):
            async with asyncio.timeout(SESSION_S):
                await self.sessions.serve(context)
        self._tally.ended("Session", context.code, messages, context.text)
        for response in context.written:
            for event in response.events:
                if event.HasField("terminal"):
                    code = name_of(event.terminal.code)
                    self._tally.ended("Terminal", code, messages, event.terminal.message)

    async def is_answered(self) -> bool:
        context: Any = LocalContext()
        last = await self._inference.Generate(parsed(pb.GenerateRequest, of_kind()[pb.GenerateRequest][0]), context)
        return len(pb.GenerateResponse.FromString(last).usage.ListFields()) > 0


class Replica:
    """The data port's books over an engine that is stepped by hand."""

    def __init__(self, tally: FuzzTally) -> None:
        self._tally = tally
        config = EngineConfig(engine="fake", num_blocks=NUM_BLOCKS)
        self._engine = FakeEngine(config, manifest=small_manifest(), hash_key=b"key")
        self._ledger = WorkLedger(self._engine, "direct")
        self._numbers = iter(range(sys.maxsize))
        self._router = self._attach()

    def take(self, message: bytes) -> None:
        found = parsed(data.AttachRequest, message)
        code = "INVALID_ARGUMENT" if found is None or found.HasField("hello") else self._serve(found)
        self._tally.ended("AttachRequest", code, [message])

    def _serve(self, found: data.AttachRequest) -> str:
        try:
            if found.HasField("dispatch"):
                self._ledger.submit(self._router, found.dispatch, time.monotonic())
        except BadDispatchError:
            self.renew()
            return "INVALID_ARGUMENT"
        if found.HasField("abort"):
            self._ledger.abort(self._router, found.abort)
        if found.HasField("credit"):
            self._router.outbox.grant(found.credit.step_batches)
        self._engine.step()
        self._ledger.collect(anew=found.HasField("resync"))
        if self._router.outbox.can_take:
            self._router.outbox.take().SerializeToString()
        return "OK"

    def renew(self) -> None:
        """The router leaves, with all its works, and comes back."""
        self._ledger.detach(self._router)
        self._router = self._attach()

    def check(self) -> None:
        """Assert that nothing is left of a router that has left."""
        self.renew()
        for _ in range(MAX_STEPS):
            is_busy = self._engine.step()
            self._ledger.collect()
            if not is_busy:
                break
        assert self._ledger.num_works == 0
        assert self._engine.load().num_free_blocks == NUM_BLOCKS
        self._engine.check_integrity()

    def _attach(self) -> AttachedRouter:
        return self._ledger.attach(f"router/{next(self._numbers)}", lambda is_urgent: None, in_columns=True)


class Router:
    """What a router believes of a replica."""

    def __init__(self, tally: FuzzTally) -> None:
        self._tally = tally
        self._roster = Roster()
        self._state = ReplicaState("direct", self._roster)
        self._is_attached = False

    def take(self, message: bytes) -> None:
        found = parsed(data.AttachResponse, message)
        try:
            if found is None:
                raise ValueError("no message")
            self._believe(found)
            code = "OK"
        except ValueError:  # the link is refused with it
            self.renew()
            code = "refused"
        self._tally.ended("AttachResponse", code, [message])

    def _believe(self, found: data.AttachResponse) -> None:
        if found.HasField("hello_ack") or not self._is_attached:
            ack = found.hello_ack if found.HasField("hello_ack") else data.HelloAck(block_size=16, num_blocks=64)
            self._state.start(ack)
            self._is_attached = True
        if found.HasField("step_batch"):
            self._state.sent(1, 10)
            self._state.expect(1, [bytes(16)])
            self._state.update(found.step_batch)
            self._state.unexpect(1)
            for delta in found.step_batch.deltas:
                from_logprobs(delta.logprobs)
                finish = from_finish(delta.finish)
                if finish.reason not in (FinishReason.STOP, FinishReason.LENGTH):
                    status.to_terminal(error_of(finish)).SerializeToString()
            for _ in from_tokens(found.step_batch.tokens):
                pass

    def renew(self) -> None:
        self._state.forget()
        self._is_attached = False

    def check(self) -> None:
        self._roster.check_integrity()
        self.renew()
        self._roster.check_integrity()
        assert self._roster.index.num_entries == 0


class Direct:
    """All of them, fed by one mutator."""

    def __init__(self, seed: int, num_messages: int) -> None:
        self.tally = FuzzTally()
        self._mutator = Mutator(seed, texts=TEXTS, numbers=NUMBERS)
        self._samples = of_kind()
        self._num_messages = num_messages
        self._front = Front(self.tally)
        self._replica = Replica(self.tally)
        self._router = Router(self.tally)
        self.memories: list[float] = []

    async def run(self) -> None:
        next_good = 0
        while self.tally.num_messages < self._num_messages:
            await self._batch()
            if self.tally.num_messages >= next_good:
                next_good += GOOD_EVERY
                await self._check()
            if self.tally.num_messages >= len(self.memories) * self._num_messages / 6:
                self._note_memory()
        await self._settle()
        self._note_memory()

    async def _batch(self) -> None:
        kinds = self._mutator.random.choices(list(SHARES), list(SHARES.values()), k=BATCH)
        sessions: list[list[bytes]] = [[]]
        for kind in kinds:
            message = self._mutator.mutated(kind, self._samples[kind])
            self.tally.sent()
            if kind is pb.SessionRequest:
                sessions[-1].append(message)
                if len(sessions[-1]) == SESSION_MESSAGES or parsed(kind, message) is None:
                    sessions.append([])
            else:
                await self._take(kind, message)
        results = await asyncio.gather(*map(self._front.hold_session, sessions), return_exceptions=True)
        for session, result in zip(sessions, results, strict=True):
            if isinstance(result, BaseException):
                self.tally.failed("Session", "raised", session, repr(result))
        self._guard("AttachRequest", self._replica.check)
        self._guard("AttachResponse", self._router.check)

    async def _take(self, kind: type[Message], message: bytes) -> None:
        try:
            if kind is data.AttachRequest:
                self._replica.take(message)
            elif kind is data.AttachResponse:
                self._router.take(message)
            else:
                await self._front.take(kind, message)
        except Exception as error:
            self.tally.failed(kind.__name__, "raised", [message], repr(error))

    def _guard(self, target: str, check: Callable[[], None]) -> None:
        try:
            check()
        except Exception as error:
            self.tally.failed(target, "left something", [], repr(error))

    async def _check(self) -> None:
        if not await self._front.is_answered():
            self.tally.failed("Generate", "a good request was not answered", [])

    async def _settle(self) -> None:
        """Wait until nothing is left; what is, is a failure."""
        end = time.monotonic() + SETTLE_S
        while self._front.intake.num_open and time.monotonic() < end:  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(0.05)
        await self._front.sessions.stop()
        if self._front.intake.num_open or self._front.intake.num_accepted != self._front.intake.num_ended:
            self.tally.failed("front", f"{self._front.intake.num_open} answers are left", [])

    def _note_memory(self) -> None:
        gc.collect()
        self.memories.append(process_tree.pss_bytes(os.getpid()) / 2**20)


def main() -> None:
    """Do the job of the command line and print what became of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=json.loads)
    job: dict[str, Any] = parser.parse_args().job
    errors = LoggedErrors()
    logging.getLogger().addHandler(errors)
    random.seed(job["seed"])

    async def run() -> Direct:
        direct = Direct(job["seed"], job["messages"])
        await direct.run()
        return direct

    direct = asyncio.run(run())
    for text in errors.texts:
        direct.tally.failed("log", "an error was logged", [], text)
    print(json.dumps({**direct.tally.to_dict(), "memories": direct.memories}), flush=True)


if __name__ == "__main__":
    main()
