"""One choice of an answer: the journal of its tokens, the text that each made certain, and how it ended.

Cuts it anywhere between tokens, for a client that attaches again. Knows no streams, no windows, and not whether its
tokens were generated just now or were received by the client before an interruption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from octavo.v1 import types_pb2 as pb

from router.detokenizer import Detokenizer
from workers.types import Finish, FinishReason, TokenLogprobs

_REASONS = {FinishReason.STOP: pb.FINISH_REASON_STOP, FinishReason.LENGTH: pb.FINISH_REASON_LENGTH}


class Choice:
    """``pieces[i]`` is the text that became certain with ``token_ids[i]``; `tail` is what was held back to the end and
    belongs to `finish`.

    The first `min_tokens` tokens end nothing.
    """

    __slots__ = (
        "_min_tokens",
        "_stop_token_ids",
        "detokenizer",
        "finish",
        "is_finish_sent",
        "logprobs",
        "num_received",
        "num_sent",
        "pieces",
        "sum_logprobs",
        "tail",
        "token_ids",
    )

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        stop_token_ids: frozenset[int] = frozenset(),
        min_tokens: int = 0,
    ) -> None:
        self.detokenizer = detokenizer
        self.token_ids: list[int] = []
        self.pieces: list[str] = []
        self.logprobs: list[TokenLogprobs] = []
        """Of the tokens after the received ones; empty unless they are to be sent."""
        self.sum_logprobs = 0.0
        self.tail = ""
        self.finish: pb.Finish | None = None
        self.is_finish_sent = False
        self._stop_token_ids = stop_token_ids
        self._min_tokens = min_tokens
        self.num_received = 0
        """Tokens that the client had before this request; they count as sent."""
        self.num_sent = 0

    def receive(self, token_ids: Sequence[int], max_tokens: int) -> int:
        """Begin with what the client has already; return how many of these tokens are the choice's: not those behind
        its end. If it has ended, its finish is still to be sent."""
        for token_id in token_ids:
            self.push((token_id,))
            is_stop = token_id in self._stop_token_ids and len(self.token_ids) > self._min_tokens
            if self.finish is None and is_stop:
                self.end(Finish(reason=FinishReason.STOP, stop_token_id=token_id))
            elif self.finish is None and len(self.token_ids) == max_tokens:
                self.end(Finish(reason=FinishReason.LENGTH))
            if self.finish is not None:
                break
        self.num_received = self.num_sent = len(self.token_ids)
        return self.num_received

    def push(self, token_ids: Sequence[int]) -> int:
        """Take tokens and return how many: those after a stop string are dropped. A token that stops has no text."""
        detokenizer, known, pieces = self.detokenizer, self.token_ids, self.pieces
        if self._stop_token_ids.isdisjoint(token_ids) and (texts := detokenizer.push_whole(token_ids)) is not None:
            known += token_ids
            pieces += texts
            return len(token_ids)
        for count, token_id in enumerate(token_ids, start=1):
            known.append(token_id)
            may_end = len(known) > self._min_tokens
            if may_end and token_id in self._stop_token_ids:
                pieces.append("")
            else:
                pieces.append(detokenizer.push(token_id, may_end))
            if detokenizer.matched is not None:
                self.finish = pb.Finish(reason=pb.FINISH_REASON_STOP, stop=detokenizer.matched)
                return count
        return len(token_ids)

    def note_logprobs(self, logprobs: Sequence[TokenLogprobs], *, keeps: bool) -> None:
        """Add up the log probabilities of the tokens that were pushed last, and keep them if they are to be sent."""
        self.sum_logprobs += sum(each.logprob for each in logprobs)
        if keeps:
            self.logprobs += logprobs

    def end(self, finish: Finish) -> None:
        self.tail = self.detokenizer.flush(may_end=len(self.token_ids) > self._min_tokens)
        if self.detokenizer.matched is not None:
            self.finish = pb.Finish(reason=pb.FINISH_REASON_STOP, stop=self.detokenizer.matched)
        elif finish.stop_token_id is not None:
            self.finish = pb.Finish(reason=_REASONS[finish.reason], stop_token_id=finish.stop_token_id)
        else:
            self.finish = pb.Finish(reason=_REASONS[finish.reason])

    def resume(self, offset: int) -> None:
        """The client has the first `offset` tokens; what follows them is to be sent, the finish too."""
        assert self.num_received <= offset <= len(self.token_ids)
        self.num_sent = offset
        self.is_finish_sent = False

    def take(self, index: int, limit: int, add: Callable[[], pb.Delta]) -> int | None:
        """Fill a delta from `add` with what follows what was sent, at most `limit` tokens of it; return how many, or
        None if there is nothing."""
        start = self.num_sent
        end = min(len(self.token_ids), start + limit)
        is_last = self.finish is not None and not self.is_finish_sent and end == len(self.token_ids)
        if start == end and not is_last:
            return None
        delta = add()
        if index:
            delta.index = index
        if end == start + 1:
            delta.text = self.pieces[start]
            delta.token_ids.append(self.token_ids[start])
        else:
            delta.text = "".join(self.pieces[start:end])
            delta.token_ids.extend(self.token_ids[start:end])
        delta.token_offset = start
        if self.logprobs:
            self._fill_logprobs(delta, start)
        if is_last:
            assert self.finish is not None
            delta.text += self.tail
            delta.finish.CopyFrom(self.finish)
            self.is_finish_sent = True
        self.num_sent = end
        return end - start

    def skip(self) -> None:
        """Count everything that there is as sent."""
        self.num_sent = len(self.token_ids)
        self.is_finish_sent = True

    def _fill_logprobs(self, delta: pb.Delta, start: int) -> None:
        for i, token_id in enumerate(delta.token_ids, start=start - self.num_received):
            known = self.logprobs[i]
            message = delta.logprobs.add()
            message.chosen.token_id = token_id
            message.chosen.logprob = known.logprob
            for top_id, logprob in known.top:
                message.top.add(token_id=top_id, logprob=logprob)
