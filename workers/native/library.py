"""The C library beside this file, through ctypes: the structures of octavo.h, field by field, and its functions.

`setup` compiles it where there is a compiler; without it the engine computes with torch. Calls release the GIL. Nothing
here checks sizes: what is handed over must be what octavo.h says, and must live until the call, or the context, ends.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_void_p
from pathlib import Path

ABI = 1
EXACT, INT8 = 0, 1
"""enum octavo_arithmetic."""
CACHE_F32, CACHE_F16 = 0, 1
"""enum octavo_cache_type."""
NOT_THERE = -2
"""What octavo_run returns for a token that the model, or a block that the cache has not."""

_log = logging.getLogger(__name__)


class Matrix(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("bias", c_void_p),
        ("format", c_int32),
        ("outputs", c_int32),
        ("inputs", c_int32),
    ]


class Layer(Structure):
    _fields_ = [
        ("attention_norm", c_void_p),
        ("ffn_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("qkv", Matrix),
        ("output", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
    ]


class Model(Structure):
    _fields_ = [
        ("hidden", c_int32),
        ("num_layers", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("ffn", c_int32),
        ("vocab", c_int32),
        ("arithmetic", c_int32),
        ("norm_eps", c_float),
        ("norm", c_void_p),
        ("frequencies", c_void_p),
        ("embedding", Matrix),
        ("head", Matrix),
        ("layers", POINTER(Layer)),
    ]


class Cache(Structure):
    _fields_ = [("data", c_void_p), ("type", c_int32), ("num_blocks", c_int32), ("block_size", c_int32)]


class Chunk(Structure):
    _fields_ = [("first", c_int32), ("count", c_int32), ("start", c_int32), ("table", c_int32)]


class Step(Structure):
    _fields_ = [
        ("num_rows", c_int32),
        ("num_chunks", c_int32),
        ("num_sampling", c_int32),
        ("tokens", c_void_p),
        ("chunks", c_void_p),
        ("tables", c_void_p),
        ("sampling", c_void_p),
        ("logits", c_void_p),
        ("best", c_void_p),
    ]


_FUNCTIONS: dict[str, tuple[type | None, list[type]]] = {
    "octavo_abi": (c_int32, []),
    "octavo_instructions": (c_char_p, []),
    "octavo_open": (c_void_p, [POINTER(Model), POINTER(Cache), c_int32]),
    "octavo_run": (c_int32, [c_void_p, POINTER(Step)]),
    "octavo_close": (None, [c_void_p]),
    "octavo_linear": (c_int32, [c_int32, POINTER(Matrix), c_int32, c_void_p, c_int32, c_int32, c_void_p]),
    "octavo_attention": (
        c_int32,
        [c_int32, POINTER(Model), POINTER(Cache), POINTER(Step), c_int32, c_void_p, c_void_p],
    ),
    "octavo_elementwise": (None, [c_int32, c_int32, c_void_p, c_void_p, c_float, c_int32, c_void_p]),
    "octavo_round_row": (None, [c_int32, c_void_p, c_int32, c_void_p, c_void_p, c_void_p]),
    "octavo_argmax": (c_int32, [c_int32, c_void_p, c_int32]),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the library, or None where it was not built or is of another version than this file."""
    for path in sorted(Path(__file__).parent.glob("_kernels*.so")):
        try:
            found = ctypes.CDLL(str(path))
            for name, (result, arguments) in _FUNCTIONS.items():
                function = getattr(found, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            _log.warning("%s cannot be used: %s", path.name, error)
            continue
        if found.octavo_abi() == ABI:
            return found
        _log.warning("%s has ABI %d instead of %d: run setup again", path.name, found.octavo_abi(), ABI)
    return None


def instructions() -> str:
    """Return the instruction set that the library uses here; "" without a library."""
    found = library()
    return "" if found is None else found.octavo_instructions().decode()
