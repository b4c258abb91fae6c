"""What is sent: the same for the same seed whoever sends it, with the sharing that the scenario asks for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from load_tests.generator.content import Content, Conversation, answer
from load_tests.generator.driver import Part
from load_tests.generator.poisons import POISONS
from load_tests.generator.scenario import FOLDER, Scenario, parse_scenario


def scenario_of(seed: int = 1, **kind: Any) -> Scenario:
    arrivals = {"process": "poisson", "rate": 5, "duration_s": 2}
    return parse_scenario(
        {"name": "toy", "seed": seed, "arrivals": arrivals, "kinds": [{"name": "one", **kind}]}, FOLDER
    )


def first_requests(scenario: Scenario, count: int = 50) -> list[Any]:
    content = Content(scenario)
    return [content.ask(content.conversation(number)) for number in range(count)]


def test_the_same_seed_asks_the_same_whoever_makes_it_and_in_whatever_order() -> None:
    kind = {"output": [1, 99], "timeout_s": [1, 5], "cancel_share": 0.5, "temperature": 0.7, "prompt": {"own": [1, 50]}}
    scenario = scenario_of(**kind)
    content = Content(scenario)
    backwards = [content.ask(content.conversation(number)) for number in reversed(range(50))]
    assert first_requests(scenario) == backwards[::-1]
    assert first_requests(scenario) != first_requests(scenario_of(seed=2, **kind))
    assert len({request.request_id for request in backwards}) == 50


@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_share_the_numbers_out(count: int) -> None:
    parts = [[number for number in range(20) if number in Part(index, count)] for index in range(count)]
    assert sorted(number for part in parts for number in part) == list(range(20))


def test_all_share_the_system_prompt_and_each_has_its_own_rest() -> None:
    prompts = [request.prompt for request in first_requests(scenario_of(prompt={"system": 40, "own": 8}))]
    assert {len(prompt) for prompt in prompts} == {48}
    assert len({tuple(prompt[:40]) for prompt in prompts}) == 1
    assert len({tuple(prompt[40:]) for prompt in prompts}) == 50


def test_documents_are_chosen_by_their_popularity() -> None:
    shape = {"system": 4, "document": 16, "documents": 5, "own": 4}
    prompts = [request.prompt for request in first_requests(scenario_of(zipf=2.0, prompt=shape), 400)]
    counts = Counter(tuple(prompt[4:20]) for prompt in prompts)
    assert len(counts) == 5
    assert counts.most_common(1)[0][1] > 200  # 1 / (1 + 1/4 + 1/9 + 1/16 + 1/25) of 400 is 273


def test_several_documents_are_different_ones() -> None:
    shape = {"document": 8, "documents": 3, "picked": 3, "own": 1}
    for request in first_requests(scenario_of(prompt=shape)):
        assert len({tuple(request.prompt[at : at + 8]) for at in (0, 8, 16)}) == 3


def test_each_tenant_has_its_own_system_prompt() -> None:
    requests = first_requests(scenario_of(tenants=4, prompt={"system": 16, "systems": 4, "own": 2}), 200)
    systems: dict[str, set[tuple[int, ...]]] = {}
    for request in requests:
        systems.setdefault(request.tenant, set()).add(tuple(request.prompt[:16]))
    assert sorted(systems) == ["one-0", "one-1", "one-2", "one-3"]
    assert all(len(each) == 1 for each in systems.values())
    assert len({next(iter(each)) for each in systems.values()}) == 4


def test_kinds_come_by_weight() -> None:
    table = {
        "name": "toy",
        "arrivals": {"process": "poisson", "rate": 5, "duration_s": 2},
        "kinds": [{"name": "often", "weight": 3}, {"name": "seldom", "weight": 1}],
    }
    counts = Counter(request.kind for request in first_requests(parse_scenario(table, FOLDER), 400))
    assert counts["often"] == pytest.approx(300, abs=40)


def converse(content: Content, conversation: Conversation) -> list[Any]:
    requests = []
    while not conversation.is_over:
        requests.append(content.ask(conversation))
        answer(conversation, [7, 8], "well")
    return requests


def test_a_later_turn_repeats_all_that_was_said() -> None:
    content = Content(scenario_of(turns=3, prompt={"system": 4, "own": 2}))
    first, second, third = (request.prompt for request in converse(content, content.conversation(0)))
    assert second[:6] == first
    assert second[6:8] == [7, 8]
    assert third[:10] == second
    assert len(third) == 14


def test_messages_take_turns_behind_the_system_prompt() -> None:
    content = Content(scenario_of(turns=2, is_sticky=True, prompt={"form": "messages", "system": 4, "own": 2}))
    first, second = converse(content, content.conversation(0))
    assert [message["role"] for message in second.prompt] == ["system", "user", "assistant", "user"]
    assert second.prompt[:2] == first.prompt
    assert second.prompt[2]["content"] == "well"
    assert second.options["affinity_key"] == first.options["affinity_key"] != ""


def test_text_is_words() -> None:
    (request,) = first_requests(scenario_of(prompt={"form": "text", "system": 3, "own": 4}), 1)
    assert len(request.prompt.split()) == 7


def test_a_poison_request_says_how_it_must_be_refused() -> None:
    requests = first_requests(scenario_of(poisons=list(POISONS)), 100)
    assert {request.expected for request in requests} == {"INVALID_ARGUMENT", "NOT_FOUND"}
    assert all(request.model == "no-such-model" for request in requests if request.expected == "NOT_FOUND")


def test_a_trace_says_how_long_prompts_and_answers_are() -> None:
    arrivals = {"process": "trace", "file": "trace.csv", "duration_s": 60}
    table = {"name": "toy", "arrivals": arrivals, "kinds": [{"name": "one", "prompt": {"system": 5}}]}
    scenario = parse_scenario(table, FOLDER)
    for request, line in zip(first_requests(scenario, 20), scenario.trace, strict=False):
        assert len(request.prompt) == 5 + line.prompt
        assert request.options["max_tokens"] == line.output
