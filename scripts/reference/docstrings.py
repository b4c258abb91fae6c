"""The sentence under a name: docstrings of constants and fields, which Python itself throws away."""

from __future__ import annotations

import ast
import inspect
import textwrap


def of_class(kind: type) -> dict[str, str]:
    """Return the docstrings that stand under names in the body of a class, each as one line, in their order; "" for a
    name without one."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for statement, following in zip(tree.body, [*tree.body[1:], None], strict=True):
        for name in _names(statement):
            found[name] = _text(following)
    return found


def _names(statement: ast.stmt) -> list[str]:
    match statement:
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case ast.Assign(targets=[ast.Name(id=name)]):
            return [name]
    return []


def _text(statement: ast.stmt | None) -> str:
    match statement:
        case ast.Expr(value=ast.Constant(value=str(text))):
            return " ".join(text.split())
    return ""
