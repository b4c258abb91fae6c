"""The model of the router rig, made in memory: a byte-level tokenizer with many words, a chat template, a manifest.

The tokens of `RIG_WORDS` are what the rig's engine may say when it tells the time (`router_clock.py`); a text becomes
one token a byte. No file is written or fetched.
"""

from __future__ import annotations

from typing import Final

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from router.chat import ChatTemplate
from router.model import ServedModel
from router.tokenizer import Tokenizer
from workers.fake import fake_manifest
from workers.types import ModelManifest

VOCAB_SIZE: Final = 33_259
MAX_MODEL_LEN: Final = 16_384
RIG_WORDS: Final = range(259, VOCAB_SIZE)
_SPECIAL: Final = ("<unk>", "<s>", "</s>")
_TEMPLATE: Final = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def rig_manifest() -> ModelManifest:
    """Return what replicas and routers of the rig agree on."""
    return fake_manifest(name="fake", vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN)


def rig_model() -> ServedModel:
    """Return the model as a router serves it."""
    symbols = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    assert len(symbols) == RIG_WORDS.start
    symbols += [f"Ġw{number}" for number in RIG_WORDS]
    vocabulary = {symbol: token_id for token_id, symbol in enumerate(symbols)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    return ServedModel(manifest=rig_manifest(), tokenizer=Tokenizer(tokenizer), chat_template=ChatTemplate(_TEMPLATE))
