"""The replicas of one router: which there are, the link to each, and which requests are aboard which.

Follows the set that the control plane pushes. A replica that has left the set gets nothing new and its link lives on
until its last request has left. Knows neither queue nor placement.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from router.flight import Flight
from router.link import ReplicaLink
from router.roster import Roster
from router.types import ReplicaAddress, ReplicaView


class Fleet:
    """`make_link` makes the link to a replica, which keeps the roster told; the fleet starts it."""

    def __init__(self, make_link: Callable[[ReplicaAddress, Roster], ReplicaLink]) -> None:
        self.roster = Roster()
        """The replicas that may be sent work, as placement sees them."""
        self._make_link = make_link
        self._present: dict[str, ReplicaLink] = {}
        """Links to the replicas of the set."""
        self._aboard: dict[ReplicaLink, set[Flight]] = {}
        """Of each link that has not ended, the requests that its replica has."""

    def update(self, replicas: Sequence[ReplicaAddress]) -> None:
        """Take over who is there now. A replica whose address changed is another one."""
        now = {address.replica_id: address for address in replicas}
        for link in list(self._present.values()):
            if now.get(link.replica_id) != link.address:
                del self._present[link.replica_id]
                link.retire(is_idle=not self._aboard[link])
        for address in now.values():
            if address.replica_id not in self._present:
                link = self._present[address.replica_id] = self._make_link(address, self.roster)
                self._aboard[link] = set()
                link.start()

    def lacks(self, needed: frozenset[str]) -> frozenset[str]:
        """Return which of the `needed` capabilities are missing: none if some replica has them all, or if no replica
        has said yet what it can do."""
        if not needed:
            return needed
        least: frozenset[str] | None = None
        for link in self._present.values():
            if link.capabilities:
                missing = needed - link.capabilities
                if not missing:
                    return missing
                if least is None or len(missing) < len(least):
                    least = missing
        return least or frozenset()

    @property
    def has_ready(self) -> bool:
        """Whether some replica may be sent work, credit or not."""
        return self.roster.open != 0

    @property
    def num_ready(self) -> int:
        """Replicas that may be sent work."""
        return self.roster.open.bit_count()

    @property
    def num_aboard_all(self) -> int:
        """Sequences that replicas have of all routers, by what they report and what was sent since."""
        return sum(link.state.num_running for link in self._aboard)

    @property
    def owed_tokens(self) -> int:
        """Prompt tokens that replicas have yet to compute, for all routers."""
        return sum(link.state.owed_tokens for link in self._aboard)

    @property
    def credit_tokens(self) -> int:
        """Prompt tokens that all replicas together can take."""
        return self.roster.credit_tokens

    @property
    def credit_sequences(self) -> int:
        """The same in sequences."""
        return self.roster.credit_sequences

    @property
    def block_size(self) -> int:
        """Of the replicas, or of some if they differ; 0 without any."""
        return next(iter(self.roster.block_sizes), 0)

    def link(self, replica_id: str) -> ReplicaLink:
        return self._present[replica_id]

    def views(self) -> list[ReplicaView]:
        """Describe the replicas of the set, and those that have left it and still work."""
        leaving = [link for link in self._aboard if link.is_retired and link.replica_id not in self._present]
        return [link.view() for link in (*self._present.values(), *leaving)]

    def board(self, link: ReplicaLink, flight: Flight) -> None:
        self._aboard[link].add(flight)

    def leave(self, link: ReplicaLink, flight: Flight) -> None:
        """Take `flight` off: nothing more is expected of it there. Let the link go if that was the last one of a
        replica that has left."""
        aboard = self._aboard[link]
        aboard.remove(flight)
        link.state.unexpect(flight.work_id)
        if link.is_retired and not aboard:
            link.finish()

    def aboard(self, link: ReplicaLink) -> list[Flight]:
        return list(self._aboard[link])

    def forget(self, link: ReplicaLink) -> None:
        """`link` has ended for good."""
        assert not self._aboard.pop(link), "requests are still aboard a link that has ended"

    async def close(self) -> None:
        """End all links. No request is aboard any of them."""
        await asyncio.gather(*(link.close() for link in self._aboard))
        self._present.clear()

    def num_aboard(self) -> int:
        return sum(len(aboard) for aboard in self._aboard.values())

    def check_integrity(self) -> None:
        """Assert that each link is where it must be; for tests."""
        self.roster.check_integrity()
        assert set(self._present.values()) <= self._aboard.keys()
        for link, aboard in self._aboard.items():
            assert (self._present.get(link.replica_id) is link) != link.is_retired
            assert link.can_send == link.state.is_open
            assert link.state.num_expected <= len(aboard)
            assert all(flight.link is link and not flight.is_ended for flight in aboard)
