"""One router and the engines `paged`, `fake` and `transformers`: answers, resume, traces, cancels, tenants and bad
input are the same with each, in this process over real gRPC."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from octavo.client import Client, ClientOptions, FailedPreconditionError, InvalidArgumentError
from octavo.names import Attribute, Reason
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from cluster.models import fetch_model
from router.config import ObserverConfig, RouterConfig
from router.dispatcher import Dispatcher
from router.model import ServedModel
from router.observer import RequestObserver
from router.server import RouterServer
from router.types import ReplicaAddress
from tests.data_plane.rig import KEYS, TIMES, make_dispatcher, until
from tests.data_plane.spans import SAMPLED, assert_child_of, named, number, one, span_id
from tests.pooling.tiny_encoders import VOCAB_SIZE, save_encoder
from workers.build import build_engine
from workers.config import EngineConfig
from workers.data_plane import DataPlaneServer
from workers.engine import PagedEngine
from workers.thread import EngineThread

NAMES = ("paged", "fake", "transformers")
VLLM = pytest.param(
    "vllm", marks=pytest.mark.skip(reason="vLLM has an environment of its own: make exact, make bench-engines")
)
"""tests/vllm_engine says the same of it, over whole clusters."""
LONG = 24
HEADER = "x-octavo-tenant"
OPTIONS: dict[str, Any] = {"max_tokens": LONG, "temperature": 0.0, "ignore_eos": True, "timeout": 100}
PROMPTS = [[4 + i, 5, 6 + i, 7, 8, 9, 10] for i in range(6)]


class Pace:
    """Has engines' steps take a moment, so that what happens meanwhile finds requests that run; and holds them up."""

    def __init__(self) -> None:
        self.left: int | None = None
        """Steps with a result until all wait for `go_on`; None: nothing is held up."""
        self._go = threading.Event()

    def go_on(self) -> None:
        self.left = None
        self._go.set()

    def slow_down(self, engine: Any) -> None:
        step = engine.step

        def slow_step() -> bool:
            time.sleep(0.003)
            if self.left == 0:
                self._go.wait(60)
            has_run = bool(step())
            if has_run and self.left:
                self.left -= 1
            return has_run

        engine.step = slow_step


