"""Describes a model in a GGUF file: its shape, its ends, its tokenizer and chat template, all from the file's header.

A file that is cut, damaged or of an architecture that no engine here runs is refused before a worker opens it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.model_gguf import GgufHeader, read_header
from cluster.model_manifest import model_fingerprint, text_fingerprint, weights_fingerprint, write_files
from cluster.model_tokenizer import CONTROL, USER_DEFINED, Vocabulary, tokenizer_json
from workers.types import ModelManifest

GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""`general.architecture`; Mistral, SmolLM and TinyLlama files say llama."""

END_TOKENS = frozenset(
    {"<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_text|>", "</s>"}
)
"""Tokens that end an answer wherever they are control tokens; files name only one of them as their end."""


def describe_gguf(path: Path, entry: Path, *, name: str, licence: str = "") -> None:
    """Write tokenizer.json, chat_template.jinja and manifest.json of the file at `path` into `entry`.

    Raises ModelFileError naming the file, the rule and the value.
    """
    header = read_header(path)
    shape = _gguf_shape(header)
    _check_extents(header)
    vocabulary = Vocabulary(header)
    tokenizer = tokenizer_json(header)
    manifest = ModelManifest(
        name=name,
        architecture=str(shape["architecture"]),
        vocab_size=len(vocabulary.tokens),
        max_model_len=_gguf_number(header, "context_length"),
        eos_token_ids=_gguf_ends(vocabulary),
        bos_token_id=vocabulary.token_id("bos"),
        weights_format="gguf",
        model_fingerprint=model_fingerprint(shape),
        tokenizer_fingerprint=text_fingerprint(tokenizer),
        weights_fingerprint=weights_fingerprint([path]),
        licence=licence or str(header.metadata.get("general.license", "")),
    )
    template = header.metadata.get("tokenizer.chat_template")
    write_files(entry, manifest, tokenizer, template if isinstance(template, str) else None)


def _gguf_shape(header: GgufHeader) -> Mapping[str, object]:
    architecture = header.metadata.get("general.architecture")
    if architecture not in GGUF_ARCHITECTURES:
        raise header.refuse(f"general.architecture must be one of {', '.join(GGUF_ARCHITECTURES)}, is {architecture!r}")
    num_heads = _gguf_number(header, "attention.head_count")
    width = _gguf_number(header, "embedding_length")
    return {
        "architecture": architecture,
        "layers": _gguf_number(header, "block_count"),
        "width": width,
        "feed_forward": _gguf_number(header, "feed_forward_length"),
        "heads": num_heads,
        "kv_heads": _gguf_number(header, "attention.head_count_kv", num_heads),
        "head_size": _gguf_number(header, "attention.key_length", width // num_heads),
        "vocabulary": len(Vocabulary(header).tokens),
    }


def _gguf_number(header: GgufHeader, name: str, default: int | None = None) -> int:
    key = f"{header.metadata['general.architecture']}.{name}"
    value: Any = header.metadata.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise header.refuse(f"{key} must be a whole number of at least 1, is {value!r}")
    return value


def _gguf_ends(vocabulary: Vocabulary) -> tuple[int, ...]:
    """Return the ids that end an answer, the one that the file calls its end first."""
    named = [vocabulary.token_id(name) for name in ("eos", "eot", "eom")]
    known = [
        number
        for token in sorted(END_TOKENS)
        if (number := vocabulary.ids.get(token)) is not None and vocabulary.types[number] in (CONTROL, USER_DEFINED)
    ]
    return tuple(dict.fromkeys(number for number in [*named, *known] if number is not None))


def _check_extents(header: GgufHeader) -> None:
    """Refuse a file that ends before its tensors do."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if not header.tensors:
        raise header.refuse("has no tensors")
    for tensor in header.tensors:
        try:
            block_values, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.type_number)]
        except (ValueError, KeyError):
            raise header.refuse(f"tensor {tensor.name!r} has the unknown type {tensor.type_number}") from None
        num_values = 1
        for extent in tensor.shape:
            num_values *= extent
        end = header.header_bytes + tensor.offset + num_values // block_values * block_bytes
        if end > header.file_bytes:
            raise header.refuse(
                f"is truncated: tensor {tensor.name!r} ends at byte {end}, the file has {header.file_bytes}"
            )
