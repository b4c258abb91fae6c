"""Replicas with the engine `fake` and a clock that jumps, behind the real queue and the real placement: what is
computed, and when first tokens come. Scheduler, caches, credits and reports are the real ones."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, cast

from octavo.internal.v1 import data_plane_pb2 as pb

from router.admission import Admission
from router.config import RouterConfig
from router.flight import Flight
from router.forecast import make_queue
from router.placement import LeastCost, PromptHashes
from router.queued import Queued
from router.replica_state import ReplicaState
from router.roster import Roster
from router.types import Request
from workers.config import EngineConfig
from workers.fake import FakeEngine
from workers.outbox import Outbox
from workers.types import GenerateWork, WorkId
from workers.wire import to_hello_ack

KEY = b"key"
TURN_S = 0.002


@dataclass
class Answers:
    first_s: dict[str, float] = field(default_factory=dict)
    """By request: when its first token came, since it did."""
    num_ended: int = 0
    num_cached: int = 0
    """Prompt tokens that were not computed."""
    end_s: float = 0.0


class Replica:
    """Begins a step every `step_s`, and says what came of it when it ends."""

    def __init__(self, name: str, roster: Roster, step_s: float, offset_s: float, engine: dict[str, Any]) -> None:
        self.now = 0.0
        self._step_s = step_s
        self._next_s = offset_s
        self._engine = FakeEngine(EngineConfig(engine="fake", **engine), hash_key=KEY, clock=lambda: self.now)
        self._outbox = Outbox(max_kv_events=1 << 20, resident=lambda: ())
        self._outbox.grant(1 << 30)
        self._last_batch_id = 0
        self._ended: pb.StepBatch | None = None
        """Of the step that runs."""
        self.state = ReplicaState(name, roster)
        self.state.start(
            to_hello_ack(
                self._engine.info,
                protocol=1,
                replica_id=name,
                epoch=1,
                pid=1,
                load=self._engine.load(),
                resident=(),
            )
        )

    def send(self, work: GenerateWork, batch_id: int, num_tokens: int, hashes: list[bytes]) -> None:
        self._last_batch_id = batch_id
        self.state.sent(batch_id, num_tokens)
        self.state.expect(work.work_id.number, hashes)
        self._engine.submit(work)

    def advance(self, now: float) -> list[pb.WorkDelta]:
        """Return what came of the step that has ended by now, and begin the next one."""
        if now < self._next_s:
            return []
        self._next_s += self._step_s
        self.now = now
        ended, self._ended = self._ended, None
        self._engine.step()
        for delta in self._engine.drain_outputs():
            self._outbox.add(delta)
        self._outbox.add_kv_events(self._engine.kv_events())
        load = self._engine.load()
        self._outbox.report(load, self._last_batch_id, load.resident)
        self._ended = self._outbox.take().step_batch
        if ended is None:
            return []
        self.state.update(ended)
        assert not self.state.needs_resync
        return list(ended.deltas)


def simulate(
    plan: Iterable[Request], *, replicas: int = 2, step_s: float = 0.02, batching: bool = True, **engine: Any
) -> Answers:
    """Let `replicas` answer `plan`."""
    return _Simulation(RouterConfig(batching=batching), replicas, step_s, engine).run(plan)


class _Simulation:
    def __init__(self, config: RouterConfig, num_replicas: int, step_s: float, engine: dict[str, Any]) -> None:
        self._batcher, self._forecast = make_queue(config)
        self._admission = Admission(max_queued_tokens=1 << 30, max_queued_requests=1 << 30)
        self._placement = LeastCost(random.Random(5))
        self._roster = Roster()
        names = [f"r{i}" for i in range(num_replicas)]
        self._replicas = {
            name: Replica(name, self._roster, step_s, i * step_s / num_replicas, engine) for i, name in enumerate(names)
        }
        self._numbers = itertools.count(1)
        self._flights: dict[int, Flight] = {}
        self._answers = Answers()

    def run(self, plan: Iterable[Request]) -> Answers:
        arrivals = deque(sorted(plan, key=lambda one: one.accepted_at))
        num_arrivals, now = len(arrivals), 0.0
        while arrivals or self._flights:
            for replica in self._replicas.values():
                for delta in replica.advance(now):
                    self._take(delta, now)
            while arrivals and arrivals[0].accepted_at <= now:
                self._arrive(arrivals.popleft(), now)
            self._send(now)
            now += TURN_S
        self._batcher.check_integrity()
        self._roster.check_integrity()
        self._answers.end_s = now
        assert self._answers.num_ended == num_arrivals
        return self._answers

    def _take(self, delta: pb.WorkDelta, now: float) -> None:
        flight, answers = self._flights[delta.work_id], self._answers
        flight.num_tokens += len(delta.token_ids)
        if flight.first_token_at is None and delta.token_ids:
            flight.first_token_at = now
            answers.first_s[flight.request.request_id] = now - flight.request.accepted_at
            answers.num_cached += delta.cached_tokens
        if delta.HasField("finish"):
            self._forecast.over(self._flights.pop(delta.work_id), now, is_answered=True, is_lost=False)
            answers.num_ended += 1

    def _arrive(self, request: Request, now: float) -> None:
        key, permit = next(self._numbers), self._admission.admit(request.num_known_tokens, now)
        flight = self._flights[key] = Flight(key, request, cast(Any, None), permit)
        flight.hashes = PromptHashes(KEY, request)
        self._batcher.add(self._forecast.queued(flight, now))

    def _send(self, now: float) -> None:
        roster = self._roster
        left: list[Queued] = []
        while batch := self._batcher.next_batch(
            now,
            roster.credit_tokens,
            credit_sequences=roster.credit_sequences,
            block_size=roster.block_sizes[0],
            at_hand=roster.has_at_hand,
        ):
            left += [
                queued
                for queued in itertools.chain.from_iterable(batch.groups)
                if not self._place(queued, batch.batch_id, now)
            ]
        for queued in left:
            self._batcher.add(replace(queued, since=now))

    def _place(self, queued: Queued, batch_id: int, now: float) -> bool:
        """Send a request; return False if no replica has credit for it."""
        flight, request = self._flights[queued.key], queued.request
        assert flight.hashes is not None
        decision = self._placement.place(request, flight.hashes, self._roster)
        if decision is None:
            self._forecast.unsent(queued)
            return False
        self._forecast.sent(flight, queued, now)
        work = GenerateWork(work_id=WorkId("router", queued.key), prompt=request.prompt, max_tokens=request.max_tokens)
        num_tokens = request.num_known_tokens - decision.matched_tokens
        hashes = flight.hashes.of(self._roster.block_sizes[0])
        self._replicas[decision.replica].send(work, batch_id, num_tokens, hashes)
        return True
