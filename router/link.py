"""The one stream between this router and one replica: attached, shaken hands over, kept alive, attached again.

Owns the connection, its writer task and the `ReplicaState` that mirrors the replica. Works that were sent belong to the
listener; when the stream breaks, it is told once, and every work that was sent on it is lost. Knows no requests.

    connecting -> ready -> draining -> (stream ends) -> connecting ...
         \\-> refused: the replica is not one of ours or not one we fit; tried again, ever less often
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import grpc.aio
from octavo.internal.v1 import data_plane_pb2 as pb
from octavo.internal.v1.data_plane_pb2_grpc import DataPlaneServiceStub

from router.hello import MismatchError, RouterIdentity, shake_hands
from router.link_outbox import WINDOW_BATCHES, LinkOutbox
from router.replica_state import ReplicaState
from router.roster import Roster
from router.types import ReplicaAddress, ReplicaView
from workers.peer_tls import CHANNEL_OPTION

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
MAX_DETAIL = 500
"""Characters of why a stream ended, which may be a peer's words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTimes:
    attach_s: float = 5.0
    """How long connection and handshake may take."""
    min_backoff_s: float = 0.05
    max_backoff_s: float = 2.0
    silence_s: float = 4.0
    """A replica of which nothing is heard for this long is lost; it has a heartbeat of about a second. Its works go on
    elsewhere: taken for lost too early it costs computation, and no answer."""


SILENCE_TICKS = 5
"""`silence_s` is counted in so many ticks of this loop, not by the clock: a loop that was held up itself must not take
that for the silence of all replicas."""


_log = logging.getLogger(__name__)


class LinkListener(Protocol):
    """Who owns the works. Called on the event loop; may call the link back."""

    def link_changed(self, link: ReplicaLink) -> None:
        """State or load is another: there may be credit."""

    def link_delivered(self, link: ReplicaLink, batch: pb.StepBatch) -> None:
        """It has deltas or tokens. Raises ValueError for what no replica of ours says."""

    def link_lost(self, link: ReplicaLink, detail: str) -> None:
        """The stream ended: nothing more comes of what was sent on it."""

    def link_over(self, link: ReplicaLink) -> None:
        """The link has ended for good. Its last call."""


