"""`octavo generate --input --output`: a file of prompts to a file of answers, a bounded number at a time, resumable.

The output is the only state. A line is written whole when its answer is; at the start of a run, lines that are not
whole or report an error are dropped from it, and what the rest answers is not asked again. Its order means nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import typer
from octavo.client import CallError, Client, ConnectionFailedError, GenerateOptions, Prompt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.cli_answer import answer_record, error_record
from workers.errors import ConfigError

_OPTION_NAMES = frozenset(GenerateOptions.__annotations__)
_MAX_TRIES = 5
"""Of a request that a full cluster turned away."""


@dataclass(frozen=True, slots=True)
class Task:
    """One line of the input."""

    id: str
    prompt: Prompt
    model: str
    timeout_s: float | None
    options: GenerateOptions


def read_tasks(
    lines: Iterable[str], *, model: str, timeout_s: float | None, options: GenerateOptions
) -> Iterator[Task]:
    """Yield the tasks of an input, with the given defaults. Raises ConfigError with the line's number."""
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"line {number} of the input must be a JSON object: {error}") from None
        if not isinstance(record, dict) or "prompt" not in record:
            raise ConfigError(f'line {number} of the input must be an object with "prompt", is {line.strip()[:80]}')
        for key, kinds in (("id", (str, int)), ("model", str), ("timeout", (int, float))):
            if key in record and not isinstance(record[key], kinds):
                raise ConfigError(f'line {number} of the input has "{key}" of the wrong type, is {record[key]!r}')
        unknown = record.keys() - _OPTION_NAMES - {"id", "prompt", "model", "timeout"}
        if unknown:
            raise ConfigError(f"line {number} of the input has unknown keys: {', '.join(sorted(unknown))}")
        name = str(record.get("id", number))
        if name in seen:
            raise ConfigError(f"line {number} of the input must have an id of its own, {name!r} stands above")
        seen.add(name)
        own: Any = {key: value for key, value in record.items() if key in _OPTION_NAMES}
        if isinstance(own.get("logit_bias"), dict):
            own["logit_bias"] = _bias(own["logit_bias"], number)
        yield Task(
            name,
            record["prompt"],
            record.get("model", model),
            record.get("timeout", timeout_s),
            {**options, **own},
        )


def _bias(record: dict[str, float], number: int) -> dict[int, float]:
    """Return a bias with its token ids as numbers, which they cannot be in JSON. Raises ConfigError."""
    try:
        return {int(token_id): bias for token_id, bias in record.items()}
    except ValueError:
        raise ConfigError(f'line {number} of the input has a "logit_bias" with a key that is no token id') from None


def repair_output(path: Path) -> set[str]:
    """Drop broken lines and errors from an output, and return the ids that it answers."""
    if not path.exists():
        return set()
    answered: set[str] = set()
    kept: list[bytes] = []
    whole = True
    for line in path.read_bytes().splitlines(keepends=True):
        name = _answered_id(line)
        if name is None or name in answered:
            whole = False
            continue
        answered.add(name)
        kept.append(line)
    if not whole:
        temporary = path.with_name(path.name + ".repaired")
        temporary.write_bytes(b"".join(kept))
        os.replace(temporary, path)
    return answered


def _answered_id(line: bytes) -> str | None:
    """Return the id of a whole line with an answer, None for any other."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or "id" not in record or "error" in record:
        return None
    return str(record["id"])


async def run_batch(
    client: Client,
    input_file: Path,
    output_file: Path,
    *,
    model: str,
    timeout_s: float | None,
    options: GenerateOptions,
    concurrency: int,
) -> int:
    """Answer what is not answered yet; return 0 if everything is. Raises ConfigError for a bad input, before anything
    is asked, and ConnectionFailedError when no router is reached."""
    with input_file.open(encoding="utf-8") as lines:
        tasks = list(read_tasks(lines, model=model, timeout_s=timeout_s, options=options))
    answered = repair_output(output_file)
    missing = [task for task in tasks if task.id not in answered]
    try:
        output = output_file.open("a", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the output cannot be written: {error}") from None
    with output:
        async with client:
            batch = _Batch(client, missing, output)
            await batch.run(min(concurrency, len(missing)))
    done = f"{len(tasks) - batch.num_failed} of {len(tasks)} answered, {len(tasks) - len(missing)} of them before"
    typer.echo(f"octavo: {done}; {batch.num_failed} failed: {output_file}", err=True)
    return 1 if batch.num_failed else 0


class _Batch:
    """The tasks of one run, taken by a bounded number of workers."""

    def __init__(self, client: Client, tasks: list[Task], output: TextIO) -> None:
        self.num_failed = 0
        self._client = client
        self._tasks = iter(tasks)
        self._output = output
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[tokens]} tokens, {task.fields[failed]} failed"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar = self._progress.add_task("answering", total=len(tasks), tokens=0, failed=0)
        self._num_tokens = 0

    async def run(self, concurrency: int) -> None:
        with self._progress:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(concurrency):
                        group.create_task(self._work())
            except BaseExceptionGroup as group_error:
                raise group_error.exceptions[0] from None

    async def _work(self) -> None:
        for task in self._tasks:
            try:
                record = await self._ask(task)
            except ConnectionFailedError:
                raise  # it would be the same for all the others: they stay unanswered
            except CallError as error:
                self.num_failed += 1
                record = error_record(task.id, error)
            self._output.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._output.flush()
            self._progress.update(self._bar, advance=1, tokens=self._num_tokens, failed=self.num_failed)

    async def _ask(self, task: Task) -> dict[str, Any]:
        for num_tries in range(1, _MAX_TRIES + 1):
            try:
                answer = await self._client.complete(
                    task.prompt, model=task.model, timeout=task.timeout_s, **task.options
                )
            except CallError as error:
                if isinstance(error, ConnectionFailedError) or not error.retryable or num_tries == _MAX_TRIES:
                    raise
                await asyncio.sleep(error.retry_delay or 1.0)
            else:
                self._num_tokens += sum(len(choice.token_ids) for choice in answer.choices)
                return answer_record(task.id, answer)
        raise AssertionError("the last try returns or raises")
