"""What is wrong with one request: every broken rule and every field that is not served, told together."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.names import Reason

from router.model import ServedModel
from workers.errors import InvalidRequestError, NotServedError, OctavoError, Violation


class Violations:
    """Collects what is wrong with one request."""

    def __init__(self) -> None:
        self._invalid: list[Violation] = []
        self._not_served: list[Violation] = []
        self._reasons: set[str] = set()

    def require(self, holds: bool, field: str, rule: str, value: object, *, reason: str = Reason.INVALID_FIELD) -> None:
        if not holds:
            self._invalid.append(Violation(field, f"{rule}, is {shown(value)}"))
            self._reasons.add(reason)

    def serve(self, is_served: bool, field: str, what: str = "") -> None:
        if not is_served:
            self._not_served.append(Violation(field, f"{what or 'this field'} is not served by this release"))

    @property
    def count(self) -> int:
        return len(self._invalid) + len(self._not_served)

    def error(self) -> OctavoError | None:
        """Return what to raise. A broken rule weighs more than a field that is not served; all are listed."""
        violations = [*self._invalid, *self._not_served]
        if not violations:
            return None
        message = "; ".join(f"{field}: {description}" for field, description in violations)
        if not self._invalid:
            return NotServedError(message, violations=violations)
        reason = self._reasons.pop() if len(self._reasons) == 1 else Reason.INVALID_FIELD
        return InvalidRequestError(message, reason=reason, violations=violations)

    def raise_if_any(self) -> None:
        error = self.error()
        if error is not None:
            raise error


def check_token_ids(token_ids: Sequence[int], field: str, model: ServedModel, violations: Violations) -> None:
    vocab_size = model.manifest.vocab_size
    if token_ids and max(token_ids) >= vocab_size:
        i, value = next((i, value) for i, value in enumerate(token_ids) if value >= vocab_size)
        rule = f"must be in [0, {vocab_size}), the model's vocabulary"
        violations.require(False, f"{field}[{i}]", rule, value, reason=Reason.TOKEN_ID_OUT_OF_RANGE)


def shown(value: object) -> str:
    """Return a value for a message: short, and in ASCII."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
