"""The paged engine on a model of one layer: seeded draws, adapters and constraints in mixed batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from load_tests.rigs.teacher import teacher_forced
from tests.workers.gguf_files import VOCAB, random_tensors, write_gguf
from workers import kernels
from workers.config import EngineConfig
from workers.engine import PagedEngine
from workers.models.llama import LlamaModel
from workers.plan import Chunk, StepPlan
from workers.prefix import PrefixHasher
from workers.runner import CpuRunner
from workers.sequence import Sequence as EngineSequence
from workers.types import EngineInfo, FinishReason, GenerateWork, SamplingParams, TokenLogprobs, WorkId
from workers.weights.checkpoint import Checkpoint, open_checkpoint

BLOCK_SIZE = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(write_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", random_tensors()))


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> LlamaModel:
    return LlamaModel(checkpoint, torch.float32)


def new_runner(model: LlamaModel, num_blocks: int) -> CpuRunner:
    cache = model.new_cache(num_blocks=num_blocks, block_size=BLOCK_SIZE)
    return CpuRunner(model.over(cache), cache)


def new_engine(model: LlamaModel, num_blocks: int = 64, lookup_tokens: int = 0, **options: Any) -> PagedEngine:
    config = EngineConfig(chunk_tokens=8, lookup_tokens=lookup_tokens)
    return engine_over(new_runner(model, num_blocks), num_blocks, config, **options)


def engine_over(runner: CpuRunner, num_blocks: int, config: EngineConfig, **options: Any) -> PagedEngine:
    hasher = PrefixHasher(b"", BLOCK_SIZE)
    info = EngineInfo(
        engine="paged",
        model="tiny",
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        max_model_len=num_blocks * BLOCK_SIZE,
        vocab_size=VOCAB,
        model_fingerprint="",
        tokenizer_fingerprint="",
        weights_fingerprint="",
        hash_key_fingerprint=hasher.key_fingerprint,
    )
    return PagedEngine(config, info=info, runner=runner, hasher=hasher, **options)


def work(number: int, prompt: Sequence[int], **options: Any) -> GenerateWork:
    return GenerateWork(work_id=WorkId("t", number), prompt=list(prompt), **{"max_tokens": 12} | options)


def run(engine: PagedEngine, works: Sequence[GenerateWork]) -> tuple[list[list[int]], int]:
    """Return the answers in the order of `works`, and how often any of them was preempted."""
    for each in works:
        engine.submit(each)
    answers: dict[WorkId, list[int]] = {each.work_id: [] for each in works}
    num_preemptions = 0
    while engine.step():
        engine.check_integrity()
        for delta in engine.drain_outputs():
            answers[delta.work_id] += delta.token_ids
            if delta.finish is not None:
                assert delta.finish.reason is FinishReason.LENGTH
                num_preemptions += delta.finish.num_preemptions
    return list(answers.values()), num_preemptions


SAMPLINGS = [
    SamplingParams(seed=3),
    SamplingParams(seed=4, temperature=0.8, top_k=7),
    SamplingParams(temperature=0.0),
    SamplingParams(seed=2**64 - 1, top_p=0.8, repetition_penalty=1.2),
    SamplingParams(seed=6, min_p=0.05, presence_penalty=0.4, frequency_penalty=0.1),
]


def test_seeded_draws_are_the_same_alone_batched_preempted_and_resumed(model: LlamaModel) -> None:
    works = [work(number, range(1 + 3 * number), sampling=sampling) for number, sampling in enumerate(SAMPLINGS)]
    alone = [run(new_engine(model), [each])[0][0] for each in works]
    assert len({tuple(answer) for answer in alone}) == len(works)

    together, num_preemptions = run(new_engine(model), works)
    assert together == alone
    assert num_preemptions == 0

    starved, num_preemptions = run(new_engine(model, num_blocks=9), works)
    assert starved == alone
    assert num_preemptions > 0

    resumed = [
        work(each.work_id.number, each.prompt, sampling=each.sampling, received=[answer[:5]])
        for each, answer in zip(works, alone, strict=True)
    ]
    assert run(new_engine(model), resumed)[0] == [answer[5:] for answer in alone]


def test_an_adapter_changes_its_own_sequences(model: LlamaModel) -> None:
    """A toy adapter, plugged in without a change elsewhere: it turns the first layer's down projection off."""
    greedy = SamplingParams(temperature=0.0)
    plain = [work(0, [3, 1, 4], sampling=greedy), work(1, [3, 1, 4, 1, 5], sampling=greedy)]
    before, _ = run(new_engine(model), plain)
    down = torch.randn(model.shape.hidden_size, model.shape.ffn_size, generator=torch.Generator().manual_seed(0))
    model.attach("toy", {(0, "down"): lambda rows: rows @ down.T})

    adapted = [plain[0], work(1, [3, 1, 4, 1, 5], sampling=greedy, adapter="toy")]
    after, _ = run(new_engine(model), adapted)
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert after[1] == run(new_engine(model), adapted[1:])[0][0]


