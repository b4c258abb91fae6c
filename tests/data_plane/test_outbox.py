"""What waits for one router, and how it is merged."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo.internal.v1 import data_plane_pb2 as pb

from router.wire import from_tokens
from workers import outbox as outbox_module
from workers.outbox import MAX_DELTA_BYTES, Outbox
from workers.types import Finish, FinishReason, KvEvent, KvEventKind, Load, TokenDelta, TokenLogprobs, WorkId
from workers.wire import num_bytes

STORED, REMOVED, CLEARED = KvEventKind.STORED, KvEventKind.REMOVED, KvEventKind.CLEARED


def make_outbox(
    *, credit: int = 10, max_kv_events: int = 100, resident: tuple[bytes, ...] = (), in_columns: bool = False
) -> Outbox:
    outbox = Outbox(max_kv_events=max_kv_events, resident=lambda: resident, in_columns=in_columns)
    outbox.grant(credit)
    return outbox


def block(number: int) -> bytes:
    return number.to_bytes(16, "little")


def delta(number: int, *token_ids: int, index: int = 0, **fields: object) -> TokenDelta:
    return TokenDelta(work_id=WorkId("r", number), index=index, token_ids=token_ids, **fields)  # type: ignore[arg-type]


def test_deltas_of_one_choice_become_one_in_order_of_their_first() -> None:
    outbox = make_outbox()
    finish = Finish(reason=FinishReason.STOP, stop_token_id=4, queue_s=1.0, prefill_s=2.0, decode_s=3.0)
    for one in (
        delta(1, 1, num_cached_tokens=0, logprobs=(TokenLogprobs(-1.0, ((1, -1.0), (2, -2.0))),)),
        delta(2, 7, num_cached_tokens=16),
        delta(1, 2, index=1),
        delta(1, 3, 4, finish=finish),
    ):
        outbox.add(one)
    assert outbox.has_deltas
    first, second, third = outbox.take().step_batch.deltas
    assert (first.work_id, first.index, list(first.token_ids)) == (1, 0, [1, 3, 4])
    assert first.HasField("cached_tokens")
    assert first.cached_tokens == 0
    assert first.logprobs[0].logprob == -1.0
    assert list(first.logprobs[0].top_token_ids) == [1, 2]
    assert (first.finish.reason, first.finish.stop_token_id, first.finish.decode_s) == ("stop", 4, 3.0)
    assert (second.work_id, list(second.token_ids), second.cached_tokens) == (2, [7], 16)
    assert (third.work_id, third.index) == (1, 1)
    assert not third.HasField("cached_tokens")
    assert not third.HasField("finish")
    assert outbox.is_empty


def test_plain_tokens_go_in_columns_to_those_who_know_them() -> None:
    for in_columns in (True, False):
        outbox = make_outbox(in_columns=in_columns)
        for number, *token_ids in ((3, 1), (1, 2), (3, 4, 5), (2, 6)):
            outbox.add_tokens(number, token_ids)
        assert outbox.has_deltas
        batch = outbox.take().step_batch
        expected = {3: [1, 4, 5], 1: [2], 2: [6]}
        assert dict(from_tokens(batch.tokens)) == (expected if in_columns else {})
        assert {d.work_id: list(d.token_ids) for d in batch.deltas} == ({} if in_columns else expected)
        assert outbox.is_empty


def test_a_work_with_more_to_say_is_in_no_column() -> None:
    """Whatever comes first: its tokens keep their order, and it is told of once."""
    outbox = make_outbox(in_columns=True)
    outbox.add(delta(1, 1, num_cached_tokens=8))
    outbox.add_tokens(1, [2])
    outbox.add_tokens(2, [7])
    outbox.add(delta(2, 8, index=1))
    outbox.add_tokens(3, [4])
    outbox.add(delta(3, 5, finish=Finish(reason=FinishReason.LENGTH)))
    batch = outbox.take().step_batch
    told = [(d.work_id, d.index, list(d.token_ids)) for d in batch.deltas]
    assert told == [(1, 0, [1, 2]), (2, 1, [8]), (3, 0, [4, 5])]
    assert dict(from_tokens(batch.tokens)) == {2: [7]}


@given(st.lists(st.tuples(st.integers(1, 3), st.booleans(), st.booleans()), max_size=30))
def test_every_token_is_told_once_and_in_order(steps: list[tuple[int, bool, bool]]) -> None:
    """Steps: whose token, whether something else is said with it, whether a message is taken after it."""
    outbox = make_outbox(credit=100, in_columns=True)
    said: dict[int, list[int]] = {1: [], 2: [], 3: []}
    heard: dict[int, list[int]] = {1: [], 2: [], 3: []}
    for token, (number, is_plain, is_taken) in enumerate([*steps, (1, True, True)]):
        said[number].append(token)
        if is_plain:
            outbox.add_tokens(number, (token,))
        else:
            outbox.add(delta(number, token, num_cached_tokens=0))
        if is_taken:
            batch = outbox.take().step_batch
            columns = dict(from_tokens(batch.tokens))
            assert not columns.keys() & {d.work_id for d in batch.deltas}
            for number_told, token_ids in [*columns.items(), *((d.work_id, d.token_ids) for d in batch.deltas)]:
                heard[number_told] += token_ids
    assert heard == said


def test_more_numbers_than_a_message_may_have_go_in_several() -> None:
    """As one message they were more than gRPC sends: the stream broke, and all works on it with it, again and again."""
    outbox = make_outbox(credit=0)
    numbers = (0.5,) * (MAX_DELTA_BYTES // 4 * 2 // 5)
    for number in range(5):
        outbox.add(delta(number, pooled=numbers, finish=Finish(reason=FinishReason.STOP)))
    outbox.add_tokens(7, [1])
    outbox.report(Load(num_steps=5), 3)
    assert outbox.num_deltas == 5
    found = []
    while not outbox.is_empty:
        assert outbox.has_deltas
        outbox.grant(1)
        response = outbox.take()
        assert response.ByteSize() <= MAX_DELTA_BYTES
        assert not outbox.can_take, "each costs a credit"
        found.append(response.step_batch)
    assert [[d.work_id for d in batch.deltas] for batch in found] == [[0, 1], [2, 3], [4, 7]]
    assert [batch.HasField("load") for batch in found] == [False, False, True]
    assert outbox.num_deltas == 0


TEXTS = st.text(max_size=20)
LOGPROBS = st.builds(TokenLogprobs, st.just(-1.5), st.lists(st.tuples(st.integers(0, 2**32 - 1), st.just(-2.5))))
FINISHES = st.builds(
    Finish,
    reason=st.sampled_from(FinishReason),
    stop_token_id=st.sampled_from([None, 2**32 - 1]),
    error_reason=TEXTS,
    error_message=TEXTS,
    queue_s=st.just(0.1),
    prefill_s=st.just(0.1),
    decode_s=st.just(0.1),
    num_preemptions=st.integers(0, 2**31 - 1),
    num_steps=st.integers(0, 2**31 - 1),
)
DELTAS = st.builds(
    TokenDelta,
    st.builds(WorkId, st.just("r"), st.sampled_from([1, 2**64 - 1])),
    st.sampled_from([0, 2**32 - 1]),
    st.lists(st.integers(0, 2**32 - 1), max_size=3),
    st.lists(LOGPROBS, max_size=3),
    st.none() | FINISHES,
    st.sampled_from([None, 0, 2**32 - 1]),
    st.lists(st.just(0.5), max_size=40),
)


@given(st.lists(DELTAS, max_size=12), st.integers(300, 900))
def test_no_message_is_larger_than_the_bound_and_nothing_is_lost(deltas: list[TokenDelta], bound: int) -> None:
    """`bound` is less than the largest delta, which goes alone."""
    outbox = make_outbox(credit=100)
    messages: list[pb.AttachResponse] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(outbox_module, "MAX_DELTA_BYTES", bound)
        for one in deltas:
            outbox.add(one)
    while outbox.can_take:
        messages.append(outbox.take())
    for message in messages:
        is_alone = len(message.step_batch.deltas) == 1
        assert message.ByteSize() <= bound or is_alone
    for one in deltas:
        alone = make_outbox()
        alone.add(one)
        assert alone.take().ByteSize() <= num_bytes(one)
    told = [(d.work_id, d.index, x) for m in messages for d in m.step_batch.deltas for x in d.token_ids]
    assert sorted(told) == sorted((d.work_id.number, d.index, x) for d in deltas for x in d.token_ids)
    assert sum(len(d.pooled) for m in messages for d in m.step_batch.deltas) == sum(len(d.pooled) for d in deltas)


def test_columns_that_do_not_add_up_are_no_message() -> None:
    for bad in (
        pb.WorkTokens(work_ids=[1, 2], num_tokens=[1], token_ids=[5]),
        pb.WorkTokens(work_ids=[1], num_tokens=[2], token_ids=[5]),
        pb.WorkTokens(work_ids=[1], num_tokens=[1], token_ids=[5, 6]),
    ):
        with pytest.raises(ValueError, match=r"zip|tokens that it counts"):
            list(from_tokens(bad))


def test_a_message_costs_a_credit() -> None:
    outbox = make_outbox(credit=1)
    assert not outbox.can_take
    outbox.add(delta(1, 1))
    assert outbox.can_take
    outbox.take()
    outbox.add(delta(1, 2))
    assert not outbox.can_take
    outbox.grant(1)
    assert list(outbox.take().step_batch.deltas[0].token_ids) == [2]


def test_the_last_load_counts() -> None:
    outbox = make_outbox()
    outbox.report(Load(num_running=1, num_steps=5), 3)
    outbox.report(Load(num_running=2, num_steps=6), 4)
    batch = outbox.take().step_batch
    assert (batch.load.num_running, batch.step, batch.last_batch_id) == (2, 6, 4)
    outbox.add(delta(1, 1))
    assert not outbox.take().step_batch.HasField("load")


def test_draining_needs_no_credit_and_is_said_once() -> None:
    outbox = make_outbox(credit=0)
    outbox.add(delta(1, 1))
    outbox.announce_draining(2.5)
    response = outbox.take()
    assert response.draining.grace_us == 2_500_000
    assert not response.HasField("step_batch")
    assert not outbox.can_take
    outbox.grant(1)
    assert not outbox.take().HasField("draining")


def test_too_many_events_become_the_whole_set() -> None:
    outbox = make_outbox(max_kv_events=4, resident=(block(1), block(2)))
    outbox.add_kv_events(KvEvent(REMOVED, block(i)) for i in range(5))
    events = outbox.take().step_batch.kv_events
    assert events == pb.KvEvents(cleared=True, stored=block(1) + block(2))


@given(st.lists(st.one_of(st.tuples(st.sampled_from([STORED, REMOVED]), st.integers(0, 3)), st.none()), max_size=40))
def test_a_reader_of_merged_events_knows_the_resident_set(steps: list[tuple[KvEventKind, int] | None]) -> None:
    """None stands for a message taken."""
    truth: set[bytes] = set()
    known: set[bytes] = set()
    outbox = Outbox(max_kv_events=3, resident=lambda: truth)
    outbox.grant(100)
    for step in [*steps, None]:
        if step is not None:
            kind, number = step
            if kind is STORED:
                truth.add(block(number))
            else:
                truth.discard(block(number))
            outbox.add_kv_events([KvEvent(kind, block(number))])
            continue
        if outbox.is_empty:
            continue
        events = outbox.take().step_batch.kv_events
        if events.cleared:
            known.clear()
        known -= {events.removed[i : i + 16] for i in range(0, len(events.removed), 16)}
        known |= {events.stored[i : i + 16] for i in range(0, len(events.stored), 16)}
    assert known == truth


def test_cleared_voids_what_came_before_it() -> None:
    outbox = make_outbox()
    outbox.add_kv_events([KvEvent(STORED, block(1)), KvEvent(CLEARED), KvEvent(STORED, block(2))])
    assert outbox.take().step_batch.kv_events == pb.KvEvents(cleared=True, stored=block(2))
    outbox.add_kv_events([KvEvent(CLEARED)])
    assert outbox.take().step_batch.kv_events == pb.KvEvents(cleared=True)
