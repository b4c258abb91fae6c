"""Describes a model in a directory as transformers writes it: config.json, safetensors, tokenizer.json.

The directory is only read. Of safetensors the headers are read, which tell whether a file was cut; of pickled weights,
which count only where there are no safetensors, nothing is: the worker opens them with torch's restricted loader.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cluster.model_manifest import (
    model_fingerprint,
    servable_length,
    text_fingerprint,
    weights_fingerprint,
    write_files,
)
from workers.errors import ModelFileError
from workers.types import ModelManifest
from workers.weights.directory import PICKLES, SAFETENSORS, weight_format
from workers.weights.directory import weight_files as named_files
from workers.weights.generic_shape import embedding_size_of, max_positions_of, vocab_size_of
from workers.weights.shape import from_config

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
CARD = "README.md"
CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification")
"""Ends of the names of architectures."""
SENTENCE_CONFIG = "sentence_bert_config.json"

DESCRIBING_FILES = (CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE, CARD, SENTENCE_CONFIG)

MAX_HEADER_BYTES = 100 << 20


def content_fingerprint(folder: Path) -> str:
    """Return a text that changes when any file changes that a description is made of. Raises ModelFileError."""
    parts = [weights_fingerprint(weight_files(folder))]
    for name in DESCRIBING_FILES:
        path = folder / name
        parts.append(text_fingerprint(_read(path)) if path.exists() else "")
    return text_fingerprint("\n".join(parts))


def describe_directory(folder: Path, entry: Path, *, name: str, any_architecture: bool = False) -> None:
    """Write tokenizer.json, chat_template.jinja and manifest.json of the model in `folder` into `entry`.

    `any_architecture`: also of one that only an engine with code of others may know. Raises ModelFileError naming the
    file, the rule and the value.
    """
    config = _read_object(folder / CONFIG)
    described = _described(folder / CONFIG, config, any_architecture)
    weights = weight_files(folder)
    form = weight_format(folder)
    for path in weights if form is SAFETENSORS else ():
        _check_extent(path)
    tokenizer_text, token_ids = _tokenizer(folder, described.vocab_size)
    settings = _read_object(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).exists() else {}
    manifest = ModelManifest(
        name=name,
        architecture=described.architecture,
        vocab_size=described.vocab_size,
        max_model_len=min(described.max_model_len, _encoded_length(folder) or described.max_model_len),
        eos_token_ids=_ends(folder, config, settings, token_ids),
        bos_token_id=_beginning(config, settings, token_ids),
        weights_format=form.name,
        model_fingerprint=described.fingerprint,
        tokenizer_fingerprint=text_fingerprint(tokenizer_text),
        weights_fingerprint=weights_fingerprint(weights),
        licence=_licence(folder),
        labels=_labels(described.architecture, config),
        embedding_size=embedding_size_of(config),
    )
    write_files(entry, manifest, tokenizer_text, _chat_template(folder, settings))


def weight_files(folder: Path) -> list[Path]:
    """Return the files that make up the model, in a fixed order. Raises ModelFileError."""
    form = weight_format(folder)
    if form.is_in(folder):
        return named_files(folder, form)
    found = sorted(path.name for path in folder.iterdir() if path.suffix in {".bin", ".pt", ".pth", ".gguf"})
    hint = f"; found {', '.join(found)}, which is not read from a directory by this release" if found else ""
    known = " or ".join((SAFETENSORS.single, SAFETENSORS.index, PICKLES.single, PICKLES.index))
    raise ModelFileError(f"{folder}: must have {known}{hint}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ModelFileError(f"{path}: is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path}: cannot be read: {error}") from error


def _read_object(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: must be a JSON object, is a {type(value).__name__}")
    return value


class _Described(NamedTuple):
    architecture: str
    vocab_size: int
    max_model_len: int
    fingerprint: str


def _described(path: Path, config: Mapping[str, Any], any_architecture: bool) -> _Described:
    try:
        try:
            shape = from_config(config)
        except ModelFileError:
            if not any_architecture:
                raise
            return _of_any_architecture(config)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error
    return _Described(shape.architecture, shape.vocab_size, servable_length(shape), model_fingerprint(shape))


def _of_any_architecture(config: Mapping[str, Any]) -> _Described:
    names = config.get("architectures") or [config.get("model_type") or "unknown"]
    described = json.dumps({key: value for key, value in config.items() if not key.startswith("_")}, sort_keys=True)
    return _Described(str(names[0]), vocab_size_of(config), max_positions_of(config), text_fingerprint(described))


def _labels(architecture: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the classes of a model that classifies; transformers has two where nothing is said."""
    if not architecture.endswith(CLASSIFIERS):
        return ()
    names = config.get("id2label")
    if not isinstance(names, dict):
        return tuple(f"LABEL_{number}" for number in range(int(config.get("num_labels") or 2)))
    return tuple(str(names[key]) for key in sorted(names, key=int))


