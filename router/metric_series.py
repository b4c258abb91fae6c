"""Series of a router's metrics that are looked up once and written to often: those of a model, and those of a tenant.

Each is a function of an amount. A series that is there counts from zero on, whether anything happens or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from octavo.metrics import bound
from octavo.names import Attribute

from router.request_record import RequestRecord

TOKEN_TYPES: Final = ("input", "cached", "output")
Write = Callable[[float], None]


class ModelSeries:
    """`instruments` by the names of the attributes below; `operation`: labels of those that have an operation."""

    __slots__ = (
        "_choices",
        "_decode",
        "_first_token",
        "_instruments",
        "_label",
        "_per_token",
        "_prefill",
        "_queue",
        "_tokens",
    )

    def __init__(self, instruments: Mapping[str, Any], model: str, operation: Mapping[str, str]) -> None:
        self._instruments = instruments
        self._label = label = {Attribute.REQUEST_MODEL: model}
        self._queue = bound(instruments["queue"], label)
        self._prefill = bound(instruments["prefill"], label)
        self._decode = bound(instruments["decode"], label)
        self._first_token = bound(instruments["first_token"], operation)
        self._per_token = bound(instruments["per_token"], operation)
        self._tokens = [bound(instruments["tokens"], label | {Attribute.TOKEN_TYPE: kind}) for kind in TOKEN_TYPES]
        self._choices: dict[str, Write] = {}

    def ended(self, record: RequestRecord, queue_s: float) -> None:
        """A request that was queued has ended."""
        accounts = record.accounts
        if accounts.attempts:
            self._queue(queue_s)
            count_tokens(record, self._tokens)
        if accounts.prefill_s:
            self._prefill(accounts.prefill_s)
        if (first_token_s := record.first_token_s) is not None:
            self._first_token(first_token_s)
            if (token_s := record.token_s) is not None:
                self._per_token(token_s)
            if accounts.decode_s:
                self._decode(accounts.decode_s)
        for finish in record.finish_reasons:
            write = self._choices.get(finish)
            if write is None:
                label = self._label | {Attribute.FINISH_REASON: finish}
                write = self._choices[finish] = bound(self._instruments["choices"], label)
            write(1)


class TenantSeries:
    __slots__ = ("_instruments", "_label", "_queue", "_requests", "_tokens")

    def __init__(self, instruments: Mapping[str, Any], tenant: str) -> None:
        self._instruments = instruments
        self._label = label = {Attribute.TENANT: tenant}
        self._queue = bound(instruments["tenant_queue"], label)
        self._tokens = [
            bound(instruments["tenant_tokens"], label | {Attribute.TOKEN_TYPE: kind}) for kind in TOKEN_TYPES
        ]
        self._requests: dict[str, Write] = {}

    def ended(self, record: RequestRecord, queue_s: float) -> None:
        reason = record.reason
        write = self._requests.get(reason)
        if write is None:
            label = self._label | ({Attribute.ERROR_TYPE: reason} if reason else {})
            write = self._requests[reason] = bound(self._instruments["tenant_requests"], label)
        write(1)
        if record.accounts.attempts:
            self._queue(queue_s)
            count_tokens(record, self._tokens)


def count_tokens(record: RequestRecord, tokens: list[Write]) -> None:
    """Count what a tenant pays for, of a request that was sent to a replica."""
    given, cached, generated = tokens
    given(record.num_prompt)
    if num_cached := record.accounts.num_cached:
        cached(num_cached)
    generated(record.num_generated - record.num_received)
