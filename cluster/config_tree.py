"""Nested mappings to frozen dataclasses and back: TOML, OCTAVO_* variables, and values of the types that keys want.

Knows no key of ours; whatever does not fit raises ConfigError with the key, the rule and the value.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from cluster.config_sections import rule
from workers.errors import ConfigError

ENV_PREFIX = "OCTAVO_"
ENV_CREDENTIALS = frozenset(
    {
        "OCTAVO_TOKEN",
        "OCTAVO_CA_FILE",
        "OCTAVO_CERT_FILE",
        "OCTAVO_KEY_FILE",
        "OCTAVO_VICTIM_TOKEN",
        "OCTAVO_ATTACKER_TOKEN",
    }
)
"""Clients' (cluster/cli_dial.py, cluster/cli_isolation.py)."""
ENV_RESERVED = ENV_CREDENTIALS | {"OCTAVO_CONFIG", "OCTAVO_CACHE_DIR", "OCTAVO_SECRET_FILE", "OCTAVO_ADDRESS"}
"""Variables that are no configuration keys: those, the file, the node's cache, the node's secret, a client's router."""
_KUBERNETES_LINK = re.compile(r"OCTAVO_(?!\w*__)(\w+_)?(SERVICE_(HOST|PORT)|PORT(_|$))")
"""Kubernetes puts these into every pod beside a service called octavo or octavo-something; none has a section."""

Tree = Mapping[str, Any]
Section = TypeVar("Section")


def read(path: Path) -> dict[str, Any]:
    """Return what a TOML file says. Raises ConfigError."""
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration {path} is not TOML: {error}") from error


def from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return what OCTAVO_* variables say, as text that has yet to become what its key wants."""
    tree: dict[str, Any] = {}
    for name in sorted(environ):
        if not name.startswith(ENV_PREFIX) or name in ENV_RESERVED or _KUBERNETES_LINK.match(name):
            continue
        *sections, key = name.removeprefix(ENV_PREFIX).lower().split("__")
        at = tree
        for section in sections:
            at = at.setdefault(section, {})
        at[key] = _Text(environ[name], name)
    return tree


def merge(under: Tree, over: Tree) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return merged


def build(kind: type[Section], tree: object, path: str = "") -> Section:
    """Return the section of class `kind` that `tree` gives. `path`: its name in messages, with a dot at the end."""
    rule(isinstance(tree, Mapping), path.rstrip("."), "must be a section", tree)
    assert isinstance(tree, Mapping)
    hints = get_type_hints(kind)
    values = {}
    for key, value in tree.items():
        name = f"{path}{key}"
        if key not in hints:
            where = f" (from {value.variable})" if isinstance(value, _Text) else ""
            raise ConfigError(f"{name} must be one of {', '.join(f'{path}{hint}' for hint in hints)}, is no key{where}")
        values[key] = _value(hints[key], value, name)
    return kind(**values)


def to_toml(section: Any) -> str:
    """Return a dataclass as the file that gives it: its values, then a section for each dataclass in it. A mapping of
    dataclasses gives one for each; any other stands in braces."""
    return "\n\n".join(_blocks(section, "")) + "\n"


class _Text(str):
    """A value that came as text and has yet to become what its key wants."""

    __slots__ = ("variable",)
    variable: str

    def __new__(cls, text: str, variable: str) -> _Text:
        value = super().__new__(cls, text)
        value.variable = variable
        return value


def _value(kind: Any, value: object, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return build(kind, value, f"{name}.")  # type: ignore[arg-type]  # a class, not an instance
    if kind == tuple[str, ...]:
        if isinstance(value, _Text):
            value = [part.strip() for part in value.split(",") if part.strip()]
        rule(isinstance(value, list | tuple), name, "must be a list of strings", value)
        return tuple(_value(str, item, f"{name}[{i}]") for i, item in enumerate(value))  # type: ignore[var-annotated, arg-type]
    if kind == Mapping[str, Any]:
        rule(isinstance(value, Mapping), name, "must be a table", value)
        return {key: _any(item) for key, item in value.items()}  # type: ignore[attr-defined]
    if kind not in (bool, int, float, str):  # the one other mapping: resources.custom
        rule(isinstance(value, Mapping), name, "must be a table of numbers", value)
        return {key: _value(float, amount, f"{name}.{key}") for key, amount in value.items()}  # type: ignore[attr-defined]
    if isinstance(value, _Text):
        value = _parse(kind, value, name)
    if kind is float and type(value) is int:
        value = float(value)
    rule(type(value) is kind, name, f"must be {_KINDS[kind]}", value)
    if isinstance(value, float):
        rule(math.isfinite(value), name, "must be finite", value)
    return value


_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def _any(value: object) -> Any:
    """Return a value whose kind nobody has said: what a variable's text is in JSON, else the text."""
    if isinstance(value, Mapping):
        return {key: _any(item) for key, item in value.items()}
    if not isinstance(value, _Text):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return str(value)


def _parse(kind: type, text: _Text, name: str) -> object:
    if kind is bool:
        rule(text in ("true", "false", "1", "0"), name, f"({text.variable}) must be true or false", str(text))
        return text in ("true", "1")
    try:
        return kind(text) if kind is not str else str(text)
    except ValueError:
        raise ConfigError(f"{name} ({text.variable}) must be {_KINDS[kind]}, is {str(text)!r}") from None


def _blocks(section: Any, path: str) -> Iterator[str]:
    lines, sections = [f"[{path}]"] if path else [], {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            sections[field.name] = value
        elif isinstance(value, Mapping) and any(map(dataclasses.is_dataclass, value.values())):
            sections |= {f"{field.name}.{_key(key)}": item for key, item in value.items()}
        elif path or value != {}:
            lines.append(f"{field.name} = {_toml(value)}")
    yield "\n".join(lines)
    for name, item in sections.items():
        yield from _blocks(item, f"{path}.{name}" if path else name)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def _toml(value: object) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)