def _encoded_length(folder: Path) -> int:
    """Return the tokens that a model of sentence-transformers was made for; 0: it is none."""
    path = folder / SENTENCE_CONFIG
    length = _read_object(path).get("max_seq_length") if path.exists() else None
    return length if isinstance(length, int) and length > 0 else 0


def _check_extent(path: Path) -> None:
    """Refuse a safetensors file that ends before its tensors do. Header: length (8 bytes, little endian), then JSON."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ModelFileError(
                f"{path}: is truncated or corrupt: the header's length is {length}, the file has {size}"
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        end = max((tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"), default=0)
        needed = 8 + length + int(end)
    except (ValueError, AttributeError, KeyError, IndexError, TypeError, OverflowError, RecursionError) as error:
        raise ModelFileError(f"{path}: is corrupt: the header is not that of a safetensors file: {error}") from error
    if needed != size:
        raise ModelFileError(f"{path}: is truncated or corrupt: its header says {needed} bytes, the file has {size}")


def _tokenizer(folder: Path, vocab_size: int) -> tuple[str, Mapping[str, int]]:
    path = folder / TOKENIZER
    if not path.exists():
        others = sorted(found.name for found in folder.glob("tokenizer.model*")) + sorted(
            found.name for found in folder.glob("vocab*")
        )
        hint = f" (found {', '.join(others)}; AutoTokenizer.from_pretrained(...).save_pretrained(...) converts)"
        raise ModelFileError(f"{path}: is missing: a model needs its tokenizer{hint if others else ''}")
    from tokenizers import Tokenizer

    text = _read(path)
    try:
        token_ids: Mapping[str, int] = Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    except Exception as error:  # the Rust library raises plain Exception
        raise ModelFileError(f"{path}: is not a tokenizer: {error}") from error
    largest = max(token_ids.values(), default=-1)
    if not 0 <= largest < vocab_size:
        raise ModelFileError(f"{path}: its token ids must be below vocab_size ({vocab_size}), the largest is {largest}")
    return text, token_ids


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    if (folder / CHAT_TEMPLATE).exists():
        return _read(folder / CHAT_TEMPLATE)
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _ends(
    folder: Path, config: Mapping[str, Any], settings: Mapping[str, Any], token_ids: Mapping[str, int]
) -> tuple[int, ...]:
    """Return the ids that end an answer, the tokenizer's own end first."""
    path = folder / GENERATION_CONFIG
    generation = _read_object(path) if path.exists() else {}
    named = token_ids.get(_token_text(settings.get("eos_token")))
    numbers: list[Any] = [] if named is None else [named]
    for source in (generation, config):
        value = source.get("eos_token_id")
        numbers += value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(number for number in numbers if isinstance(number, int)))


def _beginning(config: Mapping[str, Any], settings: Mapping[str, Any], token_ids: Mapping[str, int]) -> int | None:
    number = token_ids.get(_token_text(settings.get("bos_token")), config.get("bos_token_id"))
    return number if isinstance(number, int) else None


def _token_text(value: Any) -> str:
    """tokenizer_config.json gives a token as its text or as an object with `content`."""
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")


def _licence(folder: Path) -> str:
    """Return what the model card's front matter says."""
    path = folder / CARD
    if not path.exists():
        return ""
    front = _read(path).split("---", 2)
    found = re.search(r"^license:\s*(\S+)\s*$", front[1], re.MULTILINE) if len(front) == 3 else None
    return found.group(1) if found else ""
