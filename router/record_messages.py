"""A `RequestRecord` as protobuf, for StatusService. Made when somebody asks."""

from __future__ import annotations

from octavo.v1 import status_service_pb2 as pb

from router.accounts import Accounts, fill_decision
from router.request_record import RequestRecord
from router.status import message_of_text
from router.types import Attempt


def to_message(record: RequestRecord, router_id: str) -> pb.RequestRecord:
    accounts, start = record.accounts, record.accepted_at
    message = pb.RequestRecord(
        request_id=record.request_id,
        trace_id=record.trace_id,
        tenant=record.tenant,
        model=record.model,
        router=router_id,
        is_session=record.is_session,
        arrived_at=record.unix_time - record.duration_s,
        duration_s=record.duration_s,
        is_running=not record.is_ended,
        code=record.code,
        reason=record.reason,
        message=message_of_text(record.message, record.code) if record.reason else "",
        priority=record.priority,
        timeout_s=record.deadline - start,
        has_own_deadline=record.has_own_deadline,
        num_choices=record.num_choices,
        max_tokens=record.max_tokens,
        prompt_tokens=record.num_prompt,
        generated_tokens=record.num_generated,
        received_tokens=record.num_received,
        finish_reasons=record.finish_reasons,
        queued_at_s=_after(start, accounts.submitted_at if record.has_begun else None),
        first_token_at_s=_after(start, accounts.first_token_at),
        computed_at_s=_after(start, accounts.over_at if record.has_begun else None),
        num_messages=accounts.num_messages,
        sent_tokens=accounts.num_taken,
        first_sent_at_s=_after(start, accounts.first_taken_at),
        last_sent_at_s=_after(start, accounts.taken_at),
        num_attachments=accounts.num_attachments,
        operation=record.operation,
    )
    if not record.is_ended:
        _see_last(record)
    for attempt in record.attempts:
        _fill_attempt(message.attempts.add(), attempt, start)
    if accounts.has_finish:
        _fill_engine(message.attempts[-1].engine, accounts)
    return message


def _see_last(record: RequestRecord) -> None:
    """Note in the attempt that lasts what the front has of it; the back does so when it ends."""
    if record.attempts and (last := record.attempts[-1]).left_at is None:
        num_before = sum(attempt.num_tokens for attempt in record.attempts[:-1])
        last.num_tokens = record.num_generated - record.num_received - num_before
        first_token_at = record.accounts.first_token_at
        if first_token_at is not None and first_token_at >= last.sent_at:
            last.first_token_at = first_token_at


def _fill_attempt(message: pb.RequestRecord.Attempt, attempt: Attempt, start: float) -> None:
    wait, batch = attempt.wait, attempt.batch
    message.MergeFrom(
        pb.RequestRecord.Attempt(
            queued_at_s=wait.since - start,
            wait_s=wait.duration_s,
            no_replica_s=wait.no_replica_s,
            full_s=wait.full_s,
            num_waiting=wait.num_waiting,
            num_gone=wait.num_gone,
            batch_id=batch.batch_id,
            batch_requests=batch.num_requests,
            batch_tokens=batch.num_tokens,
            sent_at_s=attempt.sent_at - start,
            cached_tokens=attempt.num_cached,
            first_token_at_s=_after(start, attempt.first_token_at),
            num_tokens=attempt.num_tokens,
            left_at_s=_after(start, attempt.left_at),
            loss_reason=attempt.loss_reason,
            loss=attempt.loss,
        )
    )
    fill_decision(message.decision, attempt.decision)


def _fill_engine(message: pb.RequestRecord.Engine, accounts: Accounts) -> None:
    message.queue_s = accounts.engine_queue_s
    message.prefill_s = accounts.prefill_s
    message.decode_s = accounts.decode_s
    message.num_steps = accounts.num_steps
    message.num_preemptions = accounts.num_preemptions


def _after(start: float, at: float | None) -> float | None:
    return None if at is None else at - start
