"""The client against the real router's front: what each promises the other, over a network that breaks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable

import pytest
from octavo.client import (
    Client,
    DeadlineExceededError,
    Finish,
    FinishReason,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
    UnimplementedError,
)
from octavo.names import Reason

from router.session import LINGER_S
from tests.client.cuttable_proxy import CuttableProxy, cuttable_proxy
from tests.client.waiting import until
from tests.router.rig import Rig, Work, answering, running
from workers import errors

TEXT = "The quick brown fox jumps over it."


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with running() as rig:
        yield rig


@pytest.fixture
async def proxy(rig: Rig) -> AsyncIterator[CuttableProxy]:
    async with cuttable_proxy(rig.address) as proxy:
        yield proxy


@pytest.fixture
async def client(proxy: CuttableProxy, make_client: Callable[..., Client]) -> AsyncIterator[Client]:
    async with make_client(proxy.address) as client:
        yield client


async def test_a_whole_answer_with_its_accounts(client: Client, rig: Rig) -> None:
    rig.backend.script = answering(TEXT)
    for prompt in ("Hi", [72, 105], [{"role": "user", "content": "Hi"}]):
        answer = await client.complete(prompt)  # type: ignore[arg-type]
        assert answer.text == TEXT
        assert answer.token_ids == tuple(TEXT.encode())
        assert answer.finish is not None
        assert answer.finish.reason is FinishReason.LENGTH
        assert answer.usage is not None
        assert answer.usage.generated_tokens == len(TEXT)
        assert answer.decision is not None
        assert (answer.decision.replica, answer.decision.candidates[0].owed_tokens) == ("r1", 3.0)
    await rig.assert_nothing_left()


async def test_the_other_calls(client: Client) -> None:
    assert [model.name for model in await client.list_models()] == ["toy"]
    assert await client.detokenize(await client.tokenize("Hi")) == "Hi"
    assert [replica.id for replica in (await client.status()).replicas] == ["r1"]
    assert await client.health()
    with pytest.raises(NotFoundError) as caught:
        await client.tokenize("Hi", model="gpt-9")
    assert caught.value.reason == Reason.MODEL_NOT_FOUND


async def test_refusals_name_field_rule_and_value(client: Client) -> None:
    with pytest.raises(InvalidArgumentError) as invalid:
        await client.complete("Hi", top_p=2.0)
    assert invalid.value.field_violations[0].field == "sampling.top_p"
    with pytest.raises(UnimplementedError) as unserved:
        await client.complete("Hi", model="toy:french")
    assert unserved.value.field_violations[0].field == "model"
    with pytest.raises(InvalidArgumentError) as empty:
        await client.complete("")
    assert empty.value.reason == Reason.EMPTY_PROMPT


async def test_choices_and_their_log_probabilities_over_a_network_that_breaks(
    client: Client, rig: Rig, proxy: CuttableProxy
) -> None:
    asked = client.complete("Hi", n=3, logprobs=1, logit_bias={65: -1.5}, min_tokens=2)
    reading = asyncio.create_task(asked)
    work = await rig.backend.work()
    assert (work.request.n, dict(work.request.sampling.logit_bias), work.request.min_tokens) == (3, {65: -1.5}, 2)
    work.dispatch()
    for position in range(0, len(TEXT), 7):
        for index in range(3):
            work.emit(TEXT[position : position + 7 - index], index, logprob=-1.0 - index)
        if position % 2:
            await asyncio.sleep(0.01)
        proxy.cut()
    for index in range(3):
        work.finish(index=index)
    answer = await reading
    assert answer.text == answer.choices[0].text == TEXT
    for index, choice in enumerate(answer.choices):
        assert len(choice.text) == len(choice.token_ids) == len(choice.logprobs)
        assert [each.token_id for each in choice.logprobs] == list(choice.token_ids)
        assert {each.logprob for each in choice.logprobs} == {-1.0 - index}
        assert choice.logprobs[0].top[1] == (0, -9.0)
        assert choice.finish is not None
    await rig.assert_nothing_left()


async def test_the_best_come_first(client: Client, rig: Rig) -> None:
    def script(work: Work) -> None:
        for index, logprob in enumerate((-3.0, -1.0, -2.0)):
            work.emit("abc"[index], index, logprob=logprob)
            work.finish(index=index)

    rig.backend.script = script
    answer = await client.complete("Hi", n=2, best_of=3)
    assert [choice.text for choice in answer.choices] == ["b", "c"]
    assert answer.choices[0].logprobs == ()


async def test_an_answer_goes_on_after_received_tokens_over_a_cut(
    client: Client, rig: Rig, proxy: CuttableProxy
) -> None:
    """The cut may lose the Start, or come after it: the client says that it has what it said before."""
    for number, delay in enumerate((0.0, 0.02)):
        reading = asyncio.create_task(client.complete("Hi", received_token_ids=[list(TEXT[:10].encode())]))
        await asyncio.sleep(delay)
        proxy.cut()
        work = await rig.backend.work(number)
        work.dispatch()
        work.emit(TEXT[10:20])
        await asyncio.sleep(0.01)
        proxy.cut()
        work.emit(TEXT[20:])
        work.finish()
        assert (await reading).text == TEXT[10:]
    await rig.assert_nothing_left()


async def test_each_choice_goes_on_after_its_received_tokens_over_a_cut(
    client: Client, rig: Rig, proxy: CuttableProxy
) -> None:
    """As a client asks another router after the death of one: two choices in the middle, one at its end."""
    received = [list(TEXT[:cut].encode()) for cut in (4, 9, 15)]
    reading = asyncio.create_task(client.complete("Hi", n=3, received_token_ids=received, stop=TEXT[10:15]))
    work = await rig.backend.work()
    assert [list(each) for each in work.request.received] == received
    work.dispatch()
    work.emit(TEXT[4:7], 0)
    work.emit(TEXT[9:14], 1)
    await asyncio.sleep(0.01)
    proxy.cut()
    work.emit(TEXT[7:], 0)
    work.emit(TEXT[14:], 1)
    answer = await reading
    assert [choice.text for choice in answer.choices] == [TEXT[4:10], TEXT[9:10], ""]
    assert [bytes(choice.token_ids).decode() for choice in answer.choices] == [TEXT[4:15], TEXT[9:15], ""]
    assert {choice.finish for choice in answer.choices} == {Finish(FinishReason.STOP, stop=TEXT[10:15])}
    await rig.assert_nothing_left()


async def test_cuts_in_the_middle_change_nothing(client: Client, rig: Rig, proxy: CuttableProxy) -> None:
    reading = asyncio.create_task(client.complete("Hi"))
    work = await rig.backend.work()
    work.dispatch()
    for position in range(0, len(TEXT), 7):
        work.emit(TEXT[position : position + 7])
        if position % 2:
            await asyncio.sleep(0.01)
        proxy.cut()
    work.finish()
    assert (await reading).text == TEXT
    assert proxy.num_connections > 1
    await rig.assert_nothing_left()


async def test_a_cut_before_the_first_token_does_not_ask_twice(client: Client, rig: Rig, proxy: CuttableProxy) -> None:
    reading = asyncio.create_task(client.complete("Hi"))
    work = await rig.backend.work()
    proxy.cut()
    await until(lambda: proxy.num_connections >= 2)
    work.dispatch()
    work.emit(TEXT)
    work.finish()
    assert (await reading).text == TEXT
    assert len(rig.backend.works) == 1


async def test_two_hundred_requests_over_a_network_that_breaks(client: Client, rig: Rig, proxy: CuttableProxy) -> None:
    dice = random.Random(7)

    def script(work: Work) -> None:
        loop = asyncio.get_running_loop()
        work.dispatch()
        for i in range(10):
            loop.call_later(dice.random() * 0.05 + i * 0.05, work.emit, TEXT[i * 3 : i * 3 + 3])
        loop.call_later(0.6, work.finish)

    rig.backend.script = script
    readings = [asyncio.create_task(client.complete(f"{i}")) for i in range(200)]
    pause_s = 0.1
    while not all(reading.done() for reading in readings):
        await asyncio.sleep(pause_s)
        proxy.cut()
        pause_s *= 1.1  # where to attach all of them takes longer than that
    for reading in readings:
        assert sorted((await reading).text) == sorted(TEXT[:30])
        assert (await reading).finish is not None
    assert len(rig.backend.works) == 200
    assert proxy.num_connections > 2
    await rig.assert_nothing_left()


async def test_an_unread_answer_waits_for_its_reader(
    rig: Rig, proxy: CuttableProxy, make_client: Callable[..., Client]
) -> None:
    rig.backend.script = answering(TEXT)
    async with make_client(proxy.address, window=4) as client:
        slow = client.generate("slow")
        await until(lambda: slow._exchange.num_buffered_tokens == 4)
        assert (await client.complete("fast")).text == TEXT
        proxy.cut()
        await until(lambda: proxy.num_connections >= 2)
        assert (await client.complete("fast")).text == TEXT
        assert slow._exchange.num_buffered_tokens == 4
        assert (await slow.complete()).text == TEXT


async def test_leaving_cancels_in_the_back(client: Client, rig: Rig, proxy: CuttableProxy) -> None:
    async def leave() -> None:
        async for _ in client.generate("Hi"):
            break

    leaving = asyncio.create_task(leave())
    work = await rig.backend.work()
    work.dispatch()
    work.emit("x")
    await leaving
    await until(lambda: work.is_cancelled)

    detached = client.generate("Hi")
    work = await rig.backend.work(1)
    proxy.cut()
    await asyncio.sleep(0)
    await detached.aclose()
    await until(lambda: work.is_cancelled)
    await rig.assert_nothing_left()


async def test_a_deadline_reaches_the_back(client: Client, rig: Rig) -> None:
    assert await client.health()  # and so there is a connection
    with pytest.raises(DeadlineExceededError) as caught:
        await client.complete("Hi", timeout=1.0)
    assert caught.value.reason == Reason.DEADLINE_PASSED
    [work] = rig.backend.works
    assert work.request.deadline - work.request.accepted_at < 1.1
    await until(lambda: rig.server.intake.num_open == 0)


async def test_a_request_turned_away_is_a_new_one_at_its_next_try(client: Client, rig: Rig) -> None:
    """The router keeps what it ended for some seconds, in case its Terminal was lost; a retry that attached got that
    same refusal again, for as long."""

    def turn_away(work: Work) -> None:
        rig.backend.script = answering(TEXT)
        work.end(errors.UnavailableError("no replica"))

    rig.backend.script = turn_away
    async with asyncio.timeout(0.9 * LINGER_S):
        assert (await client.complete("Hi")).text == TEXT
    assert len(rig.backend.works) == 2
    await rig.assert_nothing_left()


async def test_a_drain_lets_answers_finish(client: Client, rig: Rig) -> None:
    running_answer = asyncio.create_task(client.complete("Hi"))
    work = await rig.backend.work()
    draining = asyncio.create_task(rig.server.drain(30.0))
    await until(lambda: rig.server.intake.is_draining)
    with pytest.raises((UnavailableError, DeadlineExceededError)):
        await client.complete("too late", timeout=0.2)
    work.dispatch()
    work.emit(TEXT)
    work.finish()
    assert (await running_answer).text == TEXT
    assert await draining
