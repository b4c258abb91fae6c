"""The one table of names that leave a process: spans, attributes, metrics, ErrorInfo reasons, metadata keys.

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
    SESSION_REQUEST = "octavo.v1.InferenceService/Session request"
    QUEUE = "octavo.queue"
    DISPATCH = "octavo.dispatch"
    PREFILL = "octavo.prefill"
    DECODE = "octavo.decode"
    BATCH = "octavo.batch"
    STEP = "octavo.step"
    SCALE = "octavo.scale"


class Metric:
    REPLICAS_TARGET = "octavo.replicas.target"
    SCALE_DECISIONS = "octavo.scale.decisions"


class Attribute:
    RPC_SYSTEM = "rpc.system"
    RPC_SERVICE = "rpc.service"
    RPC_METHOD = "rpc.method"
    RPC_GRPC_STATUS_CODE = "rpc.grpc.status_code"
    REQUEST_MODEL = "gen_ai.request.model"
    OPERATION_NAME = "gen_ai.operation.name"
    REQUEST_MAX_TOKENS = "gen_ai.request.max_tokens"
    REQUEST_TEMPERATURE = "gen_ai.request.temperature"
    INPUT_TOKENS = "gen_ai.usage.input_tokens"
    OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
    CACHED_INPUT_TOKENS = "gen_ai.usage.cache_read.input_tokens"
    FINISH_REASONS = "gen_ai.response.finish_reasons"
    ERROR_TYPE = "error.type"
    REQUEST_ID = "octavo.request.id"
    ATTEMPT = "octavo.request.attempt"
    PRIORITY = "octavo.request.priority"
    REPLICA = "octavo.replica.id"
    ROUTER = "octavo.router.id"
    RULE = "octavo.placement.rule"
    MATCHED_TOKENS = "octavo.placement.matched_tokens"
    CANDIDATES = "octavo.placement.candidates"
    BATCH_ID = "octavo.batch.id"
    BATCH_REQUESTS = "octavo.batch.requests"
    BATCH_TOKENS = "octavo.batch.tokens"
    NUM_PREEMPTIONS = "octavo.num_preemptions"
    STEP = "octavo.step"
    REPLICAS_BEFORE = "octavo.replicas.before"
    REPLICAS_TARGET = "octavo.replicas.target"
    SCALE_REASON = "octavo.scale.reason"
    SCALE_DEMAND = "octavo.scale.demand"
    SCALE_DIRECTION = "octavo.scale.direction"


class Metadata:
    """gRPC metadata keys."""

    AUTHORIZATION = "authorization"
    TRACEPARENT = "traceparent"
    TRACESTATE = "tracestate"
    REPLICA = "octavo-replica"
    CACHED_TOKENS = "octavo-cached-tokens"
    REQUEST_ID = "octavo-request-id"
