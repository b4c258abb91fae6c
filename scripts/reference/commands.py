"""docs/commands.md: every command of `octavo`, its arguments and options, read from its own definition."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import typer.main

from cluster.cli import app
from scripts.reference.markdown import code, codes, table

INTRODUCTION = """\
# Commands

`octavo COMMAND --help` says the same. Results go to stdout, everything else to stderr.
"""


def page() -> str:
    return "\n".join([INTRODUCTION, *_commands(typer.main.get_command(app), "octavo")])


def _commands(command: Any, path: str) -> Iterator[str]:
    yield _one(command, path)
    for name, below in getattr(command, "commands", {}).items():
        if not below.hidden:
            yield from _commands(below, f"{path} {name}")


def _one(command: Any, path: str) -> str:
    arguments = " ".join(_metavar(each) for each in command.params if each.param_type_name == "argument")
    parts = [f"## {path}\n", f"```\n{path} [OPTIONS] {arguments}".rstrip() + "\n```\n"]
    if command.help:
        parts.append(inspect.cleandoc(command.help) + "\n")
    if command.epilog:
        parts.append(inspect.cleandoc(command.epilog) + "\n")
    rows = [_row(each) for each in command.params if each.name != "help"]
    if rows:
        parts.append(table(("option", "variable", "default", "meaning"), rows))
    return "\n".join(parts)


def _metavar(argument: Any) -> str:
    name = (argument.metavar or argument.name or "").upper()
    return name if argument.required else f"[{name}]"


def _row(parameter: Any) -> tuple[str, str, str, str]:
    is_option = parameter.param_type_name == "option"
    names = codes((*parameter.opts, *parameter.secondary_opts)) if is_option else code(_metavar(parameter))
    default = "" if parameter.default in (None, False) or callable(parameter.default) else parameter.default
    return (names, code(parameter.envvar or ""), code(default), " ".join((parameter.help or "").split()))
