"""What a replica's books have of each attached router, and of each work that its engine has."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from workers.outbox import Outbox
from workers.types import Load, Work
from workers.work_spans import WorkSpans


class AttachedRouter:
    """One attached router. `owner` is unlike that of any other attachment, also of the same router."""

    __slots__ = ("_last_counted", "batches", "news_of", "num_works", "on_news", "outbox", "owner")

    def __init__(self, owner: str, outbox: Outbox, on_news: Callable[[bool], None]) -> None:
        self.owner = owner
        self.outbox = outbox
        self.on_news = on_news
        self.batches: deque[Batch] = deque()
        """In the order of arrival, those that the load does not count yet."""
        self.num_works = 0
        """That the engine has and that have not ended."""
        self.news_of = 0
        """Until a load counts so many works, this router does not know of some that others have sent; 0: it does."""
        self._last_counted = 0

    def begin(self, batch_id: int, num_steps: int) -> Batch:
        """Return the books of a batch of which a message has come after `num_steps` of the engine; a batch that is too
        large for one comes in several."""
        if not self.batches or self.batches[-1].batch_id != batch_id:
            self.batches.append(Batch(batch_id))
        self.batches[-1].num_steps = num_steps
        return self.batches[-1]

    def last_counted_batch(self, load: Load) -> int:
        while self.batches and self.batches[0].is_counted(load):
            self._last_counted = self.batches.popleft().batch_id
        return self._last_counted


class Batch:
    """What a router has dispatched together, until the engine's load counts its works."""

    __slots__ = ("batch_id", "num_steps", "num_submitted", "num_unseen")

    def __init__(self, batch_id: int) -> None:
        self.batch_id = batch_id
        self.num_steps = 0
        """The engine's, when the last of the batch was submitted."""
        self.num_submitted = 0
        """All works that were ever submitted, these included."""
        self.num_unseen = 0
        """Works of which the engine has said nothing yet."""

    def is_counted(self, load: Load) -> bool:
        """Say whether `load` has these works in it. Where it does not say so itself: the engine may have been in a step
        when they came, and that one's load still lacks them; the next step begins with taking them in."""
        if load.num_taken is not None and load.num_taken >= self.num_submitted:
            return True
        return self.num_unseen == 0 or load.num_steps >= self.num_steps + 2


class LiveWork:
    """A work that the engine has."""

    __slots__ = (
        "aborted_choices",
        "batch",
        "choices",
        "is_aborted",
        "is_plain",
        "is_seen",
        "num_choices",
        "router",
        "spans",
    )

    def __init__(self, router: AttachedRouter, batch: Batch, work: Work, spans: WorkSpans | None) -> None:
        self.router = router
        self.batch = batch
        self.spans = spans
        self.choices = range(work.num_choices)
        """Their indices."""
        self.num_choices = len(self.choices)
        """Those that have not ended."""
        self.is_seen = False
        self.is_plain = False
        """Whether tokens of the first choice only have to be passed on: the router has heard of the work and wants all
        of it, and nobody else looks at them."""
        self.is_aborted = False
        self.aborted_choices: set[int] = set()
        """Those that were aborted while the others go on."""

    def is_unwanted(self, index: int) -> bool:
        """Whether its router has said that it wants no more of this choice."""
        return self.is_aborted or index in self.aborted_choices
