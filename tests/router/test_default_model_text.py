"""The embedded default model's own tokenizer and chat template."""

from __future__ import annotations

import pytest

from router.model import ServedModel
from workers.types import ModelFiles


@pytest.fixture(scope="module")
def model(default_model: ModelFiles) -> ServedModel:
    return ServedModel.from_files(default_model)


@pytest.mark.parametrize(
    "text", ["The capital of France is Paris.", "서울은 대한민국의 수도이다. 🙂👩‍👩‍👧", "\tx = y[1:]  # é\n\n"]
)
async def test_text_goes_round_token_by_token(model: ServedModel, text: str) -> None:
    ids = await model.tokenizer.encode_text(text)
    detokenizer = model.tokenizer.detokenizer()
    pieces = [detokenizer.push(token_id) for token_id in ids]
    assert "".join(pieces) + detokenizer.flush() == text == await model.tokenizer.decode(ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_its_template(model: ServedModel) -> None:
    assert model.chat_template is not None
    prompt = model.chat_template.render([{"role": "user", "content": "What is the capital of France?"}])
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = model.tokenizer.encode(prompt, add_special_tokens=False)
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 3, 2)
    assert max(ids) < model.manifest.vocab_size
