"""The model ``fake``: a byte-level tokenizer, a chat template and a manifest, for the engine `fake`; no weights.

It measures and tests a cluster without fetching anything. Its vocabulary has 1,024 entries: three special tokens, the
256 bytes, and words that the engine may say though no text ever becomes them.
"""

from __future__ import annotations

from pathlib import Path

from cluster.model_cache import ModelCache
from workers.fake import fake_manifest
from workers.types import ModelFiles

FAKE = "fake"
FORMAT = 1
VOCAB_SIZE = 1_024
MAX_MODEL_LEN = 8_192
_SPECIAL = ("<unk>", "<s>", "</s>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def fake_files(cache: ModelCache) -> ModelFiles:
    """Return the model's files, written into `cache` first if they are not there."""
    entry = cache.fill(f"{FAKE}-{FORMAT}", _write, is_valid=lambda path: (path / "manifest.json").is_file())
    return ModelFiles(
        weights=entry,
        tokenizer_json=entry / "tokenizer.json",
        chat_template=entry / "chat_template.jinja",
        manifest=entry / "manifest.json",
    )


def _write(entry: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    symbols = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    symbols += [f"Ġw{number}" for number in range(len(symbols), VOCAB_SIZE)]
    vocab = {symbol: token_id for token_id, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    tokenizer.save(str(entry / "tokenizer.json"))
    (entry / "chat_template.jinja").write_text(_CHAT_TEMPLATE)
    manifest = fake_manifest(name=FAKE, vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN, eos_token_ids=(2,))
    (entry / "manifest.json").write_text(manifest.to_json())
