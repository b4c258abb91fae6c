"""A served model as the router sees it: its manifest, its tokenizer and its chat template; never its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from router.chat import ChatTemplate
from router.tokenizer import Tokenizer
from workers.errors import ModelFileError
from workers.types import ModelFiles, ModelManifest


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """What a router is told of a model that it is to serve."""

    name: str
    """What requests call it."""
    files: str
    """Under which `Boot` finds its files."""
    group: str
    """Under which its replicas are published (router/membership.py)."""
    max_model_len: int = 0
    """That of the engines' configuration; 0: the manifest's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    manifest: ModelManifest
    """The file's, but for `name`, which is what requests call it, and `max_model_len`, which is what the replicas'
    engines are set up for."""
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None = None

    @classmethod
    def from_files(cls, files: ModelFiles, *, name: str = "", max_model_len: int = 0) -> ServedModel:
        """Open all but the weights, blocking; `max_model_len` as in `ModelSource`, `name` too unless it is empty.

        Raises ModelFileError for a file that is missing or unreadable.
        """
        try:
            manifest = ModelManifest.from_json(_read(files.manifest))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ModelFileError(f"{files.manifest} is not a manifest of a model: {error}") from error
        manifest = dataclasses.replace(
            manifest, name=name or manifest.name, max_model_len=max_model_len or manifest.max_model_len
        )
        tokenizer = Tokenizer.from_file(files.tokenizer_json)
        template = None
        if files.chat_template is not None:
            template = ChatTemplate(_read(files.chat_template), special_tokens=_special_tokens(manifest, tokenizer))
        return cls(manifest=manifest, tokenizer=tokenizer, chat_template=template)


@dataclass(frozen=True, slots=True)
class UnservedModel:
    """A model that this router should serve and cannot, while it serves others."""

    failure: str
    """Why, in words."""


Models: TypeAlias = Mapping[str, ServedModel | UnservedModel]
"""By the names that requests call them. What is unserved may become served."""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(f"cannot read {path}: {error}") from error


def _special_tokens(manifest: ModelManifest, tokenizer: Tokenizer) -> dict[str, str]:
    """The tokens that templates write by name. A model without a beginning of text has an empty one."""
    eos_token_id = manifest.eos_token_ids[0] if manifest.eos_token_ids else None
    return {
        "bos_token": tokenizer.token(manifest.bos_token_id) or "",
        "eos_token": tokenizer.token(eos_token_id) or "",
    }
