"""The one table of names that leave a process, but for metrics: spans, attributes, ErrorInfo reasons, metadata keys.

Standard library only. Where the OpenTelemetry semantic conventions have a name it is used (RPC and GenAI conventions);
what they lack is under ``octavo.``.
"""

from __future__ import annotations

ERROR_DOMAIN = "octavo"


class Reason:
    """ErrorInfo.reason and Terminal.reason; the comment names the code."""

    # INVALID_ARGUMENT
    INVALID_FIELD = "INVALID_FIELD"
    EMPTY_PROMPT = "EMPTY_PROMPT"
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG"
    TOKEN_ID_OUT_OF_RANGE = "TOKEN_ID_OUT_OF_RANGE"
    REQUEST_ID_IN_USE = "REQUEST_ID_IN_USE"
    # NOT_FOUND
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    REQUEST_NOT_FOUND = "REQUEST_NOT_FOUND"
    # UNIMPLEMENTED
    FIELD_NOT_SERVED = "FIELD_NOT_SERVED"
    # FAILED_PRECONDITION
    ENGINE_CAPABILITY = "ENGINE_CAPABILITY"
    INCOMPATIBLE_PEER = "INCOMPATIBLE_PEER"
    # RESOURCE_EXHAUSTED
    QUEUE_FULL = "QUEUE_FULL"  # the backlog is full, and the request's tenant has its part of it or more
    DEADLINE_TOO_SHORT = "DEADLINE_TOO_SHORT"  # the client's deadline cannot be met, by measured speeds; told at once
    SLOW_CONSUMER = "SLOW_CONSUMER"
    MESSAGE_TOO_LARGE = "MESSAGE_TOO_LARGE"
    SESSION_LIMIT = "SESSION_LIMIT"
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED"  # the tenant has had its requests or tokens of this minute
    # UNAVAILABLE
    NO_REPLICA = "NO_REPLICA"
    MODEL_FAILED = "MODEL_FAILED"  # this model cannot be served, though others are
    REPLICA_LOST = "REPLICA_LOST"
    DRAINING = "DRAINING"
    SESSION_LOST = "SESSION_LOST"
    SESSION_AGE = "SESSION_AGE"  # of a GoAway: nothing is wrong, the next Session may find another router
    # DEADLINE_EXCEEDED
    DEADLINE_PASSED = "DEADLINE_PASSED"
    DEADLINE_UNREACHABLE = "DEADLINE_UNREACHABLE"  # it has waited, and what is left does not suffice: never computed
    # CANCELLED
    CANCELLED = "CANCELLED"
    # UNAUTHENTICATED
    BAD_PROOF = "BAD_PROOF"
    NO_CREDENTIALS = "NO_CREDENTIALS"
    BAD_CREDENTIALS = "BAD_CREDENTIALS"
    KEY_REVOKED = "KEY_REVOKED"
    KEY_EXPIRED = "KEY_EXPIRED"
    # PERMISSION_DENIED
    TENANT_MISMATCH = "TENANT_MISMATCH"  # the certificate and the token are of different tenants
    # INTERNAL
    INTERNAL = "INTERNAL"


class Span:
    GENERATE = "octavo.v1.InferenceService/Generate"
    EMBED = "octavo.v1.InferenceService/Embed"
    SCORE = "octavo.v1.InferenceService/Score"
    RERANK = "octavo.v1.InferenceService/Rerank"
    CLASSIFY = "octavo.v1.InferenceService/Classify"
    SESSION_REQUEST = "octavo.v1.InferenceService/Session request"
    ACCEPT = "octavo.accept"
    QUEUE = "octavo.queue"
    DISPATCH = "octavo.dispatch"
    ENGINE_QUEUE = "octavo.engine.queue"
    PREFILL = "octavo.prefill"
    DECODE = "octavo.decode"
    DELIVER = "octavo.deliver"
    BATCH = "octavo.batch"
    STEP = "octavo.step"
    SCALE = "octavo.scale"


class Event:
    """Of spans."""

    RESUMED = "octavo.resumed"
    """The answer goes on at another replica; with the reason why the one before was left."""
    CACHE_HIT = "octavo.cache.hit"
    """Tokens of the prompt were in the cache."""
    EVICTED = "octavo.cache.evicted"
    """Cached blocks made way for others."""
    PREEMPTED = "octavo.preempted"
    """The sequence gave its blocks up, to be computed again."""
    READMITTED = "octavo.readmitted"
    """It goes on after that."""
    SLOWEST_STEP = "octavo.slowest_step"
    """The step of this span that took longest, with its number and time."""


