"""vLLM behind a router, end to end: answers, cache, tenants, shapes, refusals, what is told of it.

Part of `make exact`. Greedy answers are compared with those of plain transformers in fp32 (tests/oracle).
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from urllib.request import urlopen

import grpc
import pytest
from octavo.client import CallError, Client, ClientOptions, Completion, FinishReason, InvalidArgumentError
from octavo.names import Span
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster import ClusterProcess
from tests.collector import Collector
from tests.integration.calls import await_status, connected, generate, has_ready, is_idle, octavo_trace, request
from tests.oracle.answers import committed_answers
from tests.vllm_engine.conftest import BLOCK_SIZE, MAX_MODEL_LEN, TENANT_HEADER

pytestmark = [pytest.mark.cluster, pytest.mark.exact]

PROMPT = "The capital of France is"
TIMEOUT_S = 300.0


def client_of(cluster: ClusterProcess, tenant: str = "") -> Client:
    return Client(cluster.address, options=ClientOptions(metadata=((TENANT_HEADER, tenant),) if tenant else ()))


async def ask(cluster: ClusterProcess, prompt: object = PROMPT, *, tenant: str = "", **options: object) -> Completion:
    async with client_of(cluster, tenant) as client:
        return await client.complete(prompt, timeout=TIMEOUT_S, **options)  # type: ignore[arg-type]


async def test_greedy_answers_are_those_of_transformers(vllm_cluster: ClusterProcess) -> None:
    """All at once, and again: then they find their blocks, and are the same."""
    entries = committed_answers()

    async def all_of_them(client: Client) -> list[Completion]:
        return await asyncio.gather(
            *(
                client.complete(
                    entry.prompt, max_tokens=len(entry.answer), temperature=0.0, ignore_eos=True, timeout=TIMEOUT_S
                )
                for entry in entries
            )
        )

    async with client_of(vllm_cluster) as client:
        cold, warm = await all_of_them(client), await all_of_them(client)
    for entry, first, second in zip(entries, cold, warm, strict=True):
        assert first.token_ids == tuple(entry.answer), entry.name
        assert second.token_ids == tuple(entry.answer), entry.name
    (longest,) = (second for entry, second in zip(entries, warm, strict=True) if entry.name == "licence")
    assert longest.usage is not None
    assert longest.usage.cached_tokens >= 1_600


async def test_the_router_sees_the_cache_and_tenants_do_not_share_it(vllm_cluster: ClusterProcess) -> None:
    prefix = [100 + secrets.randbelow(40_000) for _ in range(10 * BLOCK_SIZE)]
    first = await ask(vllm_cluster, [*prefix, 7], max_tokens=2, tenant="a")
    assert first.usage is not None
    assert first.usage.cached_tokens == 0
    await asyncio.sleep(1)  # events of the cache are told twice on their way
    again = await ask(vllm_cluster, [*prefix, 8, 9], max_tokens=2, tenant="a")
    assert again.usage is not None
    assert again.decision is not None
    assert again.usage.cached_tokens == again.decision.matched_tokens == len(prefix)
    assert again.usage.replica == first.usage.replica
    other = await ask(vllm_cluster, [*prefix, 8, 9], max_tokens=2, tenant="b")
    assert other.usage is not None
    assert other.decision is not None
    assert (other.usage.cached_tokens, other.decision.matched_tokens) == (0, 0)


async def test_choices_log_probabilities_and_seeds(vllm_cluster: ClusterProcess) -> None:
    options: dict[str, object] = {"seed": 40, "max_tokens": 6, "ignore_eos": True, "temperature": 1.0, "logprobs": 2}
    several = await ask(vllm_cluster, n=3, **options)
    again = await ask(vllm_cluster, n=3, **options)
    assert len({choice.token_ids for choice in several.choices}) == 3
    assert [choice.token_ids for choice in several.choices] == [choice.token_ids for choice in again.choices]
    assert several.usage is not None
    assert several.usage.generated_tokens == 18
    for choice in several.choices:
        assert len(choice.logprobs) == 6
        for each in choice.logprobs:
            assert len(each.top) == 2
            assert each.logprob <= each.top[0][1] + 1e-6 <= 1e-5


async def test_a_seed_gives_the_same_answer_in_however_many_steps_a_prompt_is_computed(
    vllm_cluster: ClusterProcess,
) -> None:
    """In three of 512 tokens, and then from the cache."""
    prompt = [(7 * number) % 5_000 + 300 for number in range(1_200)]
    cold = await ask(vllm_cluster, prompt, max_tokens=12, temperature=1.0, seed=5)
    warm = await ask(vllm_cluster, prompt, max_tokens=12, temperature=1.0, seed=5)
    assert cold.usage is not None
    assert warm.usage is not None
    assert cold.usage.cached_tokens == 0
    assert warm.usage.cached_tokens > 1_000
    assert cold.token_ids == warm.token_ids


async def test_stop_ids_bias_and_the_least_number_of_tokens(vllm_cluster: ClusterProcess) -> None:
    first = (await ask(vllm_cluster, temperature=0.0, max_tokens=1)).token_ids[0]
    options: dict[str, object] = {"temperature": 0.0, "max_tokens": 8, "stop_token_ids": [first]}
    stopped = await ask(vllm_cluster, **options)
    assert len(stopped.token_ids) == 1
    assert stopped.finish is not None
    assert (stopped.finish.reason, stopped.finish.stop_token_id) == (FinishReason.STOP, first)
    held = await ask(vllm_cluster, min_tokens=4, **options)
    assert len(held.token_ids) > 4
    assert first not in held.token_ids[:4]
    forced = await ask(vllm_cluster, temperature=0.0, max_tokens=5, logit_bias={first: 100.0})
    assert forced.token_ids == (first,) * 5


async def test_an_answer_goes_on_where_it_was_cut(vllm_cluster: ClusterProcess) -> None:
    options: dict[str, object] = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
    whole = await ask(vllm_cluster, **options)
    rest = await ask(vllm_cluster, received_token_ids=[whole.token_ids[:5]], **options)
    assert whole.token_ids[:5] + rest.token_ids == whole.token_ids
    assert whole.text.endswith(rest.text)


async def test_an_answer_has_the_shape_that_was_asked_for(vllm_cluster: ClusterProcess) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "size": {"enum": [1, 2]}},
        "required": ["city", "size"],
        "additionalProperties": False,
    }
    num_whole = 0
    for seed in range(4):
        shaped = await ask(vllm_cluster, response_format={"json_schema": schema}, max_tokens=60, seed=seed)
        assert shaped.finish is not None
        if shaped.finish.reason is FinishReason.STOP:
            num_whole += 1
            found = json.loads(shaped.text)
            assert found["city"] in ("Paris", "Rome")
            assert found["size"] in (1, 2)
        matching = await ask(vllm_cluster, response_format={"regex": "[a-f]{3}-[0-9]{4}"}, max_tokens=40, seed=seed)
        assert re.fullmatch("[a-f]{3}-[0-9]{4}", matching.text)
    assert num_whole >= 2, "a draw may spend all its tokens on white space, as seed 0 does with vLLM 0.26"


@pytest.mark.parametrize(
    "options",
    [
        {"received_token_ids": [[5, 6]], "frequency_penalty": 1.0},
        {"received_token_ids": [[5, 6]], "response_format": {"regex": "a+"}},
    ],
    ids=["penalties", "shape"],
)
async def test_what_vllm_cannot_do_is_refused(vllm_cluster: ClusterProcess, options: dict[str, object]) -> None:
    """It counts what it generated itself only."""
    with pytest.raises(CallError) as refused:
        await ask(vllm_cluster, max_tokens=8, **options)
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ENGINE_CAPABILITY")


async def test_bad_input_is_refused_and_harms_nobody(vllm_cluster: ClusterProcess) -> None:
    with pytest.raises(InvalidArgumentError) as too_long:
        await ask(vllm_cluster, [5] * (MAX_MODEL_LEN - 10), max_tokens=11)
    assert too_long.value.reason == "PROMPT_TOO_LONG"
    for bad in ([], [10**9]):
        with pytest.raises(InvalidArgumentError):
            await ask(vllm_cluster, bad, max_tokens=1)
    for shape in ({"regex": "("}, {"grammar": "root ::= ("}, {"json_schema": {"type": "no such type"}}):
        with pytest.raises(CallError, match="vLLM refuses this request") as refused:
            await ask(vllm_cluster, response_format=shape, max_tokens=4)
        assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ENGINE_CAPABILITY")
    longest = await ask(vllm_cluster, [5] * (MAX_MODEL_LEN - 2), max_tokens=2, ignore_eos=True)
    assert len(longest.token_ids) == 2


async def _blocks_of_a_few(channel: grpc.aio.Channel) -> tuple[int, int]:
    """Return how many blocks vLLM says are held, and by how many sequences, while four requests of up to 4 blocks run.
    (With none it says nothing: a replica's load is then that none is held.)"""
    begun = asyncio.Semaphore(0)
    few = [
        asyncio.create_task(
            generate(channel, request([500 + number] * 20, 100), timeout_s=TIMEOUT_S, on_tokens=begun.release)
        )
        for number in range(4)
    ]
    for _ in few:
        await begun.acquire()
    replicas = (await await_status(channel, lambda found: any(each.num_running for each in found.replicas))).replicas
    for answer in await asyncio.gather(*few):
        assert answer.code is grpc.StatusCode.OK
    held = sum(replica.num_blocks - replica.num_free_blocks for replica in replicas)
    return held, sum(replica.num_running for replica in replicas)


async def test_nothing_is_left_of_what_was_cancelled(vllm_cluster: ClusterProcess) -> None:
    """200 requests, half of them cancelled wherever they are by then: every block is free again."""

    async def one(channel: grpc.aio.Channel, number: int) -> grpc.StatusCode | None:
        asked = request([100 + number] * (BLOCK_SIZE * 2), 24)
        cancel_after_s = 0.5 + number * 0.05 if number % 2 else None
        answer = await generate(channel, asked, timeout_s=TIMEOUT_S, cancel_after_s=cancel_after_s)
        assert answer.code is not grpc.StatusCode.OK or len(answer.tokens) == 24
        return answer.code

    async with connected(vllm_cluster.address) as channel:
        await await_status(channel, has_ready(2))
        codes = await asyncio.gather(*(one(channel, number) for number in range(200)))
        await await_status(channel, is_idle)
        held, running = await _blocks_of_a_few(channel)
    assert 0 < held <= running * 4, "what vLLM says while so few run: nothing of the others"
    assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.CANCELLED}
    assert codes[::2] == [grpc.StatusCode.OK] * 100
    assert codes.count(grpc.StatusCode.CANCELLED) > 50


