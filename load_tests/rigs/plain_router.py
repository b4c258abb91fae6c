"""A router with nothing of a router in it: one stream to a data port, over which so many answers are kept going.

    router = PlainRouter("replica-0", secret, Answers(streams=256, prompt=128, output=256))
    await router.connect(address)
    ... router.num_tokens grows ...
    router.close()

It proves the cluster's secret as routers do and looks at token counts and ends alone, over HTTP/2 by hand.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from octavo.internal.v1 import data_plane_pb2 as pb

from load_tests.rigs.data_port import DataStream
from router.hello import RouterIdentity
from workers.handshake import ClusterKeys

VOCABULARY = range(300, 1_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """`streams` answers at a time, of `output` tokens to prompts of `prompt` random ones."""

    streams: int
    prompt: int
    output: int


class PlainRouter(DataStream):
    def __init__(self, replica_id: str, secret: bytes, answers: Answers) -> None:
        keys = ClusterKeys.derive(secret)
        super().__init__(replica_id, RouterIdentity(router_id="plain", epoch=time.time_ns(), keys=keys))
        self._answers = answers
        self._random = random.Random(3)
        self.num_tokens = self.num_messages = 0
        self.failure = ""

    async def connect(self, address: str) -> None:
        """Attach and ask for all streams, the first answers of which are shorter, so that they do not end together."""
        await super().connect(address)
        streams, output = self._answers.streams, self._answers.output
        lengths = [max(1, output * (stream + 1) // streams) for stream in range(streams)]
        self.send(pb.AttachRequest(dispatch=self._dispatch(lengths)))

    def told(self, batch: pb.StepBatch, now: float) -> None:
        ended = [delta for delta in batch.deltas if delta.HasField("finish")]
        self.num_messages += 1
        self.num_tokens += len(batch.tokens.token_ids) + sum(len(delta.token_ids) for delta in batch.deltas)
        for delta in ended:
            if delta.finish.reason != "length":
                self.failure = f"an answer ended with {delta.finish.reason}: {delta.finish.error_message}"
        reply = pb.AttachRequest(credit=pb.Credit(step_batches=1))
        if ended and not self.failure:
            reply.dispatch.CopyFrom(self._dispatch([self._answers.output] * len(ended)))
        self.send(reply)

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
