"""The directory that vLLM reads a model from.

It reads directories in Hugging Face's form. A GGUF file is written as one first, into the model's cache on this node,
once for each precision: in fp32, which keeps its weights as they are, or rounded to bf16, which takes half of the room.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from workers.errors import ModelFileError
from workers.types import ModelFiles


def has_tokenizer(model: Path) -> bool:
    return (model / "tokenizer.json").exists()


def directory_of(files: ModelFiles, dtype: str) -> Path:
    """Return the model's own directory, or one made of its file; with `dtype` "fp32" nothing is rounded.

    Raises ModelFileError.
    """
    if files.weights.is_dir():
        return files.weights
    if files.packed is None:
        raise ModelFileError(
            f"{files.weights}: vLLM reads directories, and there is no place for one made of this file"
        )
    is_exact = dtype == "fp32"
    target = files.packed / ("huggingface-ends-fp32" if is_exact else "huggingface-ends-bf16")
    if not (target / "config.json").exists():
        _write_directory(files.weights, target, is_exact=is_exact)
    return target


def _write_directory(gguf: Path, target: Path, *, is_exact: bool) -> None:
    """Write a GGUF file as a directory, whole or not at all, whoever else does the same. Raises ModelFileError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix="huggingface.", dir=target.parent))
    try:
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        described = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
        plain = type(model)(type(model.config)(**described))
        plain.load_state_dict(model.state_dict())
        plain.to(torch.float32 if is_exact else torch.bfloat16).save_pretrained(made)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        name_end(tokenizer, model.config.eos_token_id)
        tokenizer.save_pretrained(made)
        made.rename(target)
    except OSError:
        if not (target / "config.json").exists():
            raise
    except Exception as error:
        raise ModelFileError(f"{gguf}: could not be written as a directory for vLLM: {error}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def name_end(tokenizer: Any, ids: int | list[int] | None) -> None:
    """Tell a tokenizer that was read from a GGUF file, and does not know it, which token ends an answer.

    vLLM 0.26 and 0.27 let an answer of a shape end with this token alone. Without it they take one by its name, and
    where a request does not stop at that, its answer fails right after its end ("grammar rejected tokens").
    """
    if tokenizer.eos_token_id is None and ids is not None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[0] if isinstance(ids, list) else ids)
