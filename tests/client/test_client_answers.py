"""What a caller gets: deltas in order, the whole answer, its accounts; and what the router gets."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import grpc
import pytest
from octavo.client import (
    Client,
    ClientOptions,
    FieldViolation,
    FinishReason,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    UnimplementedError,
)
from octavo.names import Reason

from tests.client.scripted_router import ScriptedRouter, expected_ids, expected_text, pb
from tests.client.waiting import until


async def test_deltas_come_in_order_and_accounts_at_the_end(client: Client) -> None:
    generation = client.generate("hello", max_tokens=20)
    deltas = [delta async for delta in generation]
    assert "".join(delta.text for delta in deltas) == expected_text(20)
    assert [delta.token_offset for delta in deltas] == list(range(20))
    assert [delta.finish is not None for delta in deltas] == [False] * 19 + [True]
    assert generation.usage is not None
    assert generation.usage.generated_tokens == 20
    assert generation.usage.replica == "r1"
    assert generation.decision is not None
    assert generation.decision.rule == "only"
    assert generation.is_ended
    assert [delta async for delta in generation] == []


async def test_complete_returns_the_whole_answer(client: Client) -> None:
    answer = await client.complete("hello", request_id="mine")
    assert answer.text == expected_text(8)
    assert answer.token_ids == expected_ids(8)
    assert answer.finish is not None
    assert answer.finish.reason is FinishReason.LENGTH
    assert answer.usage is not None
    assert answer.usage.cached_tokens == 1
    assert answer.decision is not None
    assert answer.request_id == "mine"
    assert answer.trace_id == ""


async def test_every_option_reaches_the_router(client: Client, router: ScriptedRouter) -> None:
    await client.complete(
        "p",
        model="m",
        timeout=600.0,
        request_id="all",
        traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01",
        max_tokens=1,
        min_tokens=1,
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        seed=9,
        logit_bias={3: 1.5},
        stop="END",
        stop_token_ids=[1, 2],
        ignore_eos=True,
        priority=-3,
        affinity_key="k",
        n=2,
        best_of=3,
        logprobs=0,
        received_token_ids=[[5, 6], []],
    )
    [start] = router.starts
    request = start.request
    assert (request.model, request.prompt.text, request.max_tokens, request.min_tokens) == ("m", "p", 1, 1)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 7, 0.125)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.5, 0.5, -0.5)
    assert (sampling.seed, dict(sampling.logit_bias)) == (9, {3: 1.5})
    assert (list(request.stop), list(request.stop_token_ids), request.ignore_eos) == (["END"], [1, 2], True)
    assert (request.priority, request.affinity_key) == (-3, "k")
    assert (request.n, request.best_of, request.HasField("logprobs"), request.logprobs) == (2, 3, True, 0)
    assert [list(each.ids) for each in request.received_token_ids] == [[5, 6], []]
    assert 590 < start.timeout.seconds + start.timeout.nanos / 1e9 <= 600
    assert start.window == 1024
    assert not start.attach_offsets


async def test_what_is_left_out_is_absent(client: Client, router: ScriptedRouter) -> None:
    await client.complete("p")
    [start] = router.starts
    assert not start.HasField("timeout")
    assert [field.name for field, _ in start.request.ListFields()] == ["prompt"]


async def test_prompts_as_ids_and_as_messages(client: Client, router: ScriptedRouter) -> None:
    await client.complete([5, 6, 7])
    await client.complete([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    ids, messages = (start.request.prompt for start in router.starts)
    assert list(ids.token_ids.ids) == [5, 6, 7]
    assert [(each.role, each.content[0].text) for each in messages.messages.messages] == [
        ("system", "Be brief."),
        ("user", "Hi"),
    ]


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ([-1], {}, "prompt.token_ids"),
        ([2**32], {}, "prompt.token_ids"),
        (["a", "b"], {}, "prompt.token_ids"),
        ([{"role": "user"}], {}, "prompt.messages[0]"),
        ([{"role": "user", "content": 3}], {}, "prompt.messages[0]"),
        ({"role": "user", "content": "x"}, {}, "prompt"),
        ("p", {"max_tokens": "many"}, "max_tokens"),
        ("p", {"temperature": "hot"}, "sampling.temperature"),
        ("p", {"stop": [3]}, "stop"),
        ("p", {"seed": -1}, "sampling.seed"),
        ("p", {"logit_bias": {-1: 1.0}}, "sampling.logit_bias"),
        ("p", {"logit_bias": {"1": 1.0}}, "sampling.logit_bias"),
        ("p", {"received_token_ids": [[1], [-1]]}, "received_token_ids"),
        ("p", {"received_token_ids": [1, 2]}, "received_token_ids"),
        ("p", {"n": 2**31}, "n"),
        ("lone \ud800 surrogate", {}, "prompt.text"),
        ([{"role": "user", "content": "\ud800"}], {}, "prompt.messages[0]"),
        ("p", {"model": 3}, "model"),
        ("p", {"stop": "\ud800"}, "stop"),
        ("p", {"request_id": 7}, "request_id"),
        ("p", {"traceparent": b"\xff"}, "traceparent"),
        ("p", {"tracestate": "\ud800"}, "tracestate"),
        ("p", {"timeout": math.nan}, "timeout"),
        ("p", {"timeout": math.inf}, "timeout"),
        ("p", {"timeout": -1.0}, "timeout"),
    ],
)
async def test_what_cannot_be_sent_names_the_field(client: Client, prompt: object, options: object, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        client.generate(prompt, **options)  # type: ignore[arg-type]
    assert caught.value.reason == Reason.INVALID_FIELD
    assert [violation.field for violation in caught.value.field_violations] == [field]


async def test_an_unknown_option_is_a_type_error(client: Client) -> None:
    with pytest.raises(TypeError, match="max_token"):
        client.generate("p", max_token=3)  # type: ignore[call-arg]


async def test_a_refusal_carries_everything_the_terminal_says(client: Client, router: ScriptedRouter) -> None:
    terminal = pb.Terminal(code=3, reason="INVALID_FIELD", message="sampling.top_p must be in (0, 1], is 2.0")
    terminal.field_violations.add(field="sampling.top_p", description="must be in (0, 1], is 2.0")
    router.refusals = [terminal]
    with pytest.raises(InvalidArgumentError) as caught:
        await client.complete("p", top_p=2.0)
    error = caught.value
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.message == "sampling.top_p must be in (0, 1], is 2.0"
    assert str(error) == "INVALID_ARGUMENT: sampling.top_p must be in (0, 1], is 2.0 [INVALID_FIELD]"
    assert error.field_violations == (FieldViolation("sampling.top_p", "must be in (0, 1], is 2.0"),)
    assert not error.retryable


async def test_a_full_queue_says_when_to_come_back_and_is_not_retried(client: Client, router: ScriptedRouter) -> None:
    terminal = pb.Terminal(code=8, reason="QUEUE_FULL", message="full")
    terminal.retry_delay.nanos = 250_000_000
    router.refusals = [terminal]
    with pytest.raises(ResourceExhaustedError) as caught:
        await client.complete("p")
    assert caught.value.retry_delay == 0.25
    assert caught.value.retryable
    assert len(router.starts) == 1


async def test_two_hundred_requests_side_by_side_over_one_session(client: Client, router: ScriptedRouter) -> None:
    answers = await asyncio.gather(*(client.complete("p", max_tokens=1 + i % 50) for i in range(200)))
    assert [answer.text for answer in answers] == [expected_text(1 + i % 50) for i in range(200)]
    assert router.num_sessions == 1
    assert len(router.starts) == 200
    assert len(router.messages) < 50, "starts of one moment travel together"


async def test_the_same_id_twice_at_once_is_refused(client: Client, router: ScriptedRouter) -> None:
    router.hold(1)
    first = client.generate("p", request_id="same")
    with pytest.raises(InvalidArgumentError, match="'same'") as caught:
        client.generate("p", request_id="same")
    assert caught.value.reason == Reason.REQUEST_ID_IN_USE
    await first.aclose()


async def test_an_id_can_be_used_again_at_once_after_a_cancel(client: Client, router: ScriptedRouter) -> None:
    router.hold(1)
    first = client.generate("p", request_id="same")
    await until(lambda: router.starts)
    await first.aclose()
    router.release()
    assert (await client.complete("p", request_id="same")).text == expected_text(8)
    assert router.cancels == ["same"]


async def test_a_request_too_large_for_a_message_is_refused_here(
    router: ScriptedRouter, make_client: Callable[..., Client]
) -> None:
    async with make_client(router.address, max_message_bytes=10_000) as client:
        with pytest.raises(ResourceExhaustedError, match="max_message_bytes") as caught:
            client.generate("x" * 10_000)
        assert caught.value.reason == Reason.MESSAGE_TOO_LARGE
        assert (await client.complete("x" * 1000)).text == expected_text(8)


async def test_a_request_too_large_for_the_router_fails_alone(client: Client, router: ScriptedRouter) -> None:
    """The router's limit (4 MiB here) breaks the whole Session; only the culprit may suffer."""
    router.hold(2)
    sibling = client.generate("p")
    await until(lambda: router.starts)
    with pytest.raises(ResourceExhaustedError):
        await client.complete("x" * 5_000_000)
    router.release()
    assert (await sibling.complete()).text == expected_text(8)


