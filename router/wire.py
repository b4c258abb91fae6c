"""The router's side of the data plane's messages: our values out, protobuf in, and back. Owns no state, does no I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from octavo.internal.v1 import data_plane_pb2 as pb

from router.types import PoolTask, Request
from workers.types import Finish, FinishReason, Load, SamplingParams, TokenLogprobs


def to_work(request: Request, *, work_id: int, attempt: int, now: float, traceparent: str, tracestate: str) -> pb.Work:
    """Return one attempt of `request`, whose deadline is after `now`."""
    work = pb.Work(
        work_id=work_id,
        request_id=request.request_id,
        attempt=attempt,
        priority=request.priority,
        timeout_us=_timeout_us(request.deadline - now),
        traceparent=traceparent,
        tracestate=tracestate,
        adapter=request.adapter,
        salt=request.salt,
    )
    if request.pool is not None:
        _fill_pool(work.pool, request.prompt, request.pool)
    else:
        _fill_generate(work.generate, request)
    return work


def _fill_pool(message: pb.Pool, tokens: Sequence[int], task: PoolTask) -> None:
    message.token_ids.extend(tokens)
    message.method = task.method
    message.normalize = bool(task.normalize)
    message.normalizes_by_model = task.normalize is None
    message.num_first_tokens = task.num_first_tokens


def _fill_generate(message: pb.Generate, request: Request) -> None:
    message.prompt_token_ids.extend(request.prompt)
    message.max_tokens = request.max_tokens
    message.min_tokens = request.min_tokens
    message.stop_token_ids.extend(sorted(request.stop_token_ids))
    message.n = request.n
    message.sampling.CopyFrom(_to_sampling(request.sampling))
    if len(request.received) == 1:
        message.received_token_ids.extend(request.received[0])
    else:
        message.received_choices.extend(pb.TokenIds(ids=token_ids) for token_ids in request.received)
    if request.num_logprobs is not None:
        message.num_logprobs = request.num_logprobs


def _timeout_us(left_s: float) -> int:
    """Return 0, no deadline, for an infinite one only."""
    return 0 if left_s == float("inf") else max(1, min(int(left_s * 1e6), 2**63))


def _to_sampling(sampling: SamplingParams) -> pb.SamplingParams:
    kind, text = sampling.format or ("", "")
    return pb.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed,
        logit_bias=sampling.logit_bias,
        format_kind=kind,
        format=text,
    )


def from_tokens(message: pb.WorkTokens) -> Iterator[tuple[int, list[int]]]:
    """Yield the number and the tokens of each work. Raises ValueError if there are more or fewer of them than said,
    or none of a work."""
    token_ids, start = list(message.token_ids), 0
    for number, num_tokens in zip(message.work_ids, message.num_tokens, strict=True):
        if not num_tokens:
            raise ValueError(f"a StepBatch must have tokens of each work that it names, has none of work {number}")
        end = start + num_tokens
        yield number, token_ids[start:end]
        start = end
    if start != len(token_ids):
        raise ValueError(f"a StepBatch must have the tokens that it counts, {start}, has {len(token_ids)}")


def from_logprobs(messages: Iterable[pb.TokenLogprobs]) -> list[TokenLogprobs]:
    return [
        TokenLogprobs(message.logprob, tuple(zip(message.top_token_ids, message.top_logprobs, strict=True)))
        for message in messages
    ]


def from_finish(message: pb.Finish) -> Finish:
    """A reason that this release does not know is an error."""
    try:
        reason = FinishReason(message.reason)
    except ValueError:
        reason = FinishReason.ERROR
    return Finish(
        reason=reason,
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
        error_reason=message.error_reason,
        error_message=message.error_message,
        queue_s=message.queue_s,
        prefill_s=message.prefill_s,
        decode_s=message.decode_s,
        num_preemptions=message.num_preemptions,
        num_steps=message.num_steps,
    )


def from_load(message: pb.Load, num_steps: int = 0) -> Load:
    return Load(
        num_running=message.num_running,
        num_waiting=message.num_waiting,
        num_blocks=message.num_blocks,
        num_free_blocks=message.num_free_blocks,
        owed_prefill_tokens=message.owed_prefill_tokens,
        credit_tokens=message.credit_tokens,
        credit_sequences=message.credit_sequences if message.HasField("credit_sequences") else None,
        num_preemptions=message.num_preemptions,
        prefix_cache_queries=message.prefix_cache_queries,
        prefix_cache_hits=message.prefix_cache_hits,
        num_computed_tokens=message.num_computed_tokens,
        num_steps=num_steps,
        num_drafted_tokens=message.num_drafted_tokens,
        num_accepted_tokens=message.num_accepted_tokens,
    )
