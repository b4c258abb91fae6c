"""Embeddings through Octavo against sentence-transformers itself: the same model, texts, threads and machine.

    octavo    client -- Embed --> router -- data plane --> replica
    direct    SentenceTransformer.encode in a process of its own; what it is asked goes there before the clock starts

Both are up all the time and idle while the other one is measured: calls of 32 texts of very different lengths, one
after the other, then calls of one text; both drop the end of a text that is too long. Repetitions begin with the one
and the other in turns; each compares within itself, and the median of the repetitions is judged. Needs the environment
of load_tests/engines/sentence_env.sh.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

from octavo.client import Client

from cluster.models import fetch_model
from load_tests.bars import Bar, at_least, at_most
from load_tests.notes import Notes, figure
from load_tests.peers.contestants import THREADS, Octavo
from load_tests.rigs.bar_command import Settings, main
from load_tests.sentence_place import sentence_environment, sentence_variables
from load_tests.server import ServerProcess, free_port

DIRECT = Path(__file__).parents[1] / "engines" / "sentence_direct.py"
SEED = 9
BATCH = 32
MIN_WORDS, MAX_WORDS = 4, 120
NUM_BATCHES, NUM_SINGLES = 16, 40
MIN_SPEED, MAX_FIRST, MAX_ERROR = 1.2, 1.5, 1e-5
WAYS = ("octavo", "direct")
LINE_LIMIT = 1 << 26


class Result(NamedTuple):
    seconds: list[float]
    """Of each batch."""
    vectors: list[list[float]]
    """Of the last batch."""


Embed = Callable[[list[list[str]]], Awaitable[Result]]


async def measure_both(settings: Settings, notes: Notes) -> None:
    directory = fetch_model("minilm").weights
    num_batches, num_singles = (2, 4) if settings.is_quick else (NUM_BATCHES, NUM_SINGLES)
    async with _octavo() as octavo, _direct(directory) as direct:
        ways = {"octavo": octavo, "direct": direct}
        for way in WAYS:  # what happens for the first time only
            await ways[way](make_batches(-1, 3, BATCH))
            await ways[way](make_batches(-1, 3, 1))
        for repetition in settings.rounds():
            batches, singles = make_batches(repetition, num_batches, BATCH), make_batches(repetition, num_singles, 1)
            found = {}
            for way in WAYS if repetition % 2 == 0 else WAYS[::-1]:
                found[way] = await ways[way](batches)
                each = await ways[way](singles)
                notes.add(
                    way,
                    embeddings_per_s=num_batches * BATCH / sum(found[way].seconds),
                    first_ms=1e3 * statistics.median(each.seconds),
                )
            notes.add("both", difference=_difference(found["octavo"].vectors, found["direct"].vectors))


def make_batches(repetition: int, number: int, size: int) -> list[list[str]]:
    """Return texts out of Python's manual, no two repetitions' the same."""
    rng = random.Random(f"{SEED} {repetition} {size}")
    words = " ".join(topics[name] for name in sorted(topics)).split()
    batches = []
    for _ in range(number):
        lengths = [rng.randint(MIN_WORDS, MAX_WORDS) for _ in range(size)]
        starts = [rng.randrange(len(words) - length) for length in lengths]
        batches.append([" ".join(words[a : a + length]) for a, length in zip(starts, lengths, strict=True)])
    return batches


@contextlib.asynccontextmanager
async def _octavo() -> AsyncIterator[Embed]:
    """Raises ServerError."""
    contestant = Octavo(name="octavo", arithmetic="exact", settings={"ENGINE": "transformers"}, model="minilm")
    with tempfile.TemporaryDirectory(prefix="octavo-embeddings-") as folder:
        place, port = Path(folder), free_port()
        server = ServerProcess(contestant.command(place, port), contestant.variables(place), place / "log")
        try:
            ready = await asyncio.to_thread(contestant.await_ready, server, port)
            async with Client(ready.address) as client:

                async def embed(batches: list[list[str]]) -> Result:
                    seconds = []
                    for texts in batches:
                        began = time.perf_counter()
                        vectors = await client.embed(texts, truncate=True, timeout=60)
                        seconds.append(time.perf_counter() - began)
                    return Result(seconds, vectors)

                yield embed
        finally:
            server.stop()


@contextlib.asynccontextmanager
async def _direct(directory: Path) -> AsyncIterator[Embed]:
    process = await asyncio.create_subprocess_exec(
        *(str(sentence_environment() / "bin" / "python"), str(DIRECT), str(directory), str(THREADS)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=LINE_LIMIT,
        env=sentence_variables(THREADS),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    given, said = process.stdin, process.stdout

    async def line() -> Any:
        """Raises RuntimeError when it has ended."""
        async with asyncio.timeout(120):
            text = await said.readline()
        if not text:
            raise RuntimeError(f"sentence-transformers ended with code {await process.wait()}")
        return json.loads(text)

    async def embed(batches: list[list[str]]) -> Result:
        given.write(json.dumps({"batches": batches}).encode() + b"\n")
        return Result(**await line())

    try:
        await line()
        yield embed
    finally:
        given.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(10):
                await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()


def _difference(ours: list[list[float]], theirs: list[list[float]]) -> float:
    pairs = zip(ours, theirs, strict=True)
    return max(abs(a - b) for our, their in pairs for a, b in zip(our, their, strict=True))


def judge(notes: Notes) -> list[Bar]:
    speed, first = (_compared(notes, key) for key in ("embeddings_per_s", "first_ms"))
    return [
        at_least(
            f"embeddings/s, batch {BATCH}, x sentence-transformers",
            speed,
            MIN_SPEED,
            _told(notes, "embeddings_per_s", "/s"),
        ),
        at_most("embeddings: one text, x sentence-transformers", first, MAX_FIRST, _told(notes, "first_ms", "ms")),
        at_most("embeddings: largest difference", notes.worst("both", "difference"), MAX_ERROR),
    ]


def _compared(notes: Notes, key: str) -> float | None:
    """Return the median over the repetitions of what Octavo's figure is to the other one."""
    pairs = zip(notes.of("octavo", key), notes.of("direct", key), strict=False)
    compared = [ours / theirs for ours, theirs in pairs if theirs]
    return statistics.median(compared) if compared else None


def _told(notes: Notes, key: str, unit: str) -> str:
    ours, theirs = (figure(notes.median(way, key), unit) for way in WAYS)
    return f"{ours} beside {theirs}"


if __name__ == "__main__":
    sys.exit(main("engines_embeddings", measure_both, judge))
