"""Text to token ids and back, with a model's ``tokenizer.json``; the engine never sees text.

Owns nothing that changes, so any thread may use it. Long texts are encoded off the event loop. Knows no chat
templates (``router/chat.py``) and no request rules (``router/validation.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from router.detokenizer import Decoder, Detokenizer, StopStrings, TableDecoder, TokenTable, WindowDecoder
from workers.errors import ModelFileError

MAX_INLINE_CHARACTERS = 2_048
"""Longer texts, about a millisecond's work, go to a thread."""
MAX_INLINE_TOKENS = 4_096


class Tokenizer:
    """Wraps a `tokenizers.Tokenizer`, without its truncation and padding."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._table = TokenTable.of(tokenizer)
        vocabulary = tokenizer.get_vocab()
        self.num_tokens = max(vocabulary.values(), default=-1) + 1
        """One more than the largest token id."""
        self._longest = max((len(token) for token in vocabulary), default=1)

    @classmethod
    def from_file(cls, path: Path) -> Tokenizer:
        """Raises ModelFileError for a file that is missing or no tokenizer.json."""
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the Rust side raises bare Exceptions
            raise ModelFileError(f"{path} is not a readable tokenizer.json: {error}") from error

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`, blocking. `add_special_tokens`: those that the model's tokenizer puts around."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_at_most(self, text: str, limit: int | None) -> list[int]:
        """Return the ids of `text`, blocking; no more than `limit`, special tokens at its end kept."""
        ids: list[int] = self._tokenizer.encode(text).ids
        if limit is None or len(ids) <= limit:
            return ids
        inner = self._tokenizer.encode(text, add_special_tokens=False)
        inner.truncate(max(0, limit - self._tokenizer.num_special_tokens_to_add(False)))
        found: list[int] = self._tokenizer.post_process(inner).ids
        return found

    def encode_pair(self, first: str, second: str, limit: int | None) -> tuple[list[int], int]:
        """Return the ids of a pair of texts, as the model's tokenizer puts them together, and how many are of the
        first; blocking. Of more than `limit` the longer text loses its end."""
        encoding = self._tokenizer.encode(first, second)
        if limit is not None and len(encoding.ids) > limit:
            one, other = (self._tokenizer.encode(text, add_special_tokens=False) for text in (first, second))
            room = max(0, limit - self._tokenizer.num_special_tokens_to_add(True))
            shorter, longer = sorted((one, other), key=lambda part: len(part.ids))
            kept = min(len(shorter.ids), room // 2)
            shorter.truncate(kept)
            longer.truncate(room - kept)
            encoding = self._tokenizer.post_process(one, other)
        segments: list[int] = encoding.type_ids
        return encoding.ids, segments.index(1) if 1 in segments else 0

    async def encode_text(self, text: str) -> list[int]:
        """Return the ids of `text`; suspends only if it is longer than `MAX_INLINE_CHARACTERS`."""
        return self.encode(text) if len(text) <= MAX_INLINE_CHARACTERS else await asyncio.to_thread(self.encode, text)

    def min_tokens(self, text: str) -> int:
        """Return a number of tokens that `text` surely needs, without tokenizing it."""
        return len(text) // self._longest

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `token_ids`; suspends only for more than `MAX_INLINE_TOKENS`."""
        if len(token_ids) <= MAX_INLINE_TOKENS:
            return self._decode(token_ids, skip_special_tokens)
        return await asyncio.to_thread(self._decode, token_ids, skip_special_tokens)

    def _decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def token(self, token_id: int | None) -> str | None:
        """Return the vocabulary entry of `token_id`, if there is one."""
        token: str | None = None if token_id is None else self._tokenizer.id_to_token(token_id)
        return token

    def detokenizer(self, stops: StopStrings | None = None) -> Detokenizer:
        """Return a new `Detokenizer` for one choice."""
        decoder: Decoder = WindowDecoder(self._decode) if self._table is None else TableDecoder(self._table)
        return Detokenizer(decoder, stops)
