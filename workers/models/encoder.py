"""Models that turn a text into numbers, through transformers: embeddings of any encoder or decoder, and its heads.

    embed      rows of all sequences one after the other, without padding: each attends to its own through `interface`.
               A model whose code does not come to the same so (a few tokens tell) is computed as those with heads are
    classify   sequences in the order of their lengths, padded to their group's longest, by transformers alone

Owns the module. Knows token ids; what is done first is the engine's to say.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize, scaled_dot_product_attention

from workers.errors import CapabilityError, ModelFileError
from workers.models.interface import IMPLEMENTATION, Calls, LayerCall
from workers.models.probe import probe_tokens
from workers.models.transformers_loading import open_module
from workers.types import CAPABILITY_CLASSIFY, CAPABILITY_EMBED, CLASSIFY, PoolWork
from workers.weights.directory import read_json
from workers.weights.generic_shape import first_position_of

METHODS = ("cls", "mean", "max", "last")
MAX_PADDING = 1 / 8
"""Of a group's rows."""
HEADS = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
}
IDENTITY = "torch.nn.modules.linear.Identity"
MAX_FLAT_ERROR = 1e-3

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PoolingDefaults:
    """What the files of sentence-transformers beside a model say; mean and plain without them."""

    method: str = "mean"
    normalizes: bool = False

    @classmethod
    def of(cls, directory: Path) -> PoolingDefaults:
        """Raises ModelFileError for steps that are not served."""
        path = directory / "modules.json"
        if not path.exists():
            return cls()
        modules: Any = json.loads(path.read_text())
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        if others := sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"}):
            raise ModelFileError(f"{path}: has modules of type {', '.join(others)}, which are not served")
        method = "mean"
        for kind, module in zip(kinds, modules, strict=True):
            if kind == "Pooling":
                method = _method_of(read_json(directory / module["path"] / "config.json"))
        return cls(method, "Normalize" in kinds)


def _method_of(config: dict[str, Any]) -> str:
    names = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "last": "lasttoken"}
    said = [method for method, name in names.items() if config.get(f"pooling_mode_{name}")]
    others = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    if isinstance(config.get("pooling_mode"), str):
        said = others = [str(config["pooling_mode"])]
    if len(said) != 1 or len(others) != 1 or said[0] not in METHODS:
        raise ModelFileError(f"the model's own pooling must be one of {', '.join(METHODS)}, is {others}")
    return said[0]


