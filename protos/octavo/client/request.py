"""Python arguments to a GenerateRequest. Knows which shapes the wire can carry; the rules are the router's to check.

What cannot be put on the wire (a negative token id, a message without a role) is an `InvalidArgumentError` with the
field, as it would be had the router seen it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypedDict

from octavo.client.errors import FieldViolation, InvalidArgumentError
from octavo.names import Reason
from octavo.v1 import inference_service_pb2 as pb
from octavo.v1 import types_pb2


class Message(TypedDict):
    """One turn of a conversation: role "system", "user" or "assistant", or what else the model's template knows."""

    role: str
    content: str


Prompt: TypeAlias = str | Sequence[int] | Sequence[Message] | Sequence[Mapping[str, str]]
"""Text, token ids, or a conversation that the router renders with the model's chat template."""


class GenerateOptions(TypedDict, total=False):
    """How to generate. What is left out has the router's default; the rules are in octavo/v1/types.proto."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    logit_bias: Mapping[int, float]
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    n: int
    best_of: int
    logprobs: int
    priority: int
    affinity_key: str
    response_format: Mapping[str, object]
    """What shape the answer must have, one of {"json_object": True}, {"json_schema": SCHEMA} (as text or as a dict),
    {"regex": TEXT} and {"grammar": TEXT}. Of engines that can hold answers to one."""
    received_token_ids: Sequence[Sequence[int]]
    """Per choice, tokens of an interrupted answer: the answer continues after them, and brings what follows only; of a
    choice that had ended, its finish."""


MAX_TIMEOUT_S = 10**9
"""Far beyond every request, and within what a Duration holds."""

_SAMPLING_FIELDS = frozenset(types_pb2.Sampling.DESCRIPTOR.fields_by_name)


def make_request(prompt: Prompt, *, model: str, options: GenerateOptions) -> pb.GenerateRequest:
    """Return the request for these arguments. Raises InvalidArgumentError; TypeError for an unknown option."""
    unknown = options.keys() - GenerateOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    try:
        request = pb.GenerateRequest(model=model)
    except (TypeError, ValueError) as error:
        raise invalid("model", str(error)) from None
    request.prompt.CopyFrom(make_prompt(prompt))
    for name, value in options.items():
        if value is None:  # the same as leaving it out
            continue
        owner = request.sampling if name in _SAMPLING_FIELDS else request
        path = f"sampling.{name}" if name in _SAMPLING_FIELDS else name
        try:
            field = getattr(owner, name)
            if name == "response_format":
                field.CopyFrom(_format(value))
            elif name == "received_token_ids":
                field.extend(types_pb2.TokenIds(ids=token_ids) for token_ids in value)  # type: ignore[attr-defined]
            elif hasattr(field, "update"):
                field.update(value)
            elif hasattr(field, "extend"):
                field.extend([value] if isinstance(value, str) else value)
            else:
                setattr(owner, name, value)
        except (TypeError, ValueError) as error:
            raise invalid(path, f"{error}, is {value!r}") from None
    return request


def _format(asked: object) -> types_pb2.ResponseFormat:
    if not isinstance(asked, Mapping) or len(asked) != 1:
        raise TypeError("must be a mapping with one key")
    ((kind, value),) = asked.items()
    if kind == "json_object" and value is True:
        return types_pb2.ResponseFormat(json_object=types_pb2.ResponseFormat.JsonObject())
    if kind == "json_schema" and isinstance(value, Mapping):
        value = json.dumps(value)
    if kind not in ("json_schema", "regex", "grammar") or not isinstance(value, str):
        raise TypeError("must have json_object (True), json_schema, regex or grammar")
    return types_pb2.ResponseFormat(**{kind: value})  # type: ignore[arg-type]  # a name of a text


def check_start(request_id: str, *, timeout: float | None, traceparent: str, tracestate: str) -> None:
    """Raise InvalidArgumentError for what cannot be put into a Start."""
    for name, value in (("request_id", request_id), ("traceparent", traceparent), ("tracestate", tracestate)):
        try:
            pb.Start(request_id=value)
        except (TypeError, ValueError) as error:
            raise invalid(name, str(error)) from None
    if timeout is not None and not 0 < timeout < MAX_TIMEOUT_S:
        raise invalid("timeout", f"must be > 0 and < {MAX_TIMEOUT_S} seconds, is {timeout!r}")


def make_prompt(prompt: Prompt) -> types_pb2.Prompt:
    """Return the wire's form of a prompt. Raises InvalidArgumentError."""
    if isinstance(prompt, str):
        try:
            return types_pb2.Prompt(text=prompt)
        except ValueError as error:  # a lone surrogate
            raise invalid("prompt.text", str(error)) from None
    if isinstance(prompt, Mapping) or not isinstance(prompt, Sequence):
        raise invalid("prompt", f"must be text, token ids or messages, is {type(prompt).__name__}")
    if prompt and isinstance(prompt[0], Mapping):
        messages = [_message(i, message) for i, message in enumerate(prompt)]
        return types_pb2.Prompt(messages=types_pb2.ChatMessages(messages=messages))
    try:
        return types_pb2.Prompt(token_ids=types_pb2.TokenIds(ids=prompt))  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise invalid("prompt.token_ids", str(error)) from None


def _message(position: int, message: object) -> types_pb2.ChatMessage:
    if not isinstance(message, Mapping) or message.keys() != {"role", "content"}:
        shape = sorted(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
        raise invalid(f"prompt.messages[{position}]", f"must have exactly role and content, has {shape}")
    try:
        content = [types_pb2.ContentPart(text=message["content"])]
        return types_pb2.ChatMessage(role=message["role"], content=content)
    except (TypeError, ValueError) as error:
        raise invalid(f"prompt.messages[{position}]", str(error)) from None


def invalid(field: str, description: str) -> InvalidArgumentError:
    """Return what the router would say of a field that cannot even be written down for it."""
    return InvalidArgumentError(
        f"{field}: {description}", reason=Reason.INVALID_FIELD, field_violations=[FieldViolation(field, description)]
    )
