"""The requests that have ended lately, so many of them. Finds them for whoever asks, by looking at all. Pure."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator

from router.request_record import MAX_NAME, RequestRecord


class RequestRecords:
    """Keeps the last `max_records`; 0: none."""

    def __init__(self, max_records: int) -> None:
        self.max_records = max_records
        self._records: deque[RequestRecord] = deque(maxlen=max_records)

    def __len__(self) -> int:
        return len(self._records)

    def add(self, record: RequestRecord) -> None:
        self._records.append(record)

    def find(self, name: str, *, tenant: str) -> list[RequestRecord]:
        """Return the tenant's requests with this id, or of the trace with this id, the oldest first. Of an id that was
        too long the beginning is known."""
        name, trace_id = name[:MAX_NAME], name.lower()
        return [each for each in self._of(tenant) if each.request_id == name or each.trace_id == trace_id]

    def slowest(self, number: int, *, tenant: str, model: str = "") -> list[RequestRecord]:
        """Return the tenant's `number` slowest requests, of all models or one, the slowest first."""
        found = (each for each in self._of(tenant) if not model or each.model == model)
        return heapq.nlargest(number, found, key=_duration)

    def _of(self, tenant: str) -> Iterator[RequestRecord]:
        return (each for each in self._records if each.tenant == tenant)


def _duration(record: RequestRecord) -> float:
    return record.duration_s
