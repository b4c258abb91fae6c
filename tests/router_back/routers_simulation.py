"""Several routers before replicas with the engine `fake`, under a clock that jumps: where requests go, and what is
computed there. Placement, books of both sides, scheduler and caches are the real ones; messages take `DELAY_S`."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from octavo.internal.v1 import data_plane_pb2 as pb

from router.placement import LeastCost, PromptHashes
from router.replica_state import ReplicaState
from router.roster import Roster
from router.types import Request
from router.wire import to_work
from workers.config import EngineConfig
from workers.fake import FakeEngine
from workers.ledger_entries import AttachedRouter
from workers.wire import to_hello_ack
from workers.work_ledger import WorkLedger

KEY = b"key"
TICK_S, STEP_S, DELAY_S = 0.001, 0.005, 0.008
BLOCK, NUM_BLOCKS, CHUNK_TOKENS = 16, 128, 256


@dataclass
class Outcome:
    computed: Counter[str] = field(default_factory=Counter)
    """Tokens by replica."""
    num_cached: int = 0
    """Prompt tokens that were not computed."""
    num_ended: int = 0

    @property
    def balance(self) -> float:
        """The most loaded replica over the mean, in computed tokens."""
        return max(self.computed.values()) * len(self.computed) / self.computed.total()


class _Router:
    def __init__(self, name: str, rng: random.Random) -> None:
        self.name = name
        self.roster = Roster()
        self.placement = LeastCost(rng)
        self.states: dict[str, ReplicaState] = {}
        self.attached: dict[str, AttachedRouter] = {}
        self.waiting: deque[Request] = deque()
        self.num_sent = 0


class _Replica:
    def __init__(self, name: str, routers: Iterable[_Router], offset_s: float) -> None:
        self.name = name
        self.now = 0.0
        self._next_s = offset_s
        config = EngineConfig(
            engine="fake", num_blocks=NUM_BLOCKS, block_size=BLOCK, chunk_tokens=CHUNK_TOKENS, max_num_sequences=64
        )
        self.engine = FakeEngine(config, hash_key=KEY, clock=lambda: self.now)
        self.ledger = WorkLedger(self.engine, name)
        self._news: dict[str, bool] = {}
        for router in routers:
            attached = self.ledger.attach(router.name, self._note(router.name))
            attached.outbox.grant(1 << 30)
            router.attached[name] = attached
            state = router.states[name] = ReplicaState(name, router.roster)
            load = self.engine.load()
            ack = to_hello_ack(self.engine.info, protocol=1, replica_id=name, epoch=1, pid=1, load=load, resident=())
            state.start(ack)

    def _note(self, router: str) -> Callable[[bool], None]:
        def on_news(is_urgent: bool) -> None:
            self._news[router] = is_urgent or self._news.get(router, False)

        return on_news

    def advance(self, now: float) -> list[str]:
        """Return the names of the routers to which a message goes, if a step has ended by now."""
        if now < self._next_s:
            return []
        self._next_s += STEP_S
        self.now = now
        self.engine.step()
        self._news.clear()
        self.ledger.collect()
        return [name for name, is_urgent in self._news.items() if is_urgent]


class _Simulation:
    def __init__(self, num_routers: int, num_replicas: int, seed: int) -> None:
        rng = random.Random(seed)
        self.routers = {f"router-{i}": _Router(f"router-{i}", random.Random(rng.random())) for i in range(num_routers)}
        names = [f"r{i}" for i in range(num_replicas)]
        self.replicas = {name: _Replica(name, self.routers.values(), rng.uniform(0, STEP_S)) for name in names}
        self.outcome = Outcome()
        self._messages: deque[tuple[float, _Router, str, pb.StepBatch]] = deque()
        self._dispatches: deque[tuple[float, _Router, str, pb.Dispatch]] = deque()

    def run(self, plan: Iterable[Request]) -> Outcome:
        arrivals, turn = deque(sorted(plan, key=lambda request: request.accepted_at)), 0
        num_arrivals, routers, now = len(arrivals), list(self.routers.values()), 0.0
        while self.outcome.num_ended < num_arrivals:
            while self._messages and self._messages[0][0] <= now:
                _, router, name, batch = self._messages.popleft()
                self._take(router, name, batch)
            while self._dispatches and self._dispatches[0][0] <= now:
                _, router, name, dispatch = self._dispatches.popleft()
                self.replicas[name].ledger.submit(router.attached[name], dispatch, now)
            for replica in self.replicas.values():
                for name in replica.advance(now):
                    router = self.routers[name]
                    message = router.attached[replica.name].outbox.take()
                    self._messages.append((now + DELAY_S, router, replica.name, message.step_batch))
            while arrivals and arrivals[0].accepted_at <= now:
                routers[turn % len(routers)].waiting.append(arrivals.popleft())
                turn += 1
            for router in routers:
                while router.waiting and self._send(router, router.waiting[0], now):
                    router.waiting.popleft()
            now += TICK_S
        for router in routers:
            router.roster.check_integrity()
        for replica in self.replicas.values():
            self.outcome.computed[replica.name] = replica.engine.load().num_computed_tokens
        return self.outcome

    def _send(self, router: _Router, request: Request, now: float) -> bool:
        hashes = PromptHashes(KEY, request)
        decision = router.placement.place(request, hashes, router.roster)
        if decision is None:
            return False
        router.num_sent += 1
        number, state = router.num_sent, router.states[decision.replica]
        state.sent(number, request.num_known_tokens - decision.matched_tokens)
        state.expect(number, hashes.of(BLOCK))
        work = to_work(request, work_id=number, attempt=1, now=now, traceparent="", tracestate="")
        dispatch = pb.Dispatch(batch_id=number, work=[work])
        self._dispatches.append((now + TICK_S, router, decision.replica, dispatch))
        return True

    def _take(self, router: _Router, name: str, batch: pb.StepBatch) -> None:
        state = router.states[name]
        state.update(batch)
        assert not state.needs_resync
        for delta in batch.deltas:
            self.outcome.num_cached += delta.cached_tokens
            self.outcome.num_ended += delta.HasField("finish")


def simulate(plan: Iterable[Request], *, routers: int, replicas: int = 8, seed: int = 1) -> Outcome:
    """Let `replicas` answer `plan`, a part of it through each of `routers` in turn."""
    return _Simulation(routers, replicas, seed).run(plan)
