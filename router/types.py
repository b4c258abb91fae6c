"""The router's nouns, and the seam between its front (protobuf, text) and its back (queue, placement, replicas).

A `Request` is valid by construction: nobody downstream checks it again. The front hands it to the `Backend` with a
`Sink`; the back calls the sink on the event loop's thread, in order, and ends with exactly one `ended`. Both sides know
token ids only; text stays in the front.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from router.signal import ModelSignal
from workers.errors import OctavoError
from workers.types import Finish, Load, SamplingParams, TokenLogprobs, needed_capabilities, pool_capabilities


class PoolTask(NamedTuple):
    """What is to be made of a request that generates nothing: see `workers.types.PoolWork`."""

    method: str
    normalize: bool | None
    num_first_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One accepted request. `deadline` and `accepted_at` are on ``time.monotonic``, in seconds."""

    request_id: str
    model: str
    prompt: Sequence[int]
    received: Sequence[Sequence[int]] = ()
    """What the client has of each choice from before an interruption; the answer continues after it. Or none at all."""
    sampling: SamplingParams
    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    """End-of-sequence ids included, unless the client ignores them."""
    n: int = 1
    """How many choices are generated; with best_of the front answers fewer."""
    num_logprobs: int | None = None
    pool: PoolTask | None = None
    """None: it generates. Else numbers are made of its prompt, and what is said of generating means nothing."""
    priority: int = 0
    affinity_key: str = ""
    tenant: str = ""
    salt: bytes = b""
    adapter: str = ""
    deadline: float
    has_own_deadline: bool = False
    """Whether the client brought it; else it is the router's, and nobody waits for the answer by then."""
    accepted_at: float
    traceparent: str = ""
    tracestate: str = ""

    @property
    def needed_capabilities(self) -> frozenset[str]:
        """What a replica's engine must be able to do for it, beyond generating."""
        if self.pool is not None:
            return pool_capabilities(self.pool.method)
        return needed_capabilities(self.sampling, self.num_logprobs, self.received)

    @property
    def num_known_tokens(self) -> int:
        """What a replica must have computed, or cached, before the next tokens: prompt and received tokens."""
        return len(self.prompt) + sum(map(len, self.received)) if self.received else len(self.prompt)


class Candidate(NamedTuple):
    """A replica that could have taken a request, and its cost in tokens."""

    replica: str
    matched_tokens: int = 0
    """Cached there, or being computed there for an earlier request."""
    owed_tokens: float = 0.0
    """Prefill that it owes others."""
    uncached_tokens: float = 0.0
    """Of this prompt; what another replica is computing at the moment counts twice, as it would be wasted."""
    decode_tokens: float = 0.0
    displaced_tokens: float = 0.0
    """What it would have to forget for this prompt, by how full its cache is."""
    recent_tokens: float = 0.0
    """What it has computed lately beyond its part, weighed."""

    @property
    def cost(self) -> float:
        load = self.owed_tokens + self.decode_tokens + self.displaced_tokens
        return load + self.uncached_tokens + self.recent_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Why a request goes where it goes; a value that can be logged and replayed."""

    replica: str
    rule: str
    matched_tokens: int = 0
    candidates: tuple[Candidate, ...] = ()
    attempt: int = 1


class Wait(NamedTuple):
    """One wait in the queue, and why it was one. What is left of `duration_s` it was not the request's turn, or the
    batch that it went with was awaited."""

    since: float = 0.0
    """On ``time.monotonic``."""
    duration_s: float = 0.0
    no_replica_s: float = 0.0
    """So long no replica was ready."""
    full_s: float = 0.0
    """So long some were, and none could take more."""
    num_waiting: int = 0
    """Requests that waited already when this one came."""
    num_gone: int = 0
    """Requests that were sent while it waited."""


class BatchShape(NamedTuple):
    """What left the queue together."""

    batch_id: int = 0
    num_requests: int = 1
    num_tokens: int = 0
    """Prompt tokens; of those that are shared, each once."""


class Attempt:
    """A request at one replica: why it had waited, where it went and why, and what came of it. The back goes on to
    fill it in while it lasts, the front notes `num_cached`. Times are on ``time.monotonic``."""

    __slots__ = (
        "batch",
        "decision",
        "first_token_at",
        "left_at",
        "loss",
        "loss_reason",
        "num_cached",
        "num_tokens",
        "queue_s",
        "sent_at",
        "wait",
    )

    def __init__(
        self,
        decision: Decision,
        queue_s: float,
        *,
        sent_at: float = 0.0,
        wait: Wait = Wait(),  # noqa: B008  # a value
        batch: BatchShape = BatchShape(),  # noqa: B008
    ) -> None:
        self.decision = decision
        self.queue_s = queue_s
        """From the request's acceptance until it was sent."""
        self.sent_at = sent_at
        self.wait = wait
        self.batch = batch
        self.num_cached = 0
        """Prompt tokens that the replica had."""
        self.first_token_at: float | None = None
        self.num_tokens = 0
        """Generated there, of all choices."""
        self.left_at: float | None = None
        """When it was over there; None while it lasts."""
        self.loss_reason = self.loss = ""
        """Why it has to go on elsewhere: a reason of `octavo.names.Reason`, and in words."""


