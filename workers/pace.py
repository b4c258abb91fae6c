"""How often steps of sequences that decode have prompts in them.

An accelerator that replays a step of decodes as a graph, and computes any other operator by operator, does that at
twice the price, however short the prompt is. Where answers end and begin all the time that would be every step. So
after a step with a prompt some follow without, unless there is enough to fill one: who comes then waits for as many
steps, and whoever comes after a pause does not wait at all. Where steps with prompts are graphs as well, the interval
is 1 and nobody waits.
"""

from __future__ import annotations

from workers.sequence import Sequence


class PrefillPace:
    """A step with a prompt is followed by `interval` - 1 without, unless `chunk_tokens` tokens of prompts wait."""

    def __init__(self, interval: int, chunk_tokens: int) -> None:
        assert interval >= 1
        self._interval = interval
        self._chunk_tokens = chunk_tokens
        self._num_since = interval
        """Steps since the last one with a prompt, it included."""

    def admits(self, waiting: list[Sequence]) -> bool:
        """Say whether a step in which others decode may have a prompt of these, who wait by rank. One that is due does
        not wait for this."""
        if self._num_since >= self._interval or not waiting or waiting[0].is_due:
            return True
        return sum(max(1, s.num_tokens - s.num_spared) for s in waiting) >= self._chunk_tokens

    def count(self, *, has_prefill: bool) -> None:
        """A step was planned."""
        self._num_since = 1 if has_prefill else self._num_since + 1
