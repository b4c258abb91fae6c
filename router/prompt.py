"""The prompt of a request to token ids, whichever of its three forms it has: its rules, and who tokenizes it where.

What is long enough to hold up other requests is tokenized or rendered in a thread, and what is surely too long for the
model is refused without that. Knows nothing else of a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from octavo.names import Reason
from octavo.v1.types_pb2 import ChatMessage, Prompt

from router.model import ServedModel
from router.tokenizer import MAX_INLINE_CHARACTERS
from router.violations import Violations, check_token_ids
from workers.errors import CapabilityError, InvalidRequestError, Violation

MAX_MESSAGES = 4_096
"""In one conversation, and parts of messages in it; looking at more would hold up everybody else's requests."""


def is_quick(prompt: Prompt) -> bool:
    """Whether `prompt_ids` will do without suspending."""
    return not prompt.HasField("messages") and len(prompt.text) <= MAX_INLINE_CHARACTERS


async def prompt_ids(prompt: Prompt, model: ServedModel, violations: Violations) -> list[int]:
    """Return the token ids of `prompt`; empty where `violations` says why. Raises CapabilityError for messages to a
    model without a chat template."""
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
            ids = await _message_ids(prompt.messages.messages, model, violations)
    if violations.count == known_before:
        rule = "must have at least one token, as text, token ids or messages"
        violations.require(bool(ids), "prompt", rule, "empty", reason=Reason.EMPTY_PROMPT)
        check_token_ids(ids, field, model, violations)
    return ids


async def _message_ids(messages: Sequence[ChatMessage], model: ServedModel, violations: Violations) -> list[int]:
    if model.chat_template is None:
        raise CapabilityError(
            f"prompt.messages: {model.manifest.name} has no chat template; send text or token ids",
            violations=[Violation("prompt.messages", f"{model.manifest.name} has no chat template")],
        )
    known_before = violations.count
    plain = _plain_messages(messages, violations)
    if violations.count > known_before:
        return []
    return await asyncio.to_thread(_render, plain, model, violations)


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


def _render(messages: list[dict[str, str]], model: ServedModel, violations: Violations) -> list[int]:
    """Render and tokenize, blocking. The template writes the special tokens itself."""
    assert model.chat_template is not None
    try:
        text = model.chat_template.render(messages)
    except InvalidRequestError as error:
        raise InvalidRequestError(str(error), violations=[Violation("prompt.messages", str(error.args[0]))]) from error
    if _is_surely_too_long(text, model, "prompt.messages", violations):
        return []
    return model.tokenizer.encode(text, add_special_tokens=False)


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