class ModelStanding(NamedTuple):
    """How it stands with one model in this router, for gauges."""

    num_queued_requests: int = 0
    num_queued_tokens: int = 0
    oldest_wait_s: float = 0.0
    num_dispatched: int = 0
    """Requests that replicas have."""
    credit_tokens: int = 0
    """Prompt tokens that may still be sent."""
    num_index_blocks: int = 0
    """Blocks of caches that it knows."""


class Sink(Protocol):
    """Where the back delivers one request's answer. None of these blocks or raises."""

    def dispatched(self, attempt: Attempt) -> None:
        """The request was sent to a replica."""

    def cached(self, num_tokens: int) -> None:
        """The replica found this many prompt tokens in its cache. Before the first tokens of each attempt."""

    def tokens(self, index: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None: ...

    def pooled(self, index: int, values: Sequence[float]) -> None:
        """What was made of the prompt of a request with a `PoolTask`, whole."""

    def known(self, index: int) -> Sequence[int]:
        """Return the tokens of a choice so far, what the client had before included."""

    def finished(self, index: int, finish: Finish) -> None:
        """Choice `index` ended with STOP or LENGTH; its tokens have all been delivered. Not for one that was
        cancelled."""

    def ended(self, error: OctavoError | None) -> None:
        """The request is over: all choices finished or were cancelled (None), or `error`. Nothing follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaAddress:
    """A replica that the control plane says is there, and where its data port is ("host:port")."""

    replica_id: str
    address: str
    node_id: str = ""
    is_encrypted: bool = False
    """Whether the port speaks TLS, with routers of this cluster alone."""
    memory: str = ""
    """How its KV memory was sized, as a sum for people."""
    metrics: str = ""
    """Where it tells its metrics, if it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaView:
    """What a router knows of one replica."""

    replica_id: str
    model: str
    state: str
    """"starting", "connecting", "ready", "draining" or "refused"."""
    detail: str = ""
    address: str = ""
    pid: int = 0
    node_id: str = ""
    memory: str = ""
    block_size: int = 0
    kernels: str = ""
    dtype: str = ""
    engine: str = ""
    capabilities: frozenset[str] = frozenset()
    epoch: int = 0
    num_resyncs: int = 0
    """How often what it had told of its cache turned out wrong, and all of it was asked for."""
    starting_s: float = 0.0
    """How long it has been starting, if it is."""
    load: Load = field(default_factory=Load)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """What waits in this router and what is on the way, and how much may wait."""

    num_queued_requests: int
    num_queued_tokens: int
    num_running_requests: int
    max_queued_tokens: int
    num_queued_sequences: int = 0
    """Each choice of a request that waits."""


class Cancel(Protocol):
    """Ends a request that a `Backend` has taken on, or one choice of it, and frees what it holds."""

    def __call__(self, index: int | None = None) -> None:
        """End the request with CancelledRequestError, delivered before this returns. With `index`: end that choice, of
        which nothing more is delivered; the request ends well when all others have finished. Of what has ended
        already: no effect."""


class Backend(Protocol):
    """The router's back as its front sees it. Everything is called on the event loop's thread and returns at once."""

    def submit(self, request: Request, sink: Sink) -> Cancel:
        """Take `request` on, or raise OverloadedError, UnavailableError or CapabilityError. After a return,
        `sink.ended` is called exactly once, also at the deadline."""

    def replicas(self) -> Sequence[ReplicaView]: ...

    def backlog(self) -> Backlog: ...

    def signal(self, model: str) -> ModelSignal:
        """Return how it stands with a model, for the cluster's scaling."""

    def standing(self, model: str) -> ModelStanding:
        """Return what gauges show of a model."""
