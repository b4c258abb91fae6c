"""What a router counts and measures of its requests: the synchronous instruments of `octavo.metrics`.

A request is told of once, when it has ended; a batch and a decision when they go; tokens and messages never. Labels
are bounded: models that are served, reasons of errors, rules, and so many tenants as are configured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Final

from octavo import metrics as table
from octavo.metrics import bound
from octavo.names import Attribute, Reason

from router.metric_series import ModelSeries, TenantSeries, Write
from router.request_record import RequestRecord
from router.span import GENERATION, OPERATIONS
from router.types import Attempt, BatchShape, Decision

UNKNOWN: Final = "unknown"
"""The model of requests that name none of those that are served."""
OTHER: Final = "other"
"""The tenants that are too many."""
NOBODY: Final = "none"
"""The tenant where callers are not told apart, or say nothing."""
_OPERATION: Final = {Attribute.OPERATION_NAME: GENERATION}
_MISSES: Final = frozenset({Reason.DEADLINE_PASSED, Reason.DEADLINE_UNREACHABLE})
_FAILURES: Final = (
    Reason.INTERNAL,
    Reason.NO_REPLICA,
    Reason.MODEL_FAILED,
    Reason.REPLICA_LOST,
    Reason.QUEUE_FULL,
)
"""What alerts count."""
Labels = Callable[[str, str], dict[str, str]]
"""Makes the labels of a series of a model and a word: a reason or a rule."""
_TABLE: Final = {
    "duration": table.REQUEST_DURATION,
    "first_token": table.TIME_TO_FIRST_TOKEN,
    "per_token": table.TIME_PER_OUTPUT_TOKEN,
    "queue": table.QUEUE_DURATION,
    "prefill": table.PREFILL_DURATION,
    "decode": table.DECODE_DURATION,
    "requests": table.REQUESTS,
    "choices": table.FINISHED_CHOICES,
    "tokens": table.TOKENS_USED,
    "rejections": table.REJECTIONS,
    "misses": table.DEADLINE_MISSES,
    "resumes": table.RESUMES,
    "tenant_requests": table.TENANT_REQUESTS,
    "tenant_tokens": table.TENANT_TOKENS,
    "tenant_queue": table.TENANT_QUEUE_DURATION,
    "batch_requests": table.BATCH_REQUESTS,
    "batch_tokens": table.BATCH_TOKENS,
    "placements": table.PLACEMENTS,
    "matched": table.PLACEMENT_MATCHED_TOKENS,
}


class RouterMetrics:
    """`meter` is one of the OpenTelemetry API; `models` are the names of all that are served or should be."""

    def __init__(self, meter: Any, models: Collection[str], *, max_tenants: int) -> None:
        self.meter = meter
        self._only_model = next(iter(models)) if len(models) == 1 else UNKNOWN
        self._max_tenants = max_tenants
        self._instruments = {name: metric.create(meter) for name, metric in _TABLE.items()}
        self._models = {model: self._new_model(model) for model in (*models, UNKNOWN)}
        self._tenants: dict[str, TenantSeries] = {}
        self._other_tenants: TenantSeries | None = None
        self._writes: dict[tuple[str, str, str, Labels], Write] = {}
        for model in models:
            self._begin_at_zero(model)

    def request_ended(self, record: RequestRecord) -> None:
        model, reason, queue_s = self._model(record.model), record.reason, record.queue_s
        labels = _ended[record.operation]
        self._write("duration", model, reason, labels)(record.duration_s)
        self._write("requests", model, reason, labels)(1)
        if record.has_begun:
            self._models[model].ended(record, queue_s)
            if reason in _MISSES:
                self._write("misses", model, reason, _failed)(1)
        elif reason and reason != Reason.CANCELLED:
            self.refused(model, reason)
        tenant = self._tenants.get(record.tenant)
        if tenant is None:
            tenant = self._new_tenant(record.tenant)
        tenant.ended(record, queue_s)

    def refused(self, model: str, reason: str) -> None:
        """A request was turned away before it was queued."""
        self._write("rejections", self._model(model), reason, _failed)(1)

    def batch_left(self, model: str, batch: BatchShape) -> None:
        self._write("batch_requests", model, "", _failed)(batch.num_requests)
        self._write("batch_tokens", model, "", _failed)(batch.num_tokens)

    def placed(self, model: str, decision: Decision, *, after: Attempt | None) -> None:
        """A request has a replica; `after` an attempt at another one that was lost, if there was one."""
        self._write("placements", model, decision.rule, _ruled)(1)
        if decision.matched_tokens:
            self._write("matched", model, "", _failed)(decision.matched_tokens)
        if after is not None:
            self._write("resumes", model, after.loss_reason, _failed)(1)

    def _begin_at_zero(self, model: str) -> None:
        """A series that begins with its first failure shows no increase to whoever computes rates: begin before it."""
        for reason in _FAILURES:
            self._write("requests", model, reason, _ended[GENERATION])(0)
        for reason in _MISSES:
            self._write("misses", model, reason, _failed)(0)
        self._write("resumes", model, Reason.REPLICA_LOST, _failed)(0)

    def _model(self, name: str) -> str:
        """Return the label for what a client may have written."""
        if name in self._models:
            return name
        return UNKNOWN if name else self._only_model

    def _new_model(self, model: str) -> ModelSeries:
        return ModelSeries(self._instruments, model, _OPERATION | {Attribute.REQUEST_MODEL: model})

    def _new_tenant(self, name: str) -> TenantSeries:
        """Return the series of a tenant: its own for those that came first."""
        if len(self._tenants) < self._max_tenants:
            found = self._tenants[name] = TenantSeries(self._instruments, name or NOBODY)
            return found
        if self._other_tenants is None:
            self._other_tenants = TenantSeries(self._instruments, OTHER)
        return self._other_tenants

    def _write(self, name: str, model: str, word: str, labels: Labels) -> Write:
        """Return what writes to one series of the instrument `name`."""
        key = (name, model, word, labels)
        write = self._writes.get(key)
        if write is None:
            write = self._writes[key] = bound(self._instruments[name], labels(model, word))
        return write


def _failed(model: str, reason: str) -> dict[str, str]:
    return {Attribute.REQUEST_MODEL: model} | ({Attribute.ERROR_TYPE: reason} if reason else {})


def _operated(operation: str, model: str, reason: str) -> dict[str, str]:
    return {Attribute.OPERATION_NAME: operation} | _failed(model, reason)


_ended: Final = {operation: partial(_operated, operation) for operation in (GENERATION, *OPERATIONS.values())}
"""Labels of what a request ended with, by its operation."""


def _ruled(model: str, rule: str) -> dict[str, str]:
    return {Attribute.REQUEST_MODEL: model, Attribute.RULE: rule}