async def test_a_trace_and_the_record_of_a_request_tell_its_phases(
    vllm_cluster: ClusterProcess, collector: Collector
) -> None:
    with collector.client_span("ask") as (trace_id, _, traceparent):
        await ask(vllm_cluster, list(range(200, 300)), max_tokens=5, ignore_eos=True, traceparent=traceparent)
    spans = collector.await_spans(trace_id, {"ask", Span.SESSION_REQUEST, Span.DISPATCH, Span.PREFILL, Span.DECODE})
    assert spans[Span.PREFILL].parent_id == spans[Span.DECODE].parent_id == spans[Span.DISPATCH].span_id
    assert spans[Span.DECODE].attributes["gen_ai.usage.output_tokens"] == 5
    code, out, err = await octavo_trace(vllm_cluster.address, trace_id)
    assert (code, err) == (0, "")
    assert "decoded: 5 tokens in 5 steps" in out


async def test_replicas_tell_the_metrics_of_vllm(vllm_cluster: ClusterProcess) -> None:
    def told() -> dict[str, float]:
        with urlopen(vllm_cluster.ready["metrics"]) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            return {
                sample.name: sample.value + 0.0 for family in families for sample in family.samples if _is_vllm(sample)
            }

    def _is_vllm(sample: object) -> bool:
        return getattr(sample, "labels", {}).get("instance") == replica

    prompt = [300 + secrets.randbelow(40_000) for _ in range(3 * BLOCK_SIZE)]
    first = await ask(vllm_cluster, prompt, max_tokens=4, ignore_eos=True)
    assert first.usage is not None
    replica = first.usage.replica
    before = told()
    await asyncio.sleep(1)
    second = await ask(vllm_cluster, [*prompt, 5], max_tokens=4, ignore_eos=True)
    assert second.usage is not None
    assert second.usage.replica == replica
    after = told()
    grown = {name: after[name] - before[name] for name in before if name.endswith("_total") and name in after}
    assert grown["octavo_engine_prompt_tokens_total"] == 97
    assert grown["octavo_engine_generated_tokens_total"] == 4
    assert grown["octavo_prefix_cache_queries_total"] == 97
    assert grown["octavo_prefix_cache_hits_total"] == 96
    assert grown["octavo_engine_computed_tokens_total"] == 1 + 4
    assert grown["octavo_engine_steps_total"] >= 4
    assert after["octavo_engine_running"] == after["octavo_engine_waiting"] == after["octavo_kv_usage"] == 0
