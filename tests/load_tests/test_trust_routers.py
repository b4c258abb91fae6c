"""The rigs of several routers and of TLS: what their judges say of runs that were noted, and that such rigs stand."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from octavo.client import Client, ClientOptions, ConnectionFailedError, Delta, UnauthenticatedError

from load_tests.bars import Bar
from load_tests.generator.crew import Crew
from load_tests.generator.scenario import parse_scenario, read_scenario
from load_tests.notes import Notes, judge_terminals
from load_tests.rigs import trust_cost, trust_router_death, trust_routers
from load_tests.rigs.lean_crew import LeanLoad, load
from load_tests.rigs.lean_http2 import request_headers
from load_tests.rigs.rig_trust import RigTrust
from load_tests.rigs.router_latency import GenerateAsk, SessionAsk
from load_tests.rigs.router_rig import RigConfig, RouterRig
from load_tests.rigs.trust_router_death import Stream, outcome

JUDGES = (trust_cost.judge, trust_routers.judge, trust_router_death.judge)
UNAUTHENTICATED = str(grpc.StatusCode.UNAUTHENTICATED.value[0])


def by_name(bars: list[Bar]) -> dict[str, Bar]:
    assert len({bar.bar for bar in bars}) == len(bars)
    return {bar.bar: bar for bar in bars}


@pytest.mark.parametrize("judge", JUDGES)
def test_what_was_not_measured_meets_no_bar(judge: Any) -> None:
    bars = judge(Notes())
    assert bars
    assert not any(bar.ok for bar in bars)


# What TLS and keys cost.


def noted_costs(clear: float, secured: float, added_ms: float) -> Notes:
    notes = Notes()
    for call in trust_cost.CALLS:
        for way, per_s, p50_ms in (("clear", clear, 3.0), ("secured", secured, 3.0 + added_ms)):
            notes.add(f"{call}, tokens, {way}", tokens_per_s=per_s, router_us_per_token=10.0)
            notes.add(f"{call}, requests, {way}", requests_per_s=per_s)
            notes.add(f"{call}, first token, {way}", p50_ms=p50_ms)
    return notes


def test_costs_are_shares_and_milliseconds() -> None:
    assert all(bar.ok for bar in trust_cost.judge(noted_costs(1_000.0, 901.0, 0.4)))
    bars = trust_cost.judge(noted_costs(1_000.0, 890.0, 0.6))
    assert len(bars) == 6
    assert not any(bar.ok for bar in bars)
    named = by_name(bars)
    assert named["session: share of tokens/s lost to TLS and keys"].value == 0.11
    assert named["generate: added to the first token by TLS and keys, p50, ms"].value == 0.6
    assert all(bar.ok for bar in trust_cost.judge(noted_costs(1_000.0, 1_100.0, -0.1)))


def test_costs_are_compared_within_a_repetition() -> None:
    notes = Notes()
    for clear, secured in ((1_000.0, 950.0), (2_000.0, 1_940.0), (500.0, 400.0)):
        notes.add("session, tokens, clear", tokens_per_s=clear)
        notes.add("session, tokens, secured", tokens_per_s=secured)
    assert by_name(trust_cost.judge(notes))["session: share of tokens/s lost to TLS and keys"].value == 0.05


# Several routers.


def test_four_routers_are_judged_by_how_much_worse_they_do() -> None:
    notes = Notes()
    for one, four in ((0.99, 0.95), (0.98, 0.97), (0.99, 0.5)):
        notes.add(trust_routers.what(1), of_best=one, balance=1.1)
        notes.add(trust_routers.what(4), of_best=four, balance=1.0)
    cached, balance = trust_routers.judge(notes)
    assert (cached.value, cached.ok) == (0.0404, True)
    assert balance.value is not None
    assert balance.value < 0
    assert balance.ok
    for _ in range(4):
        notes.add(trust_routers.what(1), of_best=1.0, balance=1.0)
        notes.add(trust_routers.what(4), of_best=0.94, balance=1.06)
    assert not any(bar.ok for bar in trust_routers.judge(notes))


def test_each_process_of_a_generator_has_a_router_of_its_own() -> None:
    table, folder = read_scenario("router_prefixes", {"processes": 4})
    crew = Crew(table, folder, parse_scenario(table, folder), "a:1", "b:2", "c:3")
    assert [job["target"] for job in crew._jobs] == ["a:1", "b:2", "c:3", "a:1"]
    assert [job["index"] for job in crew._jobs] == [0, 1, 2, 3]


# A router that is killed.


def streamed(*pieces: tuple[int, list[int], str], error: str = "") -> Stream:
    """`pieces`: offset, tokens and text of each, a second between two."""
    stream = Stream([5, 6, 7, 8], " a b c d")
    for second, (offset, token_ids, text) in enumerate(pieces):
        stream.take(Delta(text, tuple(token_ids), token_offset=offset), float(second))
    stream.is_ended, stream.error = True, error
    return stream


WHOLE = ((0, [5, 6], " a b"), (2, [7, 8], " c d"))


def test_answers_are_right_lost_repeated_or_wrong() -> None:
    assert streamed(*WHOLE).verdict == "right"
    assert streamed(*WHOLE, (4, [], "")).verdict == "right"
    assert streamed(*WHOLE, error="UNAVAILABLE/SESSION_LOST").verdict == "lost"
    assert streamed(WHOLE[0]).verdict == "lost"
    assert streamed(WHOLE[0], error="UNAVAILABLE/SESSION_LOST").verdict == "lost"
    assert streamed(WHOLE[0], (1, [6, 7, 8], " b c d")).verdict == "repeated"
    assert streamed(*WHOLE, (4, [8], " d")).verdict == "repeated"
    assert streamed((0, [5, 9], " a x"), WHOLE[1]).verdict == "wrong"
    assert streamed(WHOLE[0], (2, [7, 8], " c")).verdict == "wrong"
    unended = streamed(*WHOLE)
    unended.is_ended = False
    assert unended.verdict == "lost"


def test_gaps_are_those_of_the_answers_that_were_cut() -> None:
    early, late, over = streamed(*WHOLE), streamed(*WHOLE), streamed(*WHOLE)
    early.times, late.times, over.times = [0.0, 1.01], [0.5, 1.8], [0.0, 0.9]
    assert over.gap_s(1.0) is None
    assert streamed(*WHOLE).gap_s(-1.0) is None
    noted = outcome([early, late, over], cut=1, killed_at=1.0)
    assert (noted["sent"], noted["ended"], noted["ok"], noted["lost"]) == (3, 3, 3, 0)
    assert noted["gap_max_s"] == noted["gap_p50_s"] == pytest.approx(0.8)
    assert outcome([over], cut=0, killed_at=1.0)["gap_max_s"] is None


def test_a_kill_that_cut_nothing_shows_nothing() -> None:
    figures = {"sent": 10, "ended": 10, "ok": 10, "lost": 0, "repeated": 0, "wrong": 0, "gap_max_s": 0.1}
    notes = Notes()
    for kind in trust_router_death.KINDS:
        notes.add(kind, **figures, cut=0)
    assert not any(bar.ok for bar in trust_router_death.judge(notes))
    for kind in trust_router_death.KINDS:
        notes.add(kind, **figures, cut=5)
    assert all(bar.ok for bar in trust_router_death.judge(notes))
    assert judge_terminals(notes.runs).ok
    notes.add("one port", **{**figures, "repeated": 1}, cut=5)
    assert [bar.ok for bar in trust_router_death.judge(notes)] == [True, False]


# The rigs.


def test_a_token_is_a_header() -> None:
    plain, secured = (request_headers("host:1", "/a/B", is_secure=each, token="t" * each) for each in (False, True))
    assert secured == b"\x83\x87" + plain[2:] + b"\x0f\x08\x08Bearer t"


@pytest.fixture(scope="module")
def trust() -> Any:
    with RigTrust() as trust:
        folder = Path(trust.ca_file).parent
        yield trust
    assert not folder.exists()


@pytest.fixture(scope="module")
def rig(trust: RigTrust) -> Any:
    """Two routers on one port, one of which a test may kill."""
    config = RigConfig(routers=2, shares_port=True, step_s=0.0, router=trust.router, is_encrypted=True)
    with RouterRig(config) as rig:
        yield rig


async def test_lean_clients_prove_themselves(rig: RouterRig, trust: RigTrust) -> None:
    proofs = {"ca_file": trust.ca_file, "token": trust.token}
    for client in (SessionAsk(), GenerateAsk()):
        await client.connect(rig.address, **proofs)
        await asyncio.wait_for(client.ask([300, 301]), 10.0)
        client.close()
    stranger = GenerateAsk()
    await stranger.connect(rig.address, ca_file=trust.ca_file)
    with pytest.raises(ConnectionError, match=f"status {UNAUTHENTICATED}"):
        await asyncio.wait_for(stranger.ask([300]), 10.0)
    stranger.close()


@pytest.mark.parametrize("call", trust_cost.CALLS)
async def test_a_first_token_over_tls(rig: RouterRig, trust: RigTrust, call: str) -> None:
    client = trust_cost.Client(call, rig.address, ca_file=trust.ca_file, token=trust.token)
    for _ in range(3):
        assert await client.first_token_s([300, 301]) > 0
    assert client.num_ended == 3
    await client.close()


@pytest.mark.parametrize("call", ["session", "generate"])
async def test_a_lean_load_over_tls(rig: RouterRig, trust: RigTrust, call: str) -> None:
    small = LeanLoad(
        call=call,
        streams=4,
        output=3,
        duration_s=10.0,
        requests=20,
        tells_time=False,
        ca_file=trust.ca_file,
        token=trust.token,
    )
    counts, _ = await load(rig, small)
    assert (counts.sent, counts.ended, counts.ok, counts.tokens) == (20, 20, 20, 60)


async def test_a_router_that_is_killed_leaves_the_other_on_their_port(rig: RouterRig, trust: RigTrust) -> None:
    """Last of those that use the rig."""
    options = ClientOptions(metadata=trust.metadata)
    assert len(rig.addresses) == 1
    assert len({rig.address, *rig.routers.values()}) == 3
    for address in (rig.address, *rig.routers.values()):
        async with Client(address, credentials=trust.credentials(), options=options) as client:
            assert len((await client.status()).replicas) == 1
    async with Client(rig.address, credentials=trust.credentials()) as stranger:
        with pytest.raises(UnauthenticatedError):
            await stranger.status()
    rig.kill("router-0")
    for _ in range(4):
        async with Client(rig.address, credentials=trust.credentials(), options=options) as client:
            answer = await client.complete([300], max_tokens=2, ignore_eos=True, timeout=10.0)
            assert len(answer.token_ids) == 2
    async with Client(rig.routers["router-0"], credentials=trust.credentials(), options=options) as client:
        with pytest.raises(ConnectionFailedError):
            await client.status()
