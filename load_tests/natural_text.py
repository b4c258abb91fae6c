"""Natural text that every Python has with it: the reference manual's topics, as token ids.

No data file is needed, and a window of it at a random place is a prompt that no run before has sent. Which text that is
depends on Python's version; whoever compares figures compares them within one run.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer


class NaturalText:
    """Token ids of one long text."""

    def __init__(self, token_ids: list[int]) -> None:
        self._token_ids = token_ids

    @classmethod
    def read(cls, tokenizer_json: Path) -> NaturalText:
        """Return the manual in the vocabulary of this tokenizer, without special tokens."""
        tokenizer = Tokenizer.from_file(str(tokenizer_json))
        pieces = [tokenizer.encode(topics[name], add_special_tokens=False).ids for name in sorted(topics)]
        return cls([token_id for piece in pieces for token_id in piece])

    @classmethod
    async def ask(cls, tokenize: Callable[[str], Awaitable[list[int]]]) -> NaturalText:
        """Return the manual as somebody else tokenises it, topic by topic."""
        pieces = [await tokenize(topics[name]) for name in sorted(topics)]
        return cls([token_id for piece in pieces for token_id in piece])

    def __len__(self) -> int:
        return len(self._token_ids)

    def windows(self, rng: random.Random, count: int, size: int) -> list[list[int]]:
        """Return `count` windows of `size` tokens, no two of which begin at the same place."""
        starts = rng.sample(range(len(self._token_ids) - size + 1), count)
        return [self._token_ids[start : start + size] for start in starts]
