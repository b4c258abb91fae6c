"""Where a chat template runs: Jinja's immutable sandbox, without loader, in which nothing is without a bound.

A template is somebody else's program, so it is not trusted:
- of filters, globals and string methods it has those that templates need and that cannot make much out of little;
- every string, list and number that it builds, and its output, is bounded (`MAX_CHARACTERS`, `MAX_BITS`);
- its iterations and calls are counted and timed (`MAX_STEPS`, `MAX_RENDER_S`) by the `Meter` of each rendering.

It has what templates written for `transformers` expect: raise_exception, strftime_now, tojson, loop controls and
``{% generation %}``. Knows no messages.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_CHARACTERS = 16 * 1024 * 1024
"""Of any string that a template builds; for other values the number of their parts counts too."""
MAX_BITS = 4_096
MAX_STEPS = 200_000
"""Iterations of loops and calls in one rendering."""
MAX_RENDER_S = 2.0
MAX_INDENT = 64

METER = "octavo meter"
"""Where the context keeps the `Meter`; no name of a template has a space in it."""
# fmt: off
_FILTERS = frozenset({
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby", "int",
    "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "safe",
    "select", "selectattr", "sort", "string", "striptags", "sum", "title", "trim", "unique", "upper",
})
# fmt: on
_GLOBALS = frozenset({"range", "dict", "namespace"})
_UNSAFE_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map", "translate"})


class TemplateLimitError(Exception):
    """A template asks for more than it may have."""


def compile_template(source: str) -> jinja2.Template:
    """Return the template; the context of each rendering has a new `Meter` under `METER`. Raises what Jinja raises."""
    environment = _Environment()
    return environment.from_string(_metered(environment.parse(source)))


class Meter:
    """What one rendering has used up, and the operations that compiled templates do through it."""

    __slots__ = ("_deadline", "_num_steps")

    def __init__(self) -> None:
        self._num_steps = 0
        self._deadline = time.monotonic() + MAX_RENDER_S

    def step(self) -> str:
        self._num_steps += 1
        if self._num_steps > MAX_STEPS:
            raise TemplateLimitError(f"it takes more than {MAX_STEPS} steps")
        if time.monotonic() > self._deadline:
            raise TemplateLimitError(f"it takes longer than {MAX_RENDER_S:g} s")
        return ""

    def bounded(self, value: object) -> object:
        self.step()
        return _bounded(value)

    def concat(self, *parts: object) -> str:
        self.step()
        texts = [str(_bounded(part)) for part in parts]
        check_size(sum(map(len, texts)))
        return "".join(texts)


class _Metering(NodeTransformer):
    """Rewrites a parsed template: a step at the beginning of each body that may run often, bounds on what filters get,
    and ``~`` within the limits."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802  (Jinja's visitor names)
        return self._with_step(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        return self._with_step(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:  # noqa: N802
        return self._with_step(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _call("concat", node.nodes)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if node.node is not None:
            node.node = _call("bounded", [node.node])
        node.args = [_call("bounded", [argument]) for argument in node.args]
        return node

    def _with_step(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.Output([_call("step", [])]))
        return node


def _call(method: str, arguments: list[nodes.Expr]) -> nodes.Call:
    meter = nodes.Getitem(nodes.ContextReference(), nodes.Const(METER), "load")
    return nodes.Call(nodes.Getattr(meter, method, "load"), arguments, [], None, None)


def _metered(template: nodes.Template) -> nodes.Template:
    _Metering().visit(template)
    template.set_lineno(1)
    template.set_environment(template.environment)  # type: ignore[arg-type]  # the parser has set it
    return template


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's words for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012  (Jinja declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # evaluates nothing while compiling, where nothing is metered
            finalize=_bounded,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        self.filters = {name: function for name, function in self.filters.items() if name in _FILTERS}
        self.filters.update(tojson=_to_json, replace=_replace, join=_join, indent=_indent)
        self.globals = {name: value for name, value in self.globals.items() if name in _GLOBALS}
        self.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str) and attr in _UNSAFE_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Leave str.format to `is_safe_attribute`, which refuses it."""

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  (as overridden)
        name, owner = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None)
        if not isinstance(owner, Meter):
            __context[METER].step()
        if isinstance(owner, str) and name == "replace":
            return _replace(owner, *args, **kwargs)
        if isinstance(owner, str) and name == "join":
            return _join(args[0], owner)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        context[METER].step()
        sequences = (str, list, tuple)
        if operator == "%" and isinstance(left, str):
            raise TemplateLimitError("it formats with %, which has no bound")
        if operator == "+" and isinstance(left, sequences) and isinstance(right, sequences):
            check_size(len(left) + len(right))
        if operator == "*":
            for sequence, factor in ((left, right), (right, left)):
                if isinstance(sequence, sequences) and isinstance(factor, int):
                    check_size(len(sequence) * factor)
        if operator == "**":
            _check_power(left, right)
        return _check_number(super().call_binop(context, operator, left, right))


def check_size(num_characters: int) -> None:
    if num_characters > MAX_CHARACTERS:
        raise TemplateLimitError(f"it makes a text of more than {MAX_CHARACTERS} characters")


def _check_number(value: Any) -> Any:
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise TemplateLimitError(f"it makes a number of more than {MAX_BITS} bits")
    return value


def _check_power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > MAX_BITS:
        raise TemplateLimitError(f"it makes a number of more than {MAX_BITS} bits")


def _bounded(value: Any) -> Any:
    """Return `value`, if its text is surely bounded: shared parts count as often as they occur."""
    if isinstance(value, str | int | float | None | Undefined):
        return value
    size = 0
    parts: list[Iterable[Any]] = [iter((value,))]
    while parts:
        for part in parts[-1]:
            size += len(part) if isinstance(part, str) else 1
            check_size(size)
            if isinstance(part, Mapping):
                parts.append(iter([*part.keys(), *part.values()]))
                break
            if isinstance(part, list | tuple | set | frozenset):
                parts.append(iter(part))
                break
        else:
            parts.pop()
    return value


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """As `transformers` has it: no HTML escaping, Unicode as it is."""
    known = {
        "ensure_ascii": False,
        **{name: options[name] for name in ("ensure_ascii", "sort_keys") if name in options},
    }
    separators = options.get("separators")
    return json.dumps(
        _bounded(value), indent=_narrow(indent), separators=tuple(separators) if separators else None, **known
    )


def _replace(text: Any, old: Any, new: Any, count: int | None = -1) -> str:
    text, old, new = str(text), str(old), str(new)
    occurrences = text.count(old) if len(new) > len(old) else 0
    check_size(len(text) + occurrences * (len(new) - len(old)))
    replaced: str = text.replace(old, new, -1 if count is None else count)
    return replaced


def _join(parts: Iterable[Any], d: Any = "", attribute: str | None = None) -> str:
    separator = str(d)
    texts = [str(part if attribute is None else _attribute(part, attribute)) for part in parts]
    check_size(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


def _attribute(part: Any, name: str) -> Any:
    return part.get(name, "") if isinstance(part, Mapping) else ""


def _indent(text: Any, width: int = 4, first: bool = False, blank: bool = False) -> str:
    margin = " " * (_narrow(width) or 0)
    lines = str(text).splitlines()
    check_size(len(str(text)) + len(margin) * len(lines))
    return "\n".join(margin + line if (i or first) and (line or blank) else line for i, line in enumerate(lines))


def _narrow(width: Any) -> int | None:
    if width is None:
        return None
    if isinstance(width, int) and 0 <= width <= MAX_INDENT:
        return width
    raise TemplateLimitError(f"it indents by {width!r}, which must be in [0, {MAX_INDENT}]")


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    if len(format) > 128 or any(character.isdigit() for character in format):
        raise TemplateLimitError("it formats the time with a width or with more than 128 characters")
    return datetime.datetime.now().strftime(format)
