"""How an answer or an error looks: as a line of JSON, as text in a terminal, as an exit code."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import typer
from octavo.client import CallError, Choice, Completion, ConnectionFailedError

EXIT_FAILED = 1
EXIT_UNREACHABLE = 4

_CONTROLS = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """Return `text` without control characters if stdout is a terminal: what a model says must not steer it."""
    return text.translate(_CONTROLS) if sys.stdout.isatty() else text


def answer_record(request_id: str, answer: Completion) -> dict[str, Any]:
    """Return the first choice, and all of them as "choices" if there are several; "logprobs" if they were asked for."""
    several = {"choices": [_choice_record(choice) for choice in answer.choices]} if len(answer.choices) > 1 else {}
    return {
        "id": request_id,
        **_choice_record(answer.choices[0]),
        **several,
        "usage": dataclasses.asdict(answer.usage) if answer.usage else None,
        "trace_id": answer.trace_id,
    }


def _choice_record(choice: Choice) -> dict[str, Any]:
    logprobs = {"logprobs": [dataclasses.asdict(each) for each in choice.logprobs]} if choice.logprobs else {}
    return {
        "text": choice.text,
        "token_ids": list(choice.token_ids),
        "finish": dataclasses.asdict(choice.finish) if choice.finish else None,
        **logprobs,
    }


def error_record(request_id: str, error: CallError) -> dict[str, Any]:
    return {
        "id": request_id,
        "error": {
            "code": error.code.name,
            "reason": error.reason,
            "message": error.message,
            "field_violations": [dataclasses.asdict(violation) for violation in error.field_violations],
            "retry_delay": error.retry_delay,
        },
    }


def report(error: CallError) -> int:
    """Print an error with what may be done about it, and return the exit code that stands for it."""
    typer.echo(f"octavo: error: {error}", err=True)
    if isinstance(error, ConnectionFailedError):
        typer.echo("octavo: is a cluster running there? Start one with `octavo serve`, or say --address.", err=True)
        return EXIT_UNREACHABLE
    if error.retry_delay is not None:
        typer.echo(f"octavo: try again in {error.retry_delay:.1f} s", err=True)
    return EXIT_FAILED
