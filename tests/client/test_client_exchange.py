"""The pure parts by themselves: an answer over random breaks, messages that merge, waits that grow."""

from __future__ import annotations

import random

import pytest
from octavo.client.answer import Delta
from octavo.client.backoff import Backoff
from octavo.client.errors import InternalError
from octavo.client.exchange import Exchange
from octavo.client.outbox import Outbox
from octavo.v1 import inference_service_pb2 as pb
from octavo.v1 import types_pb2


def make_exchange(request_id: str = "r", *, window: int = 6, n: int = 1, num_bytes: int = 0) -> Exchange:
    request = pb.GenerateRequest(n=n, prompt=types_pb2.Prompt(text="x" * num_bytes))
    return Exchange(request_id, request, window=window, deadline=None, changed=lambda: None)


@pytest.mark.parametrize("seed", range(200))
def test_any_breaks_give_the_same_answer_within_the_window(seed: int) -> None:
    """A router with a journal, a Session that breaks at random, a reader that dawdles: two choices of 30 tokens."""
    dice = random.Random(seed)
    window = dice.choice([1, 2, 5, 16])
    exchange = make_exchange(window=window, n=2)
    read: list[list[int]] = [[], []]
    sent, allowed = [0, 0], 0
    is_attached = False
    while not (exchange.is_whole and [len(tokens) for tokens in read] == [30, 30]):
        action = dice.choice(["send", "send", "read", "read", "break"])
        if not is_attached:
            start = exchange.start(0.0)
            sent = list(start.attach_offsets) or [0, 0]
            allowed, is_attached = start.window, True
        elif action == "break" and dice.random() < 0.2:
            is_attached = False
        elif action == "send" and allowed:
            index = dice.randrange(2)
            size = min(dice.randint(1, 4), 30 - sent[index], allowed)
            if size == 0:
                continue
            delta = types_pb2.Delta(index=index, token_offset=sent[index])
            delta.token_ids.extend(range(sent[index], sent[index] + size))
            sent[index] += size
            allowed -= size
            if sent[index] == 30:
                delta.finish.reason = types_pb2.FINISH_REASON_LENGTH
            exchange.deliver(delta)
        elif action == "read":
            taken: Delta | None = exchange.take()
            if taken is not None:
                read[taken.index].extend(taken.token_ids)
                allowed += exchange.take_grant()
        assert exchange.num_buffered_tokens <= window
        assert allowed + exchange.num_buffered_tokens <= window
    assert read == [list(range(30))] * 2


def test_what_was_there_before_counts_as_here() -> None:
    """A second Start before any token is for a router that may know the request, or not."""
    received = [types_pb2.TokenIds(ids=[1, 2, 3])]
    request = pb.GenerateRequest(received_token_ids=received)
    exchange = Exchange("r", request, window=9, deadline=None, changed=lambda: None)
    assert not exchange.start(0.0).attach_offsets
    assert list(exchange.start(0.0).attach_offsets) == [3]
    assert not exchange.has_tokens
    exchange.deliver(types_pb2.Delta(token_ids=[4, 5], token_offset=3))
    assert exchange.has_tokens
    assert list(exchange.start(0.0).attach_offsets) == [5]
    with pytest.raises(InternalError):
        exchange.deliver(types_pb2.Delta(token_ids=[7], token_offset=6))


def test_nothing_is_kept_for_an_absurd_number_of_choices() -> None:
    assert len(make_exchange(n=2**31 - 1).finishes) == 1024


def test_what_cannot_be_is_refused() -> None:
    exchange = make_exchange()
    exchange.deliver(types_pb2.Delta(token_ids=[1, 2]))
    for wrong in (
        types_pb2.Delta(token_ids=[4], token_offset=3),
        types_pb2.Delta(token_ids=[2, 3], token_offset=1),
        types_pb2.Delta(token_ids=[1], index=1),
    ):
        with pytest.raises(InternalError):
            exchange.deliver(wrong)
    exchange.deliver(types_pb2.Delta(token_ids=[1, 2]))
    exchange.deliver(types_pb2.Delta(text="held back", token_offset=2, finish=types_pb2.Finish()))
    exchange.deliver(types_pb2.Delta(text="again", token_offset=2, finish=types_pb2.Finish()))
    assert [delta.text for delta in iter(exchange.take, None)] == ["", "held back"]


def test_a_message_has_all_that_is_pending() -> None:
    outbox = Outbox()
    for i in range(3):
        outbox.start(make_exchange(f"r{i}"))
    outbox.grant("running", 3)
    outbox.grant("running", 4)
    outbox.grant("r1", 9)
    outbox.cancel("old")
    assert not outbox.cancel("r2"), "its start never left"
    message, started = outbox.take(0.0)
    assert [start.request_id for start in message.starts] == ["r0", "r1"]
    assert [exchange.request_id for exchange in started] == ["r0", "r1"]
    assert [cancel.request_id for cancel in message.cancels] == ["old"]
    assert [(grant.request_id, grant.tokens) for grant in message.grants] == [("running", 7)]
    assert not outbox


def test_large_starts_travel_apart_and_no_cancel_overtakes_its_start() -> None:
    outbox = Outbox(max_start_bytes=1000)
    for name in ("a", "b", "c"):
        outbox.start(make_exchange(name, num_bytes=600))
    outbox.cancel("c", after_start=True)
    messages = []
    while outbox:
        messages.append(outbox.take(0.0)[0])
    assert [[start.request_id for start in message.starts] for message in messages] == [["a"], ["b"], ["c"]]
    assert [[cancel.request_id for cancel in message.cancels] for message in messages] == [[], [], ["c"]]


def test_what_came_of_answers_counts_as_what_their_starts_bring() -> None:
    """Many that had come far made one message together, which no router took."""
    outbox = Outbox(max_start_bytes=1000)
    for name in ("a", "b"):
        exchange = make_exchange(name, window=1000)
        exchange.start(0.0)
        exchange.deliver(types_pb2.Delta(token_ids=range(400)))
        outbox.start(exchange)
    message, _ = outbox.take(0.0)
    assert [start.request_id for start in message.starts] == ["a"]
    assert message.starts[0].request.ByteSize() <= outbox.take(0.0)[1][0].num_bytes


def test_waits_double_up_to_a_limit() -> None:
    backoff = Backoff(first_s=0.1, max_s=1.0, random=random.Random(1))
    for failures, whole in ((1, 0.1), (2, 0.2), (3, 0.4), (5, 1.0), (500, 1.0)):
        assert whole / 2 <= backoff.delay(failures) <= whole
