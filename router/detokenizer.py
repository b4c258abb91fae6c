"""Token ids to text while they are generated, and stop strings found on the way.

What `Detokenizer.push` returns is certain: it is never half a character, never a replacement character that a later
token would turn into something else, and never the beginning of a stop string that is still possible. All pushes and
the `flush` together are the answer's text, however its tokens were grouped. Special tokens have no text. Costs O(1) a
token, amortised. Knows no requests and no protobuf.

The text is that of the tokens *in their context*: a SentencePiece word after the prompt keeps its leading space, which
decoding the answer alone would strip.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from typing import Protocol

import tokenizers

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_HELD_TOKENS = 16
"""A run of tokens that never becomes a character is given up after this many (`WindowDecoder` only)."""


class Decoder(Protocol):
    """Ids to text, one answer at a time."""

    def push(self, token_id: int) -> str:
        """Return the text that became certain with this token."""

    def push_whole(self, token_ids: Sequence[int]) -> list[str] | None:
        """Return the text of each token if that is known at once and nothing is held back before, between or after
        them; else None, and no effect: then `push` them."""

    def flush(self) -> str:
        """Return what was held back; the answer is over."""


class TokenTable:
    """What each token of a vocabulary stands for, for tokenizers whose text is the concatenation of their tokens."""

    __slots__ = ("raw", "texts")

    def __init__(self, tokens: dict[int, bytes]) -> None:
        size = max(tokens, default=-1) + 1
        self.texts: list[str | None] = [""] * size
        """The token's text, where its bytes are whole characters; else None."""
        self.raw: dict[int, bytes] = {}
        """The bytes of the others."""
        for token_id, token in tokens.items():
            try:
                self.texts[token_id] = token.decode()
            except UnicodeDecodeError:
                self.texts[token_id] = None
                self.raw[token_id] = token

    @classmethod
    def of(cls, tokenizer: tokenizers.Tokenizer) -> TokenTable | None:
        """Return the table, or None if this tokenizer's decoder does more than concatenate."""
        to_bytes = _token_bytes(json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else None)
        if to_bytes is None:
            return None
        tokens = {token_id: to_bytes(token) for token, token_id in tokenizer.get_vocab().items()}
        for token_id, added in tokenizer.get_added_tokens_decoder().items():
            if added.special:
                tokens[token_id] = b""
        return cls(tokens)


class TableDecoder:
    """Decodes with a `TokenTable`: UTF-8, incrementally. Tokens that the table does not have are no text."""

    __slots__ = ("_is_pending", "_raw", "_texts", "_utf8")

    def __init__(self, table: TokenTable) -> None:
        self._texts = table.texts
        self._raw = table.raw
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_pending = False

    def push(self, token_id: int) -> str:
        text = self._texts[token_id] if token_id < len(self._texts) else ""
        if text is not None and not self._is_pending:
            return text
        text = self._utf8.decode(self._raw[token_id] if text is None else text.encode())
        self._is_pending = self._utf8.getstate()[0] != b""
        return text

    def push_whole(self, token_ids: Sequence[int]) -> list[str] | None:
        if self._is_pending:
            return None
        texts = self._texts
        try:
            found = [texts[token_id] for token_id in token_ids]
        except IndexError:
            return None
        return None if None in found else found  # type: ignore[return-value]  # there is no None in it

    def flush(self) -> str:
        self._is_pending = False
        return self._utf8.decode(b"", True)


class WindowDecoder:
    """Decodes with any tokenizer, by decoding the last few tokens again with each new one.

    ids    [ context | not yet text ]
                     ^ _start: the text of what is before it was returned
    """

    __slots__ = ("_decode", "_ids", "_known", "_start")

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0
        self._known = ""

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids)
        num_held = len(self._ids) - self._start
        if text.endswith(REPLACEMENT) and num_held <= MAX_HELD_TOKENS:
            return ""
        if len(text) <= len(self._known) and num_held <= MAX_HELD_TOKENS:
            return ""
        return self._move(text)

    def push_whole(self, token_ids: Sequence[int]) -> list[str] | None:
        return None

    def flush(self) -> str:
        return self._move(self._decode(self._ids)) if self._start < len(self._ids) else ""

    def _move(self, text: str) -> str:
        new = text[len(self._known) :]
        self._ids = self._ids[self._start :]
        self._start = len(self._ids)
        self._known = self._decode(self._ids)
        return new


