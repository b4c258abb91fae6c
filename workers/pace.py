"""How often steps of sequences that decode have prompts in them.

An accelerator that replays a step of decodes as a graph, and computes any other operator by operator, does that at
twice the price, however short the prompt is. Where answers end and begin all the time that would be every step. So
after such a step some follow without prompts, unless there is enough to fill one: who comes then waits for as many
steps, and whoever comes after a pause does not wait at all. After one that was a graph, or so long that the price is
another, the interval is 1 and nobody waits.
"""

from __future__ import annotations

from collections.abc import Callable

from workers.sequence import Sequence


class PrefillPace:
    """A step with a prompt is followed by `interval` - 1 without, unless `chunk_tokens` tokens of prompts wait. What
    `interval` returns is of the last step, and asked once that was launched."""

    def __init__(self, interval: Callable[[], int], chunk_tokens: int) -> None:
        self._interval = interval
        self._chunk_tokens = chunk_tokens
        self._had_prefill = False
        """The last step."""
        self._num_left = 0
        """Steps that are still to be without."""

    def admits(self, waiting: list[Sequence]) -> bool:
        """Say whether a step in which others decode may have a prompt of these, who wait by rank. One that is due does
        not wait for this."""
        self._look_back()
        if self._num_left <= 0 or not waiting or waiting[0].is_due:
            return True
        return sum(max(1, s.num_tokens - s.num_spared) for s in waiting) >= self._chunk_tokens

    def count(self, *, has_prefill: bool) -> None:
        """A step was planned, which is launched next."""
        self._look_back()
        self._had_prefill = has_prefill
        self._num_left -= 1

    def _look_back(self) -> None:
        if self._had_prefill:
            self._num_left, self._had_prefill = self._interval() - 1, False
