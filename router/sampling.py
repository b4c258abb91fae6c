"""The wire's `Sampling` to `SamplingParams`: its rules, and its defaults."""

from __future__ import annotations

import json
import math
import random

from octavo.names import Reason
from octavo.v1.types_pb2 import ResponseFormat, Sampling

from router.model import ServedModel
from router.violations import Violations
from workers.types import SamplingParams

MAX_LOGIT_BIASES = 1_024
MAX_LOGIT_BIAS = 100.0
MAX_FORMAT_BYTES = 65_536
_seeds = random.Random()  # repeatable by nobody, but no secret

_RULES = (
    ("temperature", 0.0, math.inf, "must be finite and >= 0"),
    ("top_p", math.ulp(0.0), 1.0, "must be in (0, 1]"),
    ("min_p", 0.0, 1.0, "must be in [0, 1]"),
    ("repetition_penalty", math.ulp(0.0), math.inf, "must be finite and > 0"),
    ("presence_penalty", -2.0, 2.0, "must be in [-2, 2]"),
    ("frequency_penalty", -2.0, 2.0, "must be in [-2, 2]"),
)


def check_sampling(sampling: Sampling, model: ServedModel, violations: Violations) -> None:
    for name, lowest, highest, rule in _RULES:
        if sampling.HasField(name):  # type: ignore[arg-type]  # one of the names above
            value: float = getattr(sampling, name)
            holds = math.isfinite(value) and lowest <= value <= highest
            violations.require(holds, f"sampling.{name}", rule, value)
    violations.require(sampling.top_k >= 0, "sampling.top_k", "must be >= 0", sampling.top_k)
    _check_logit_bias(sampling, model, violations)


def _check_logit_bias(sampling: Sampling, model: ServedModel, violations: Violations) -> None:
    count = len(sampling.logit_bias)
    if not count:
        return
    rule = f"must have at most {MAX_LOGIT_BIASES} entries"
    violations.require(count <= MAX_LOGIT_BIASES, "sampling.logit_bias", rule, count)
    if count > MAX_LOGIT_BIASES:
        return
    vocab_size = model.manifest.vocab_size
    for token_id, bias in sorted(sampling.logit_bias.items()):
        field = f"sampling.logit_bias[{token_id}]"
        rule = f"must be for an id in [0, {vocab_size}), the model's vocabulary"
        violations.require(token_id < vocab_size, field, rule, token_id, reason=Reason.TOKEN_ID_OUT_OF_RANGE)
        holds = -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS
        violations.require(holds, field, f"must be in [-{MAX_LOGIT_BIAS:g}, {MAX_LOGIT_BIAS:g}]", bias)


def check_format(asked: ResponseFormat, violations: Violations) -> None:
    """Whether the engine can hold an answer to it is the engine's to say."""
    kind = asked.WhichOneof("format")
    violations.require(kind is not None, "response_format", "must have one of its fields", "none")
    if kind in (None, "json_object"):
        return
    field, text = f"response_format.{kind}", getattr(asked, kind)
    size = len(text.encode())
    violations.require(1 <= size <= MAX_FORMAT_BYTES, field, f"must have 1 to {MAX_FORMAT_BYTES} bytes", size)
    if kind == "json_schema" and size <= MAX_FORMAT_BYTES:
        violations.require(_is_schema(text), field, "must be a JSON object or a boolean", text[:40])


def _is_schema(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | bool)
    except (ValueError, RecursionError):
        return False


def make_sampling(sampling: Sampling, asked: ResponseFormat | None = None) -> SamplingParams:
    """Return what `check_sampling` and `check_format` found nothing against, with every default filled in."""
    kind = None if asked is None else asked.WhichOneof("format")
    return SamplingParams(
        temperature=sampling.temperature if sampling.HasField("temperature") else 1.0,
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed if sampling.HasField("seed") else _seeds.getrandbits(64),
        logit_bias=dict(sampling.logit_bias),
        format=None if kind is None else (kind, "" if kind == "json_object" else getattr(asked, kind)),
    )
