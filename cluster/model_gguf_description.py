"""Describes a model in a GGUF file: its shape, its ends, its tokenizer and chat template, all from the file's header.

A file that is cut, damaged or of an architecture that no engine here runs is refused before a worker opens it.
"""

from __future__ import annotations

import math
from pathlib import Path

from cluster.model_manifest import (
    model_fingerprint,
    servable_length,
    text_fingerprint,
    weights_fingerprint,
    write_files,
)
from cluster.model_tokenizer import CONTROL, USER_DEFINED, Vocabulary, tokenizer_json
from workers.errors import ModelFileError
from workers.types import ModelManifest
from workers.weights.gguf_header import GgufHeader, read_header
from workers.weights.shape import ModelShape, from_gguf

END_TOKENS = frozenset(
    {"<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|end_of_text|>", "</s>"}
)
"""Tokens that end an answer wherever they are control tokens; files name only one of them as their end."""


def describe_gguf(path: Path, entry: Path, *, name: str, licence: str = "") -> None:
    """Write tokenizer.json, chat_template.jinja and manifest.json of the file at `path` into `entry`.

    Raises ModelFileError naming the file, the rule and the value.
    """
    header = read_header(path)
    try:
        _describe(path, header, entry, name=name, licence=licence)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error


def _describe(path: Path, header: GgufHeader, entry: Path, *, name: str, licence: str) -> None:
    shape = _shape(header)
    _check_extents(header, path.stat().st_size)
    vocabulary = Vocabulary(header.metadata)
    if len(vocabulary.tokens) > shape.vocab_size:
        raise ModelFileError(
            f"tokenizer.ggml.tokens must have at most as many entries as the embedding has rows ({shape.vocab_size}), "
            f"has {len(vocabulary.tokens)}"
        )
    tokenizer = tokenizer_json(vocabulary)
    manifest = ModelManifest(
        name=name,
        architecture=shape.architecture,
        vocab_size=shape.vocab_size,
        max_model_len=servable_length(shape),
        eos_token_ids=_ends(vocabulary),
        bos_token_id=vocabulary.token_id("bos"),
        weights_format="gguf",
        model_fingerprint=model_fingerprint(shape),
        tokenizer_fingerprint=text_fingerprint(tokenizer),
        weights_fingerprint=weights_fingerprint([path]),
        licence=licence or str(header.metadata.get("general.license", "")),
    )
    template = header.metadata.get("tokenizer.chat_template")
    write_files(entry, manifest, tokenizer, template if isinstance(template, str) else None)


def _shape(header: GgufHeader) -> ModelShape:
    embedding = header.tensors.get("token_embd.weight")
    try:
        return from_gguf(
            header.metadata,
            vocab_size=embedding.size[0] if embedding else 0,
            tied="output.weight" not in header.tensors,
            # What they are does not matter here; that they are there decides which scaling the file has.
            divisors=(1.0,) if "rope_freqs.weight" in header.tensors else (),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:  # a number that is none, or not finite
        raise ModelFileError(f"metadata is corrupt: {type(error).__name__}: {error}") from error


def _check_extents(header: GgufHeader, file_bytes: int) -> None:
    """Refuse a file that ends before its tensors do."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    for tensor in header.tensors.values():
        try:
            block_values, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.type_id)]
        except (ValueError, KeyError):
            raise ModelFileError(f"tensor {tensor.name!r} has the unknown type {tensor.type_id}") from None
        end = header.data_start + tensor.offset + math.prod(tensor.size) // block_values * block_bytes
        if end > file_bytes:
            raise ModelFileError(f"truncated: tensor {tensor.name!r} ends at byte {end}, the file has {file_bytes}")


def _ends(vocabulary: Vocabulary) -> tuple[int, ...]:
    """Return the ids that end an answer, the one that the file calls its end first."""
    named = [vocabulary.token_id(name) for name in ("eos", "eot", "eom")]
    known = [
        number
        for token in sorted(END_TOKENS)
        if (number := vocabulary.ids.get(token)) is not None and vocabulary.types[number] in (CONTROL, USER_DEFINED)
    ]
    return tuple(dict.fromkeys(number for number in [*named, *known] if number is not None))
