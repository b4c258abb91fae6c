"""GenerateRequest to `Request`: every rule that a request must keep, so that nobody downstream checks anything again.

All violations of one request are reported together, each with its field, the rule and the value. A field that no engine
of this release serves is refused with its name (NotServedError), never ignored. Defaults are filled in here. Knows
neither calls nor Sessions; what came beside the message is in its `Envelope`.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from octavo.names import Reason
from octavo.v1.inference_service_pb2 import GenerateRequest
from octavo.v1.types_pb2 import TRUNCATE_NONE, TRUNCATE_UNSPECIFIED, ChatMessage, Prompt

from router.config import RouterConfig
from router.identity import ANYBODY, Identity
from router.model import ServedModel
from router.tokenizer import MAX_INLINE_CHARACTERS
from router.types import Request
from workers.errors import CapabilityError, InvalidRequestError, NotFoundError, NotServedError, OctavoError, Violation
from workers.types import SamplingParams

MAX_ID_BYTES = 128
MAX_STOP_TOKEN_IDS = 256
MAX_PRIORITY = 100
MAX_MESSAGES = 4_096
"""In one conversation, and parts of messages in it; looking at more would hold up everybody else's requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What came with a GenerateRequest: in the call's metadata for Generate, in its Start for Session."""

    request_id: str
    accepted_at: float
    deadline: float
    """Both on ``time.monotonic``, in seconds."""
    identity: Identity = ANYBODY
    traceparent: str = ""
    tracestate: str = ""
    is_session: bool = False


class Accepted(NamedTuple):
    request: Request
    model: ServedModel
    stops: tuple[str, ...]


class Violations:
    """Collects what is wrong with one request."""

    def __init__(self) -> None:
        self._invalid: list[Violation] = []
        self._not_served: list[Violation] = []
        self._reasons: set[str] = set()

    def require(self, holds: bool, field: str, rule: str, value: object, *, reason: str = Reason.INVALID_FIELD) -> None:
        if not holds:
            self._invalid.append(Violation(field, f"{rule}, is {shown(value)}"))
            self._reasons.add(reason)

    def serve(self, is_served: bool, field: str, what: str = "") -> None:
        if not is_served:
            self._not_served.append(Violation(field, f"{what or 'this field'} is not served by this release"))

    @property
    def count(self) -> int:
        return len(self._invalid) + len(self._not_served)

    def error(self) -> OctavoError | None:
        """Return what to raise. A broken rule weighs more than a field that is not served; all are listed."""
        violations = [*self._invalid, *self._not_served]
        if not violations:
            return None
        message = "; ".join(f"{field}: {description}" for field, description in violations)
        if not self._invalid:
            return NotServedError(message, violations=violations)
        reason = self._reasons.pop() if len(self._reasons) == 1 else Reason.INVALID_FIELD
        return InvalidRequestError(message, reason=reason, violations=violations)

    def raise_if_any(self) -> None:
        error = self.error()
        if error is not None:
            raise error


class Validator:
    """Checks requests for the models that one router serves."""

    def __init__(self, config: RouterConfig, models: Mapping[str, ServedModel]) -> None:
        self._config = config
        self._models = models

    def is_quick(self, message: GenerateRequest) -> bool:
        """Whether `accept` will do without suspending."""
        prompt = message.prompt
        return not prompt.HasField("messages") and len(prompt.text) <= MAX_INLINE_CHARACTERS

    async def accept(self, message: GenerateRequest, envelope: Envelope, *, traceparent: str) -> Accepted:
        """Return the valid request. `traceparent`: of the span that the back's spans shall belong to.

        Raises NotFoundError, InvalidRequestError, NotServedError or CapabilityError.
        """
        name, model = self.model(message.model)
        violations = Violations()
        self._check_fields(message, envelope, model, violations)
        check_sampling(message, violations)
        _check_not_served(message, violations)
        prompt = await self.prompt_ids(model, message.prompt, violations)
        max_tokens = self._check_length(message, prompt, model, violations)
        violations.raise_if_any()
        eos_token_ids = () if message.ignore_eos else model.manifest.eos_token_ids
        request = Request(
            request_id=envelope.request_id,
            model=name,
            prompt=prompt,
            sampling=_sampling(message),
            max_tokens=max_tokens,
            stop_token_ids=frozenset((*eos_token_ids, *message.stop_token_ids)),
            priority=message.priority,
            affinity_key=message.affinity_key,
            tenant=envelope.identity.tenant,
            salt=envelope.identity.salt,
            deadline=envelope.deadline,
            accepted_at=envelope.accepted_at,
            traceparent=traceparent,
            tracestate=envelope.tracestate,
        )
        return Accepted(request, model, tuple(message.stop))

    def model(self, name: str) -> tuple[str, ServedModel]:
        """Return a served model. Raises NotFoundError, or NotServedError for an adapter."""
        if not name and len(self._models) == 1:
            return next(iter(self._models.items()))
        model = self._models.get(name)
        if model is not None:
            return name, model
        base, _, adapter = name.rpartition(":")
        if base in self._models:
            raise NotServedError(
                f"model: adapters are not served by this release, asked for {shown(adapter)} of {base}",
                violations=[Violation("model", f"adapters are not served by this release, is {shown(name)}")],
            )
        served = ", ".join(sorted(self._models)) or "none"
        rule = f"must be one of the served models ({served})"
        raise NotFoundError(
            f"model: {rule}, is {shown(name)}",
            reason=Reason.MODEL_NOT_FOUND,
            violations=[Violation("model", f"{rule}, is {shown(name)}")],
        )

    async def prompt_ids(self, model: ServedModel, prompt: Prompt, violations: Violations) -> list[int]:
        """Return the token ids of `prompt`; empty where `violations` says why. Raises CapabilityError for messages to
        a model without a chat template."""
        known_before = violations.count
        field = "prompt"
        ids: list[int] = []
        match prompt.WhichOneof("prompt"):
            case "token_ids":
                field = "prompt.token_ids"
                if not _has_too_many(len(prompt.token_ids.ids), model, field, violations):
                    ids = list(prompt.token_ids.ids)
            case "text":
                if not _is_surely_too_long(prompt.text, model, "prompt.text", violations):
                    ids = await model.tokenizer.encode_text(prompt.text)
            case "messages":
                ids = await self._message_ids(model, prompt.messages.messages, violations)
        if violations.count == known_before:
            rule = "must have at least one token, as text, token ids or messages"
            violations.require(bool(ids), "prompt", rule, "empty", reason=Reason.EMPTY_PROMPT)
            check_token_ids(ids, field, model, violations)
        return ids

    async def _message_ids(
        self, model: ServedModel, messages: Sequence[ChatMessage], violations: Violations
    ) -> list[int]:
        if model.chat_template is None:
            raise CapabilityError(
                f"prompt.messages: {model.manifest.name} has no chat template; send text or token ids",
                violations=[Violation("prompt.messages", f"{model.manifest.name} has no chat template")],
            )
        known_before = violations.count
        plain = _plain_messages(messages, violations)
        if violations.count > known_before:
            return []
        return await asyncio.to_thread(_render, model, plain, violations)

    def _check_fields(
        self, message: GenerateRequest, envelope: Envelope, model: ServedModel, violations: Violations
    ) -> None:
        config = self._config
        check = violations.require
        if message.HasField("max_tokens"):
            check(message.max_tokens >= 1, "max_tokens", "must be >= 1", message.max_tokens)
        check(
            len(message.stop) <= config.max_stop_strings,
            "stop",
            f"must have at most {config.max_stop_strings} strings",
            len(message.stop),
        )
        rule = f"must have 1 to {config.max_stop_bytes} bytes"
        for i, stop in enumerate(message.stop[: config.max_stop_strings + 1]):
            size = len(stop.encode())
            check(1 <= size <= config.max_stop_bytes, f"stop[{i}]", rule, size)
        check(
            len(message.stop_token_ids) <= MAX_STOP_TOKEN_IDS,
            "stop_token_ids",
            f"must have at most {MAX_STOP_TOKEN_IDS} ids",
            len(message.stop_token_ids),
        )
        check_token_ids(message.stop_token_ids[:MAX_STOP_TOKEN_IDS], "stop_token_ids", model, violations)
        in_range = -MAX_PRIORITY <= message.priority <= MAX_PRIORITY
        check(in_range, "priority", f"must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}]", message.priority)
        size = len(message.affinity_key.encode())
        check(size <= MAX_ID_BYTES, "affinity_key", f"must have at most {MAX_ID_BYTES} bytes", size)
        own_id = message.client_request_id
        if not envelope.is_session:
            size = len(own_id.encode())
            check(size <= MAX_ID_BYTES, "client_request_id", f"must have at most {MAX_ID_BYTES} bytes", size)
        elif own_id not in ("", envelope.request_id):
            rule = f"must be empty or equal to Start.request_id ({shown(envelope.request_id)})"
            check(False, "client_request_id", rule, own_id)

    def _check_length(
        self, message: GenerateRequest, prompt: list[int], model: ServedModel, violations: Violations
    ) -> int:
        """Return max_tokens with its default filled in."""
        limit = model.manifest.max_model_len
        left = limit - len(prompt)
        rule = f"must have at most {limit - 1} tokens (the model's context is {limit})"
        violations.require(left >= 1, "prompt", rule, f"{len(prompt)} tokens", reason=Reason.PROMPT_TOO_LONG)
        if not message.HasField("max_tokens"):
            return max(1, min(self._config.default_max_tokens, left))
        if 1 <= left < limit:
            rule = f"prompt ({len(prompt)} tokens) + max_tokens must be <= {limit}, the model's context"
            violations.require(
                message.max_tokens <= left, "max_tokens", rule, message.max_tokens, reason=Reason.PROMPT_TOO_LONG
            )
        return message.max_tokens


def check_sampling(message: GenerateRequest, violations: Violations) -> None:
    sampling = message.sampling
    rules = (
        ("temperature", 0.0, math.inf, "must be finite and >= 0"),
        ("top_p", math.ulp(0.0), 1.0, "must be in (0, 1]"),
        ("min_p", 0.0, 1.0, "must be in [0, 1]"),
        ("repetition_penalty", math.ulp(0.0), math.inf, "must be finite and > 0"),
        ("presence_penalty", -2.0, 2.0, "must be in [-2, 2]"),
        ("frequency_penalty", -2.0, 2.0, "must be in [-2, 2]"),
    )
    for name, lowest, highest, rule in rules:
        if sampling.HasField(name):  # type: ignore[arg-type]  # one of the names above
            value: float = getattr(sampling, name)
            holds = math.isfinite(value) and lowest <= value <= highest
            violations.require(holds, f"sampling.{name}", rule, value)
    violations.require(sampling.top_k >= 0, "sampling.top_k", "must be >= 0", sampling.top_k)


def _sampling(message: GenerateRequest) -> SamplingParams:
    sampling = message.sampling
    return SamplingParams(
        temperature=sampling.temperature if sampling.HasField("temperature") else 1.0,
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        seed=sampling.seed if sampling.HasField("seed") else secrets.randbits(64),
    )


def _check_not_served(message: GenerateRequest, violations: Violations) -> None:
    for field in ("n", "best_of"):
        if message.HasField(field):
            value: int = getattr(message, field)
            violations.require(value >= 1, field, "must be >= 1", value)
            violations.serve(value <= 1, field, f"{field} > 1 (is {value})")
    violations.require(message.min_tokens >= 0, "min_tokens", "must be >= 0", message.min_tokens)
    violations.serve(message.min_tokens <= 0, "min_tokens")
    violations.serve(not message.HasField("logprobs"), "logprobs")
    violations.serve(not message.sampling.logit_bias, "sampling.logit_bias")
    violations.serve(not message.received_token_ids, "received_token_ids")
    violations.serve(
        message.truncate in (TRUNCATE_UNSPECIFIED, TRUNCATE_NONE), "truncate", "any value other than TRUNCATE_NONE"
    )
    violations.serve(not message.HasField("response_format"), "response_format")


def check_token_ids(token_ids: Sequence[int], field: str, model: ServedModel, violations: Violations) -> None:
    vocab_size = model.manifest.vocab_size
    if token_ids and max(token_ids) >= vocab_size:
        i, value = next((i, value) for i, value in enumerate(token_ids) if value >= vocab_size)
        rule = f"must be in [0, {vocab_size}), the model's vocabulary"
        violations.require(False, f"{field}[{i}]", rule, value, reason=Reason.TOKEN_ID_OUT_OF_RANGE)


def _is_surely_too_long(text: str, model: ServedModel, field: str, violations: Violations) -> bool:
    """Whether `text` needs no tokenizing to be refused: the time that takes would be the client's to spend."""
    return _has_too_many(model.tokenizer.min_tokens(text), model, field, violations, or_more=" or more")


