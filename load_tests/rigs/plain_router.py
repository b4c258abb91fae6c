"""A router with nothing of a router in it: one stream to a data port, over which so many answers are kept going.

    router = PlainRouter("replica-0", secret, Answers(streams=256, prompt=128, output=256))
    await router.connect(address)
    ... router.num_tokens grows ...
    router.close()

It proves the cluster's secret as routers do and looks at token counts and ends alone, over HTTP/2 by hand.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from dataclasses import dataclass

from octavo.internal.v1 import data_plane_pb2 as pb

from load_tests.rigs.lean_http2 import Http2
from router.hello import RouterIdentity, shake_hands
from workers.handshake import ClusterKeys

ATTACH = "/octavo.internal.v1.DataPlaneService/Attach"
WINDOW_BATCHES = 64
ATTACH_S = 10.0
VOCABULARY = range(300, 1_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """`streams` answers at a time, of `output` tokens to prompts of `prompt` random ones."""

    streams: int
    prompt: int
    output: int


class PlainRouter:
    """Attached from `connect` to `close`. A `Listener` of its connection, and for `shake_hands` the call."""

    def __init__(self, replica_id: str, secret: bytes, answers: Answers) -> None:
        self._replica_id = replica_id
        self._identity = RouterIdentity(router_id="plain", epoch=time.time_ns(), keys=ClusterKeys.derive(secret))
        self._answers = answers
        self._numbers = itertools.count(1)
        self._random = random.Random(3)
        self._greetings: asyncio.Queue[pb.AttachResponse] = asyncio.Queue()
        self._is_attached = False
        self._connection: Http2
        self._stream = 0
        self.num_tokens = self.num_messages = self.num_answers = 0
        self.failure = ""

    async def connect(self, address: str) -> None:
        """Attach and ask for all streams, the first answers of which are shorter, so that they do not end together."""
        self._connection = await Http2.connect(address, self)
        self._stream = self._connection.open(ATTACH)
        async with asyncio.timeout(ATTACH_S):
            await shake_hands(self, self._identity, self._replica_id, credit=WINDOW_BATCHES)
        self._is_attached = True
        streams, output = self._answers.streams, self._answers.output
        lengths = [max(1, output * (stream + 1) // streams) for stream in range(streams)]
        await self.write(pb.AttachRequest(dispatch=self._dispatch(lengths)))

    def close(self) -> None:
        self._connection.close()

    # As `shake_hands` sees it: a call.

    async def read(self) -> pb.AttachResponse:
        return await self._greetings.get()

    async def write(self, message: pb.AttachRequest) -> None:
        self._connection.send(self._stream, message.SerializeToString())

    # As its connection sees it.

    def arrived(self, stream: int, message: bytes) -> None:
        response = pb.AttachResponse.FromString(message)
        if not self._is_attached:
            self._greetings.put_nowait(response)
            return
        batch = response.step_batch
        ended = [delta for delta in batch.deltas if delta.HasField("finish")]
        self.num_messages += 1
        self.num_answers += len(ended)
        self.num_tokens += len(batch.tokens.token_ids) + sum(len(delta.token_ids) for delta in batch.deltas)
        for delta in ended:
            if delta.finish.reason != "length":
                self.failure = f"an answer ended with {delta.finish.reason}: {delta.finish.error_message}"
        reply = pb.AttachRequest(credit=pb.Credit(step_batches=1))
        if ended and not self.failure:
            reply.dispatch.CopyFrom(self._dispatch([self._answers.output] * len(ended)))
        self._connection.send(self._stream, reply.SerializeToString())

    def ended(self, stream: int, status: str) -> None:
        self.failure = self.failure or f"the replica ended the stream with status {status}"

    def _dispatch(self, lengths: list[int]) -> pb.Dispatch:
        return pb.Dispatch(batch_id=next(self._numbers), work=[self._work(length) for length in lengths])

    def _work(self, length: int) -> pb.Work:
        number = next(self._numbers)
        generate = pb.Generate(
            prompt_token_ids=self._random.choices(VOCABULARY, k=self._answers.prompt),
            max_tokens=length,
            n=1,
            sampling=pb.SamplingParams(top_p=1.0, repetition_penalty=1.0),
        )
        return pb.Work(work_id=number, request_id=f"plain-{number}", attempt=1, generate=generate)
