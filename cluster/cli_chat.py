"""`octavo chat`: a conversation, turn by turn. Owns what was said; reads stdin, writes stdout.

The event loop runs while an answer streams and stands still while a person types, so Ctrl-C means one thing at a time:
asyncio's runner turns it into the end of the current answer, `input` into the end of the conversation.
"""

from __future__ import annotations

import asyncio
import sys

import typer
from octavo.client import CallError, Client, GenerateOptions, Message

from cluster.cli_answer import printable, report


class Chat:
    """`run` reads messages until the input ends, and returns the exit code."""

    def __init__(
        self, client: Client, *, model: str, system: str, timeout_s: float | None, options: GenerateOptions
    ) -> None:
        self._client = client
        self._model = model
        self._timeout_s = timeout_s
        self._options = options
        self._beginning: list[Message] = [{"role": "system", "content": system}] if system else []
        self._said = list(self._beginning)
        self._is_interactive = sys.stdin.isatty()

    def run(self) -> int:
        exit_code = 0
        with asyncio.Runner() as runner:
            runner.run(self._client.__aenter__())
            try:
                runner.run(self._greet())
                while (message := self._read()) is not None:
                    exit_code = max(exit_code, self._turn(runner, message))
                    if exit_code and not self._is_interactive:
                        break
            except CallError as error:
                return report(error)
            finally:
                runner.run(self._client.close())
        return 0 if self._is_interactive else exit_code

    async def _greet(self) -> None:
        """Find out whether there is anybody to talk with before somebody types."""
        models = [model.name for model in await self._client.list_models()]
        if self._is_interactive:
            name = self._model or ", ".join(models)
            typer.echo(f"octavo: talking with {name}; Ctrl-C ends an answer, Ctrl-D the conversation", err=True)

    def _read(self) -> str | None:
        """Return the next message, None at the end."""
        if not self._is_interactive:
            line = sys.stdin.readline()
            return line.strip() if line else None
        try:
            return input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return None

    def _turn(self, runner: asyncio.Runner, message: str) -> int:
        if not message:
            return 0
        if message == "/reset":
            self._said = list(self._beginning)
            return 0
        self._said.append({"role": "user", "content": message})
        pieces: list[str] = []
        try:
            runner.run(self._answer(pieces))
        except KeyboardInterrupt:  # what was said of the answer stays in the conversation
            typer.echo(" [cancelled]")
            if not self._is_interactive:
                raise
        except CallError as error:
            if pieces:
                typer.echo()
            self._said.pop()
            return report(error)
        self._said.append({"role": "assistant", "content": "".join(pieces)})
        return 0

    async def _answer(self, pieces: list[str]) -> None:
        generation = self._client.generate(self._said, model=self._model, timeout=self._timeout_s, **self._options)
        async for delta in generation:
            pieces.append(delta.text)
            typer.echo(printable(delta.text), nl=False)
        typer.echo()