class Attribute:
    RPC_SYSTEM = "rpc.system"
    """grpc."""
    RPC_SERVICE = "rpc.service"
    """The gRPC service."""
    RPC_METHOD = "rpc.method"
    """The gRPC method."""
    RPC_GRPC_STATUS_CODE = "rpc.grpc.status_code"
    """The number of the gRPC status; 0: all is well."""
    REQUEST_MODEL = "gen_ai.request.model"
    """The model, as requests call it."""
    OPERATION_NAME = "gen_ai.operation.name"
    """text_completion; of Embed embeddings, and score, rerank, classify of the calls of these names."""
    REQUEST_MAX_TOKENS = "gen_ai.request.max_tokens"
    """The most tokens that the answer may have."""
    REQUEST_TEMPERATURE = "gen_ai.request.temperature"
    """As the request asks."""
    INPUT_TOKENS = "gen_ai.usage.input_tokens"
    """Tokens of the prompt."""
    OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
    """Tokens that were generated, of all choices."""
    CACHED_INPUT_TOKENS = "gen_ai.usage.cache_read.input_tokens"
    """Tokens of the prompt that a cache had."""
    FINISH_REASONS = "gen_ai.response.finish_reasons"
    """Why each choice ended."""
    FINISH_REASON = "octavo.finish.reason"
    """Why a choice ended."""
    TOKEN_TYPE = "gen_ai.token.type"
    """input, cached (part of these), output."""
    TENANT = "octavo.tenant"
    """Who pays, as proven; other: one of those beyond `telemetry.max_tenants`."""
    REPLICA_STATE = "octavo.replica.state"
    """As the router sees a replica."""
    BLOCK_STATE = "octavo.kv.block_state"
    """used, cached, free."""
    STEP_PHASE = "octavo.step.phase"
    """schedule, run, sample, emit."""
    ERROR_TYPE = "error.type"
    """The reason of the error; nothing without one."""
    REQUEST_ID = "octavo.request.id"
    """As client and router call the request."""
    ATTEMPT = "octavo.request.attempt"
    """1 for the first replica, one more after each that was lost."""
    PRIORITY = "octavo.request.priority"
    """As the request asks."""
    WAIT_NO_REPLICA = "octavo.queue.no_replica_s"
    """Of the wait: while no replica was ready."""
    WAIT_FULL = "octavo.queue.full_s"
    """Of the wait: while replicas were ready and none could take more."""
    REPLICA = "octavo.replica.id"
    """The replica."""
    ROUTER = "octavo.router.id"
    """The router."""
    RULE = "octavo.placement.rule"
    """What decided on the replica."""
    MATCHED_TOKENS = "octavo.placement.matched_tokens"
    """Prompt tokens in the replica's cache, as the router knew."""
    CANDIDATES = "octavo.placement.candidates"
    """As JSON: replicas that were looked at, with the terms of their cost in tokens."""
    BATCH_ID = "octavo.batch.id"
    """The dispatch batch; of one router and replica each has its own number."""
    BATCH_REQUESTS = "octavo.batch.requests"
    """Requests of the batch."""
    BATCH_TOKENS = "octavo.batch.tokens"
    """Prompt tokens of the batch."""
    NUM_PREEMPTIONS = "octavo.num_preemptions"
    """How often the sequence gave its blocks up."""
    NUM_STEPS = "octavo.num_steps"
    """Steps of the engine in which the request took part."""
    RECEIVED_TOKENS = "octavo.received_tokens"
    """Tokens of the answer that were there before this attempt."""
    STEP = "octavo.step"
    """The number of the step in its replica."""
    FIRST_STEP = "octavo.step.first"
    """The number of the first step in which the request took part."""
    LAST_STEP = "octavo.step.last"
    """The number of the last step in which the request took part."""
    STEP_DURATION = "octavo.step.duration_s"
    """What the step took."""
    STEP_SEQUENCES = "octavo.step.sequences"
    """Sequences that took part in the step, sampled or not."""
    STEP_TOKENS = "octavo.step.tokens"
    """Tokens that the step computed."""
    STEP_SCHEDULE_TIME = "octavo.step.schedule_s"
    """Of the step: deciding what it computes."""
    STEP_RUN_TIME = "octavo.step.run_s"
    """Of the step: computing; on a GPU waiting for that, sampling with it."""
    STEP_SAMPLE_TIME = "octavo.step.sample_s"
    """Of the step: drawing tokens."""
    STEP_EMIT_TIME = "octavo.step.emit_s"
    """Of the step: accounting for what came of it and handing it over."""
    UNTOLD_STEPS = "octavo.step.untold"
    """Steps before this one that have no span, since there were too many links to make."""
    EVICTED_BLOCKS = "octavo.cache.evicted_blocks"
    """Cached blocks that made way for others."""
    TIME_TO_FIRST_TOKEN = "gen_ai.response.time_to_first_chunk"
    """Seconds from the request's arrival until its first token was there."""
    REPLICAS_BEFORE = "octavo.replicas.before"
    """How many replicas there were to be."""
    REPLICAS_TARGET = "octavo.replicas.target"
    """How many there shall be."""
    SCALE_REASON = "octavo.scale.reason"
    """Why, in words."""
    SCALE_DEMAND = "octavo.scale.demand"
    """Sequences that there should be places for."""
    SCALE_DIRECTION = "octavo.scale.direction"
    """up, down."""


class Metadata:
    """gRPC metadata keys."""

    AUTHORIZATION = "authorization"
    TRACEPARENT = "traceparent"
    TRACESTATE = "tracestate"
    REPLICA = "octavo-replica"
    CACHED_TOKENS = "octavo-cached-tokens"
    REQUEST_ID = "octavo-request-id"