async def test_a_router_that_loses_tokens_is_not_believed(client: Client, router: ScriptedRouter) -> None:
    router.skips = 2
    router.hold(3)
    reading = aiter(client.generate("p"))
    for _ in range(3):
        await anext(reading)
    router.break_sessions()
    await until(lambda: len(router.starts) == 2)
    router.release()
    with pytest.raises(InternalError, match="tokens 5 to 6 of choice 0, 3 are here"):
        await anext(reading)
    await until(lambda: router.cancels)


async def test_the_other_calls(client: Client) -> None:
    [model] = await client.list_models()
    assert (model.name, model.max_model_len) == ("scripted", 64)
    assert await client.tokenize("abc") == [97, 98, 99]
    assert await client.detokenize([97, 98, 99]) == "abc"
    status = await client.status()
    assert [replica.kernels for replica in status.replicas] == ["torch"]
    assert await client.health() is True
    assert await client.health("somebody.else") is False


async def test_errors_of_the_other_calls_carry_their_details(client: Client) -> None:
    with pytest.raises(NotFoundError, match="no model 'gpt-9'") as caught:
        await client.tokenize("abc", model="gpt-9")
    assert caught.value.reason == "MODEL_NOT_FOUND"
    assert caught.value.field_violations == (FieldViolation("model", "unknown"),)
    assert caught.value.retry_delay == 1.5


async def test_a_server_that_is_no_router(router: ScriptedRouter, make_client: Callable[..., Client]) -> None:
    router.session_error = (grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
    async with make_client(router.address) as client:
        with pytest.raises(UnimplementedError, match="Method not found"):
            await client.complete("p")
    assert router.num_sessions == 1


async def test_a_closed_client_says_so(router: ScriptedRouter, make_client: Callable[..., Client]) -> None:
    client = make_client(router.address)
    with pytest.raises(RuntimeError, match="not open"):
        client.generate("p")
    async with client:
        assert await client.health()
    with pytest.raises(RuntimeError, match="not open"):
        await client.health()
    with pytest.raises(RuntimeError, match="once"):
        await client.__aenter__()


def test_options_name_the_rule_and_the_value() -> None:
    for value in (0, -1, math.nan):
        with pytest.raises(ValueError, match=f"window must be > 0, is {value}"):
            ClientOptions(window=value).check()  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one address"):
        Client([])
