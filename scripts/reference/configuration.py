"""docs/configuration.md: every key, its variable, type, default and meaning, and what a wrong value is told."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any, get_type_hints

from cluster.config import TABLES, ClusterConfig, ModelConfig, from_tree
from cluster.config_tree import ENV_PREFIX
from scripts.reference.docstrings import of_class
from scripts.reference.markdown import code, table
from workers.errors import ConfigError

INTRODUCTION = """\
One TOML file (`--config`, `OCTAVO_CONFIG`), over it `OCTAVO_*` variables, over both the options of `octavo serve`.
`octavo config` prints the result. A table `[models.NAME]` has the same keys for one of several models: {shared}.
"""
PROBES: Mapping[type, tuple[Any, ...]] = {
    bool: (),
    int: (-1, 0, 10**12),
    float: (-1.0, 0.0, 1e12),
    str: ("?", "", " ", "x" * 300),
}
"""Values that break rules, by type; a key's rule is what is said of the first that breaks it."""
HEADS = ("key", "variable", "type", "default", "meaning", "rule")
_LISTS, _TABLES = ("?",), {"?": -1.0}


def page() -> str:
    shared = ", ".join(
        code(f"[{field.name}]" if dataclasses.is_dataclass(_hints(ModelConfig)[field.name]) else field.name)
        for field in dataclasses.fields(ModelConfig)
    )
    return "\n".join(["# Configuration\n", INTRODUCTION.format(shared=shared), *_sections()])


def _sections() -> Iterator[str]:
    hints, about = _hints(ClusterConfig), of_class(ClusterConfig)
    sections = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    plain = [name for name in hints if name not in sections and name != TABLES]
    yield table(HEADS, [_row("", ClusterConfig, name, about) for name in plain])
    for section, kind in sections.items():
        yield f"## [{section}]\n"
        docs = of_class(kind)
        yield table(HEADS, [_row(section, kind, field.name, docs) for field in dataclasses.fields(kind)])


def _row(section: str, kind: type, name: str, about: Mapping[str, str]) -> tuple[str, ...]:
    hint = _hints(kind)[name]
    key = f"{section}.{name}" if section else name
    variable = ENV_PREFIX + key.replace(".", "__").upper()
    default = getattr(kind(), name)
    if hint not in PROBES and hint != tuple[str, ...]:
        variable = ""  # a table cannot be said in one
    return (code(name), code(variable), _type(hint), code(_toml(default)), about[name], rule(key, hint))


def rule(key: str, hint: Any) -> str:
    """Return what a configuration with a wrong value for `key` is told, "" if there is none."""
    for probe in PROBES.get(hint, (_LISTS,) if hint == tuple[str, ...] else (_TABLES,)):
        tree: Any = probe
        for part in reversed(key.split(".")):
            tree = {part: tree}
        try:
            from_tree(tree)
        except ConfigError as error:
            said = str(error)
            if said.startswith(key):
                return _without_value(said.removeprefix(key))
    return ""


def _without_value(said: str) -> str:
    """Cut off the value that broke the rule, and what names the part of the key that had it."""
    for end in (", is ", ", has "):
        said = said.rpartition(end)[0] or said
    return said.partition(" ")[2].strip()


def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _type(hint: Any) -> str:
    if isinstance(hint, type) and hint in PROBES:
        return {bool: "true or false", int: "integer", float: "number", str: "string"}[hint]
    if hint == tuple[str, ...]:
        return "list of strings"
    return "table of numbers" if hint == Mapping[str, float] else "table"


def _toml(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)
