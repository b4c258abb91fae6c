"""One line for each request that has ended, for operators who want them: who, what, how long, how many tokens, why.

    request=7f.. tenant=acme model=default code=OK reason=- via=session priority=0 prompt=12 cached=0 generated=30
    attempts=1 replica=.. queued_s=0.001 first_token_s=0.050 total_s=0.731 finish=stop trace=4bf9..

On one line; where lines are JSON, the same stands under "request" as well. The texts of prompt and answers stand at its
end, as JSON, only if that is asked for, too.
"""

from __future__ import annotations

import json
import logging
from typing import Any, Final

from octavo.v1 import types_pb2 as pb

from router.request_record import Recorded, RequestRecord
from router.span import GENERATION

_log = logging.getLogger(__name__)
_NOTHING: Final = "-"


class AccessLog:
    """`has_texts`: with prompts and answers."""

    def __init__(self, *, has_texts: bool) -> None:
        self.has_texts = has_texts

    def write(self, record: RequestRecord, answer: Recorded) -> None:
        told = _fields(record)
        fields = " ".join(f"{name}={_word(value)}" for name, value in told.items())
        if self.has_texts:
            texts = {"prompt": _text(answer.prompt), "answers": answer.journal.texts}
            fields = f"{fields} texts={json.dumps(texts, ensure_ascii=False)}"
            told["texts"] = texts
        known = {"request_id": record.request_id, "traceparent": record.traceparent, "request": told}
        _log.info("%s", fields, extra=known)


def _fields(record: RequestRecord) -> dict[str, Any]:
    first_token_s = record.first_token_s
    return {
        "request": record.request_id,
        "tenant": record.tenant,
        "model": record.model,
        "code": record.code,
        "reason": record.reason,
        "via": _way(record),
        "priority": record.priority,
        "prompt": record.num_prompt,
        "cached": record.accounts.num_cached,
        "generated": record.num_generated - record.num_received,
        "attempts": len(record.attempts),
        "replica": record.accounts.replica,
        "queued_s": f"{record.queue_s:.3f}",
        "first_token_s": "" if first_token_s is None else f"{first_token_s:.3f}",
        "total_s": f"{record.duration_s:.3f}",
        "finish": ",".join(record.finish_reasons),
        "trace": record.trace_id,
    }


def _way(record: RequestRecord) -> str:
    if record.operation != GENERATION:
        return record.operation
    return "session" if record.is_session else "generate"


def _word(value: object) -> str:
    """Return `value` without what would end a word or a line: clients name requests and models as they like."""
    text = str(value)
    if not text:
        return _NOTHING
    return text if text.isprintable() and not any(each in text for each in " ='\"") else json.dumps(text)


def _text(prompt: pb.Prompt | None) -> Any:
    """Return what the client sent: text, token ids, or messages."""
    if prompt is None:
        return None
    kind = prompt.WhichOneof("prompt")
    if kind == "token_ids":
        return list(prompt.token_ids.ids)
    if kind == "messages":
        return [
            {"role": message.role, "content": "".join(part.text for part in message.content)}
            for message in prompt.messages.messages
        ]
    return prompt.text
