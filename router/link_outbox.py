"""What one link has to send: works, aborts and credit, merged into as few messages as it takes. Pure."""

from __future__ import annotations

from typing import Final

from octavo.internal.v1 import data_plane_pb2 as pb

MAX_TOKENS: Final = 4 * 1024 * 1024
"""Of the works in a message: 20 MiB at most, of the 64 that a message may have. Of a long beginning that a group shares
a batch counts the tokens once, and yet each of its works brings them all."""
WINDOW_BATCHES = 16
"""StepBatches that may be on the way; a router that falls further behind gets them merged."""


class LinkOutbox:
    """Belongs to one stream: `clear` it when that breaks."""

    def __init__(self) -> None:
        self._dispatches: list[pb.AttachRequest] = []
        self._num_tokens = 0
        """Of the last of them."""
        self._aborts: list[tuple[int, int | None]] = []
        """Work ids, with the index of a choice if only that one ends."""
        self._wants_resync = False
        self._num_taken = 0
        """StepBatches taken in since credit was last given back."""

    @property
    def owes_credit(self) -> bool:
        return self._num_taken >= WINDOW_BATCHES // 2

    def add(self, batch_id: int, work: pb.Work) -> None:
        """Send `work`, with others of the same batch as long as they fit."""
        num_tokens = _num_tokens(work)
        self._num_tokens += num_tokens
        is_begun = self._dispatches and self._dispatches[-1].dispatch.batch_id == batch_id
        if not is_begun or self._num_tokens > MAX_TOKENS:
            self._dispatches.append(pb.AttachRequest(dispatch=pb.Dispatch(batch_id=batch_id)))
            self._num_tokens = num_tokens
        self._dispatches[-1].dispatch.work.append(work)

    def abort(self, work_id: int, index: int | None) -> None:
        self._aborts.append((work_id, index))

    def resync(self) -> None:
        """Ask for all resident blocks."""
        self._wants_resync = True

    def batch_taken(self) -> None:
        """A StepBatch was taken in: it may come back as credit."""
        self._num_taken += 1

    def clear(self) -> None:
        self._dispatches, self._aborts, self._num_taken = [], [], 0
        self._wants_resync = False

    def take(self) -> list[pb.AttachRequest]:
        """Return what is to be sent, aborts and credit with the last message: a work is aborted after it is sent."""
        messages, self._dispatches = self._dispatches, []
        if self._aborts or self.owes_credit or self._wants_resync:
            if not messages:
                messages.append(pb.AttachRequest())
            for work_id, index in self._aborts:
                if index is None:
                    messages[-1].abort.work_ids.append(work_id)
                else:
                    messages[-1].abort.choices.add(work_id=work_id, index=index)
            self._aborts = []
            if self._wants_resync:
                messages[-1].resync.SetInParent()
                self._wants_resync = False
            if self._num_taken:
                messages[-1].credit.step_batches = self._num_taken
                self._num_taken = 0
        return messages


def _num_tokens(work: pb.Work) -> int:
    if work.HasField("pool"):
        return len(work.pool.token_ids)
    generate = work.generate
    num_received = len(generate.received_token_ids) + sum(len(choice.ids) for choice in generate.received_choices)
    return len(generate.prompt_token_ids) + num_received
