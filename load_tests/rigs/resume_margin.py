"""Which of the requests that are asked while replicas die have answers that rounding could change.

    python -m load_tests.rigs.resume_margin

Prints their numbers, which `resume_asks.UNSTEADY` passes over. What another replica goes on with is computed in other
chunks, and logits differ in their last bits. The oracle's prompts leave its greedy answers a margin of 2e-3 between the
best two logits; penalties and seeds leave what they leave. So every token is drawn again from logits with noise of
1e-3, the most by which fp32 logits may differ from the reference's: an answer of which one token changes is none to
compare. Nothing is cut here, so nothing that goes wrong with cuts is passed over. Some minutes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from cluster.boot import ClusterBoot
from cluster.config_sections import LogConfig
from load_tests.rigs.resume_asks import Ask, oracle_asks
from load_tests.rigs.trust_resume import LENGTHS, ORACLE
from workers import sampler
from workers.build import build_engine
from workers.config import EngineConfig
from workers.sampler import Drawn, Floats, Place
from workers.types import GenerateWork, SamplingParams, WorkId

CANDIDATES = 240
NOISE, NUM_NOISES = 1e-3, 6
AT_ONCE = 16


class NoisySampler:
    """Draws as the sampler does, and remembers by work whose tokens noise would change."""

    def __init__(self) -> None:
        self.unsteady: set[int] = set()
        self._draw = sampler.draw
        self._rng = np.random.default_rng(1)
        self._noises: list[Floats] = []

    def draw(self, logits: Floats, places: Sequence[Place], best: Sequence[int] | None = None) -> Drawn:
        if not self._noises:
            shape = (NUM_NOISES, logits.shape[-1])
            self._noises = list(self._rng.uniform(-NOISE, NOISE, shape).astype(np.float32))
        noisy = [logits + noise for noise in self._noises]
        drawn = self._draw(logits, places, best)
        for each in noisy:
            tokens = self._draw(each, places).tokens
            for place, token, other in zip(places, drawn.tokens, tokens, strict=True):
                if token != other:
                    self.unsteady.add(place.sequence.work.work_id.number)
        return drawn


def work(number: int, ask: Ask) -> GenerateWork:
    names = {"max_tokens", "ignore_eos"}
    sampling = SamplingParams(**{name: value for name, value in ask.options.items() if name not in names})  # type: ignore[arg-type]
    return GenerateWork(
        work_id=WorkId("margin", number),
        prompt=list(ask.prompt),
        sampling=sampling,
        max_tokens=ask.options["max_tokens"],
    )


def main() -> None:
    asks = oracle_asks(json.loads(ORACLE.read_text()), CANDIDATES, LENGTHS, passed_over=frozenset())
    files = ClusterBoot(LogConfig()).model_files("default")
    engine = build_engine(EngineConfig(dtype="fp32", num_blocks=1024), files, hash_key=bytes(32), threads=1)
    noisy = NoisySampler()
    sampler.draw = noisy.draw
    for first in range(0, CANDIDATES, AT_ONCE):
        for number in range(first, min(first + AT_ONCE, CANDIDATES)):
            if asks[number].reference is None:
                engine.submit(work(number, asks[number]))
        while engine.step():
            engine.drain_outputs()
        print(f"of {first + AT_ONCE}: {sorted(noisy.unsteady)}", flush=True)


if __name__ == "__main__":
    main()
