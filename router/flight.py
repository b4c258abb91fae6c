"""One request on its way through the router's back: the mutable record that the dispatcher keeps of it."""

from __future__ import annotations

from router.admission import Permit
from router.dispatch_spans import DispatchSpans
from router.link import ReplicaLink
from router.placement import PromptHashes
from router.types import Attempt, Request, Sink
from router.wait_clock import Mark


class Flight:
    """A request from its acceptance to its end. It waits (`link` is None), or a replica has it as `work_id`."""

    __slots__ = (
        "attempt",
        "charge",
        "closed_choices",
        "first_token_at",
        "hashes",
        "is_ended",
        "key",
        "link",
        "mark",
        "max_num_tokens",
        "num_idle_losses",
        "num_losses",
        "num_tokens",
        "open_choices",
        "permit",
        "record",
        "request",
        "sent_at",
        "sink",
        "spans",
        "work_id",
    )

    def __init__(self, key: int, request: Request, sink: Sink, permit: Permit) -> None:
        self.key = key
        self.request = request
        self.sink = sink
        self.permit = permit
        self.attempt = 1
        self.num_losses = 0
        self.num_idle_losses = 0
        """Since its last token."""
        self.open_choices = set(range(request.n))
        """Those that have not ended. A delta of any other is late."""
        self.closed_choices: set[int] = set()
        """Those that have ended well or that nobody wants: not in any attempt."""
        self.hashes: PromptHashes | None = None
        self.spans: DispatchSpans | None = None
        self.record: Attempt | None = None
        """What is told of the present attempt, or of the last one."""
        self.mark: Mark | None = None
        """When its last wait began."""
        self.link: ReplicaLink | None = None
        self.work_id = 0
        # Of the present attempt, or of the last one.
        self.sent_at = 0.0
        self.first_token_at: float | None = None
        self.num_tokens = 0
        """Generated, of all choices."""
        self.max_num_tokens = request.n * request.max_tokens
        self.charge = 0
        """What its tenant was charged for it."""
        self.is_ended = False

    def count(self, num_tokens: int, now: float) -> None:
        """Its replica has generated some. Raises ValueError if it never stops."""
        if self.first_token_at is None:
            self.first_token_at = now
        self.num_idle_losses = 0
        self.num_tokens += num_tokens
        if self.num_tokens > self.max_num_tokens:
            raise ValueError(f"a work of at most {self.max_num_tokens} tokens has {self.num_tokens}")

    def left(self, now: float) -> None:
        """Its attempt is over."""
        if self.record is not None:
            self.record.left_at = now
            self.record.first_token_at, self.record.num_tokens = self.first_token_at, self.num_tokens

    def go_on(self, request: Request, hashes: PromptHashes) -> None:
        """Another attempt follows, for what is left."""
        self.attempt += 1
        self.request, self.hashes = request, hashes

    def lost(self) -> None:
        """The replica that had it is no more."""
        self.num_losses += 1
        self.num_idle_losses += 1
