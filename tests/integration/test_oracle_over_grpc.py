"""The oracle through a whole cluster: what a client reads is what plain transformers says of the same weights.

The cluster keeps its cache from one test to the next, so each test has prompts of its own. bf16 is checked in this
process, where the reference takes seconds for it without instructions: one request of a few tokens.
"""

from __future__ import annotations

import asyncio
import json

import pytest
from octavo.client import Client, Completion, Prompt

from tests.cluster import ClusterProcess, running
from tests.oracle import loaded
from tests.oracle.answers import Committed, committed_answers
from tests.oracle.bf16_rule import assert_bf16_rule
from tests.oracle.regenerate import PROMPTS
from workers.native import library
from workers.native.model import NativeDtype
from workers.types import ModelFiles

pytestmark = pytest.mark.cluster

BLOCK_SIZE = 16
ALONE = ("korean", "table")
EIGHT = ("one-token", "short", "capital", "shared-list", "shared-poem", "chinese", "code", "long")
SHARING = ("capital", "shared-list", "shared-poem")
"""Prompts that begin with the same system prompt: when they come together one may find the blocks of another."""


def entries(*names: str) -> list[Committed]:
    by_name = {entry.name: entry for entry in committed_answers()}
    return [by_name[name] for name in names]


async def ask(client: Client, prompt: Prompt, max_tokens: int) -> Completion:
    return await client.complete(prompt, max_tokens=max_tokens, temperature=0.0, ignore_eos=True, timeout=150)


def assert_answer(completion: Completion, entry: Committed, *, cached_tokens: int | None) -> None:
    """The tokens are the reference's, all of them; None: the cache may have helped or not."""
    assert completion.token_ids == tuple(entry.answer), entry.name
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == len(entry.prompt)
    assert completion.usage.generated_tokens == len(entry.answer)
    if cached_tokens is not None:
        assert completion.usage.cached_tokens == cached_tokens, entry.name


def warm_tokens(entry: Committed) -> int:
    """All full blocks of the prompt; but a prompt's last token is always computed."""
    return min(len(entry.prompt) // BLOCK_SIZE * BLOCK_SIZE, len(entry.prompt) - 1)


async def test_fp32_alone_cold_and_warm(model_cluster: ClusterProcess) -> None:
    """Cold as token ids, warm as the text of the same prompt."""
    texts = json.loads(PROMPTS.read_text())
    async with Client(model_cluster.address) as client:
        for entry in entries(*ALONE):
            cold = await ask(client, entry.prompt, len(entry.answer))
            assert_answer(cold, entry, cached_tokens=0)
            warm = await ask(client, texts[entry.name], len(entry.answer))
            assert_answer(warm, entry, cached_tokens=warm_tokens(entry))
            assert warm.text == cold.text == await client.detokenize(entry.answer)


async def test_fp32_eight_at_once_cold_and_warm(model_cluster: ClusterProcess) -> None:
    eight = entries(*EIGHT)
    async with Client(model_cluster.address) as client:
        cold = await asyncio.gather(*(ask(client, entry.prompt, len(entry.answer)) for entry in eight))
        warm = await asyncio.gather(*(ask(client, entry.prompt, len(entry.answer)) for entry in eight))
    for entry, first, second in zip(eight, cold, warm, strict=True):
        assert_answer(first, entry, cached_tokens=None if entry.name in SHARING else 0)
        assert_answer(second, entry, cached_tokens=warm_tokens(entry))


@pytest.mark.exact
@pytest.mark.skipif(library.library() is None, reason="native kernels: the C library was not built")
async def test_bf16_by_its_rule(default_model: ModelFiles, model_cluster: ClusterProcess) -> None:
    """By a second application on the same Ray."""
    (entry,) = entries("code")
    with running(
        *("--model", "default", "--ray-address", model_cluster.ready["ray_address"], "--app", "bf16"),
        OCTAVO_ENGINE__DTYPE="bf16",
        OCTAVO_ENGINE__NUM_BLOCKS="512",
    ) as cluster:
        async with Client(cluster.address) as client:
            (replica,) = (await client.status()).replicas
            assert replica.dtype == "bf16"
            completion = await ask(client, entry.prompt, 8)
    assert len(completion.token_ids) == 8
    model = loaded.native_model(default_model.weights, NativeDtype.BF16)
    assert_bf16_rule(model, default_model.weights, entry.prompt, [completion.token_ids])