class EvenThenOdd:
    """A toy constraint: even tokens and odd tokens take turns."""

    def __init__(self) -> None:
        self._parity = 0

    def mask(self) -> Sequence[int]:
        return range(self._parity, VOCAB, 2)

    def advance(self, token_id: int) -> None:
        assert token_id % 2 == self._parity
        self._parity = 1 - self._parity


def test_a_constraint_rules_its_own_sequence(model: LlamaModel) -> None:
    engine = new_engine(model, constraint_for=lambda each: EvenThenOdd() if each.work_id.number == 0 else None)
    answers, _ = run(engine, [work(0, [1, 2]), work(1, [1, 2], sampling=SamplingParams(temperature=0.0))])
    assert [token % 2 for token in answers[0]] == [0, 1] * 6
    assert answers[1] == run(new_engine(model), [work(1, [1, 2], sampling=SamplingParams(temperature=0.0))])[0][0]


def test_without_bf16_nothing_but_weights_is_rounded(checkpoint: Checkpoint, model: LlamaModel) -> None:
    """Logits of this model are off by 0.2 % with weights in fp16, and by twenty times as much in bf16."""
    if kernels.kernel_for(torch.bfloat16) != "fp16":
        pytest.skip("this CPU multiplies bf16, or this torch has no products with fp16 weights")
    tokens = [token % VOCAB for token in range(3, 40)]
    exact = teacher_forced(model, tokens, 8)
    rounded = teacher_forced(LlamaModel(checkpoint, torch.bfloat16), tokens, 8)
    assert 0 < (rounded - exact).square().mean().sqrt() < 1e-2 * exact.square().mean().sqrt()


def test_an_embedding_that_fp16_cannot_hold_is_not_rounded(tmp_path: Path) -> None:
    """It became infinite, and all logits of a prompt with that token NaN."""
    tensors = random_tensors()
    tensors["token_embd.weight"][5, 7] = 1e6
    large = open_checkpoint(write_gguf(tmp_path / "large.gguf", tensors))
    exact, rounded = (
        teacher_forced(LlamaModel(large, dtype), [3, 5, 9], 3) for dtype in (torch.float32, torch.bfloat16)
    )
    assert (rounded - exact).square().mean().sqrt() < 2e-2 * exact.square().mean().sqrt()


def test_a_step_s_time_is_told_by_computing_and_drawing(model: LlamaModel) -> None:
    engine = new_engine(model)
    watch = engine.watch()
    engine.submit(work(1, range(5), max_tokens=3))
    while engine.step():
        watch.ended()
    records = watch.drain()
    assert len(records) == 3
    for record in records:
        assert min(record.schedule_s, record.run_s, record.sample_s, record.emit_s) > 0


def test_copied_blocks_hold_what_was_copied(model: LlamaModel) -> None:
    """Copy on write by hand: a second sequence goes on from a copy of the first one's half-filled block."""
    runner = new_runner(model, 8)
    first, second, alone = (EngineSequence(work(n, [9, 8, 7, 6, 5, 4])) for n in range(3))
    first.block_table, second.block_table, alone.block_table = [0, 1], [0, 2], [3, 4]
    runner.launch(StepPlan(1, (Chunk(first, 0, 5, samples=False),)))
    shared = runner.launch(StepPlan(2, (Chunk(second, 5, 1, samples=True),), copies=((1, 2),)))
    whole = runner.launch(StepPlan(3, (Chunk(alone, 0, 6, samples=True),)))
    assert shared.output().tokens == whole.output().tokens
    assert runner.num_computed_rows == 5 + 1 + 6


def test_nothing_is_drawn_from_a_chunk_that_does_not_sample(model: LlamaModel) -> None:
    runner = new_runner(model, 8)
    sequence = EngineSequence(work(0, range(8)))
    sequence.block_table = [0, 1]
    assert runner.launch(StepPlan(1, (Chunk(sequence, 0, 4, samples=False),))).output().tokens == [()]


def repetitive(number: int, sampling: SamplingParams) -> GenerateWork:
    """A prompt that says the same three times, so that there is something to look up."""
    return work(number, [5, 6, 7, 8, 9 + number] * 3, sampling=sampling, max_tokens=30)


@pytest.mark.parametrize("num_blocks", [64, 20])
def test_answers_with_prompt_lookup_are_the_same(model: LlamaModel, num_blocks: int) -> None:
    """Greedy and seeded, with penalties, alone and together, with preemption."""
    works = [repetitive(number, sampling) for number, sampling in enumerate(SAMPLINGS)]
    plain, _ = run(new_engine(model), works)
    engine = new_engine(model, num_blocks, lookup_tokens=5)
    looked_up, num_preemptions = run(engine, works)
    assert looked_up == plain
    assert (num_preemptions > 0) == (num_blocks == 20)
    assert engine.load().num_drafted_tokens > engine.load().num_accepted_tokens > 0
    assert [run(new_engine(model, lookup_tokens=3), [each])[0][0] for each in works] == plain