class EncoderModel:
    """The model in `directory`. Raises ModelFileError."""

    kernels = "transformers"
    dtype_name = "fp32"

    def __init__(self, directory: Path, architecture: str) -> None:
        head = next((auto for end, auto in HEADS.items() if architecture.endswith(end)), None)
        self.has_head = head is not None
        self._defaults = PoolingDefaults() if head else PoolingDefaults.of(directory)
        self._module = open_module(directory, head or "AutoModel", torch.float32, attn_implementation="sdpa")
        self._config = self._module.config
        self._parameters = inspect.signature(self._module.forward).parameters
        self._first_position = first_position_of(self._config.to_dict())
        self._calls = Calls()
        self._activation = self._choose_activation() if head else torch.nn.Identity()
        self.is_flat = not self.has_head and self._try_flat()
        """Whether sequences are computed without any padding."""
        self.vocab_size: int = self._config.get_text_config().vocab_size

    @property
    def capabilities(self) -> frozenset[str]:
        return frozenset({CAPABILITY_CLASSIFY if self.has_head else CAPABILITY_EMBED})

    @torch.inference_mode()
    def pool(self, works: Sequence[PoolWork]) -> list[tuple[float, ...]]:
        """Return the numbers of each work, in their order. Raises CapabilityError for what this model does not do."""
        if any((work.method == CLASSIFY) != self.has_head for work in works):
            raise CapabilityError(f"this model does {'not embed' if self.has_head else 'not classify'}")
        order = sorted(range(len(works)), key=lambda i: len(works[i].tokens))
        found: list[tuple[float, ...]] = [()] * len(works)
        if self.is_flat:
            ordered = [works[i] for i in order]
            for i, vector in zip(order, self._embed(ordered, self._flat_rows(ordered)), strict=True):
                found[i] = vector
            return found
        for group in self._groups(order, works):
            chosen = [works[i] for i in group]
            output = self._padded(chosen)
            vectors = self._classified(chosen, output) if self.has_head else self._embed(chosen, output)
            for i, vector in zip(group, vectors, strict=True):
                found[i] = vector
        return found

    # Without padding.

    def _flat_rows(self, works: Sequence[PoolWork]) -> torch.Tensor:
        """Return the last hidden states [rows, hidden], of one work after the other, the shortest first."""
        lengths = [len(work.tokens) for work in works]
        positions = torch.cat([torch.arange(length) for length in lengths]) + self._first_position
        given: dict[str, Any] = {"input_ids": torch.tensor([token for work in works for token in work.tokens])[None]}
        if "position_ids" in self._parameters:
            given["position_ids"] = positions[None]
        if "use_cache" in self._parameters:
            given["use_cache"] = False
        if "token_type_ids" in self._parameters:
            given["token_type_ids"] = torch.cat([_segments(work) for work in works])[None]
        with self._calls.during(_FlatStep(lengths, self._is_causal)):
            rows: torch.Tensor = self._module(**given).last_hidden_state[0]
        return rows

    @torch.inference_mode()
    def _try_flat(self) -> bool:
        """Set the module up for `_flat_rows`; return whether that gives what transformers gives alone."""
        tokens = probe_tokens(self._config.get_text_config().vocab_size)
        works = [_probe_work(ids) for ids in reversed(tokens)]
        plain = torch.cat([self._padded([work]) for work in works])
        layers: list[LayerCall] = []
        self._calls.bind(self._module)
        self._calls.on_call = layers.append
        self._is_causal = bool(getattr(self._config, "is_decoder", False))
        try:
            self._module.set_attn_implementation(IMPLEMENTATION)
            self._flat_rows(works)
            self._is_causal = bool(layers) and all(layer.is_causal for layer in layers)
            is_plain = not any(layer.extras or layer.window for layer in layers)
            difference = (self._flat_rows(works) - plain).abs().max().item()
            if layers and is_plain and difference <= MAX_FLAT_ERROR * max(1.0, plain.abs().max().item()):
                return True
        except Exception as error:  # of any kind: code of others, and there is another way
            _log.info("this model does not take texts side by side (%r): it gets them padded", error)
        finally:
            self._calls.on_call = lambda call: None
        self._module.set_attn_implementation("sdpa")
        return False

    def _embed(self, works: Sequence[PoolWork], rows: torch.Tensor) -> Iterator[tuple[float, ...]]:
        """`rows`: of one work after the other."""
        methods = [self._defaults.method if work.method == "model" else work.method for work in works]
        lengths = torch.tensor([len(work.tokens) for work in works])
        ends = lengths.cumsum(0)
        starts = ends - lengths
        pooled = {method: _POOL[method](rows, starts, ends, lengths) for method in set(methods)}
        unit = {method: normalize(vectors, dim=-1).tolist() for method, vectors in pooled.items()}
        plain = {method: vectors.tolist() for method, vectors in pooled.items()}
        for i, (work, method) in enumerate(zip(works, methods, strict=True)):
            normalizes = self._defaults.normalizes if work.normalize is None else work.normalize
            yield tuple((unit if normalizes else plain)[method][i])

    # With padding.

    def _groups(self, order: Sequence[int], works: Sequence[PoolWork]) -> Iterator[list[int]]:
        """Cut `order`, by length, into groups of which little is padding; without a padding token, of none."""
        limit = 0.0 if self._config.pad_token_id is None else MAX_PADDING
        group: list[int] = []
        total = 0
        for i in order:
            length = len(works[i].tokens)
            if group and (len(group) + 1) * length - (total + length) > limit * (len(group) + 1) * length:
                yield group
                group, total = [], 0
            group.append(i)
            total += length
        if group:
            yield group

    def _padded(self, works: Sequence[PoolWork]) -> torch.Tensor:
        """Return hidden states [rows, hidden] of one work after the other; with a head, what that says [works, ...]."""
        longest = max(len(work.tokens) for work in works)
        pad = self._config.pad_token_id or 0
        ids = torch.tensor([[*work.tokens, *[pad] * (longest - len(work.tokens))] for work in works])
        mask = torch.tensor([[1] * len(work.tokens) + [0] * (longest - len(work.tokens)) for work in works])
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if "use_cache" in self._parameters:
            given["use_cache"] = False
        if "token_type_ids" in self._parameters:
            given["token_type_ids"] = torch.nn.utils.rnn.pad_sequence([_segments(w) for w in works], batch_first=True)
        output = self._module(**given)
        if self.has_head:
            logits: torch.Tensor = output.logits
            return logits
        rows: torch.Tensor = output.last_hidden_state[mask.bool()]
        return rows

    def _classified(self, works: Sequence[PoolWork], logits: torch.Tensor) -> Iterator[tuple[float, ...]]:
        scores = self._activation(logits)
        for i, work in enumerate(works):
            own = (scores if work.normalize else logits)[i]
            yield tuple((own[: len(work.tokens)].flatten() if own.dim() > 1 else own).tolist())

    def _choose_activation(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return what makes scores of logits: what the model's configuration says to sentence-transformers, else the
        logistic function for one label or several that may be true together, and softmax."""
        config = self._config
        own = (getattr(config, "sentence_transformers", None) or {}).get("activation_fn")
        own = own or getattr(config, "sbert_ce_default_activation_function", None)
        if own == IDENTITY:
            return torch.nn.Identity()
        is_logistic = config.num_labels == 1 or config.problem_type == "multi_label_classification"
        return torch.nn.Sigmoid() if is_logistic else torch.nn.Softmax(-1)


class _FlatStep:
    """Attention within sequences of `lengths` rows, in this order, the shortest first; those of one length at once."""

    def __init__(self, lengths: Sequence[int], is_causal: bool) -> None:
        self._runs = [(length, len(list(run))) for length, run in groupby(lengths)]
        self._is_causal = is_causal

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        mixed = torch.empty(query.shape[1], query.shape[0], value.shape[-1])
        start = 0
        for length, number in self._runs:
            end = start + length * number
            queries, keys, values = (
                heads[:, start:end].reshape(len(heads), number, length, -1).transpose(0, 1)
                for heads in (query, key, value)
            )
            output = scaled_dot_product_attention(
                queries, keys, values, is_causal=self._is_causal, scale=scale, enable_gqa=True
            )
            mixed[start:end] = output.transpose(1, 2).flatten(0, 1)
            start = end
        return mixed


def _segments(work: PoolWork) -> torch.Tensor:
    """Return [tokens]: 1 for those of the second text of a pair."""
    segments = torch.zeros(len(work.tokens), dtype=torch.int64)
    if work.num_first_tokens:
        segments[work.num_first_tokens :] = 1
    return segments


def _probe_work(tokens: list[int]) -> PoolWork:
    from workers.types import WorkId

    return PoolWork(work_id=WorkId("probe", 0), tokens=tokens)


_Pool = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
_POOL: dict[str, _Pool] = {
    "cls": lambda rows, starts, ends, lengths: rows[starts],
    "last": lambda rows, starts, ends, lengths: rows[ends - 1],
    "mean": lambda rows, starts, ends, lengths: torch.segment_reduce(rows, "mean", lengths=lengths, axis=0),
    "max": lambda rows, starts, ends, lengths: torch.segment_reduce(rows, "max", lengths=lengths, axis=0),
}
