"""Four routers in front of the same eight replicas, beside a single one: the same requests, a quarter through each.

Eight prefixes of 512 tokens, of which a replica can keep three and what it runs. Routers share no store: what is cached
and what is free they hear from the replicas, where each of them has its part. In every repetition the same seed goes
through one router and through four, replicas fresh each time and the generator's four processes the same; what counts
is by which share four do worse than one does: of prompt tokens that were cached, and of the most loaded replica over
the mean, in computed tokens. The median of the repetitions is judged. Under three minutes.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

from load_tests.bars import Bar, at_most
from load_tests.notes import Notes, figure, ratio
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.rig_load import in_ms, send
from load_tests.rigs.router_prefixes import best_share
from load_tests.rigs.router_rig import RigConfig, RouterRig

REPLICAS, ROUTERS = 8, 4
RATE = 100
MAX_WORSE = 0.05


async def measure(settings: Settings, notes: Notes) -> None:
    for repetition in settings.rounds(3):
        order = (1, ROUTERS) if repetition % 2 == 0 else (ROUTERS, 1)
        for routers in order:
            config = RigConfig(replicas=REPLICAS, routers=routers, step_s=0.005, num_blocks=128, block_size=16)
            changes = {
                "processes": ROUTERS,
                "arrivals.rate": RATE,
                "arrivals.duration_s": settings.seconds(10.0, 2.0),
                "seed": repetition + 1,
            }
            with RouterRig(config) as rig:
                load = await send(rig, "router_prefixes", changes)
            figures = load.figures
            notes.add(
                what(routers),
                **load.counts(),
                cached_share=figures["cached_share"],
                of_best=ratio(figures["cached_share"], best_share(load.report.tally.prompt_tokens)),
                balance=figures["balance"],
                loads=sorted(share.load for share in load.report.tally.replicas.values()),
                first_p99_ms=in_ms(figures["first_token_s.p99"]),
            )


def what(routers: int) -> str:
    """Return the name of a run through so many."""
    return f"{routers} router{'s' if routers > 1 else ''}"


def judge(notes: Notes) -> list[Bar]:
    cached = _worse(notes, "of_best", lambda one, four: (one - four) / one)
    balance = _worse(notes, "balance", lambda one, four: (four - one) / one)
    return [
        at_most(
            f"routers: cached share through {ROUTERS}, worse than through one by",
            cached,
            MAX_WORSE,
            _beside(notes, "of_best", "of the best possible"),
        ),
        at_most(
            f"routers: most loaded / mean through {ROUTERS}, worse than through one by",
            balance,
            MAX_WORSE,
            _beside(notes, "balance", "in computed tokens"),
        ),
    ]


def _worse(notes: Notes, key: str, compare: Callable[[float, float], float]) -> float | None:
    """Return the median over the repetitions of what one router and four compare to."""
    pairs = zip(notes.of(what(1), key), notes.of(what(ROUTERS), key), strict=False)
    compared = [compare(one, four) for one, four in pairs if one]
    return statistics.median(compared) if compared else None


def _beside(notes: Notes, key: str, unit: str) -> str:
    one, four = (notes.of(what(routers), key) for routers in (1, ROUTERS))
    texts = (", ".join(map(figure, sorted(values))) or figure(None) for values in (one, four))
    first = (figure(notes.median(what(routers), "first_p99_ms")) for routers in (1, ROUTERS))
    return f"{unit}: one {next(texts)}; {ROUTERS}: {next(texts)}; first token p99, ms: {' and '.join(first)}"


if __name__ == "__main__":
    sys.exit(main("trust_routers", measure, judge))
