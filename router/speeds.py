"""How long an answer takes once its request was sent, as this router has seen it lately. Pure: `now` is an argument.

    time = first token, a line over prompt tokens + (expected answer - 1) x time per token

The expected answer is max_tokens times the share of it that answers of that size used up on average, without what was
received before, and a single token while none of that size has ended: a request that asks for 1,000 tokens may stop
after five, and must not be refused for the others. Measured over all replicas together, over their waiting and their
batches as they are. Without fresh evidence, and while no replica has any work, there is no estimate: nobody is refused
by a guess, and a system that was slow once finds out that it no longer is. Attempts that ended early count for what
they showed.
"""

from __future__ import annotations

from router.types import Request

KEEP = 1 - 1 / 64
"""Weight of what was known when something new is seen."""
MIN_SEEN = 8
STALE_S = 5.0
MARGIN_DEVIATIONS = 3.0
"""How many mean deviations longer than expected an answer may take when its request is taken on."""
LAST_DEVIATIONS = 1.5
"""And when its turn comes and others wait, who may have more time for the place."""


class Speeds:
    def __init__(self) -> None:
        self._first = Line()
        self._decode_s = self._decode_tokens = 0.0
        self._deviation_s = 0.0
        self._num_seen = 0
        self._seen_at = 0.0
        self._shares: dict[int, _Mean] = {}
        """Generated tokens over max_tokens, by the number of bits of max_tokens."""
        self.num_sent = 0
        """Attempts that replicas have. Whoever begins one counts it."""

    def over(
        self,
        request: Request,
        now: float,
        *,
        elapsed_s: float,
        first_token_s: float | None,
        num_tokens: int,
        is_answered: bool,
    ) -> None:
        """An attempt ended `elapsed_s` after it was sent, with its first token after `first_token_s`. `num_tokens`:
        generated in it, on average over choices; `is_answered`: whether the answer is whole now."""
        self.num_sent -= 1
        self._note_deviation(request, num_tokens, elapsed_s, is_answered=is_answered)
        expected_s = self._first.at(request.num_known_tokens)
        if first_token_s is not None:
            self._first.add(request.num_known_tokens, first_token_s)
        elif expected_s is None or elapsed_s >= expected_s:
            self._first.add(request.num_known_tokens, elapsed_s)
        else:
            return
        self._num_seen += 1
        self._seen_at = now
        if first_token_s is not None and num_tokens > 1:
            self._decode_s = KEEP * self._decode_s + elapsed_s - first_token_s
            self._decode_tokens = KEEP * self._decode_tokens + num_tokens - 1
        if is_answered:
            share = self._shares.setdefault(request.max_tokens.bit_length(), _Mean())
            share.add(min(1.0, (_num_received(request) + num_tokens) / request.max_tokens))

    def service_s(self, request: Request, now: float) -> float | None:
        """Return how long the answer to `request` is expected to take if it is sent now; None: nobody knows."""
        if self._num_seen < MIN_SEEN or now - self._seen_at > STALE_S or not self.num_sent:
            return None
        return self._predict(request, self._expected(request) or 1.0)

    @property
    def margin_s(self) -> float:
        """What an answer may well take longer than expected."""
        return MARGIN_DEVIATIONS * self._deviation_s

    @property
    def last_margin_s(self) -> float:
        """What it may take longer if it begins at last."""
        return LAST_DEVIATIONS * self._deviation_s

    def cost(self, request: Request) -> int:
        """Return what is known and what is expected of all choices, in tokens; by max_tokens while nobody knows."""
        expected = self._expected(request)
        if expected is None:
            expected = request.max_tokens - _num_received(request)
        return request.num_known_tokens + request.n * round(expected)

    def _expected(self, request: Request) -> float | None:
        """Return how many tokens are still to come, of each choice; None: nobody knows."""
        share = self._shares.get(request.max_tokens.bit_length())
        if share is None or share.num_seen < MIN_SEEN:
            return None
        return max(1.0, share.mean * request.max_tokens - _num_received(request))

    def _predict(self, request: Request, num_tokens: float) -> float:
        first = self._first.at(request.num_known_tokens) or 0.0
        per_token = self._decode_s / self._decode_tokens if self._decode_tokens else 0.0
        return first + max(num_tokens - 1.0, 0.0) * per_token

    def _note_deviation(self, request: Request, num_tokens: int, elapsed_s: float, *, is_answered: bool) -> None:
        if self._num_seen < MIN_SEEN:
            return
        if is_answered:
            off_s = abs(elapsed_s - self._predict(request, num_tokens))
        else:  # its time was over: it took longer than this
            off_s = elapsed_s - self._predict(request, self._expected(request) or 1.0)
        if is_answered or off_s > 0:
            self._deviation_s += (1 - KEEP) * (off_s - self._deviation_s)


class Line:
    """A straight line through points that fade, neither falling nor below zero."""

    __slots__ = ("_n", "_x", "_xx", "_xy", "_y")

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, x: float, y: float) -> None:
        self._n = KEEP * self._n + 1
        self._x = KEEP * self._x + x
        self._y = KEEP * self._y + y
        self._xx = KEEP * self._xx + x * x
        self._xy = KEEP * self._xy + x * y

    def at(self, x: float) -> float | None:
        """None without any point."""
        if not self._n:
            return None
        mean_x, mean_y = self._x / self._n, self._y / self._n
        variance = self._xx / self._n - mean_x * mean_x
        slope = 0.0
        if variance > 1e-6 * (1.0 + mean_x * mean_x):
            slope = (self._xy / self._n - mean_x * mean_y) / variance
            slope = min(max(slope, 0.0), mean_y / mean_x if mean_x else 0.0)
        return max(mean_y + slope * (x - mean_x), 0.0)


class _Mean:
    __slots__ = ("mean", "num_seen")

    def __init__(self) -> None:
        self.mean = 0.0
        self.num_seen = 0

    def add(self, value: float) -> None:
        self.num_seen += 1
        self.mean += (value - self.mean) * max(1 - KEEP, 1 / self.num_seen)


def _num_received(request: Request) -> float:
    """Tokens of its answer from before this attempt, on average over choices."""
    return (request.num_known_tokens - len(request.prompt)) / request.n
