"""Valid messages of every kind that crosses the public port and the data port: what the fuzzer begins with.

Requests are small, for a model of `VOCAB_SIZE` tokens and a context of `MAX_MODEL_LEN`; the numbers of works and the
ids of requests are few, so that messages are about the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_reflection.v1alpha.reflection_pb2 import ExtensionRequest, ServerReflectionRequest
from octavo.internal.v1 import data_plane_pb2 as data
from octavo.v1 import inference_service_pb2 as pb
from octavo.v1 import types_pb2 as types
from octavo.v1.model_service_pb2 import DetokenizeRequest, ListModelsRequest, TokenizeRequest
from octavo.v1.status_service_pb2 import GetRequestRecordRequest, GetStatusRequest, ListRequestRecordsRequest

from load_tests.rigs.router_model import VOCAB_SIZE
from workers.types import FinishReason

MAX_MODEL_LEN: Final = 256
MODEL: Final = "fake"
REQUEST_IDS: Final = tuple(f"r{number}" for number in range(8))
WORK_IDS: Final = tuple(range(1, 17))
TEXTS: Final = (
    *REQUEST_IDS,
    MODEL,
    "user",
    "generate",
    "octavo.v1.InferenceService",
    "octavo/v1/types.proto",
    "google.protobuf.Any",
    "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "congo=t61rcWkgMzE",
    *FinishReason,
    "DRAINING",
    "REPLICA_LOST",
)
NUMBERS: Final = (*WORK_IDS, MAX_MODEL_LEN - 1, MAX_MODEL_LEN, VOCAB_SIZE - 1, VOCAB_SIZE)
HASHES: Final = tuple(bytes([number]) * 16 for number in range(8))


def requests() -> list[pb.GenerateRequest]:
    ids, text = types.Prompt(token_ids=types.TokenIds(ids=[300, 301, 302])), types.Prompt(text="hello")
    said = types.ChatMessage(role="user", content=[types.ContentPart(text="hello")])
    everything = types.Sampling(
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        seed=7,
    )
    return [
        pb.GenerateRequest(prompt=ids, max_tokens=4),
        pb.GenerateRequest(prompt=text, max_tokens=3, sampling=everything, stop=["x", "end"], stop_token_ids=[2]),
        pb.GenerateRequest(prompt=types.Prompt(messages=types.ChatMessages(messages=[said])), max_tokens=2, n=2),
        pb.GenerateRequest(
            model=MODEL,
            prompt=ids,
            n=2,
            max_tokens=6,
            min_tokens=2,
            received_token_ids=[types.TokenIds(ids=[300, 301]), types.TokenIds(ids=[302])],
            priority=-5,
            affinity_key="key",
            ignore_eos=True,
        ),
        pb.GenerateRequest(prompt=ids, max_tokens=2, logprobs=1, sampling=types.Sampling(logit_bias={300: 1.0})),
        pb.GenerateRequest(prompt=text, max_tokens=2, n=1, best_of=2, truncate=types.TRUNCATE_NONE),
    ]


def session_requests() -> list[pb.SessionRequest]:
    timeout = Duration(seconds=2)
    found = [
        pb.SessionRequest(
            starts=[pb.Start(request_id=name, request=request, timeout=timeout)],
            grants=[pb.Grant(request_id=REQUEST_IDS[0], tokens=4)],
        )
        for name, request in zip(REQUEST_IDS, requests(), strict=False)
    ]
    small = requests()[0]
    return [
        *found,
        pb.SessionRequest(starts=[pb.Start(request_id=name, request=small, timeout=timeout) for name in REQUEST_IDS]),
        pb.SessionRequest(starts=[pb.Start(request_id="r6", request=small, timeout=timeout, window=1)]),
        pb.SessionRequest(starts=[pb.Start(request_id="r6", request=small, timeout=timeout, attach_offsets=[0])]),
        pb.SessionRequest(starts=[pb.Start(request_id="r0", request=small, attach_offsets=[1], window=3)]),
        pb.SessionRequest(cancels=[pb.Cancel(request_id=name) for name in REQUEST_IDS[:3]]),
        pb.SessionRequest(grants=[pb.Grant(request_id=name, tokens=2) for name in REQUEST_IDS]),
    ]


def attach_requests() -> list[data.AttachRequest]:
    """What a router says after its Hello."""
    plain = data.SamplingParams(top_p=1.0, repetition_penalty=1.0)
    generate = data.Generate(prompt_token_ids=[5, 6, 7, 8], max_tokens=3, n=1, sampling=plain)
    several = data.Generate(
        prompt_token_ids=[5, 6, 7], max_tokens=4, n=2, received_choices=[data.TokenIds(ids=[9]), data.TokenIds()]
    )
    works = [
        data.Work(work_id=number, request_id=f"r{number}", attempt=1, timeout_us=2_000_000, salt=b"s", generate=each)
        for number, each in zip(WORK_IDS, (generate, several, generate), strict=False)
    ]
    choice = data.Abort.Choice(work_id=2, index=1)
    return [
        data.AttachRequest(dispatch=data.Dispatch(batch_id=1, work=works[:1]), credit=data.Credit(step_batches=4)),
        data.AttachRequest(dispatch=data.Dispatch(batch_id=2, work=works[1:])),
        data.AttachRequest(
            dispatch=data.Dispatch(batch_id=3, work=[data.Work(work_id=9, pool=data.Pool(token_ids=[1], method="cls"))])
        ),
        data.AttachRequest(abort=data.Abort(work_ids=[1, 3], choices=[choice])),
        data.AttachRequest(credit=data.Credit(step_batches=16)),
        data.AttachRequest(resync=data.Resync()),
    ]


def step_batches(work_ids: Sequence[int] = WORK_IDS) -> list[data.AttachResponse]:
    """What a replica says of these works after its HelloAck."""
    load = data.Load(num_running=2, num_blocks=64, num_free_blocks=60, credit_tokens=512, credit_sequences=32)
    finish = data.Finish(reason="length", queue_s=0.1, prefill_s=0.1, decode_s=0.1)
    logprobs = data.TokenLogprobs(logprob=-1.0, top_token_ids=[1, 2], top_logprobs=[-1.0, -2.0])
    batches = [
        data.StepBatch(
            step=1, load=load, last_batch_id=2**40, kv_events=data.KvEvents(stored=HASHES[0], removed=HASHES[1])
        ),
        data.StepBatch(
            deltas=[data.WorkDelta(work_id=number, cached_tokens=0, token_ids=[300]) for number in work_ids]
        ),
        data.StepBatch(deltas=[data.WorkDelta(work_id=number, finish=finish) for number in work_ids]),
        data.StepBatch(deltas=[data.WorkDelta(work_id=work_ids[-1], token_ids=[300], logprobs=[logprobs])], load=load),
        data.StepBatch(
            tokens=data.WorkTokens(work_ids=work_ids, num_tokens=[1] * len(work_ids), token_ids=[300] * len(work_ids))
        ),
        data.StepBatch(load=load, resident=data.Resident(num_blocks=1, digest=int.from_bytes(HASHES[0][:8], "little"))),
        data.StepBatch(load=load, kv_events=data.KvEvents(cleared=True, stored=b"".join(HASHES))),
    ]
    return [
        *(data.AttachResponse(step_batch=batch) for batch in batches),
        data.AttachResponse(draining=data.Draining(grace_us=1_000)),
    ]


def reflections() -> list[ServerReflectionRequest]:
    extension = ExtensionRequest(containing_type="google.protobuf.FieldOptions", extension_number=1_072)
    return [
        ServerReflectionRequest(list_services=""),
        ServerReflectionRequest(file_containing_symbol="octavo.v1.InferenceService"),
        ServerReflectionRequest(file_by_filename="octavo/v1/types.proto"),
        ServerReflectionRequest(file_containing_extension=extension),
        ServerReflectionRequest(all_extension_numbers_of_type="octavo.v1.Prompt"),
    ]


def of_kind() -> Mapping[type[Message], Sequence[bytes]]:
    """Return all of them, serialised, by their kind."""
    prompts = [request.prompt for request in requests()]
    kinds: list[Sequence[Message]] = [
        requests(),
        session_requests(),
        [TokenizeRequest(prompt=prompt) for prompt in prompts],
        [DetokenizeRequest(token_ids=[300, 301]), DetokenizeRequest(model=MODEL, skip_special_tokens=False)],
        [ListModelsRequest()],
        [GetStatusRequest()],
        [GetRequestRecordRequest(id="request-1"), GetRequestRecordRequest(id="0af7651916cd43dd8448eb211c80319c")],
        [ListRequestRecordsRequest(), ListRequestRecordsRequest(max_records=5, model=MODEL)],
        [HealthCheckRequest(), HealthCheckRequest(service="octavo.v1.InferenceService")],
        reflections(),
        attach_requests(),
        step_batches(),
    ]
    return {type(messages[0]): [message.SerializeToString() for message in messages] for messages in kinds}
