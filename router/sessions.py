"""All Sessions of a router: they are served, told to go away when they are old or the router drains, and let end."""

from __future__ import annotations

import asyncio
import random
from typing import Any, Final

import grpc.aio
from octavo.names import Reason
from octavo.v1.inference_service_pb2 import GoAway

from router import status
from router.entries import Entries
from router.identity import Identities
from router.intake import Intake
from router.session import Session
from workers.errors import OctavoError

AGE_SPREAD: Final = (0.9, 1.1)
"""Of the time after which a Session is told to go, so that those that came together do not go together."""
_OF_AGE: Final = GoAway(grace=status.duration(1.0), reason=Reason.SESSION_AGE)


class Sessions:
    def __init__(self, intake: Intake, identities: Identities) -> None:
        self._intake = intake
        self._identities = identities
        self._entries = Entries()
        self._open: set[Session] = set()
        self._go_away: GoAway | None = None

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def num_known(self) -> int:
        """Requests that a client could attach to."""
        return len(self._entries)

    async def serve(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Serve one Session call to its end."""
        try:
            identity = self._identities.identify(context)
        except OctavoError as error:
            self._intake.observer.refused("", error.reason)
            await status.abort(context, error)
        session = Session(self._intake, self._entries, context, identity)
        self._open.add(session)
        if self._go_away is not None:
            session.go_away(self._go_away)
        age_s = self._intake.config.max_connection_age_s * random.uniform(*AGE_SPREAD)
        timer = asyncio.get_running_loop().call_later(age_s, session.go_away, _OF_AGE)
        try:
            await session.run()
        finally:
            timer.cancel()
            self._open.discard(session)

    def go_away(self, grace_s: float, reason: str) -> None:
        """Tell every client, also those that still come, to start no more here."""
        self._go_away = GoAway(grace=status.duration(grace_s), reason=reason)
        for session in self._open:
            session.go_away(self._go_away)

    def finish(self) -> None:
        """Let every Session end as soon as nothing is left to write."""
        for session in self._open:
            session.finish()

    async def stop(self) -> None:
        """Forget everything; no Session may be running any more."""
        await self._entries.stop()
