"""What one Session has to say and has not said yet, merged into as few messages as possible.

Pure: no asyncio, no gRPC call. Within one message a router takes starts before cancels and grants.
"""

from __future__ import annotations

from octavo.client.exchange import Exchange
from octavo.v1 import inference_service_pb2 as pb


class Outbox:
    """Starts beyond `max_start_bytes` wait for the next message, but each message takes at least one."""

    def __init__(self, max_start_bytes: int = 1024 * 1024) -> None:
        self._max_start_bytes = max_start_bytes
        self._starts: dict[str, Exchange] = {}
        self._cancels: list[str] = []
        self._grants: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._starts or self._cancels or self._grants)

    def start(self, exchange: Exchange) -> None:
        self._starts[exchange.request_id] = exchange

    def cancel(self, request_id: str, *, after_start: bool = False) -> bool:
        """Cancel a request; return whether the router will hear of it. One whose Start has not left is forgotten,
        unless `after_start`: then both go, for a request that an earlier Session started."""
        self._grants.pop(request_id, None)
        if not after_start and self._starts.pop(request_id, None) is not None:
            return False
        self._cancels.append(request_id)
        return True

    def grant(self, request_id: str, tokens: int) -> None:
        if request_id not in self._starts:  # a Start says by itself how large the window is
            self._grants[request_id] = self._grants.get(request_id, 0) + tokens

    def withdraw(self) -> list[Exchange]:
        """Take back the Starts that have not left."""
        starts, self._starts = self._starts, {}
        return list(starts.values())

    def take(self, now: float) -> tuple[pb.SessionRequest, list[Exchange]]:
        """Return the next message and the exchanges that it starts."""
        started: list[Exchange] = []
        num_bytes = 0
        for exchange in self._starts.values():
            num_bytes += exchange.num_bytes
            if started and num_bytes > self._max_start_bytes:
                break
            started.append(exchange)
        for exchange in started:
            del self._starts[exchange.request_id]
        # A cancel must not overtake the Start that it is for.
        cancels = [each for each in self._cancels if each not in self._starts]
        self._cancels = [each for each in self._cancels if each in self._starts]
        grants, self._grants = self._grants, {}
        message = pb.SessionRequest(
            starts=[exchange.start(now) for exchange in started],
            cancels=[pb.Cancel(request_id=each) for each in cancels],
            grants=[pb.Grant(request_id=each, tokens=tokens) for each, tokens in grants.items()],
        )
        return message, started
