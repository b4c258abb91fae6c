"""Protobuf messages that nobody should send: made from their descriptors and from valid ones, repeatable by seed.

    mutator = Mutator(7, texts=("fake",), numbers=(1, 2))
    data = mutator.mutated(SessionRequest, samples)

What comes out is bytes, mostly of a message that can be parsed, with values at and beyond every edge: no numbers,
infinities, the largest and the most negative integers, texts that are empty, long or no UTF-8, lists of thousands,
several members of a oneof, fields that nobody knows; and bytes that were flipped, cut, joined or made up. `texts` and
`numbers` are what means something to the other end, so that a message gets past its first check. Knows no services.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

MAX_DEPTH: Final = 5
MANY: Final = (1_000, 2_500, 5_000)
"""So many items has a list now and then; of messages a tenth."""
LONG: Final = (129, 300, 5_000, 70_000)
"""Characters of a long text."""
MAX_BYTES: Final = 1 << 20
M = TypeVar("M", bound=Message)

_F = FieldDescriptor
_INTEGERS: Final = {
    **dict.fromkeys((_F.TYPE_INT32, _F.TYPE_SINT32, _F.TYPE_SFIXED32, _F.TYPE_ENUM), (-(2**31), 2**31 - 1)),
    **dict.fromkeys((_F.TYPE_INT64, _F.TYPE_SINT64, _F.TYPE_SFIXED64), (-(2**63), 2**63 - 1)),
    **dict.fromkeys((_F.TYPE_UINT32, _F.TYPE_FIXED32), (0, 2**32 - 1)),
    **dict.fromkeys((_F.TYPE_UINT64, _F.TYPE_FIXED64), (0, 2**64 - 1)),
}
_FLOATS: Final = (0.0, -0.0, 1.0, -1.0, 0.5, 2.0, -2.0, 1e-38, 3e38, math.nan, math.inf, -math.inf)
_TEXTS: Final = (
    "",
    "a",
    "\0",
    "hello",
    "ünïcödé \N{GRINNING FACE}",
    "\N{REPLACEMENT CHARACTER}",
    "a:b",
    "../..",
    "%s{}",
)
_MARK: Final = "\x01NoUtf8\x01"
_NO_UTF8: Final = b"\xff\xfe\x80\xc0\xed\xa0\x80\xf5"
"""As long as `_MARK`, whose place it takes where lengths are already written."""
assert len(_MARK) == len(_NO_UTF8)


class Mutator:
    def __init__(self, seed: int, *, texts: Sequence[str] = (), numbers: Sequence[int] = ()) -> None:
        self.random = random.Random(seed)
        self.texts = list(texts)
        self.numbers = list(numbers)
        self._only_text = ""
        self._ways: list[tuple[Callable[[type[Message], bytes, Sequence[bytes]], bytes], int]] = [
            (self._as_it_is, 4),
            (self._edited, 40),
            (self._made_up, 20),
            (self._flipped, 10),
            (self._cut, 5),
            (self._joined, 6),
            (self._with_unknown, 5),
            (self._without_utf8, 4),
            (self._noise, 3),
        ]

    def mutated(self, kind: type[Message], samples: Sequence[bytes]) -> bytes:
        """Return what is to be sent in place of one of `samples`, which are valid messages of `kind`."""
        (way,) = self.random.choices([way for way, _ in self._ways], [weight for _, weight in self._ways])
        return way(kind, self.random.choice(samples), samples)[:MAX_BYTES]

    def message(self, kind: type[M]) -> M:
        """Return a message with some of its fields, or all of them, set to anything."""
        found = kind()
        self._fill(found, self.random.choice((0.1, 0.3, 0.6, 1.0)), 0)
        return found

    # Ways.

    def _as_it_is(self, kind: type[Message], sample: bytes, samples: Sequence[bytes]) -> bytes:
        return sample

    def _edited(self, kind: type[Message], sample: bytes, samples: Sequence[bytes]) -> bytes:
        found = kind.FromString(sample)
        for _ in range(self.random.randint(1, 3)):
            self._edit(found)
        return found.SerializeToString()

    def _made_up(self, kind: type[Message], sample: bytes, samples: Sequence[bytes]) -> bytes:
        return self.message(kind).SerializeToString()

    def _flipped(self, kind: type[Message], sample: bytes, samples: Sequence[bytes]) -> bytes:
        data = bytearray(sample)
        for _ in range(self.random.randint(1, 4) if data else 0):
            data[self.random.randrange(len(data))] = self.random.randrange(256)
        return bytes(data)

    def _cut(self, kind: type[Message], sample: bytes, samples: Sequence[bytes]) -> bytes:
        return sample[: self.random.randint(0, len(sample))]

    def _joined(self, kind: type[Message], sample: bytes, samples: Sequence[bytes]) -> bytes:
        """Return one message after the other, which is their merge, or a part of one before a part of another."""
        other = self.random.choice(samples)
        if self.random.random() < 0.6:
            return sample + self.message(kind).SerializeToString() + other
        return sample[: self.random.randint(0, len(sample))] + other[self.random.randint(0, len(other)) :]

    def _with_unknown(self, kind: type[Message], sample: bytes, samples: Sequence[bytes]) -> bytes:
        for _ in range(self.random.randint(1, 5)):
            sample += self._field(self.random.choice((0, 1, 2, 3, 15, 16, 999, 19_500, 2**29 - 1)))
        return sample

    def _without_utf8(self, kind: type[Message], sample: bytes, samples: Sequence[bytes]) -> bytes:
        self._only_text = _MARK
        data = self.message(kind).SerializeToString()
        self._only_text = ""
        return data.replace(_MARK.encode(), _NO_UTF8)

    def _noise(self, kind: type[Message], sample: bytes, samples: Sequence[bytes]) -> bytes:
        return self.random.randbytes(self.random.choice((0, 1, 2, 8, 64, 4_096)))

    # Fields on the wire.

    def _field(self, number: int) -> bytes:
        """Return a field of any wire type, those among them that do not exist."""
        wire_type = self.random.randrange(8)
        tag = _varint(number << 3 | wire_type)
        match wire_type:
            case 0:
                return tag + _varint(self.random.getrandbits(64))
            case 1:
                return tag + self.random.randbytes(8)
            case 2:
                size = self.random.choice((0, 1, 20, 2**31, 2**63))
                return tag + _varint(size) + self.random.randbytes(min(size, 20))
            case 5:
                return tag + struct.pack("<f", self.random.choice(_FLOATS))
        return tag  # a group that begins or ends here, or what no wire type is

    # Fields of a message.

    def _fill(self, message: Message, density: float, depth: int) -> None:
        for field in message.DESCRIPTOR.fields:
            if self.random.random() < density:
                self._set(message, field, depth)

    def _edit(self, message: Message) -> None:
        """Change one field, of this message or of one in it."""
        while True:
            if not message.DESCRIPTOR.fields:
                return
            field = self.random.choice(message.DESCRIPTOR.fields)
            inner = None if _is_map(field) else self._inner(message, field)
            if inner is None or self.random.random() < 0.25:
                break
            message = inner
        if self.random.random() < 0.15:
            message.ClearField(field.name)
        else:
            self._set(message, field, 1)

    def _inner(self, message: Message, field: FieldDescriptor) -> Message | None:
        """Return a message that is in this field, if there is one."""
        if field.type != _F.TYPE_MESSAGE:
            return None
        value: Any = getattr(message, field.name)
        if field.is_repeated:
            return self.random.choice(value) if value else None
        found: Message | None = value if message.HasField(field.name) else None
        return found

    def _set(self, message: Message, field: FieldDescriptor, depth: int) -> None:
        value: Any = None
        if _is_map(field):
            key, item = (field.message_type.fields_by_name[name] for name in ("key", "value"))
            value = getattr(message, field.name)
            for _ in range(self._count()):
                value[self._scalar(key)] = self._scalar(item)
        elif field.type == _F.TYPE_MESSAGE:
            value = getattr(message, field.name)
            if field.is_repeated:
                self._extend(value, depth)
            else:
                value.SetInParent()
                if depth < MAX_DEPTH:
                    self._fill(value, 0.5, depth + 1)
        elif field.is_repeated:
            count = self._count()
            few = [self._scalar(field) for _ in range(min(count, 16))]
            getattr(message, field.name).extend(few if count <= 16 else few[:1] * count)
        else:
            setattr(message, field.name, self._scalar(field))

    def _extend(self, messages: Any, depth: int) -> None:
        count = self._count()
        if depth >= MAX_DEPTH:
            return
        for _ in range(min(count, 4)):
            self._fill(messages.add(), 0.5, depth + 1)
        if count > 16:
            shared = messages.add()
            self._fill(shared, 0.1, MAX_DEPTH)
            messages.extend([shared] * (count // 10))

    def _count(self) -> int:
        return self.random.choice(MANY) if self.random.random() < 0.01 else self.random.choice((0, 1, 1, 2, 3, 17))

    def _scalar(self, field: FieldDescriptor) -> Any:
        draw = self.random
        if field.type in _INTEGERS:
            return self._integer(*_INTEGERS[field.type])
        match field.type:
            case _F.TYPE_BOOL:
                return draw.random() < 0.5
            case _F.TYPE_STRING:
                return self._text()
            case _F.TYPE_BYTES:
                return draw.randbytes(draw.choice((0, 1, 15, 16, 32, 48, 1_600)))
        return draw.choice(_FLOATS) if draw.random() < 0.6 else draw.uniform(-3.0, 3.0)

    def _integer(self, low: int, high: int) -> int:
        draw, kind = self.random, self.random.random()
        if kind < 0.2 and self.numbers:
            value = draw.choice(self.numbers)
        elif kind < 0.6:
            value = draw.randrange(20)
        elif kind < 0.9:
            value = draw.choice((low, low + 1, -1, -2, 255, 256, 1_000, 2**31 - 1, 2**31, high - 1, high))
        else:
            value = draw.randint(low, high)
        return min(max(value, low), high)

    def _text(self) -> str:
        draw, kind = self.random, self.random.random()
        if self._only_text:
            return self._only_text
        if kind < 0.5 and self.texts:
            return draw.choice(self.texts)
        if kind < 0.97:
            return draw.choice(_TEXTS)
        return draw.choice("aé\N{GRINNING FACE}") * draw.choice(LONG)


def parsed(kind: type[M], data: bytes) -> M | None:
    """Return the message, or None for what is none."""
    try:
        return kind.FromString(data)
    except DecodeError:
        return None


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
