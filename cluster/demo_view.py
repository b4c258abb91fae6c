"""How the demo looks: side by side in a terminal, as plain lines elsewhere, as one JSON object a line for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from octavo.v1 import status_service_pb2
from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cluster.demo import Answer, Question

PANEL_WIDTH = 38
NUMBERS_WIDTH = 80
QUESTION_WIDTH = 44
LINES_WIDTH = NUMBERS_WIDTH + QUESTION_WIDTH
"""Of the table where no terminal has a width."""
REFRESH_PER_S = 12


class LinesView:
    """Plain lines: each answer when it is complete, then a table."""

    def __init__(self, out: Console, errors: Console) -> None:
        self.out = out
        self._errors = errors

    def note(self, text: str) -> None:
        self._errors.print(f"demo: {text}", markup=False, highlight=False, soft_wrap=True)

    def cluster_ready(self, status: status_service_pb2.GetStatusResponse, address: str, start_s: float) -> None:
        self.line(f"Octavo {status.version} at {address}, ready after {start_s:.1f} s")
        for replica in status.replicas:
            self.line(
                f"  replica {short(replica.id)}: {replica.model}, engine {replica.engine}, kernels {replica.kernels}, "
                f"{replica.dtype}, {replica.num_blocks} blocks of {replica.block_size} tokens, pid {replica.pid}"
            )

    def wave_begun(self, wave: int, questions: Sequence[Question]) -> None:
        self.line("")
        self.line(wave_title(wave, len(questions)))

    def said(self, question: Question, text: str) -> None:
        """Lines come whole, from `answered`."""

    def answered(self, answer: Answer) -> None:
        self.line(f"[{answer.number}] {answer.question}")
        self.line(f"    {printable(answer.text)}")

    def wave_ended(self) -> None:
        """Everything is printed already."""

    def all_answered(self, answers: Sequence[Answer]) -> None:
        self.line("")
        if not self.out.is_terminal:
            self.out.width = LINES_WIDTH
        self.out.print(table(answers, self.out.width), soft_wrap=False, markup=False, highlight=False)
        self.line(summary(answers))

    def done(self, answers: Sequence[Answer], total_s: float) -> None:
        self.line("")
        self.line(f"All of it took {total_s:.0f} s, start and stop of the cluster included.")

    def line(self, text: str) -> None:
        self.out.print(text, markup=False, highlight=False, soft_wrap=True)


class TerminalView(LinesView):
    """Panels side by side that fill while the answers come."""

    def __init__(self, out: Console, errors: Console) -> None:
        super().__init__(out, errors)
        self._texts: dict[Question, str] = {}
        self._complete: set[int] = set()
        self._live: Live | None = None

    def wave_begun(self, wave: int, questions: Sequence[Question]) -> None:
        super().wave_begun(wave, questions)
        self._texts = dict.fromkeys(questions, "")
        self._live = Live(
            get_renderable=self._panels, console=self.out, refresh_per_second=REFRESH_PER_S, vertical_overflow="visible"
        )
        self._live.start()

    def said(self, question: Question, text: str) -> None:
        self._texts[question] += text

    def answered(self, answer: Answer) -> None:
        self._complete.add(answer.number)

    def wave_ended(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _panels(self) -> RenderableType:
        width = max(PANEL_WIDTH, self.out.width // max(1, self.out.width // PANEL_WIDTH) - 1)
        return Columns(
            [
                Panel(
                    Text(printable(text).strip()),
                    title=Text(f"{question.number}. {question.text}"),
                    title_align="left",
                    border_style="green" if question.number in self._complete else "dim",
                    width=width,
                )
                for question, text in self._texts.items()
            ]
        )


class JsonView:
    """One JSON object a line on stdout, notes on stderr."""

    def __init__(self, out: Console, errors: Console) -> None:
        self._out = out
        self._lines = LinesView(errors, errors)

    def note(self, text: str) -> None:
        self._lines.note(text)

    def cluster_ready(self, status: status_service_pb2.GetStatusResponse, address: str, start_s: float) -> None:
        replicas = [
            {name: getattr(replica, name) for name in ("id", "pid", "model", "engine", "kernels", "dtype")}
            for replica in status.replicas
        ]
        self.write(
            {"event": "ready", "address": address, "version": status.version, "start_s": start_s, "replicas": replicas}
        )

    def wave_begun(self, wave: int, questions: Sequence[Question]) -> None:
        """Each answer says its wave."""

    def said(self, question: Question, text: str) -> None:
        """Answers are written whole."""

    def answered(self, answer: Answer) -> None:
        self.write({"event": "answer", **dataclasses.asdict(answer)})

    def wave_ended(self) -> None:
        """Each answer says its wave."""

    def all_answered(self, answers: Sequence[Answer]) -> None:
        """Each answer has its accounts."""

    def done(self, answers: Sequence[Answer], total_s: float) -> None:
        self.write({"event": "done", "answers": len(answers), "total_s": total_s})

    def write(self, value: object) -> None:
        self._out.file.write(json.dumps(value) + "\n")
        self._out.file.flush()


def wave_title(wave: int, count: int) -> str:
    if wave == 1:
        return f"{count} questions at once, on empty caches:"
    return f"{count} more at once; they share the system prompts of the first:"


def table(answers: Sequence[Answer], width: int) -> Table:
    """Return the accounts of `answers`, with the questions where `width` columns have room for them."""
    result = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    result.add_column("", justify="right")
    has_questions = width >= NUMBERS_WIDTH + QUESTION_WIDTH
    if has_questions:
        result.add_column("question", overflow="ellipsis", no_wrap=True, max_width=QUESTION_WIDTH)
    for heading in ("first token", "tokens/s", "prompt", "cached"):
        result.add_column(heading, justify="right", no_wrap=True)
    for heading in ("replica", "trace id"):
        result.add_column(heading, no_wrap=True)
    for answer in answers:
        result.add_row(
            str(answer.number),
            *([answer.question] if has_questions else []),
            f"{answer.first_token_s * 1000:.0f} ms",
            "-" if answer.tokens_per_s is None else f"{answer.tokens_per_s:.1f}",
            str(answer.prompt_tokens),
            str(answer.cached_tokens),
            short(answer.replica),
            answer.trace_id,
        )
    return result


def summary(answers: Sequence[Answer]) -> str:
    prompt, cached = sum(each.prompt_tokens for each in answers), sum(each.cached_tokens for each in answers)
    return f"{cached} of {prompt} prompt tokens came out of the caches."


def short(replica_id: str) -> str:
    """The part of a replica's id that tells it from the others."""
    return replica_id[-8:]


def printable(text: str) -> str:
    """Return `text` on one line without control characters: what a model says must not steer a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
