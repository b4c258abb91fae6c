"""Every request of the router's back that has not ended, and which of them a replica has.

Numbers them and their attempts, keeps the deadlines of those that are aboard a replica (the batcher keeps those of the
others), and says which delta belongs to a present attempt. Decides nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from router.admission import Permit
from router.fleet import Fleet
from router.flight import Flight
from router.link import ReplicaLink
from router.removable_heap import RemovableHeap
from router.types import Request, Sink


class Flights:
    """Keeps `fleet` told of who is aboard which link."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._numbers = itertools.count(1)
        self._flights: dict[int, Flight] = {}
        """By their number."""
        self._works: dict[int, Flight] = {}
        """Those that a replica has, by the work id of their present attempt."""
        self._deadlines = RemovableHeap()
        """Of the requests in `_works`."""

    def __len__(self) -> int:
        return len(self._flights)

    def __iter__(self) -> Iterator[Flight]:
        return iter(list(self._flights.values()))

    @property
    def aboard(self) -> list[Flight]:
        """Those that a replica has."""
        return list(self._works.values())

    def add(self, request: Request, sink: Sink, permit: Permit) -> Flight:
        flight = Flight(next(self._numbers), request, sink, permit)
        self._flights[flight.key] = flight
        return flight

    def find(self, key: int) -> Flight | None:
        """Return the request with this number, unless it has ended."""
        return self._flights.get(key)

    def find_work(self, work_id: int, link: ReplicaLink) -> Flight | None:
        """Return whose present attempt this is, if it is on `link`; a delta of any other work is late."""
        flight = self._works.get(work_id)
        return flight if flight is not None and flight.link is link else None

    def board(self, flight: Flight, link: ReplicaLink) -> None:
        """Begin an attempt on `link`, under a new work id."""
        assert flight.link is None
        flight.work_id, flight.link = next(self._numbers), link
        self._works[flight.work_id] = flight
        self._fleet.board(link, flight)
        self._deadlines.push(flight.work_id, flight.request.deadline)

    def leave(self, flight: Flight) -> ReplicaLink | None:
        """Take the request off its replica's books, if it is on any; return that link."""
        link, flight.link = flight.link, None
        if link is None:
            return None
        del self._works[flight.work_id]
        self._deadlines.discard(flight.work_id)
        self._fleet.leave(link, flight)
        return link

    def remove(self, flight: Flight) -> None:
        """The request has ended; `leave` follows."""
        del self._flights[flight.key]

    def first_deadline(self) -> float | None:
        """Return the earliest deadline of those aboard."""
        first = self._deadlines.first()
        return None if first is None else first[0]

    def first_late(self, now: float) -> Flight | None:
        """Return one that is aboard and whose deadline has passed."""
        first = self._deadlines.first()
        return self._works[first[1]] if first is not None and first[0] <= now else None

    def check_integrity(self) -> None:
        """Assert that every book agrees with every other; for tests."""
        self._deadlines.check_integrity()
        self._fleet.check_integrity()
        assert not any(flight.is_ended for flight in self._flights.values())
        assert len(self._works) == len(self._deadlines) == self._fleet.num_aboard()
