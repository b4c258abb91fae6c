"""A runner whose KV cache is a list of token ids, and what the engine's tests say about plans, events and deltas.

The toy reads every prefix back through the block table before it draws from it, so a block that was overwritten, given
away too early or copied too late shows at once as a wrong token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from workers.blocks import BlockPool
from workers.config import EngineConfig
from workers.engine import PagedEngine
from workers.fake import fake_digest
from workers.plan import Chunk, StepOutput, StepPlan, accepted
from workers.prefix import PrefixHasher
from workers.sequence import Sequence as EngineSequence
from workers.types import (
    EngineInfo,
    FinishReason,
    GenerateWork,
    KvEvent,
    KvEventKind,
    TokenDelta,
    TokenLogprobs,
    WorkId,
)

BLOCK_SIZE = 4
VOCAB_SIZE = 50


class PoisonError(Exception):
    pass


@dataclass
class ToyTicket:
    plan: StepPlan
    result: StepOutput

    def output(self) -> StepOutput:
        return self.result


def _logprobs(chunk: Chunk, tokens: tuple[int, ...]) -> tuple[TokenLogprobs, ...]:
    count = chunk.sequence.num_logprobs
    if count is None:
        return ()
    return tuple(TokenLogprobs(toy_logprob(t), tuple((t + i, -1.0) for i in range(count))) for t in tokens)


class ToyRunner:
    """Draws ``fake_digest(all tokens + adapter) % vocab_size``; fails on a step that computes the token `poison`."""

    verifies_drafts = True

    def __init__(self, num_blocks: int, *, vocab_size: int = VOCAB_SIZE, poison: int | None = None) -> None:
        self.cache: list[list[int | None]] = [[None] * BLOCK_SIZE for _ in range(num_blocks)]
        self.vocab_size = vocab_size
        self.poison = poison
        self.num_rows = 0
        self.num_launches = 0
        self.is_closed = False
        self._known: dict[EngineSequence, list[int]] = {}
        """All tokens of a sequence, as a device knows them: also those that the engine has not read."""

    def launch(self, plan: StepPlan) -> ToyTicket:
        assert plan.chunks
        self.num_launches += 1
        for source, target in plan.copies:
            self.cache[target] = list(self.cache[source])
        tokens = tuple(self._compute(chunk) for chunk in plan.chunks)
        for chunk, drawn in zip(plan.chunks, tokens, strict=True):
            self._known[chunk.sequence] += drawn
        return ToyTicket(plan, StepOutput(tokens, tuple(map(_logprobs, plan.chunks, tokens))))

    def close(self) -> None:
        self.is_closed = True

    def _compute(self, chunk: Chunk) -> tuple[int, ...]:
        sequence = chunk.sequence
        known = self._known.setdefault(sequence, list(sequence.tokens))
        known = [*known[: chunk.start + chunk.num_tokens], *chunk.draft]
        end = chunk.start + chunk.num_rows
        self.num_rows += chunk.num_rows
        for position in range(chunk.start, end):
            if known[position] == self.poison:
                raise PoisonError(f"token {self.poison}")
            self.cache[sequence.block_table[position // BLOCK_SIZE]][position % BLOCK_SIZE] = known[position]
        read = [self.cache[sequence.block_table[p // BLOCK_SIZE]][p % BLOCK_SIZE] for p in range(end)]
        assert read == known[:end], "a block does not hold what its sequence computed"
        if not chunk.samples:
            return ()
        first = end - len(chunk.draft)
        return accepted(chunk.draft, [self.draw(sequence, known[:i]) for i in range(first, end + 1)])

    def draw(self, sequence: EngineSequence, tokens: list[int]) -> int:
        """Return what `sequence` says after `tokens`."""
        token = toy_token(tokens, sequence.adapter, sequence.banned_at(len(tokens)), self.vocab_size)
        if sequence.constraint is not None:
            allowed = list(sequence.constraint.mask())
            token = allowed[token % len(allowed)]
        return token


def toy_token(tokens: list[int], adapter: str, banned: frozenset[int], vocab_size: int = VOCAB_SIZE) -> int:
    token = fake_digest(tokens + [ord(letter) for letter in adapter]) % vocab_size
    while token in banned:
        token = (token + 1) % vocab_size
    return token


def toy_logprob(token: int) -> float:
    """The log probability of a token that the toy draws, whatever is before it."""
    return -float(token + 1)


def toy_info(num_blocks: int, *, max_model_len: int = 1_000) -> EngineInfo:
    return EngineInfo(
        engine="toy",
        model="toy",
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        vocab_size=VOCAB_SIZE,
        model_fingerprint="",
        tokenizer_fingerprint="",
        weights_fingerprint="",
        hash_key_fingerprint="",
    )


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class ToyEngine(PagedEngine):
    """The paged engine over a `ToyRunner`, with a clock and a reader of its KV events."""

    def __init__(
        self,
        num_blocks: int = 64,
        *,
        chunk_tokens: int = 16,
        max_num_sequences: int = 8,
        prefix_cache: bool = True,
        reserve: bool = False,
        lookup_tokens: int = 0,
        poison: int | None = None,
        max_model_len: int = 1_000,
        runner: ToyRunner | None = None,
        **options: object,
    ) -> None:
        self.clock = Clock()
        self.runner = runner or ToyRunner(num_blocks, poison=poison)
        self.reader = EventReader()
        config = EngineConfig(
            chunk_tokens=chunk_tokens,
            max_num_sequences=max_num_sequences,
            prefix_cache=prefix_cache,
            reserve=reserve,
            lookup_tokens=lookup_tokens,
            block_size=BLOCK_SIZE,
        )
        super().__init__(
            config,
            info=toy_info(num_blocks, max_model_len=max_model_len),
            runner=self.runner,
            hasher=PrefixHasher(b"test", BLOCK_SIZE),
            clock=self.clock,
            **options,  # type: ignore[arg-type]
        )

    def step_checked(self) -> bool:
        """Step, then check every invariant, and that a reader of the events knows what is resident."""
        is_busy = self.step()
        self.check_integrity()
        self.reader.apply(self.kv_events())
        assert self.reader.resident == self._pool.resident_hashes()
        return is_busy

    def run(self, max_steps: int = 10_000) -> dict[WorkId, Answer]:
        """Step until nothing is left; return what was drained, which ends every work exactly once."""
        answers: dict[WorkId, Answer] = {}
        for _ in range(max_steps):
            is_busy = self.step_checked()
            gather(self.drain_outputs(), answers)
            if not is_busy:
                assert_idle(self)
                return answers
        raise AssertionError(f"still busy after {max_steps} steps")


@dataclass
class Answer:
    """What the deltas of one choice add up to."""

    tokens: list[int]
    num_deltas: int = 0
    num_cached_tokens: int | None = None
    finish: FinishReason | None = None
    last: TokenDelta | None = None


def gather(deltas: Iterable[TokenDelta], answers: dict[WorkId, Answer], index: int = 0) -> None:
    """Add the deltas of choice `index` up, and assert that nothing follows a finish."""
    for delta in deltas:
        if delta.index != index:
            continue
        answer = answers.setdefault(delta.work_id, Answer([]))
        assert answer.finish is None, f"{delta.work_id} goes on after its finish"
        answer.tokens += delta.token_ids
        answer.num_deltas += 1
        answer.last = delta
        if delta.num_cached_tokens is not None:
            assert answer.num_deltas == 1, "cached tokens come with the first delta"
            answer.num_cached_tokens = delta.num_cached_tokens
        if delta.finish is not None:
            answer.finish = delta.finish.reason


def assert_idle(engine: PagedEngine) -> None:
    """Assert that the engine holds nothing."""
    load = engine.load()
    assert (load.num_running, load.num_waiting, load.owed_prefill_tokens) == (0, 0, 0)
    assert load.num_free_blocks == load.num_blocks
    assert load.credit_tokens > 0


class EventReader:
    """Knows what is resident from events alone, and asserts that each of them changes it."""

    def __init__(self) -> None:
        self.resident: set[bytes] = set()

    def apply(self, events: Iterable[KvEvent]) -> None:
        for event in events:
            if event.kind is KvEventKind.STORED:
                assert event.block_hash not in self.resident
                self.resident.add(event.block_hash)
            else:
                assert event.kind is KvEventKind.REMOVED
                self.resident.remove(event.block_hash)


def assert_plan(plan: StepPlan, pool: BlockPool, chunk_tokens: int) -> None:
    """Assert that a plan keeps its budget, and that nobody but this step's copies can see the blocks it writes."""
    assert plan.num_tokens <= chunk_tokens
    written = []
    for chunk in plan.chunks:
        assert chunk.num_tokens >= 1
        first, last = chunk.start // BLOCK_SIZE, (chunk.start + chunk.num_rows - 1) // BLOCK_SIZE
        written += chunk.sequence.block_table[first : last + 1]
    assert len(written) == len(set(written)), "two chunks write to one block"
    sources = [source for source, _ in plan.copies]
    for block in written:
        assert pool.is_pending(block)
        assert pool.num_references(block) == 1 + sources.count(block)
    targets = [target for _, target in plan.copies]
    assert set(targets) <= set(written)
    assert len(targets) == len(set(targets))
    first_written = {block: chunk.start for chunk in plan.chunks for block in chunk.sequence.block_table}
    for source, target in plan.copies:
        assert source not in written or first_written[source] > first_written[target], "a copy lacks what is written"
        assert pool.num_references(source) >= 1


def work(
    number: int,
    prompt: Sequence[int],
    max_tokens: int = 4,
    *,
    owner: str = "r",
    **options: object,
) -> GenerateWork:
    return GenerateWork(
        work_id=WorkId(owner, number),
        prompt=list(prompt),
        max_tokens=max_tokens,
        **options,  # type: ignore[arg-type]
    )


def toy_answer(work: GenerateWork, vocab_size: int = VOCAB_SIZE, *, index: int = 0) -> list[int]:
    """Return what an undisturbed engine generates for a choice of `work`, after what was received."""
    received = work.received[index] if work.received else ()
    tokens = [*work.prompt, *received]
    first = len(tokens)
    if len(received) > work.min_tokens and tokens[-1] in work.stop_token_ids:
        return []
    while (num_answered := len(tokens) - len(work.prompt)) < work.max_tokens:
        banned = work.stop_token_ids if num_answered < work.min_tokens else frozenset[int]()
        tokens.append(toy_token(tokens, work.adapter, banned, vocab_size))
        if tokens[-1] in work.stop_token_ids:
            break
    return tokens[first:]
