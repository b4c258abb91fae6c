"""Placement at the size of a large cluster, in one process: what a decision costs, what the index weighs, who gets it.

A thousand replicas, ten thousand prefixes of 32 blocks, each on one to four replicas; requests with a random prefix and
a little of their own arrive, owe their prompts for a while, run for longer and end. Then replicas leave and come back
empty, one and a hundred at a time, under requests that nobody has cached: neither may those that came ever have much
more than the mean, nor anybody once all is level again.

How much more is a matter of how many requests a replica owes: with eight of 512 tokens the best that can be is one with
nine, 1.12 of the mean. What a placement that looks at every load makes of the same arrivals is measured beside it; the
limit is the one that the balance of prefixes is held to as well (router_prefixes.py).

Decisions are timed by this thread's CPU clock, hashing of the prompt included: what another process does is not theirs.
Python looks for garbage as seldom as in a router's process.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from load_tests.bars import Bar, at_most
from load_tests.notes import Notes, figure
from load_tests.rigs.bar_command import Settings, main
from router import garbage
from router.placement import LeastCost, PromptHashes
from router.prefix_index import count_matched
from router.roster import DECODE_TOKENS, Roster, load_of
from router.types import Request
from workers.prefix import PrefixHasher
from workers.types import SamplingParams

REPLICAS, PREFIXES, PREFIX_BLOCKS, MAX_HOLDERS = 1_000, 10_000, 32, 4
BLOCK = 16
OWN_TOKENS = 32
OWING, RUNNING = 1_000, 10_000
"""Requests whose prompts are being computed, and those that run, at any time."""
ARRIVALS, WAVE = 30_000, 5_000
OWING_EACH = 8
"""Of a replica, while replicas come and go."""
SAMPLED = 50
"""Loads are looked at after so many arrivals of a wave."""
MAX_US, MAX_MB, MAX_LOAD = 200.0, 200.0, 1.25
KEY = b"index bench key, 32 bytes long.."
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(slots=True)
class Place:
    """A replica as `router.roster.Placeable` asks for it."""

    replica: str
    block_size: int = BLOCK
    capabilities: frozenset[str] = frozenset()
    owed_tokens: int = 0
    num_running: int = 0
    cache_use: float = 0.0
    credit_tokens: int = 1_000_000
    credit_sequences: int = 1_000_000
    is_open: bool = True


class Fleet:
    """Replicas, what they have on their hands, and the placement under test."""

    def __init__(self, rng: random.Random, num_replicas: int) -> None:
        self.roster = Roster()
        self._rng = rng
        self._placement = LeastCost(rng)
        self._hasher = PrefixHasher(KEY, BLOCK)
        self._root = self._hasher.root(b"", "")
        self._slots: dict[str, int] = {}
        self._owing: deque[tuple[str, list[bytes], int]] = deque()
        self._running: deque[str] = deque()
        self._num_named = 0
        self.num_owing = OWING
        for _ in range(num_replicas):
            self.join()

    @property
    def names(self) -> list[str]:
        return list(self._slots)

    def loads(self) -> dict[str, float]:
        return {name: load_of(self.roster[slot]) for name, slot in self._slots.items()}

    def join(self) -> str:
        name = f"replica-{self._num_named}"
        self._num_named += 1
        self._slots[name] = self.roster.join(Place(name))
        return name

    def leave(self, name: str) -> None:
        """Take a replica away with all that it has on its hands."""
        slot = self._slots.pop(name)
        for owner, coming, _ in self._owing:
            if owner == name:
                self.roster.index.unexpect(slot, coming)
        self._owing = deque(each for each in self._owing if each[0] != name)
        self._running = deque(each for each in self._running if each != name)
        self.roster.leave(slot)

    def store(self, prefix: Sequence[int], name: str) -> None:
        self.roster.index.store(self._slots[name], self._hasher.blocks(self._root, prefix))

    def arrive(self, prompt: list[int]) -> tuple[float, float, int]:
        """Place a request and let time go on; return the CPU and the wall-clock seconds of the decision, and how much
        of the prompt it matched."""
        request = Request(
            request_id="",
            model="",
            prompt=prompt,
            sampling=SamplingParams(),
            max_tokens=64,
            deadline=1e9,
            accepted_at=0,
        )
        wall, cpu = time.perf_counter(), time.thread_time()
        hashes = PromptHashes(KEY, request)
        decision = self._placement.place(request, hashes, self.roster)
        cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
        assert decision is not None
        self._send(decision.replica, hashes.of(BLOCK), len(prompt))
        return cpu, wall, decision.matched_tokens

    def _send(self, name: str, hashes: list[bytes], num_tokens: int) -> None:
        slot, index = self._slots[name], self.roster.index
        num_resident = count_matched(hashes, index.resident(slot))
        coming = hashes[num_resident:]
        index.expect(slot, coming)
        self._owing.append((name, coming, num_tokens - num_resident * BLOCK))
        self._running.append(name)
        self._change(name, owed=num_tokens - num_resident * BLOCK, running=1)
        if len(self._owing) > self.num_owing:
            owner, computed, owed = self._owing.popleft()
            index.unexpect(self._slots[owner], computed)
            index.store(self._slots[owner], computed)
            self._change(owner, owed=-owed, running=0)
        if len(self._running) > RUNNING:
            self._change(self._running.popleft(), owed=0, running=-1)

    def _change(self, name: str, *, owed: int, running: int) -> None:
        place = self.roster[self._slots[name]]
        assert isinstance(place, Place)
        place.owed_tokens += owed
        place.num_running += running
        self.roster.changed(self._slots[name])


async def measure(settings: Settings, notes: Notes) -> None:
    scale = 10 if settings.is_quick else 1
    rng = random.Random(1)
    fleet = Fleet(rng, REPLICAS // scale)
    prefixes = [rng.choices(range(300, 30_000), k=PREFIX_BLOCKS * BLOCK) for _ in range(PREFIXES // scale)]
    gc.collect()
    before = _resident_bytes()
    names = fleet.names
    for prefix in prefixes:
        for name in rng.sample(names, rng.randint(1, MAX_HOLDERS)):
            fleet.store(prefix, name)
    gc.collect()
    size = _resident_bytes() - before
    garbage.settle()
    took = [fleet.arrive([*rng.choice(prefixes), *_own(rng, OWN_TOKENS)]) for _ in range(ARRIVALS // scale)]
    notes.add(
        "decisions",
        index_mb=size / 1e6,
        entries=fleet.roster.index.num_entries,
        p99_us=1e6 * _at([cpu for cpu, _, _ in took], 0.99),
        p50_us=1e6 * _at([cpu for cpu, _, _ in took], 0.5),
        wall_p99_us=1e6 * _at([wall for _, wall, _ in took], 0.99),
        matched_share=sum(matched > 0 for _, _, matched in took) / len(took),
    )
    _note_hashing(prefixes, notes)
    _come_and_go(fleet, rng, scale, notes)


class Level:
    """The same arrivals, each given to one with the least load of all. Its clock and its ends are those of `Fleet`."""

    def __init__(self, rng: random.Random, names: Sequence[str], num_owing: int) -> None:
        self._rng = rng
        self._num_owing = num_owing
        self._loads = dict.fromkeys(names, 0.0)
        self._owing: deque[tuple[str, int]] = deque()
        self._running: deque[str] = deque()

    def loads(self) -> dict[str, float]:
        return self._loads

    def leave(self, name: str) -> None:
        del self._loads[name]
        self._owing = deque(each for each in self._owing if each[0] != name)
        self._running = deque(each for each in self._running if each != name)

    def join(self, name: str) -> None:
        self._loads[name] = 0.0

    def arrive(self, num_tokens: int) -> None:
        loads = self._loads
        least = min(loads.values())
        name = self._rng.choice([each for each, load in loads.items() if load == least])
        loads[name] += num_tokens + DECODE_TOKENS
        self._owing.append((name, num_tokens))
        self._running.append(name)
        if len(self._owing) > self._num_owing:
            owner, owed = self._owing.popleft()
            loads[owner] -= owed
        if len(self._running) > RUNNING:
            loads[self._running.popleft()] -= DECODE_TOKENS


def _come_and_go(fleet: Fleet, rng: random.Random, scale: int, notes: Notes) -> None:
    """Let requests arrive of which nobody has anything, before and after replicas come and go."""
    num_replicas, num_tokens = len(fleet.names), PREFIX_BLOCKS * BLOCK
    fleet.num_owing = OWING_EACH * num_replicas
    level = Level(rng, fleet.names, fleet.num_owing)
    for _ in range(fleet.num_owing):
        fleet.arrive(_own(rng, num_tokens))
        level.arrive(num_tokens)
    for number in (0, 1, num_replicas // 10):
        came = []
        for name in rng.sample(fleet.names, number):
            fleet.leave(name)
            level.leave(name)
            came.append(fleet.join())
            level.join(came[-1])
        worst = {"ours": 0.0, "level": 0.0}
        for arrival in range(WAVE // scale):
            fleet.arrive(_own(rng, num_tokens))
            level.arrive(num_tokens)
            if arrival % SAMPLED == 0:
                for whose, loads in (("ours", fleet.loads()), ("level", level.loads())):
                    worst[whose] = max(worst[whose], _most(loads, came))
        most, best = max(worst["ours"], _most(fleet.loads())), max(worst["level"], _most(level.loads()))
        notes.add(
            "came and went", replicas=number, **({"most_over_mean": most} if number else {"before": most}), best=best
        )


def _most(loads: Mapping[str, float], of: Sequence[str] | None = None) -> float:
    """Return the largest load, of these replicas or of all, as a multiple of the mean of all."""
    own = loads.values() if of is None else [loads[name] for name in of]
    return max(own, default=0.0) * len(loads) / sum(loads.values())


def _note_hashing(prefixes: Sequence[list[int]], notes: Notes) -> None:
    """Note what of a decision is hashing: the same for every way to place by prefix."""
    hasher = PrefixHasher(KEY, BLOCK)
    root, count = hasher.root(b"", ""), min(len(prefixes), 1_000)
    began = time.thread_time()
    for prefix in prefixes[:count]:
        hasher.blocks(root, prefix)
    notes.add("hashing", us=1e6 * (time.thread_time() - began) / count)


def _own(rng: random.Random, number: int) -> list[int]:
    return rng.choices(range(300, 30_000), k=number)


def _at(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES


def judge(notes: Notes) -> list[Bar]:
    times = (
        f"p50 {figure(notes.median('decisions', 'p50_us'))}, wall clock p99 "
        f"{figure(notes.median('decisions', 'wall_p99_us'))}; 1 of {REPLICAS} replicas; of that "
        f"hashing the prompt {figure(notes.median('hashing', 'us'))}"
    )
    entries = f"{figure(notes.median('decisions', 'entries'))} pairs of block and replica"
    return [
        at_most("index: a decision, p99, µs", notes.worst("decisions", "p99_us"), MAX_US, times),
        at_most("index: memory, MB", notes.worst("decisions", "index_mb"), MAX_MB, entries),
        at_most(
            "index: most loaded / mean after replicas came and went",
            notes.worst("came and went", "most_over_mean"),
            MAX_LOAD,
            f"1 and 100 replicas; before {figure(notes.median('came and went', 'before'))}; "
            f"at best {figure(notes.worst('came and went', 'best'))}",
        ),
    ]


if __name__ == "__main__":
    sys.exit(main("router_index", measure, judge))