class ReplicaLink:
    """A link to the replica at `address`. `start` it once; `retire` it when the replica leaves the set."""

    def __init__(
        self,
        address: ReplicaAddress,
        identity: RouterIdentity,
        listener: LinkListener,
        *,
        rng: random.Random,
        times: LinkTimes | None = None,
        roster: Roster | None = None,
    ) -> None:
        self.address = address
        self.state = ReplicaState(address.replica_id, roster)
        self.status = "connecting"
        self.detail = ""
        self._identity = identity
        self._listener = listener
        self._rng = rng
        self._times = times or LinkTimes()
        self._ack = pb.HelloAck()
        self._is_retired = False
        self._outbox = LinkOutbox()
        self._num_silent_ticks = 0
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def replica_id(self) -> str:
        return self.address.replica_id

    @property
    def capabilities(self) -> frozenset[str]:
        """What the replica's engine can do; empty before the first handshake."""
        return frozenset(self._ack.capabilities)

    @property
    def can_send(self) -> bool:
        return self.status == "ready" and not self._is_retired

    @property
    def is_retired(self) -> bool:
        return self._is_retired

    def view(self) -> ReplicaView:
        ack = self._ack
        return ReplicaView(
            replica_id=self.replica_id,
            model=ack.model,
            state="draining" if self._is_retired else self.status,
            detail=self.detail,
            address=self.address.address,
            pid=ack.pid,
            node_id=self.address.node_id,
            memory=self.address.memory,
            block_size=ack.block_size,
            kernels=ack.kernels,
            dtype=ack.dtype,
            engine=ack.engine,
            capabilities=self.capabilities,
            epoch=ack.epoch,
            num_resyncs=self.state.num_resyncs,
            load=self.state.load,
        )

    def start(self) -> None:
        assert self._task is None
        self._task = asyncio.create_task(self._keep_attached(), name=f"link to {self.replica_id}")
        self._task.add_done_callback(lambda _: self._listener.link_over(self))

    def retire(self, *, is_idle: bool) -> None:
        """The replica has left the set: send nothing new. The stream lives on until it ends or `finish` is called,
        which `is_idle` (no work is on it) does at once."""
        self._is_retired = True
        self.state.close()
        if is_idle:
            self.finish()

    def finish(self) -> None:
        """End the stream without `link_lost`: no work is on it. `close` waits for it."""
        self._is_retired = True
        if self._task is not None:
            self._task.cancel()

    async def close(self) -> None:
        self.finish()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    def send(self, batch_id: int, work: pb.Work, num_tokens: int) -> None:
        """Send `work`, of which `num_tokens` are to be computed, with others of the same batch. Only while
        `can_send`."""
        assert self.can_send
        self.state.sent(batch_id, num_tokens, num_choices=work.generate.n or 1)
        self._outbox.add(batch_id, work)
        self._wake.set()

    def abort(self, work_id: int, index: int | None = None) -> None:
        """Tell the replica to end a work, or one choice of it; without a stream it has already."""
        if self.status in ("ready", "draining"):
            self._outbox.abort(work_id, index)
            self._wake.set()

    def replica_drains(self) -> None:
        """The replica has said that it takes no new work: with an announcement, or by turning a work down."""
        if self.status == "ready":
            self.status, self.detail = "draining", "the replica takes no new work"
            self.state.close()

    async def _keep_attached(self) -> None:
        delay = self._times.min_backoff_s
        while not self._is_retired:
            self.status = "connecting"
            was_attached = await self._attach()
            # What one says in attaching, or soon after, may be refused as well: it would say so again at once.
            is_sound = was_attached and self.status != "refused"
            delay = self._times.min_backoff_s if is_sound else min(2 * delay, self._times.max_backoff_s)
            if not self._is_retired:
                await asyncio.sleep(delay * self._rng.uniform(0.5, 1.0))

    async def _attach(self) -> bool:
        """Attach, and serve the stream until it ends; return whether it ever was ready."""
        was_attached = False
        try:
            async with self._channel() as channel:
                call = DataPlaneServiceStub(channel).Attach()
                async with asyncio.timeout(self._times.attach_s):
                    ack = await shake_hands(call, self._identity, self.replica_id, credit=WINDOW_BATCHES)
                was_attached = True
                self._become_ready(ack)
                await self._serve(call)
                self.detail = "the replica ended the stream"
        except TimeoutError:
            self.detail = f"no answer from {self.address.address} within {self._times.attach_s:g} s"
        except grpc.aio.AioRpcError as error:
            self.detail = (error.details() or error.code().name)[:MAX_DETAIL]
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.FAILED_PRECONDITION):
                self.status = "refused"
        except (MismatchError, ValueError) as error:
            self.status, self.detail = "refused", str(error)[:MAX_DETAIL]
        except _SilenceError as error:
            self.detail = str(error)
        except asyncio.CancelledError:
            # gRPC says so of a call that the peer cancelled, too; that is no wish to end this task.
            if _is_cancelled():
                raise
            self.detail = "the stream was cancelled"
        except Exception:
            # Whatever it is, it costs this stream and not the replica for good.
            _log.exception("the link to %s broke", self.replica_id)
            self.detail = "the link broke"
        finally:
            self._detach()
        if was_attached:
            self._listener.link_lost(self, self.detail)
        return was_attached

    def _channel(self) -> grpc.aio.Channel:
        options = [
            # A connection of its own, whose failure is seen at once and not hidden behind gRPC's own backoff.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.keepalive_time_ms", round(self._times.silence_s * 500)),
            ("grpc.keepalive_timeout_ms", round(self._times.silence_s * 500)),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),
        ]
        if not self.address.is_encrypted:
            return grpc.aio.insecure_channel(self.address.address, options=options)
        return grpc.aio.secure_channel(
            self.address.address, self._identity.credentials, options=[*options, CHANNEL_OPTION]
        )

    def _become_ready(self, ack: pb.HelloAck) -> None:
        self.state.start(ack)
        self._ack = ack
        self.status, self.detail = "ready", ""
        if self._is_retired:
            self.state.close()
        self._num_silent_ticks = 0
        self._listener.link_changed(self)

    def _detach(self) -> None:
        if self.status != "refused":
            self.status = "connecting"
        self.state.forget()
        self._outbox.clear()
        self._wake.clear()

    async def _serve(self, call: Any) -> None:
        """Read and write until the stream ends. Raises AioRpcError or _SilenceError; ValueError for bad messages."""
        reader = asyncio.create_task(self._take(call), name="link-reader")
        others = [
            asyncio.create_task(self._write(call), name="link-writer"),
            asyncio.create_task(self._listen(), name="link-watch"),
        ]
        try:
            await asyncio.wait((reader, *others), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (reader, *others):
                task.cancel()
            call.cancel()
            results = await asyncio.gather(reader, *others, return_exceptions=True)
        # The reader knows best why: gRPC's status comes to it.
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, asyncio.InvalidStateError):
                raise result

    async def _take(self, call: Any) -> None:
        while (message := await call.read()) is not grpc.aio.EOF:
            if message is None:  # gRPC's word for bytes that are none
                raise ValueError("the replica sent what is no message of the data plane")
            self._num_silent_ticks = 0
            may_have_credit = False
            if message.HasField("draining"):
                self.replica_drains()
            if message.HasField("step_batch"):
                batch = message.step_batch
                may_have_credit = self.state.update(batch)
                if self.state.needs_resync:
                    self._resync()
                if batch.deltas or batch.HasField("tokens"):
                    self._listener.link_delivered(self, batch)
                self._outbox.batch_taken()
                if self._outbox.owes_credit:
                    self._wake.set()
            if may_have_credit or message.HasField("draining"):
                self._listener.link_changed(self)

    def _resync(self) -> None:
        """What the replica had told of its cache is not what its engine has: ask for all of it."""
        if self.state.num_resyncs == 1:
            _log.warning("the cache of %s is not what was told of it; it is asked for anew", self.replica_id)
        self.state.resync_asked()
        self._outbox.resync()
        self._wake.set()

    async def _write(self, call: Any) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            for message in self._outbox.take():
                await call.write(message)
            # write() may complete without suspending, and then nobody else would ever run.
            await asyncio.sleep(0)

    async def _listen(self) -> None:
        """Notice a replica that is silent."""
        while self._num_silent_ticks < SILENCE_TICKS:
            await asyncio.sleep(self._times.silence_s / SILENCE_TICKS)
            self._num_silent_ticks += 1
        raise _SilenceError(f"nothing was heard of the replica for {self._times.silence_s:g} s")


class _SilenceError(Exception):
    """The replica does not speak."""


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
