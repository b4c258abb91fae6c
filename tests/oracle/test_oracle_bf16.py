"""bf16 in process, by the rule of `bf16_rule`.

`make test` checks one prompt: without bf16 instructions transformers takes seconds for each.
"""

from __future__ import annotations

import pytest

from tests.oracle.answers import Committed, generate
from tests.oracle.bf16_rule import assert_bf16_rule
from tests.oracle.conftest import NewEngine
from workers.models.llama import LlamaModel
from workers.types import ModelFiles


def test_one_prompt(
    default_model: ModelFiles, bf16_model: LlamaModel, committed: list[Committed], new_engine: NewEngine
) -> None:
    entry = next(entry for entry in committed if entry.name == "code")
    engine = new_engine(bf16_model, chunk_tokens=16, max_num_sequences=1)
    answers = generate(engine, [entry.prompt], 8)
    assert_bf16_rule(default_model.weights, entry.prompt, [tuple(answer.tokens) for answer in answers])


@pytest.mark.exact
@pytest.mark.parametrize("chunk_tokens", [16, 256])
@pytest.mark.parametrize("batch", [1, 8])
def test_every_prompt(
    default_model: ModelFiles,
    bf16_model: LlamaModel,
    committed: list[Committed],
    new_engine: NewEngine,
    chunk_tokens: int,
    batch: int,
) -> None:
    engine = new_engine(bf16_model, chunk_tokens=chunk_tokens, max_num_sequences=batch)
    prompts = [entry.prompt for entry in committed]
    cold, warm = generate(engine, prompts, 16), generate(engine, prompts, 16)
    for prompt, *answers in zip(prompts, cold, warm, strict=True):
        assert_bf16_rule(default_model.weights, prompt, [tuple(answer.tokens) for answer in answers])
