"""Which works run on this replica for which router, and what each router has not been told: the data plane's books.

Owns attached routers, their outboxes, live works, and the set of resident blocks. Commands of routers go into the
engine, what the engine says goes into the outboxes. Has no gRPC, no asyncio and no thread: `data_plane` moves messages.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from octavo.internal.v1 import data_plane_pb2 as pb
from octavo.names import Reason

from workers.ledger_entries import AttachedRouter, LiveWork
from workers.outbox import Outbox
from workers.step_telemetry import StepTelemetry
from workers.types import (
    CAPABILITY_GENERATE,
    CAPABILITY_POOL,
    Engine,
    Finish,
    FinishReason,
    GenerateWork,
    KvEvent,
    KvEventKind,
    PoolWork,
    TokenDelta,
    Work,
    WorkId,
    needed_capabilities,
    pool_capabilities,
)
from workers.wire import from_work
from workers.work_spans import WorkSpans

MAX_HELD_CHOICES = 16_384
"""That a replica takes on at once. Routers that keep to its credit send a few dozen more than it computes."""
MAX_UNTOLD_CHOICES = 2 * MAX_HELD_CHOICES
"""All that are held may have news at once. What is turned down beyond that comes from no router of ours."""
PROMPT_BLOCKS = 8
"""So many blocks that come or go in one step are those of a prompt; answers fill one now and then."""


class BadDispatchError(Exception):
    """A router that proved itself says what none of ours would."""


class WorkLedger:
    """The books over `engine`. One thread. `steps` is told which works are sampled whenever outputs are collected."""

    def __init__(self, engine: Engine, replica_id: str, steps: StepTelemetry | None = None) -> None:
        self._engine = engine
        self._replica_id = replica_id
        self._steps = steps
        self._routers: dict[str, AttachedRouter] = {}
        self._works: dict[WorkId, LiveWork] = {}
        self._traced: dict[WorkId, WorkSpans] = {}
        """Of these works, the sampled ones."""
        self._num_choices = 0
        """Of all works, those that have not ended."""
        self._num_submitted = engine.load().num_taken or 0
        """As the engine counts works."""
        self.resident: dict[bytes, None] = {}
        """Hashes of the blocks in the engine's cache, as far as it was collected."""
        self.is_draining = False
        """Whether new work is turned down."""

    @property
    def num_works(self) -> int:
        """Works that the engine has and that have not ended."""
        return len(self._works)

    @property
    def routers(self) -> list[AttachedRouter]:
        return list(self._routers.values())

    def attach(self, owner: str, on_news: Callable[[bool], None], *, in_columns: bool = False) -> AttachedRouter:
        """Keep books for a router from now on. `on_news` is called when its outbox has something new; with True when
        there are tokens, or works or a prompt of other routers, with False when it can wait for company. `in_columns`:
        see `Outbox`."""
        assert owner not in self._routers
        outbox = Outbox(
            max_kv_events=2 * self._engine.info.num_blocks, resident=lambda: self.resident, in_columns=in_columns
        )
        router = self._routers[owner] = AttachedRouter(owner, outbox, on_news)
        return router

    def detach(self, router: AttachedRouter) -> None:
        """Forget a router and abort its works."""
        self._routers.pop(router.owner, None)
        for work_id, work in self._works.items():
            if work.router is router:
                self._abort_one(work_id, work)

    def submit(self, router: AttachedRouter, dispatch: pb.Dispatch, now: float) -> None:
        """Hand a router's works to the engine. Raises BadDispatchError for a work that runs already, and if the router
        is to be told of more choices than any would send."""
        batch, num_before = router.begin(dispatch.batch_id, self._engine.load().num_steps), self._num_submitted
        for message in dispatch.work:
            try:
                work = from_work(message, router.owner, now)
            except ValueError as error:
                self._turn_down(router, WorkId(router.owner, message.work_id), 1, Reason.ENGINE_CAPABILITY, str(error))
                continue
            refusal = self._refusal(work)
            if refusal is not None:
                self._turn_down(router, work.work_id, work.num_choices, *refusal)
                continue
            if work.work_id in self._works:
                raise BadDispatchError(f"work {work.work_id.number} is running already")
            spans = WorkSpans.begin(work, self._replica_id, now)
            if spans is not None:
                self._traced[work.work_id] = spans
            self._works[work.work_id] = LiveWork(router, batch, work, spans)
            batch.num_unseen += 1
            router.num_works += 1
            self._num_choices += work.num_choices
            self._num_submitted += 1
            self._engine.submit(work)
        batch.num_submitted = self._num_submitted
        if self._num_submitted > num_before:
            for other in self._routers.values():
                if other is not router:
                    other.news_of = other.news_of or self._num_submitted

    def abort(self, router: AttachedRouter, abort: pb.Abort) -> None:
        for number in abort.work_ids:
            work_id = WorkId(router.owner, number)
            work = self._works.get(work_id)
            if work is not None:
                self._abort_one(work_id, work)
        for choice in abort.choices:
            work_id = WorkId(router.owner, choice.work_id)
            work = self._works.get(work_id)
            if work is not None and choice.index in work.choices and choice.index not in work.aborted_choices:
                work.aborted_choices.add(choice.index)
                work.is_plain = False
                self._engine.abort(work_id, choice.index)

    def collect(self, *, anew: bool = False) -> None:
        """Take what the engine produced and hand it to the outboxes. With `anew` the engine is asked to tell all that
        it has in its cache, to all routers: if one was told wrong, so were the others."""
        deltas, before = self._engine.drain_outputs(), self._engine.load()
        events = self._engine.kv_events(anew=True) if anew else self._engine.kv_events()
        # After the outputs: a load that is too new only counts works as taken that are about to be seen.
        load = self._engine.load()
        # If nothing happened meanwhile, the events are all that led to what the engine has now.
        of_engine = load.resident if load.resident == before.resident else None
        self._keep_resident(events)
        if self._steps is not None:
            self._steps.tell(self._traced)  # first: the records have all steps that led to these deltas
        self._deliver(deltas)
        num_busy = sum(1 for router in self._routers.values() if router.num_works)
        num_counted = self._num_submitted if load.num_taken is None else load.num_taken
        has_prompt = len(events) >= PROMPT_BLOCKS
        for router in self._routers.values():
            router.outbox.add_kv_events(events)
            # Each gets a part of what is free: if all took the whole, all of them would wait here, out of order.
            part = load.part_of(num_busy + (not router.num_works))
            router.outbox.report(part, router.last_counted_batch(load), of_engine)
            # Until they hear of a new work, all others take this replica for the idlest and send it theirs as well;
            # until they hear of a prompt in its cache, they have others compute the same one.
            is_news = 0 < router.news_of <= num_counted
            if is_news:
                router.news_of = 0
            router.on_news(router.outbox.has_deltas or is_news or has_prompt)

    def _abort_one(self, work_id: WorkId, work: LiveWork) -> None:
        if not work.is_aborted:
            work.is_aborted, work.is_plain = True, False
            self._engine.abort(work_id)

    def _refusal(self, work: Work) -> tuple[str, str] | None:
        """Return the reason why this replica takes `work` not on, and that in words; None if it does."""
        if self.is_draining:
            return Reason.DRAINING, "this replica is draining"
        if self._num_choices + work.num_choices > MAX_HELD_CHOICES:
            return Reason.QUEUE_FULL, f"this replica has {self._num_choices} choices of works already"
        info = self._engine.info
        missing = _needed_capabilities(work) - info.capabilities
        if missing:
            return Reason.ENGINE_CAPABILITY, f"engine {info.engine} lacks the capability {', '.join(sorted(missing))}"
        return None

    def _turn_down(self, router: AttachedRouter, work_id: WorkId, number: int, reason: str, message: str) -> None:
        """End a work that the engine never saw."""
        if router.outbox.num_deltas > MAX_UNTOLD_CHOICES:
            raise BadDispatchError(f"more than {MAX_UNTOLD_CHOICES} choices wait to be told of, and works still come")
        finish = Finish(reason=FinishReason.ERROR, error_reason=reason, error_message=message)
        for index in range(number):
            router.outbox.add(TokenDelta(work_id=work_id, index=index, finish=finish))
        router.on_news(True)

    def _deliver(self, deltas: Iterable[TokenDelta]) -> None:
        """Put each delta where it belongs. Most are a token of a work that runs: these take no more than this loop."""
        works = self._works
        for delta in deltas:
            work_id, index, token_ids, logprobs, finish, num_cached_tokens, pooled = delta
            work = works.get(work_id)
            assert work is not None, "an engine ends each choice once"
            is_more = index or finish or logprobs or pooled or num_cached_tokens is not None
            if work.is_plain and token_ids and not is_more:
                work.router.outbox.add_tokens(work_id.number, token_ids)
            else:
                self._deliver_one(delta, work)

    def _deliver_one(self, delta: TokenDelta, work: LiveWork) -> None:
        if not work.is_seen:
            work.is_seen = True
            is_told = work.spans is None or self._steps is not None
            work.is_plain = is_told and not (work.is_aborted or work.aborted_choices)
            work.batch.num_unseen -= 1
        if work.spans is not None:
            work.spans.observe(delta, time.monotonic())
        finish = delta.finish
        if finish is not None:
            work.num_choices -= 1
            self._num_choices -= 1
            if work.num_choices == 0:
                del self._works[delta.work_id]
                work.router.num_works -= 1
                if work.spans is not None:
                    del self._traced[delta.work_id]
                    work.spans.end(time.monotonic())
            if finish.reason is FinishReason.CANCELLED and not work.is_unwanted(delta.index):
                # Nobody asked for it: the engine is being closed. To the request this is a lost replica.
                delta = delta._replace(finish=_lost(finish, f"replica {self._replica_id} stopped"))
        if not work.is_unwanted(delta.index):
            work.router.outbox.add(delta)

    def _keep_resident(self, events: list[KvEvent]) -> None:
        for event in events:
            if event.kind is KvEventKind.STORED:
                self.resident[event.block_hash] = None
            elif event.kind is KvEventKind.REMOVED:
                self.resident.pop(event.block_hash, None)
            else:
                self.resident.clear()


def _needed_capabilities(work: Work) -> frozenset[str]:
    if isinstance(work, GenerateWork):
        return needed_capabilities(work.sampling, work.num_logprobs, work.received) | {CAPABILITY_GENERATE}
    return pool_capabilities(work.method) if isinstance(work, PoolWork) else frozenset({CAPABILITY_POOL})


def _lost(finish: Finish, message: str) -> Finish:
    return replace(finish, reason=FinishReason.ERROR, error_reason=Reason.REPLICA_LOST, error_message=message)
