"""A TOML table to a frozen dataclass: names and types are its fields', every refusal has the rule and the value.

Fields may be str, bool, int, float, `Span`, tuples of str, other such dataclasses (tables) and tuples of these (arrays
of tables), each also ``| None``. What a value may be beyond its type is for the dataclass's own `check`.
"""

from __future__ import annotations

import dataclasses
import random
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

_T = TypeVar("_T")


class ScenarioError(Exception):
    """A scenario that cannot be run; the message has the key, the rule and the value."""


def require(holds: bool, key: str, rule: str, value: object) -> None:
    """Raise ScenarioError unless `holds`."""
    if not holds:
        raise ScenarioError(f"{key} {rule}, is {value!r}")


@dataclass(frozen=True, slots=True)
class Span:
    """A number, or any between two with equal chance; in TOML ``5`` or ``[1, 9]``."""

    low: float
    high: float

    def draw(self, rng: random.Random) -> float:
        return self.low if self.low == self.high else rng.uniform(self.low, self.high)

    def draw_int(self, rng: random.Random) -> int:
        return int(self.low) if self.low == self.high else rng.randint(int(self.low), int(self.high))


def read_table(cls: type[_T], table: Mapping[str, Any], key: str = "") -> _T:
    """Return `cls` made of `table`, which lies under `key`. Raises ScenarioError."""
    prefix = f"{key}." if key else ""
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(table.keys() - fields.keys())
    if unknown:
        raise ScenarioError(f"{prefix}{unknown[0]} is not a key; there are {', '.join(sorted(fields))}")
    for name, field in fields.items():
        is_optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if name not in table and not is_optional:
            raise ScenarioError(f"{prefix}{name} must be given")
    values = {name: _read(hints[name], value, f"{prefix}{name}") for name, value in table.items()}
    return cls(**values)


def _read(kind: Any, value: Any, key: str) -> Any:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(each for each in typing.get_args(kind) if each is not type(None))
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        require(isinstance(value, list), key, "must be an array", value)
        return tuple(_read(item, each, f"{key}[{position}]") for position, each in enumerate(value))
    if kind is Span:
        return _span(value, key)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        require(isinstance(value, dict), key, "must be a table", value)
        return read_table(kind, value, key)
    if kind is float:
        require(_is_number(value), key, "must be a number", value)
        return float(value)
    if kind is int:
        require(isinstance(value, int) and not isinstance(value, bool), key, "must be a whole number", value)
    else:
        names = {str: "a string", bool: "true or false"}
        require(isinstance(value, kind), key, f"must be {names[kind]}", value)
    return value


def _span(value: Any, key: str) -> Span:
    pair = value if isinstance(value, list) else [value, value]
    is_pair = len(pair) == 2 and all(map(_is_number, pair))
    require(is_pair and 0 <= pair[0] <= pair[1], key, "must be a number >= 0, or two in ascending order", value)
    return Span(*pair)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
