"""The fake engine says what its pure function says, over real blocks and hashes."""

from __future__ import annotations

import time

import pytest

from tests.workers.toy_engine import Answer, EventReader, assert_idle, gather, work
from workers.config import EngineConfig
from workers.fake import FakeEngine, fake_continuation, fake_digest, fake_manifest, fake_next_token
from workers.prefix import PrefixHasher
from workers.types import FinishReason, WorkId


def run(engine: FakeEngine) -> dict[WorkId, Answer]:
    answers: dict[WorkId, Answer] = {}
    while engine.step():
        engine.check_integrity()
        gather(engine.drain_outputs(), answers)
    return answers


def test_the_next_token_is_a_pure_function_of_all_before_it() -> None:
    assert fake_digest([]) == 0
    assert fake_digest([1, 2, 3]) == fake_digest([3], fake_digest([1, 2]))
    assert fake_next_token([5], 1_000) == 6
    assert fake_next_token([5, 7], 1_000) == (6 * 1_000_003 + 8) % 1_000
    answer = fake_continuation([1, 2, 3], 5, 1_000)
    assert answer == [fake_next_token([1, 2, 3, *answer[:i]], 1_000) for i in range(5)]


@pytest.mark.parametrize("chunk_tokens", [5, 256])
@pytest.mark.parametrize("num_blocks", [9, 200])
def test_the_engine_says_the_same_alone_together_preempted_and_cached(num_blocks: int, chunk_tokens: int) -> None:
    config = EngineConfig(engine="fake", block_size=4, num_blocks=num_blocks, chunk_tokens=chunk_tokens)
    engine = FakeEngine(config, manifest=fake_manifest(vocab_size=300))
    works = [work(n, range(6 + n), 14) for n in range(12)]
    for _ in range(2):
        for one in works:
            engine.submit(one)
        answers = run(engine)
        for one in works:
            assert answers[one.work_id].tokens == fake_continuation(one.prompt, 14, 300)
    assert_idle(engine)
    assert (engine.load().num_preemptions > 0) == (num_blocks == 9)
    assert engine.load().prefix_cache_hits > 0


def test_stop_tokens_end_and_received_tokens_count() -> None:
    engine = FakeEngine()
    whole = fake_continuation([1, 2, 3], 10, engine.info.vocab_size)
    engine.submit(work(1, [1, 2, 3], 10, received=[whole[:4]], stop_token_ids=frozenset({whole[7]})))
    (answer,) = run(engine).values()
    assert (answer.tokens, answer.finish) == (whole[4:8], FinishReason.STOP)


def test_its_blocks_have_the_names_that_a_router_computes() -> None:
    engine = FakeEngine(hash_key=b"secret")
    prompt = list(range(40))
    engine.submit(work(1, prompt, 1, salt=b"tenant"))
    run(engine)
    hasher = PrefixHasher(b"secret", engine.info.block_size)
    assert engine.info.hash_key_fingerprint == hasher.key_fingerprint
    reader = EventReader()
    reader.apply(engine.kv_events())
    assert reader.resident == set(hasher.blocks(hasher.root(b"tenant"), prompt))


@pytest.mark.parametrize("num_shared", [512, 520])
@pytest.mark.parametrize("chunk_tokens", [64, 2_048])
def test_what_sixteen_share_is_computed_once_also_when_all_arrive_together(num_shared: int, chunk_tokens: int) -> None:
    """Cold. What is shared beyond the last full block is computed by each."""
    engine = FakeEngine(EngineConfig(engine="fake", chunk_tokens=chunk_tokens))
    works = [work(n, [*range(num_shared), *[1_000 + n] * (20 + n)], 1) for n in range(16)]
    for one in works:
        engine.submit(one)
    answers = run(engine)
    assert {i: a.tokens for i, a in answers.items()} == {
        one.work_id: fake_continuation(one.prompt, 1, engine.info.vocab_size) for one in works
    }
    num_computed = 512 + sum(len(one.prompt) - 512 for one in works)
    assert engine.load().num_computed_tokens == engine.runner.num_computed_rows == num_computed
    assert sum(a.num_cached_tokens or 0 for a in answers.values()) == 15 * 512


def test_its_shape_comes_from_config_and_manifest() -> None:
    info = FakeEngine().info
    assert (info.engine, info.block_size, info.num_blocks, info.max_model_len) == ("fake", 16, 4_096, 8_192)
    small = FakeEngine(EngineConfig(num_blocks=7, max_model_len=50), manifest=fake_manifest(name="m")).info
    assert (small.model, small.num_blocks, small.max_model_len) == ("m", 7, 50)


def test_a_step_takes_as_long_as_it_is_told() -> None:
    engine = FakeEngine(EngineConfig(engine="fake", fake_step_s=0.02))
    engine.submit(work(1, [1], 3))
    started = time.monotonic()
    run(engine)
    assert time.monotonic() - started >= 3 * 0.02
    engine.close()