def _has_too_many(
    num_tokens: int, model: ServedModel, field: str, violations: Violations, *, or_more: str = ""
) -> bool:
    limit = model.manifest.max_model_len
    if num_tokens < limit:
        return False
    rule = f"must have at most {limit - 1} tokens (the model's context is {limit})"
    violations.require(False, field, rule, f"{num_tokens} tokens{or_more}", reason=Reason.PROMPT_TOO_LONG)
    return True


def _plain_messages(messages: Sequence[ChatMessage], violations: Violations) -> list[dict[str, str]]:
    plain = []
    violations.require(
        len(messages) > 0, "prompt.messages", "must have at least one message", 0, reason=Reason.EMPTY_PROMPT
    )
    num_parts = sum(max(1, len(message.content)) for message in messages[: MAX_MESSAGES + 1])
    if num_parts > MAX_MESSAGES:
        rule = f"must have at most {MAX_MESSAGES} messages and parts of messages"
        violations.require(False, "prompt.messages", rule, max(len(messages), num_parts))
        return []
    for i, message in enumerate(messages):
        field = f"prompt.messages[{i}]"
        violations.require(message.role != "", f"{field}.role", "must not be empty", "")
        violations.serve(not message.tool_calls, f"{field}.tool_calls")
        violations.serve(not message.tool_call_id, f"{field}.tool_call_id")
        for j, part in enumerate(message.content):
            violations.require(part.HasField("text"), f"{field}.content[{j}]", "must be text", "absent")
        plain.append({"role": message.role, "content": "".join(part.text for part in message.content)})
    return plain


def _render(model: ServedModel, messages: list[dict[str, str]], violations: Violations) -> list[int]:
    """Render and tokenize, blocking. The template writes the special tokens itself."""
    assert model.chat_template is not None
    try:
        text = model.chat_template.render(messages)
    except InvalidRequestError as error:
        raise InvalidRequestError(str(error), violations=[Violation("prompt.messages", str(error.args[0]))]) from error
    if _is_surely_too_long(text, model, "prompt.messages", violations):
        return []
    return model.tokenizer.encode(text, add_special_tokens=False)


def shown(value: object) -> str:
    """Return a value for a message: short, and in ASCII."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