@dataclass
class Served:
    server: RouterServer
    dispatcher: Dispatcher
    client: Client
    address: str
    pace: Pace = field(default_factory=Pace)
    engines: list[EngineThread] = field(default_factory=list)
    plain_engines: list[PagedEngine] = field(default_factory=list)
    replicas: list[DataPlaneServer] = field(default_factory=list)

    def offer(self, numbers: Sequence[int]) -> None:
        known = [ReplicaAddress(replica_id=f"replica-{i}", address=self.replicas[i].address) for i in numbers]
        self.dispatcher.update_replicas(known)

    async def until_empty(self) -> None:
        """No request is left, no work in a replica, and no block that a sequence holds."""
        await until(lambda: self.server.intake.num_open == 0)
        await until(lambda: not any(replica.num_works for replica in self.replicas))
        for engine in self.plain_engines:
            await until(lambda engine=engine: engine.load().num_running == engine.load().num_waiting == 0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_encoder(folder, "Llama", "ForCausalLM", num_key_value_heads=2)
    return folder


@pytest.fixture(params=(*NAMES, VLLM))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def served(name: str, directory: Path, tmp_path: Path) -> AsyncIterator[Served]:
    """Two replicas, of which the router has the first; they compute one token a step."""
    files = fetch_model(str(directory), cache_dir=tmp_path, any_architecture=name == "transformers")
    config = EngineConfig(engine=name, threads=1, block_size=4, num_blocks=96, max_num_sequences=8, **_settings(name))
    async with AsyncExitStack() as stack:
        dispatcher = make_dispatcher()
        dispatcher.start()
        model = ServedModel.from_files(files, name="toy")
        router = RouterConfig(tenant_header=HEADER)
        server = RouterServer(router, {"toy": model}, dispatcher, router_id="router-1", version="0.0")
        address = f"127.0.0.1:{server.bind('127.0.0.1', 0)}"
        server.observe(RequestObserver(ObserverConfig()))
        await server.start()
        client = await stack.enter_async_context(Client(address))
        found = Served(server, dispatcher, client, address)
        for number in range(2):
            engine = await asyncio.to_thread(build_engine, config, files, hash_key=KEYS.prefix_hash, threads=1)
            found.pace.slow_down(engine)
            replica = DataPlaneServer(replica_id=f"replica-{number}", key=KEYS.data_plane, times=TIMES)
            thread = EngineThread(engine, replica.notify)
            stack.push_async_callback(_stop, replica, thread)
            await replica.start(thread)
            found.replicas.append(replica)
            found.engines.append(thread)
            found.plain_engines.append(engine)
        stack.push_async_callback(dispatcher.stop)
        stack.push_async_callback(server.stop)
        found.offer([0])
        await until(lambda: any(view.state == "ready" for view in dispatcher.replicas()))
        yield found
        await found.until_empty()
        dispatcher.check_integrity()


def _settings(name: str) -> dict[str, Any]:
    return {} if name == "fake" else {"dtype": "fp32"}  # in bf16 a token may depend on what is computed beside it


async def _stop(replica: DataPlaneServer, engine: EngineThread) -> None:
    await replica.stop()
    engine.close()
    assert await asyncio.to_thread(engine.join, 20.0)


async def answers(client: Client, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    found = await asyncio.gather(*(client.complete(list(prompt), **OPTIONS) for prompt in prompts))
    return [list(completion.token_ids) for completion in found]


async def test_together_and_alone_answers_are_the_same(served: Served) -> None:
    together = await answers(served.client, PROMPTS)
    alone = [(await answers(served.client, [prompt]))[0] for prompt in PROMPTS]
    assert together == alone
    assert all(len(tokens) == LONG for tokens in together)


async def test_a_lost_replica_costs_no_token(served: Served) -> None:
    expected = await answers(served.client, PROMPTS)
    served.pace.left = LONG // 2
    streams = [aiter(served.client.generate(prompt, **OPTIONS)) for prompt in PROMPTS]
    first = await anext(streams[0])
    await served.replicas[0].stop(0.0)
    served.offer([1])
    served.pace.go_on()
    found = [await _rest(stream) for stream in streams]
    assert [[*first.token_ids, *found[0]], *found[1:]] == expected
    records = served.server.intake.observer.records.slowest(2 * len(PROMPTS), tenant="")
    assert any(len(record.attempts) == 2 for record in records), "nothing was resumed"


async def _rest(stream: Any) -> list[int]:
    return [token_id async for delta in stream for token_id in delta.token_ids]


async def test_half_is_cancelled_and_the_other_half_is_whole(served: Served) -> None:
    expected = await answers(served.client, PROMPTS[::2])
    generations = [served.client.generate(prompt, **OPTIONS) for prompt in PROMPTS]
    for generation in generations[1::2]:
        await anext(aiter(generation))
        generation.cancel()
    assert [list((await each.complete()).token_ids) for each in generations[::2]] == expected
    await served.until_empty()


async def test_a_tenants_cache_is_its_own(name: str, served: Served) -> None:
    prompt = list(range(4, 20))
    cached = []
    for tenant in ("acme", "acme", "other"):
        async with Client(served.address, options=ClientOptions(metadata=((HEADER, tenant),))) as client:
            completion = await client.complete(prompt, **OPTIONS)
            assert completion.usage is not None
            cached.append(completion.usage.cached_tokens)
    assert cached[0] == cached[2] == 0
    assert cached[1] >= 12


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no tokens": ([], {}, "prompt"),
    "a token beyond": ([4, VOCAB_SIZE], {}, "prompt"),
    "too long": ([4] * 41, {}, "prompt"),
    "too many": ([4] * 20, {"max_tokens": 40}, "max_tokens"),
    "a temperature below 0": ([4], {"temperature": -1.0}, "temperature"),
    "a share above 1": ([4], {"top_p": 1.5}, "top_p"),
}


async def test_bad_input_is_refused_by_field(served: Served) -> None:
    for what, (prompt, options, where) in BAD.items():
        with pytest.raises(InvalidArgumentError) as caught:
            await served.client.complete(prompt, **options)
        assert where in str(caught.value), what


LACKED: dict[str, dict[str, Any]] = {
    "response_format": {"response_format": {"json_object": True}},
    "received_token_ids": {"response_format": {"regex": "a+"}, "received_token_ids": [[5]]},
}
LACKED_BY_FAKE: dict[str, dict[str, Any]] = {
    "logprobs": {"logprobs": 1},
    "sampling.logit_bias": {"logit_bias": {5: 1.0}},
}


async def test_what_an_engine_cannot_do_is_refused(name: str, served: Served) -> None:
    """By field: shapes and numbers by any of them; log probabilities, and what needs them, by the fake one."""
    calls = {where: served.client.complete([4], **options) for where, options in LACKED.items()}
    calls |= {"embed": served.client.embed(["cat"]), "classify": served.client.classify(["cat"])}
    others = {where: served.client.complete([4], max_tokens=2, **given) for where, given in LACKED_BY_FAKE.items()}
    others["logprobs "] = served.client.complete([4], max_tokens=2, best_of=2)
    for where, call in calls.items() if name != "fake" else (calls | others).items():
        with pytest.raises(FailedPreconditionError, match="no replica of this model") as caught:
            await call
        assert caught.value.reason == Reason.ENGINE_CAPABILITY
        assert where.strip() in str(caught.value)
    for call in others.values() if name != "fake" else ():
        assert len((await call).token_ids) == 2


async def test_choices_go_on_after_what_was_received_and_stop_where_they_shall(served: Served) -> None:
    options: dict[str, Any] = {**OPTIONS, "temperature": 1.0, "seed": 7, "n": 3, "max_tokens": 12}
    whole = await served.client.complete(PROMPTS[0], **options)
    answers = [list(choice.token_ids) for choice in whole.choices]
    assert [len(answer) for answer in answers] == [12] * 3
    assert whole.usage is not None
    assert whole.usage.generated_tokens == 36
    cuts = (3, 12, 7)
    received = [answer[:cut] for answer, cut in zip(answers, cuts, strict=True)]
    rest = await served.client.complete(PROMPTS[0], received_token_ids=received, **options)
    assert [[*had, *choice.token_ids] for had, choice in zip(received, rest.choices, strict=True)] == answers
    first = answers[0][0]
    options |= {"n": 1, "stop_token_ids": [first]}
    stopped = await served.client.complete(PROMPTS[0], **options)
    assert stopped.finish is not None
    assert (list(stopped.token_ids), stopped.finish.stop_token_id) == ([first], first)
    held = await served.client.complete(PROMPTS[0], min_tokens=4, **options)
    assert len(held.token_ids) > 4


async def test_a_request_is_one_trace_from_router_to_engine(exporter: InMemorySpanExporter, served: Served) -> None:
    await served.client.complete(PROMPTS[0], traceparent=SAMPLED, **OPTIONS)
    await served.until_empty()
    await until(lambda: bool(named(exporter, "octavo.decode")))
    dispatch = one(exporter, "octavo.dispatch")
    for name in ("octavo.engine.queue", "octavo.prefill", "octavo.decode"):
        assert_child_of(one(exporter, name), span_id(dispatch))
    assert number(one(exporter, "octavo.prefill"), Attribute.INPUT_TOKENS) == len(PROMPTS[0])
    assert number(one(exporter, "octavo.decode"), Attribute.OUTPUT_TOKENS) == LONG
