"""What is written beside a model's weights: tokenizer.json, chat_template.jinja, manifest.json, and how they are named.

Fingerprints say whether two processes hold the same thing:

    model       architecture and shape, the same for a GGUF file and a directory of safetensors of one model
    tokenizer   SHA-256 of tokenizer.json
    weights     SHA-256 over the size, the first 4 MiB and 64 sampled chunks of each file: an edited, cut or exchanged
                file is noticed within milliseconds also at 100 GB, single flipped bits in between are not (the default
                model's whole SHA-256 is checked when it is fetched)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from workers.types import ModelFiles, ModelManifest
from workers.weights.shape import ModelShape

TOKENIZER_JSON = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
MANIFEST = "manifest.json"

HEAD_BYTES = 4 << 20
SAMPLE_BYTES = 1 << 16
NUM_SAMPLES = 64


def model_files(entry: Path, weights: Path, packed: Path) -> ModelFiles:
    """Return the files of a complete cache entry, of a model whose replicas may keep what they pack in `packed`."""
    template = entry / CHAT_TEMPLATE
    return ModelFiles(
        weights=weights,
        tokenizer_json=entry / TOKENIZER_JSON,
        chat_template=template if template.exists() else None,
        manifest=entry / MANIFEST,
        packed=packed,
    )


def read_manifest(entry: Path) -> ModelManifest | None:
    """Return the manifest in `entry`, or None if it has none that this release reads."""
    try:
        return ModelManifest.from_json((entry / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, KeyError, TypeError, ValueError):
        return None


def is_complete(entry: Path) -> bool:
    """Say whether `entry` has a manifest and the tokenizer that it names."""
    manifest = read_manifest(entry)
    path = entry / TOKENIZER_JSON
    if manifest is None or not path.is_file():
        return False
    return manifest.tokenizer_fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()


def holds_weights(entry: Path, weights: Sequence[Path]) -> bool:
    """Say whether `weights` are those that the manifest in `entry` names."""
    manifest = read_manifest(entry)
    if manifest is None or not all(path.is_file() for path in weights):
        return False
    return manifest.weights_fingerprint == weights_fingerprint(weights)


def write_files(entry: Path, manifest: ModelManifest, tokenizer_json: str, chat_template: str | None) -> None:
    (entry / TOKENIZER_JSON).write_text(tokenizer_json, encoding="utf-8")
    if chat_template is not None:
        (entry / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
    (entry / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")


def text_fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def model_fingerprint(shape: ModelShape) -> str:
    names = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size")
    fields = {name: getattr(shape, name) for name in names}
    return text_fingerprint(json.dumps({"architecture": shape.architecture, **fields}, sort_keys=True))


def servable_length(shape: ModelShape) -> int:
    """Return the most tokens of a sequence: within a sliding window, attention is what it is without one."""
    return min(shape.max_positions, shape.sliding_window or shape.max_positions)


def weights_fingerprint(files: Sequence[Path]) -> str:
    """Return the fingerprint of `files`, in this order."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            digest.update(file.read(HEAD_BYTES))
            stride = max(SAMPLE_BYTES, (size - HEAD_BYTES) // NUM_SAMPLES)
            for start in [*range(HEAD_BYTES, size, stride), max(0, size - SAMPLE_BYTES)]:
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
