"""When requests arrive: the same for the same seed, at the rate that was asked for, in order, and in time."""

from __future__ import annotations

import statistics
from itertools import pairwise
from pathlib import Path

import pytest

from load_tests.generator.arrivals import Arrivals, TraceLine, read_trace
from load_tests.generator.fields import ScenarioError

OPEN = [
    Arrivals(process="constant", rate=50, duration_s=100),
    Arrivals(process="poisson", rate=50, duration_s=100),
    Arrivals(process="bursts", rate=50, size=10, spread_s=0.3, duration_s=100),
    Arrivals(process="ramp", from_rate=0, rate=100, duration_s=100),
    Arrivals(process="ramp", from_rate=99, rate=1, duration_s=100),
    Arrivals(process="ramp", from_rate=50, rate=50, duration_s=100),
]


def offsets(arrivals: Arrivals, seed: str = "1") -> list[float]:
    arrivals.check()
    return list(arrivals.offsets(seed))


@pytest.mark.parametrize("arrivals", OPEN, ids=lambda a: f"{a.process}-{a.from_rate:g}-{a.rate:g}")
def test_arrivals_come_in_order_at_the_rate_within_the_time_and_again_for_the_same_seed(arrivals: Arrivals) -> None:
    found = offsets(arrivals)
    assert found == sorted(found)
    assert found[0] >= 0
    assert found[-1] < arrivals.duration_s
    # 5,000 on average; bursts of 10 spread most: a standard deviation of about 220.
    assert len(found) == pytest.approx(5_000, abs=800)
    assert found == offsets(arrivals)
    if arrivals.process != "constant":
        assert found != offsets(arrivals, "2")


def test_poisson_arrivals_know_nothing_of_one_another() -> None:
    """The pauses of a Poisson process spread as much as they are long on average."""
    pauses = [after - before for before, after in pairwise(offsets(OPEN[1]))]
    assert statistics.stdev(pauses) == pytest.approx(statistics.mean(pauses), rel=0.05)


def test_bursts_come_together() -> None:
    found = offsets(Arrivals(process="bursts", rate=10, size=5, duration_s=60))
    assert len(found) % 5 == 0
    for first in range(0, len(found), 5):
        assert len(set(found[first : first + 5])) == 1


def test_a_rising_ramp_has_three_quarters_of_its_arrivals_in_its_second_half() -> None:
    found = offsets(OPEN[3])
    assert sum(at > 50 for at in found) / len(found) == pytest.approx(0.75, abs=0.02)


def test_a_trace_is_played_as_recorded_only_faster(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text("at_s,prompt,output\n5.0,10,1\n6.0,20,2\n9.5,30,3\n")
    trace = read_trace(file)
    assert trace == (TraceLine(0.0, 10, 1), TraceLine(1.0, 20, 2), TraceLine(4.5, 30, 3))
    arrivals = Arrivals(process="trace", file="trace.csv", speed=2, duration_s=2)
    arrivals.check()
    assert list(arrivals.offsets("1", trace)) == [0.0, 0.5]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "must have 1 to 1000000 lines, is 0"),
        ("at_s,prompt\n1,2\n", "is not a trace with the columns"),
        ("at_s,prompt,output\n2,1,1\n1,1,1\n", "ascending order"),
        ("at_s,prompt,output\n2,0,1\n", "prompts and outputs >= 1"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(ScenarioError, match=complaint):
        read_trace(file)


def test_another_rate_keeps_the_shape() -> None:
    ramp = Arrivals(process="ramp", from_rate=10, rate=40, duration_s=10).with_rate(80)
    assert (ramp.from_rate, ramp.rate) == (20, 80)
    with pytest.raises(ScenarioError, match="must have a rate to change it, is 'closed'"):
        Arrivals(process="closed", duration_s=1).with_rate(5)
