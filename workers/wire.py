"""The replica's side of the data plane's messages: protobuf in, our values out, and back.

Owns no state and does no I/O. A router has proven the cluster's secret before anything of it is read, so its works are
taken as they are, but for what would take the memory of all others; what an engine cannot do, it says itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from octavo.internal.v1 import data_plane_pb2 as pb

from workers.types import (
    EngineInfo,
    Finish,
    GenerateWork,
    Load,
    PoolWork,
    SamplingParams,
    TokenDelta,
    Work,
    WorkId,
)

SHARED_FIELDS = ("request_id", "attempt", "priority", "traceparent", "tracestate", "adapter", "salt")
"""Of every kind of work, called the same on the wire."""
DELTA_BYTES, LOGPROBS_BYTES = 128, 24
"""Of what surrounds the numbers of a delta, and those of a token's log probabilities."""
MAX_CHOICES = 1_024
"""Of one work: each is a sequence, made before anything else is known of it."""


def from_work(message: pb.Work, owner: str, now: float) -> Work:
    """Return the work for the engine, which has come `now`; its deadline counts from then. Raises ValueError for what
    no engine knows."""
    shared: dict[str, Any] = {name: getattr(message, name) for name in SHARED_FIELDS}
    shared["work_id"] = WorkId(owner, message.work_id)
    shared["arrived_at"] = now
    shared["deadline"] = now + message.timeout_us / 1e6 if message.timeout_us else None
    kind = message.WhichOneof("work")
    if kind == "generate":
        return _from_generate(message.generate, shared)
    if kind == "pool":
        pool = message.pool
        return PoolWork(
            tokens=list(pool.token_ids),
            method=pool.method,
            normalize=None if pool.normalizes_by_model else pool.normalize,
            num_first_tokens=pool.num_first_tokens,
            **shared,
        )
    raise ValueError("this release knows works of kind generate and pool only")


def _from_generate(generate: pb.Generate, shared: dict[str, Any]) -> GenerateWork:
    n, received = generate.n or 1, _received(generate)
    if n > MAX_CHOICES:
        raise ValueError(f"a work must have at most {MAX_CHOICES} choices, has {n}")
    if received and len(received) != n:
        raise ValueError(f"received_choices must have a list for each of {n} choices, has {len(received)}")
    return GenerateWork(
        prompt=list(generate.prompt_token_ids),
        received=received,
        sampling=_from_sampling(generate.sampling),
        max_tokens=generate.max_tokens,
        min_tokens=generate.min_tokens,
        stop_token_ids=frozenset(generate.stop_token_ids),
        n=n,
        num_logprobs=generate.num_logprobs if generate.HasField("num_logprobs") else None,
        **shared,
    )


def _received(generate: pb.Generate) -> list[list[int]]:
    if generate.received_token_ids:
        return [list(generate.received_token_ids)]
    return [list(choice.ids) for choice in generate.received_choices]


def _from_sampling(message: pb.SamplingParams) -> SamplingParams:
    return SamplingParams(
        temperature=message.temperature,
        top_p=message.top_p,
        top_k=message.top_k,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        seed=message.seed,
        logit_bias=dict(message.logit_bias),
        format=(message.format_kind, message.format) if message.format_kind else None,
    )


def add_to(message: pb.WorkDelta, delta: TokenDelta) -> None:
    """Append what `delta` says to a message of the same work and choice."""
    if delta.token_ids:
        message.token_ids.extend(delta.token_ids)
    for logprobs in delta.logprobs:
        message.logprobs.add(
            logprob=logprobs.logprob,
            top_token_ids=[token_id for token_id, _ in logprobs.top],
            top_logprobs=[logprob for _, logprob in logprobs.top],
        )
    if delta.num_cached_tokens is not None:
        message.cached_tokens = delta.num_cached_tokens
    if delta.pooled:
        message.pooled.extend(delta.pooled)
    if delta.finish is not None:
        _to_finish(message.finish, delta.finish)


def num_bytes(delta: TokenDelta) -> int:
    """Return how much a message grows by `delta`, at most."""
    size = DELTA_BYTES + 5 * len(delta.token_ids) + 4 * len(delta.pooled)
    for logprobs in delta.logprobs:
        size += LOGPROBS_BYTES + 9 * len(logprobs.top)
    if delta.finish is not None:
        size += 4 * (len(delta.finish.error_reason) + len(delta.finish.error_message))
    return size


def _to_finish(message: pb.Finish, finish: Finish) -> None:
    message.reason = finish.reason.value
    if finish.stop_token_id is not None:
        message.stop_token_id = finish.stop_token_id
    message.error_reason = finish.error_reason
    message.error_message = finish.error_message
    message.queue_s = finish.queue_s
    message.prefill_s = finish.prefill_s
    message.decode_s = finish.decode_s
    message.num_preemptions = finish.num_preemptions
    message.num_steps = finish.num_steps


def fill_tokens(message: pb.WorkTokens, tokens: Mapping[int, Sequence[int]]) -> None:
    """Say the tokens of each work, by its number, in columns."""
    message.work_ids.extend(tokens)
    message.num_tokens.extend(map(len, tokens.values()))
    message.token_ids.extend(chain.from_iterable(tokens.values()))


def fill_load(message: pb.Load, load: Load) -> None:
    message.num_running = load.num_running
    message.num_waiting = load.num_waiting
    message.num_blocks = load.num_blocks
    message.num_free_blocks = load.num_free_blocks
    message.owed_prefill_tokens = load.owed_prefill_tokens
    message.credit_tokens = load.credit_tokens
    message.prefix_cache_queries = load.prefix_cache_queries
    message.prefix_cache_hits = load.prefix_cache_hits
    message.num_preemptions = load.num_preemptions
    message.num_computed_tokens = load.num_computed_tokens
    message.num_drafted_tokens = load.num_drafted_tokens
    message.num_accepted_tokens = load.num_accepted_tokens
    if load.credit_sequences is not None:
        message.credit_sequences = load.credit_sequences


def to_hello_ack(
    info: EngineInfo, *, protocol: int, replica_id: str, epoch: int, pid: int, load: Load, resident: Iterable[bytes]
) -> pb.HelloAck:
    ack = pb.HelloAck(
        protocol=protocol,
        replica_id=replica_id,
        epoch=epoch,
        fingerprints=pb.Fingerprints(
            model=info.model_fingerprint, tokenizer=info.tokenizer_fingerprint, hash_key=info.hash_key_fingerprint
        ),
        weights_fingerprint=info.weights_fingerprint,
        block_size=info.block_size,
        num_blocks=info.num_blocks,
        max_model_len=info.max_model_len,
        capabilities=sorted(info.capabilities),
        resident=pb.KvEvents(cleared=True, stored=b"".join(resident)),
        kernels=info.kernels,
        dtype=info.dtype,
        engine=info.engine,
        pid=pid,
        model=info.model,
    )
    fill_load(ack.load, load)
    return ack
