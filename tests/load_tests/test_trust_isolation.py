"""From what an attack on one's own cluster showed to its bars."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
from octavo.internal.v1 import data_plane_pb2 as pb

from load_tests.notes import Notes
from load_tests.rigs.fuzz_data import SERVICE
from load_tests.rigs.trust_isolation import judge, knock

REFUSED = "UNAUTHENTICATED"


def noted(*, within: float, across: float, leaked: int, code: str) -> Notes:
    """Figures of an attack. `leaked`: tokens of the victim's that it found; `code`: how a stranger's calls end."""
    notes = Notes()
    for what, auc, cached in (("within", within, 5_000), ("across", across, leaked), ("forged", 0.5, leaked)):
        notes.add(what, auc=auc, rounds=400, asked_ms=50.0, new_ms=90.0, cached_tokens=cached)
    notes.add("nobody", code=code)
    notes.add("back door", code=REFUSED)
    notes.add("back door", code=code)
    return notes


def test_nothing_measured_meets_no_bar() -> None:
    assert not any(bar.ok for bar in judge(Notes()))


def test_an_attack_that_sees_within_and_guesses_across_is_isolation() -> None:
    assert all(bar.ok for bar in judge(noted(within=0.97, across=0.51, leaked=0, code=REFUSED)))


def test_each_leak_misses_its_bar() -> None:
    assert not any(bar.ok for bar in judge(noted(within=0.6, across=0.56, leaked=1, code="OK")))


async def test_a_data_port_that_says_anything_to_a_stranger_has_let_it_in() -> None:
    """Only an acknowledgement counted, and after anything else its end was waited for, without a limit."""

    async def attach(_requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        await context.write(pb.AttachResponse(challenge=pb.Challenge(nonce=bytes(32))).SerializeToString())
        await context.read()
        await context.write(pb.AttachResponse(step_batch=pb.StepBatch(step=1)).SerializeToString())
        await context.read()

    server = grpc.aio.server()
    handlers = {"Attach": grpc.stream_stream_rpc_method_handler(attach)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    assert await asyncio.wait_for(knock(f"127.0.0.1:{port}"), 10.0) == "OK"
    await server.stop(None)
