"""What is known of how long answers take, and when nothing is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.drain import STALL_S, Drain
from router.speeds import MIN_SEEN, STALE_S, Line, Speeds
from tests.router_back.queue_simulation import request


def teach(speeds: Speeds, *, count: int = 40, max_tokens: int = 20, num_tokens: int = 11, now: float = 0.0) -> None:
    """First token after 2 ms a prompt token, then 10 ms a token."""
    for i in range(count):
        num_prompt = 50 if i % 2 else 100
        one = request(str(i), 0.0, num_tokens=num_prompt, max_tokens=max_tokens)
        first_s = 0.002 * num_prompt
        elapsed_s = first_s + 0.01 * (num_tokens - 1)
        speeds.num_sent += 1
        speeds.over(one, now, elapsed_s=elapsed_s, first_token_s=first_s, num_tokens=num_tokens, is_answered=True)


def test_an_answer_takes_prefill_and_decode() -> None:
    speeds = Speeds()
    teach(speeds)
    speeds.num_sent = 1
    assert speeds.service_s(request("a", 0.0, num_tokens=200, max_tokens=20), 1.0) == pytest.approx(0.4 + 0.1, rel=0.02)
    assert speeds.margin_s == pytest.approx(0.0, abs=0.01)


def test_the_expected_answer_is_what_answers_of_that_size_used() -> None:
    speeds = Speeds()
    teach(speeds)
    assert speeds.cost(request("a", 0.0, num_tokens=30, max_tokens=20)) == 41
    assert speeds.cost(request("a", 0.0, num_tokens=30, max_tokens=1_000)) == 1_030, "of that size none is known"
    speeds.num_sent = 1
    long = speeds.service_s(request("a", 0.0, num_tokens=50, max_tokens=1_000), 1.0)
    assert long == pytest.approx(0.1, rel=0.02), "and none is refused for what it may not need"


def test_what_was_received_before_is_of_the_answer_and_does_not_come_again() -> None:
    """An answer that went on elsewhere counted as a short one, and was expected from its beginning."""
    speeds = Speeds()
    fresh = request("a", 0.0, num_tokens=30, max_tokens=20)
    resumed = replace(fresh, received=[list(range(8))])
    assert speeds.cost(fresh) == speeds.cost(resumed) == 50, "while nobody knows"
    teach(speeds)
    assert speeds.cost(fresh) == speeds.cost(resumed) == 41
    for _ in range(40):
        speeds.num_sent += 1
        speeds.over(resumed, 0.0, elapsed_s=0.12, first_token_s=0.1, num_tokens=3, is_answered=True)
    assert speeds.cost(fresh) == 41


def test_without_fresh_evidence_nobody_knows() -> None:
    speeds = Speeds()
    one = request("a", 0.0)
    speeds.num_sent = 1
    assert speeds.service_s(one, 0.0) is None
    teach(speeds, count=MIN_SEEN - 1)
    assert speeds.service_s(one, 0.0) is None
    teach(speeds, count=1)
    assert speeds.service_s(one, 0.0) is not None
    assert speeds.service_s(one, STALE_S + 0.1) is None
    speeds.num_sent = 0
    assert speeds.service_s(one, 0.0) is None, "replicas that have nothing to do may be asked"


def test_attempts_that_end_without_a_token_count_as_slow_but_never_as_fast() -> None:
    speeds = Speeds()
    one = request("a", 0.0, num_tokens=100)
    for elapsed_s in [0.5] * 20 + [0.001] * 100:
        speeds.num_sent += 1
        speeds.over(one, 0.0, elapsed_s=elapsed_s, first_token_s=None, num_tokens=0, is_answered=False)
    speeds.num_sent = 1
    assert speeds.service_s(one, 0.0) == pytest.approx(0.5)


def test_a_line_neither_falls_nor_goes_below_zero() -> None:
    line = Line()
    assert line.at(1.0) is None
    line.add(10.0, 1.0)
    assert line.at(1_000.0) == pytest.approx(1.0)
    line.add(20.0, 0.5)
    assert line.at(0.0) == line.at(1_000.0)
    for x in (10.0, 20.0, 30.0) * 100:
        line.add(x, 2 * x)
    assert line.at(40.0) == pytest.approx(80.0, rel=0.05)
    assert (line.at(0.0) or 0.0) >= 0.0


def test_a_drain_counts_only_while_there_is_a_queue() -> None:
    drain = Drain()
    drain.begin(0.0)
    assert drain.per_second(0.05) is None
    for i in range(1, 101):
        drain.sent(5, i * 0.01)
    assert drain.per_second(1.0) == pytest.approx(500.0, rel=0.03)
    drain.end(1.0)
    assert drain.per_second(9.0) == pytest.approx(500.0, rel=0.03), "nobody waited meanwhile"
    drain.begin(9.0)
    assert (drain.per_second(10.9) or 0.0) < 100.0, "and now nothing goes"


def test_a_queue_of_which_nothing_leaves_at_all_has_no_speed() -> None:
    """While replicas died it was taken to be so slow that whoever had three minutes was refused."""
    drain = Drain()
    drain.begin(0.0)
    for i in range(1, 101):
        drain.sent(5, i * 0.01)
    assert (drain.per_second(1.0 + STALL_S) or 0.0) > 0.0
    assert drain.per_second(1.1 + STALL_S) is None
    drain.sent(50, 1.2 + STALL_S)
    assert (drain.per_second(1.2 + STALL_S) or 0.0) > 0.0
