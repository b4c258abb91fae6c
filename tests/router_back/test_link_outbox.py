"""What a link sends, in as few messages as it takes."""

from __future__ import annotations

import pytest
from octavo.internal.v1 import data_plane_pb2 as pb

from router import link_outbox
from router.link import MAX_MESSAGE_BYTES
from router.link_outbox import MAX_TOKENS, WINDOW_BATCHES, LinkOutbox


def test_works_of_one_batch_go_together_and_aborts_after_them() -> None:
    outbox = LinkOutbox()
    assert outbox.take() == []
    for batch_id, work_id in ((1, 10), (1, 11), (2, 12)):
        outbox.add(batch_id, pb.Work(work_id=work_id))
    outbox.abort(12, None)
    outbox.abort(10, 3)
    first, last = outbox.take()
    assert [work.work_id for work in first.dispatch.work] == [10, 11]
    assert not first.HasField("abort")
    assert last == pb.AttachRequest(
        dispatch=pb.Dispatch(batch_id=2, work=[pb.Work(work_id=12)]),
        abort=pb.Abort(work_ids=[12], choices=[pb.Abort.Choice(work_id=10, index=3)]),
    )
    assert outbox.take() == []


def test_a_batch_that_is_too_large_for_a_message_goes_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when many ask about one book, which the replica has in its cache: the message ended the stream."""
    assert 5 * MAX_TOKENS < MAX_MESSAGE_BYTES / 2
    monkeypatch.setattr(link_outbox, "MAX_TOKENS", 10)
    outbox = LinkOutbox()
    works = [
        pb.Work(work_id=1, generate=pb.Generate(prompt_token_ids=[7] * 6)),
        pb.Work(work_id=2, generate=pb.Generate(prompt_token_ids=[7] * 2, received_token_ids=[7] * 2)),
        pb.Work(work_id=3, generate=pb.Generate(received_choices=[pb.TokenIds(ids=[7]), pb.TokenIds(ids=[7] * 2)])),
        pb.Work(work_id=4, generate=pb.Generate(prompt_token_ids=[7] * 11)),
        pb.Work(work_id=5, pool=pb.Pool(token_ids=[7] * 10)),
    ]
    for work in works:
        outbox.add(1, work)
    messages = outbox.take()
    assert [[work.work_id for work in message.dispatch.work] for message in messages] == [[1, 2], [3], [4], [5]]
    assert {message.dispatch.batch_id for message in messages} == {1}
    outbox.add(1, works[0])
    assert outbox.take() == [pb.AttachRequest(dispatch=pb.Dispatch(batch_id=1, work=works[:1]))]


def test_credit_goes_back_by_the_half_window_or_with_an_abort() -> None:
    outbox = LinkOutbox()
    for _ in range(WINDOW_BATCHES // 2 - 1):
        outbox.batch_taken()
    assert not outbox.owes_credit
    assert outbox.take() == []
    outbox.batch_taken()
    assert outbox.owes_credit
    assert outbox.take() == [pb.AttachRequest(credit=pb.Credit(step_batches=WINDOW_BATCHES // 2))]
    outbox.batch_taken()
    outbox.abort(1, None)
    assert outbox.take()[0].credit.step_batches == 1
    outbox.abort(1, None)
    outbox.clear()
    assert outbox.take() == []