class StopStrings:
    """Finds the first of several strings in a text that comes in pieces (Aho-Corasick).

    The first match is the one whose end comes first; of several with one end, the longest. The depth of the automaton's
    state is how much of the text's end may still become a match.
    """

    __slots__ = ("_depth", "_fail", "_first", "_match", "_next")

    def __init__(self, stops: Sequence[str]) -> None:
        assert stops
        assert all(stops)
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._fail = [0]
        self._match: list[str | None] = [None]
        for stop in stops:
            self._insert(stop)
        self._link()
        self._first = re.compile("[" + "".join(sorted({re.escape(stop[0]) for stop in stops})) + "]")

    def _insert(self, stop: str) -> None:
        state = 0
        for character in stop:
            following = self._next[state].get(character)
            if following is None:
                following = len(self._next)
                self._next[state][character] = following
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._fail.append(0)
                self._match.append(None)
            state = following
        self._match[state] = stop

    def _link(self) -> None:
        queue = list(self._next[0].values())
        for state in queue:
            for character, following in self._next[state].items():
                queue.append(following)
                fail = self._fail[state]
                while fail and character not in self._next[fail]:
                    fail = self._fail[fail]
                self._fail[following] = self._next[fail].get(character, 0)
                self._match[following] = self._match[following] or self._match[self._fail[following]]

    def scan(self, state: int, text: str, *, may_end: bool = True) -> tuple[int, int, str | None]:
        """Return (state after `text`, end of the match in `text`, what matched), from `state` (0 at the beginning).

        Without `may_end` what matches in `text` does not count, but it may begin what matches in the text to come.
        """
        position = 0
        while position < len(text):
            if state == 0:
                found = self._first.search(text, position)
                if found is None:
                    return 0, 0, None
                position = found.start()
            character = text[position]
            while state and character not in self._next[state]:
                state = self._fail[state]
            state = self._next[state].get(character, 0)
            position += 1
            matched = self._match[state]
            if matched is not None and may_end:
                return state, position, matched
        return state, 0, None

    def may_begin_in(self, text: str) -> bool:
        return self._first.search(text) is not None

    def num_possible(self, state: int) -> int:
        """How many characters before this state may still become a match."""
        return self._depth[state]


class Detokenizer:
    """One choice's text. After `matched` is set nothing more may be pushed."""

    __slots__ = ("_decoder", "_held", "_state", "_stops", "matched")

    def __init__(self, decoder: Decoder, stops: StopStrings | None = None) -> None:
        self._decoder = decoder
        self._stops = stops
        self._state = 0
        self._held = ""
        self.matched: str | None = None
        """The stop string that ended the text; the text ends before it."""

    def push(self, token_id: int, may_end: bool = True) -> str:
        """Return the text that became certain with this token. `may_end`: whether a stop string may end with it."""
        text = self._decoder.push(token_id)
        stops = self._stops
        if stops is None or (self._state == 0 and not stops.may_begin_in(text)):
            return text
        return self._release(stops, text, may_end)

    def push_whole(self, token_ids: Sequence[int]) -> list[str] | None:
        """Return the text of each token if no stop string may end or begin with them and nothing is held back; else
        None, and no effect: then `push` them. As most do; several cost little more than one then."""
        if self._state:
            return None
        texts = self._decoder.push_whole(token_ids)
        if texts is None or self._stops is None or not self._stops.may_begin_in("".join(texts)):
            return texts
        return None

    def flush(self, *, may_end: bool = True) -> str:
        """Return everything held back. The tokens are over."""
        text = self._decoder.flush()
        if self._stops is not None:
            text = self._release(self._stops, text, may_end)
            if self.matched is None:
                text += self._held
            self._held = ""
        return text

    def _release(self, stops: StopStrings, text: str, may_end: bool) -> str:
        self._state, end, self.matched = stops.scan(self._state, text, may_end=may_end)
        if self.matched is not None:
            text = (self._held + text[:end])[: -len(self.matched)]
            self._held = ""
            return text
        text = self._held + text
        kept = len(text) - stops.num_possible(self._state)
        self._held = text[kept:]
        return text[:kept]


def _token_bytes(decoder: object) -> Callable[[str], bytes] | None:
    """Return what turns a vocabulary entry into bytes, or None if `decoder` (its JSON) cannot be had token by token."""
    steps = _flatten(decoder)
    if steps is None:
        return None
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level
    has_byte_fallback = "ByteFallback" in kinds
    replacements: list[tuple[str, str]] = []
    is_fused = False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if not is_fused:
                replacements.append((old, new))
            case {"type": "Metaspace", "replacement": str(old)} if not is_fused:
                replacements.append((old, " "))
            case {"type": "ByteFallback"} if not is_fused:
                pass
            case {"type": "Fuse"}:
                is_fused = True
            case {"type": "Strip", "stop": 0} if is_fused:
                pass  # strips the beginning of the whole text, which is never the beginning of an answer in its context
            case _:
                return None

    def to_bytes(token: str) -> bytes:
        if has_byte_fallback and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            return bytes([int(token[3:5], 16)])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    return to_bytes


def _flatten(decoder: object) -> list[dict[str, object]] | None:
    match decoder:
        case {"type": "Sequence", "decoders": list(steps)}:
            return [step for step in steps if isinstance(step, dict)]
        case {"type": str()}:
            return [decoder]  # type: ignore[list-item]  # a mapping with the key "type"
        case _:
            return None


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:
        return token.encode()  # an added token, written as it is


def _byte_characters() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable Latin-1 stands for itself, other bytes for characters from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_characters()
