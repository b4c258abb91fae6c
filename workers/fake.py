"""The engine `fake`: the paged engine without a model, for measuring and testing the cluster.

Scheduler, blocks, hashes, KV events, deadlines and credits are the real ones; only the runner is a stand-in, whose next
token is a pure function of all tokens so far (`fake_next_token`) and whose step takes as long as it is told. Knows no
sampling: temperature and the like change nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate
from weakref import WeakKeyDictionary

from workers.config import EngineConfig
from workers.engine import PagedEngine
from workers.plan import Chunk, StepOutput, StepPlan, accepted
from workers.prefix import PrefixHasher
from workers.sequence import Sequence
from workers.types import (
    CAPABILITY_GENERATE,
    CAPABILITY_RECEIVED_CHOICES,
    CAPABILITY_RECEIVED_PENALTIES,
    EngineInfo,
    ModelManifest,
)

_MODULUS = (1 << 61) - 1
_FACTOR = 1_000_003


def fake_digest(tokens: Iterable[int], digest: int = 0) -> int:
    """Return the rolling hash of `tokens` that follow what `digest` stands for."""
    for token in tokens:
        digest = (digest * _FACTOR + token + 1) % _MODULUS
    return digest


def fake_next_token(tokens: Iterable[int], vocab_size: int) -> int:
    """Return what the fake engine says after `tokens`: ``fake_digest(tokens) % vocab_size``."""
    return fake_digest(tokens) % vocab_size


def fake_continuation(tokens: Seq[int], num_tokens: int, vocab_size: int) -> list[int]:
    """Return the first `num_tokens` of the fake engine's answer to `tokens`, if no stop token ends it."""
    answer: list[int] = []
    digest = fake_digest(tokens)
    for _ in range(num_tokens):
        answer.append(digest % vocab_size)
        digest = fake_digest(answer[-1:], digest)
    return answer


def fake_manifest(
    *, name: str = "fake", vocab_size: int = 49_152, max_model_len: int = 8_192, eos_token_ids: tuple[int, ...] = (2,)
) -> ModelManifest:
    """Return the manifest of a model that nobody has to fetch."""
    return ModelManifest(
        name=name,
        architecture="fake",
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=eos_token_ids,
        bos_token_id=None,
        weights_format="",
        model_fingerprint="fake",
        tokenizer_fingerprint="fake",
        weights_fingerprint="fake",
    )


@dataclass(frozen=True, slots=True)
class FakeTicket:
    plan: StepPlan
    result: StepOutput
    step_s: float

    def output(self) -> StepOutput:
        if self.step_s:
            time.sleep(self.step_s)
        return self.result


class FakeRunner:
    """Draws `fake_next_token`; a step costs time proportional to its tokens, however long the sequences are."""

    verifies_drafts = True

    def __init__(self, vocab_size: int, step_s: float = 0.0) -> None:
        self._vocab_size = vocab_size
        self._step_s = step_s
        self._digests: WeakKeyDictionary[Sequence, tuple[int, int]] = WeakKeyDictionary()
        """How many tokens of a sequence have been hashed, and their digest."""
        self.num_computed_rows = 0
        """Of all steps, those of failed ones too."""

    def launch(self, plan: StepPlan) -> FakeTicket:
        self.num_computed_rows += plan.num_tokens
        tokens = tuple(self._draw(chunk) if chunk.samples else () for chunk in plan.chunks)
        return FakeTicket(plan, StepOutput(tokens), self._step_s)

    def close(self) -> None:
        self._digests.clear()

    def _draw(self, chunk: Chunk) -> tuple[int, ...]:
        sequence = chunk.sequence
        count, digest = self._digests.get(sequence, (0, 0))
        digest = fake_digest(sequence.tokens[count:], digest)
        self._digests[sequence] = (len(sequence.tokens), digest)
        if not chunk.draft:
            return (digest % self._vocab_size,)
        digests = accumulate(chunk.draft, lambda digest, token: fake_digest((token,), digest), initial=digest)
        return accepted(chunk.draft, [digest % self._vocab_size for digest in digests])


class FakeEngine(PagedEngine):
    """A `SteppedEngine` over a `FakeRunner`. `config.num_blocks` of 0 means 4,096; `hash_key` is the cluster's."""

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        manifest: ModelManifest | None = None,
        hash_key: bytes = b"",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        config = config or EngineConfig(engine="fake")
        manifest = manifest or fake_manifest()
        hasher = PrefixHasher(hash_key, config.block_size)
        info = EngineInfo(
            engine="fake",
            model=manifest.name,
            block_size=config.block_size,
            num_blocks=config.num_blocks or 4_096,
            max_model_len=config.max_model_len or manifest.max_model_len,
            vocab_size=manifest.vocab_size,
            model_fingerprint=manifest.model_fingerprint,
            tokenizer_fingerprint=manifest.tokenizer_fingerprint,
            weights_fingerprint=manifest.weights_fingerprint,
            hash_key_fingerprint=hasher.key_fingerprint,
            capabilities=frozenset({CAPABILITY_GENERATE, CAPABILITY_RECEIVED_CHOICES, CAPABILITY_RECEIVED_PENALTIES}),
        )
        self.runner = FakeRunner(manifest.vocab_size, config.fake_step_s)
        super().__init__(config, info=info, runner=self.runner, hasher=hasher, clock=clock)
