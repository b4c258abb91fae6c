"""The fuzzer: its messages are what they claim to be and repeatable, and its judge believes nothing."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from octavo.internal.v1 import data_plane_pb2 as data
from octavo.v1 import inference_service_pb2 as pb

from load_tests.bars import Bar
from load_tests.notes import Notes
from load_tests.rigs import fuzz_server
from load_tests.rigs.fuzz_direct import BATCH, Direct
from load_tests.rigs.fuzz_samples import NUMBERS, TEXTS, of_kind
from load_tests.rigs.fuzz_server import FuzzedServer
from load_tests.rigs.fuzz_tally import MAX_FAILURES, MAX_HEX, FuzzTally, name_of, what_is_left, worst_growth
from load_tests.rigs.message_mutator import Mutator, parsed
from load_tests.rigs.trust_fuzz import DIRECT, SOCKETS, judge

SAMPLES = of_kind()


def fields_of(message: Message) -> Iterable[tuple[FieldDescriptor, Any]]:
    """Yield each field that is set, of this message and of all in it."""
    for field, value in message.ListFields():
        yield field, value
        if field.type == field.TYPE_MESSAGE and not (field.message_type.GetOptions().map_entry):
            for each in value if field.is_repeated else [value]:
                yield from fields_of(each)


def messages(kind: type[Message], number: int, seed: int = 1) -> list[bytes]:
    mutator = Mutator(seed, texts=TEXTS, numbers=NUMBERS)
    return [mutator.mutated(kind, SAMPLES[kind]) for _ in range(number)]


def test_the_same_seed_makes_the_same_messages() -> None:
    assert messages(pb.SessionRequest, 50) == messages(pb.SessionRequest, 50)
    assert messages(pb.SessionRequest, 50) != messages(pb.SessionRequest, 50, seed=2)


@pytest.mark.parametrize("kind", SAMPLES)
def test_samples_are_valid(kind: type[Message]) -> None:
    assert all(parsed(kind, sample) is not None for sample in SAMPLES[kind])


@pytest.mark.parametrize("kind", [pb.GenerateRequest, data.AttachResponse])
def test_most_messages_are_some_and_others_are_none(kind: type[Message]) -> None:
    num_parsed = sum(parsed(kind, message) is not None for message in messages(kind, 400))
    assert 200 < num_parsed < 395


def test_edges_are_reached() -> None:
    """Every field of a request is set by some message, and numbers come in all that they can be."""
    found = [parsed(pb.GenerateRequest, message) for message in messages(pb.GenerateRequest, 1_500)]
    values: dict[str, set[Any]] = {}
    longest = 0
    for message in found:
        for field, value in fields_of(message) if message is not None else ():
            values.setdefault(field.full_name, set()).update([repr(value)] if not field.is_repeated else [])
            longest = max(longest, len(value) if field.is_repeated else 0)
    known = {field.full_name for field in pb.GenerateRequest.DESCRIPTOR.fields}
    assert known <= values.keys()
    assert {"nan", "inf", "-inf"} <= values["octavo.v1.Sampling.temperature"]
    assert {str(2**31 - 1), str(-(2**31)), "-1"} <= values["octavo.v1.GenerateRequest.max_tokens"]
    assert longest >= 1_000


def run(what: str, number: int, **changes: Any) -> dict[str, Any]:
    figures: dict[str, Any] = {"messages": number, "num_failures": 0, "failures": [], "memories": [[50.0] * 7]}
    if what == SOCKETS:
        figures |= {"wrong": 0, "good": 9, "left": ""}
    return {"what": what, **figures, **changes}


def bars_of(*runs: dict[str, Any]) -> dict[str, Bar]:
    return {bar.bar: bar for bar in judge(Notes(runs))}


def test_nothing_measured_meets_no_bar() -> None:
    bars = judge(Notes())
    assert bars
    assert not any(bar.ok for bar in bars)


def test_a_clean_run_meets_every_bar() -> None:
    assert all(bar.ok for bar in bars_of(run(SOCKETS, 120_000), run(DIRECT, 880_000)).values())


def test_half_of_it_is_not_enough() -> None:
    missed = {name for name, bar in bars_of(run(DIRECT, 1_000_000)).items() if not bar.ok}
    assert missed == {
        "fuzz: messages over sockets",
        "fuzz: crashes, INTERNAL, UNKNOWN, errors in logs",
        "fuzz: good requests not answered",
        "fuzz: runs after which something is left",
        "fuzz: memory at the end / at a third",
    }


@pytest.mark.parametrize(
    ("changes", "bar"),
    [
        ({"num_failures": 1}, "fuzz: crashes, INTERNAL, UNKNOWN, errors in logs"),
        ({"wrong": 1}, "fuzz: good requests not answered"),
        ({"left": "3 answers"}, "fuzz: runs after which something is left"),
        ({"memories": [[50.0, 50.0, 50.0, 60.0]]}, "fuzz: memory at the end / at a third"),
        ({"messages": 99_999}, "fuzz: messages over sockets"),
    ],
)
def test_each_fault_misses_its_bar(changes: dict[str, Any], bar: str) -> None:
    bars = bars_of(run(SOCKETS, 120_000, **changes), run(DIRECT, 950_000))
    assert [name for name, each in bars.items() if not each.ok] == [bar]


def test_a_tally_keeps_the_first_failures_with_their_bytes() -> None:
    tally, other = FuzzTally(), FuzzTally()
    tally.sent(2)
    tally.ended("Generate", "OK", [b"a"])
    tally.ended("Generate", "INTERNAL", [b"\x01", b"\x02"], "text")
    assert (tally.num_failures, tally.failures[0]["hex"], tally.failures[0]["text"]) == (1, "01 02", "text")
    for _ in range(MAX_FAILURES + 5):
        other.failed("Session", "raised", [])
    other.add(tally.to_dict())
    assert (other.num_messages, other.num_failures, len(other.failures)) == (2, MAX_FAILURES + 6, MAX_FAILURES)
    assert other.codes == {"Generate: OK": 1, "Generate: INTERNAL": 1}


def test_what_is_left_is_said_in_words() -> None:
    assert what_is_left({"answers": 0, "works": 0}) == ""
    assert what_is_left({"answers": 2, "works": 0, "blocks": -1}) == "2 answers, -1 blocks"


@pytest.mark.parametrize(
    ("memories", "growth"), [([], None), ([[1.0, 2.0]], None), ([[9.0, 10.0, 11.0], [1.0, 2.0, 5.0]], 2.5)]
)
def test_growth_is_the_worst_of_all_processes(memories: Sequence[Sequence[float]], growth: float | None) -> None:
    assert worst_growth(memories) == growth


async def test_a_session_that_raises_is_kept_with_its_own_messages() -> None:
    """It was kept with those of the last one."""
    direct, held = Direct(1, BATCH), list[Sequence[bytes]]()

    async def broken(messages: Sequence[bytes]) -> None:
        held.append(messages)
        if len(held) == 1:
            raise ValueError("broken")

    direct._front.hold_session = broken  # type: ignore[method-assign]
    await direct._batch()
    await direct._settle()
    [failure] = direct.tally.failures
    assert len(held) > 1
    assert (failure["target"], failure["what"]) == ("Session", "raised")
    assert failure["hex"] == " ".join(message.hex() for message in held[0])[-MAX_HEX:]


async def test_a_process_that_says_nothing_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose loop turned no more was waited for without a limit."""
    with FuzzedServer() as server:
        assert (await server.tell())["integrity"] == ""
        assert server._process is not None
        server._process.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(fuzz_server, "ANSWER_S", 0.2)
        with pytest.raises(RuntimeError, match=r"said nothing for 0\.2 s"):
            await server.tell()


def test_codes_have_names() -> None:
    assert [name_of(code) for code in (0, 13, 99)] == ["OK", "INTERNAL", "UNKNOWN"]