def logprobs_of(engine: PagedEngine, works: Sequence[GenerateWork]) -> dict[tuple[int, int], list[TokenLogprobs]]:
    """Return by work and choice what was told of its tokens; one for each of them."""
    for each in works:
        engine.submit(each)
    found: dict[tuple[int, int], list[TokenLogprobs]] = {}
    while engine.step():
        for delta in engine.drain_outputs():
            assert len(delta.logprobs) == len(delta.token_ids)
            found.setdefault((delta.work_id.number, delta.index), []).extend(delta.logprobs)
    return found


def assert_close(found: Sequence[TokenLogprobs], expected: Sequence[TokenLogprobs]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
        assert [value for _, value in one.top] == pytest.approx([value for _, value in other.top], abs=1e-4)


def test_log_probabilities_are_the_same_alone_batched_preempted_resumed_and_looked_up(model: LlamaModel) -> None:
    works = [replace(repetitive(number, sampling), num_logprobs=3, n=2) for number, sampling in enumerate(SAMPLINGS)]
    answers = [run(new_engine(model), [replace(each, n=1)])[0][0] for each in works]
    alone: dict[tuple[int, int], list[TokenLogprobs]] = {}
    for each in works:
        alone |= logprobs_of(new_engine(model), [each])
    assert all(len(each) == 30 for each in alone.values())

    for engine in (new_engine(model), new_engine(model, 24), new_engine(model, lookup_tokens=4)):
        for key, found in logprobs_of(engine, works).items():
            assert_close(found, alone[key])

    resumed = [replace(each, n=1, received=[answer[:7]]) for each, answer in zip(works, answers, strict=True)]
    for (number, index), found in logprobs_of(new_engine(model), resumed).items():
        assert_close(found, alone[number, index][7:])


def test_seeded_choices_are_those_of_single_works(model: LlamaModel) -> None:
    for number, sampling in enumerate(SAMPLINGS):
        three = logprobs_of(new_engine(model), [work(number, range(9), sampling=sampling, n=3, num_logprobs=0)])
        for index in range(3):
            own = replace(sampling, seed=(sampling.seed + index) % 2**64)
            single = logprobs_of(new_engine(model), [work(number, range(9), sampling=own, num_logprobs=0)])
            assert_close(three[number, index], single[number, 0])


def test_a_draft_is_verified_in_one_step(model: LlamaModel) -> None:
    """By hand: a right draft brings all its tokens and one more, a wrong one what is right of it and the correction."""
    greedy = SamplingParams(temperature=0.0)
    (answer,), _ = run(new_engine(model), [work(0, [3, 1, 4, 1, 5], sampling=greedy)])
    wrong = (answer[2] + 1) % VOCAB
    for draft, expected in (
        (tuple(answer[:4]), tuple(answer[:5])),
        ((*answer[:2], wrong, answer[3]), tuple(answer[:3])),
        ((), tuple(answer[:1])),
    ):
        runner = new_runner(model, 8)
        sequence = EngineSequence(work(0, [3, 1, 4, 1, 5], sampling=greedy))
        other = EngineSequence(work(1, [3, 1, 4], sampling=greedy))
        sequence.block_table, other.block_table = [4, 2, 0], [1]
        chunks = (Chunk(sequence, 0, 5, samples=True, draft=draft), Chunk(other, 0, 2, samples=False))
        assert runner.launch(StepPlan(1, chunks)).output().tokens == [expected, ()]
        assert runner.num_computed_rows == 5 + len(draft) + 2


@pytest.mark.parametrize("chunk_tokens", [64, 4096])
@pytest.mark.parametrize("is_in_turn", [False, True])
def test_a_shared_prefix_is_computed_once(model: LlamaModel, chunk_tokens: int, *, is_in_turn: bool) -> None:
    """16 requests share 512 tokens and differ in 9 more. Cold, whether they arrive in one step or one after the other,
    the rows that go through the model are the 512, the own tokens of each, and one for each token after the first."""
    generator = torch.Generator().manual_seed(6)
    shared = torch.randint(VOCAB, (512,), generator=generator).tolist()
    own = [[number, *torch.randint(VOCAB, (8,), generator=generator).tolist()] for number in range(16)]
    works = [work(number, [*shared, *tokens], max_tokens=4) for number, tokens in enumerate(own)]
    runner = new_runner(model, 256)
    engine = engine_over(runner, 256, EngineConfig(chunk_tokens=chunk_tokens))
    for group in [[each] for each in works] if is_in_turn else [works]:
        run(engine, group)
    assert runner.num_computed_rows == 512 + 16 * (9 + 3)
    assert engine.load().num_computed_tokens == runner.num_computed_rows
    assert engine.load().prefix_cache_hits == 15 * 512
