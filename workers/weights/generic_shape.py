"""What a config.json of any architecture says of sizes, where `shape.py` knows none: for engine `transformers`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.errors import ModelFileError

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "n_ctx")
"""How architectures call the most tokens of a sequence."""
UNBOUNDED_POSITIONS = 2_048
"""Of one that says nothing, as BLOOM does: what it was trained on."""
EMBEDDINGS = ("word_embed_proj_dim", "hidden_size", "d_model", "n_embd", "dim")
"""How they call the numbers of a token's vector when it leaves the last layer."""
OFFSET_TYPES = {
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "roberta-prelayernorm",
    "xmod",
    "data2vec-text",
}
"""Whose first position comes after that of padding."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config.json that describes the model of text."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def max_positions_of(config: Mapping[str, Any]) -> int:
    """Raises ModelFileError."""
    config = text_config(config)
    found = next((config[key] for key in POSITIONS if config.get(key)), UNBOUNDED_POSITIONS)
    offset = first_position_of(config)
    return _number(found, "max_position_embeddings") - offset


def first_position_of(config: Mapping[str, Any]) -> int:
    """Return the position of a sequence's first token."""
    if config.get("model_type") not in OFFSET_TYPES:
        return 0
    return _number(config.get("pad_token_id", 1), "pad_token_id") + 1


def vocab_size_of(config: Mapping[str, Any]) -> int:
    """Raises ModelFileError."""
    return _number(text_config(config).get("vocab_size"), "vocab_size")


def embedding_size_of(config: Mapping[str, Any]) -> int:
    """Return how many numbers a token's vector has; 0: it is not said."""
    inner = text_config(config)
    found = next((inner[key] for key in EMBEDDINGS if inner.get(key)), 0)
    return found if type(found) is int and 0 < found < 2**32 else 0


def _number(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value + (name == "pad_token_id") < 2**32:
        raise ModelFileError(f"config.json: {name} must be a positive number, is {value!r}")
    return value
