"""One thing that must hold of a report: a figure, a comparison, a number. Written "first_token_s.p99 <= 0.5"."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

from load_tests.generator.fields import ScenarioError
from load_tests.generator.figures import FIGURES

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "==": operator.eq,
}
_FORM = re.compile(r"\s*([a-z0-9_.]+)\s*(<=|>=|==|<|>)\s*([-+0-9.eE]+)\s*")


@dataclass(frozen=True, slots=True)
class Threshold:
    figure: str
    comparison: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ScenarioError with what is wrong."""
        match = _FORM.fullmatch(text)
        if match is None:
            raise ScenarioError(f"a threshold must look like 'first_token_s.p99 <= 0.5', is {text!r}")
        figure, comparison, limit = match.groups()
        if figure not in FIGURES:
            raise ScenarioError(f"a threshold must be about one of {', '.join(FIGURES)}, is about {figure!r}")
        try:
            return cls(figure, comparison, float(limit))
        except ValueError as error:
            raise ScenarioError(f"a threshold must have a number, has {limit!r}") from error

    def holds(self, figures: Mapping[str, float | None]) -> bool:
        """Say whether it holds; a figure that could not be measured breaks every threshold."""
        value = figures[self.figure]
        return value is not None and _OPERATORS[self.comparison](value, self.limit)

    def __str__(self) -> str:
        return f"{self.figure} {self.comparison} {self.limit:g}"
