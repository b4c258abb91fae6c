"""A router's stream to a replica with nothing of a router behind it: one request, the message with its first token.

    port = DataPort("replica-0", rig.secret)
    await port.connect(rig.replicas["replica-0"])
    seconds = await port.ask(prompt)
    port.close()

It proves the cluster's secret as routers do. One token a request; not for many at once. The connection is made by hand
(`lean_http2.py`), so that what is beside it can be measured over one that is the same.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

from octavo.internal.v1 import data_plane_pb2 as pb

from load_tests.rigs.lean_http2 import Http2
from load_tests.rigs.router_model import rig_manifest
from router.hello import RouterIdentity, shake_hands
from workers.handshake import ClusterKeys

_ATTACH = "/octavo.internal.v1.DataPlaneService/Attach"
WINDOW_BATCHES = 64
ATTACH_S = 10.0


class DataStream(ABC):
    """Attached from `connect` to `close`. A `Listener` of its connection, and for `shake_hands` the call."""

    def __init__(self, replica_id: str, me: RouterIdentity) -> None:
        self._replica_id = replica_id
        self._identity = me
        self._connection: Http2
        self._stream = 0
        self._numbers = itertools.count(1)
        self._greetings: asyncio.Queue[pb.AttachResponse] = asyncio.Queue()
        """Messages of the handshake."""
        self._is_attached = False

    async def connect(self, address: str) -> None:
        """Raises what `shake_hands` raises."""
        self._connection = await Http2.connect(address, self)
        self._stream = self._connection.open(_ATTACH)
        async with asyncio.timeout(ATTACH_S):
            await shake_hands(self, self._identity, self._replica_id, credit=WINDOW_BATCHES)
        self._is_attached = True

    def close(self) -> None:
        self._connection.close()

    def send(self, message: pb.AttachRequest) -> None:
        self._connection.send(self._stream, message.SerializeToString())

    @abstractmethod
    def told(self, batch: pb.StepBatch, now: float) -> None:
        """A message of steps has come, `now` (monotonic); a credit for it is to be sent."""

    @abstractmethod
    def ended(self, stream: int, status: str) -> None:
        """See `Listener`."""

    # As `shake_hands` sees it: a call.

    async def read(self) -> pb.AttachResponse:
        return await self._greetings.get()

    async def write(self, message: pb.AttachRequest) -> None:
        self.send(message)

    # As its connection sees it.

    def arrived(self, stream: int, message: bytes) -> None:
        now, response = time.monotonic(), pb.AttachResponse.FromString(message)
        if not self._is_attached:
            self._greetings.put_nowait(response)
        if response.HasField("step_batch"):
            self.told(response.step_batch, now)


class DataPort(DataStream):
    """Attaches as a router of the rigs' model."""

    def __init__(self, replica_id: str, secret: bytes, *, router_id: str = "bare") -> None:
        manifest = rig_manifest()
        identity = RouterIdentity(
            router_id=router_id,
            epoch=time.time_ns(),
            keys=ClusterKeys.derive(secret),
            model_fingerprint=manifest.model_fingerprint,
            tokenizer_fingerprint=manifest.tokenizer_fingerprint,
        )
        super().__init__(replica_id, identity)
        self._waiting: dict[int, asyncio.Future[float]] = {}

    async def ask(self, prompt: Sequence[int]) -> float:
        """Return when (monotonic) the message with the one token was there."""
        number = next(self._numbers)
        answered = self._waiting[number] = asyncio.get_running_loop().create_future()
        generate = pb.Generate(
            prompt_token_ids=prompt, max_tokens=1, n=1, sampling=pb.SamplingParams(top_p=1.0, repetition_penalty=1.0)
        )
        work = pb.Work(work_id=number, request_id=f"bare-{number}", attempt=1, generate=generate)
        self.send(pb.AttachRequest(dispatch=pb.Dispatch(batch_id=number, work=[work])))
        return await answered

    def told(self, batch: pb.StepBatch, now: float) -> None:
        for delta in batch.deltas:
            answered = self._waiting.pop(delta.work_id, None)
            if answered is not None:
                answered.set_result(now)
        self.send(pb.AttachRequest(credit=pb.Credit(step_batches=1)))

    def ended(self, stream: int, status: str) -> None:
        for answered in self._waiting.values():
            answered.set_exception(ConnectionError(f"the replica ended the stream with status {status}"))
        self._waiting.clear()
