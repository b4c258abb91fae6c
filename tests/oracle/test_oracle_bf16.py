"""bf16 in process, by the rule of `bf16_rule`.

`make test` checks one prompt: without bf16 instructions transformers takes seconds for each.
"""

from __future__ import annotations

import pytest

from tests.oracle.answers import Committed, generate
from tests.oracle.bf16_rule import assert_bf16_rule
from tests.oracle.conftest import NewEngine
from workers.engine import PagedEngine
from workers.forward import LoadedModel
from workers.types import ModelFiles


def test_one_prompt(
    default_model: ModelFiles, bf16_model: LoadedModel, committed: list[Committed], new_engine: NewEngine
) -> None:
    entry = next(entry for entry in committed if entry.name == "code")
    engine = new_engine(bf16_model, chunk_tokens=16, max_num_sequences=1)
    answers = generate(engine, [entry.prompt], 8)
    assert_bf16_rule(bf16_model, default_model.weights, entry.prompt, [tuple(answer.tokens) for answer in answers])


@pytest.mark.exact
def test_every_prompt_alone_cold_and_warm(
    default_model: ModelFiles, bf16_model: LoadedModel, committed: list[Committed], new_engine: NewEngine
) -> None:
    """Chunks of 16 and of 256 take turns: alone, every prompt has one of them, every size half of the prompts."""
    for first, chunk_tokens in enumerate((16, 256)):
        entries = committed[first::2]
        engine = new_engine(bf16_model, chunk_tokens=chunk_tokens, max_num_sequences=1)
        assert_cold_and_warm(bf16_model, default_model, engine, entries)


@pytest.mark.exact
@pytest.mark.parametrize("chunk_tokens", [16, 256])
def test_every_prompt_together_cold_and_warm(
    default_model: ModelFiles,
    bf16_model: LoadedModel,
    committed: list[Committed],
    new_engine: NewEngine,
    chunk_tokens: int,
) -> None:
    engine = new_engine(bf16_model, chunk_tokens=chunk_tokens, max_num_sequences=8)
    assert_cold_and_warm(bf16_model, default_model, engine, [entry for entry in committed if len(entry.prompt) < 1000])


def assert_cold_and_warm(model: LoadedModel, files: ModelFiles, engine: PagedEngine, entries: list[Committed]) -> None:
    prompts = [entry.prompt for entry in entries]
    cold, warm = generate(engine, prompts, 16), generate(engine, prompts, 16)
    assert sum(answer.num_cached_tokens for answer in cold) < sum(answer.num_cached_tokens for answer in warm)
    for prompt, *answers in zip(prompts, cold, warm, strict=True):
        assert_bf16_rule(model, files.weights, prompt, [tuple(answer.tokens) for answer in answers])
