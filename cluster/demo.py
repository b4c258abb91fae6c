"""`octavo demo`: a whole cluster for a minute, asked a few questions over gRPC, with what came of each.

Everything is the real thing: the cluster is a child process that runs `octavo serve`, the questions go through
`octavo.client`, and the times are those that this process sees. The questions come in waves: the first meets empty
caches, the next share its two system prompts, so that their cached tokens show. Then comes the second act
(`demo_crash.py`), for which there must be two replicas.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from octavo.client import CallError, Client, Message
from octavo.v1 import status_service_pb2

from cluster.demo_crash import CrashView, SecondAct, Stage, staged
from cluster.served import Served, served

START_TIMEOUT_S = 300.0
REQUEST_TIMEOUT_S = 120.0

SYSTEM_PROMPTS = (
    "You are a friendly guide for travellers. You know the countries of the world, their capitals, rivers, mountains, "
    "food and history. Answer every question correctly, in one or two short sentences, in plain English. Name the "
    "thing that was asked for first and then add one fact about it. Do not use lists, headings or emoji. If you do "
    "not know the answer, say so instead of guessing. Never ask the traveller a question in return.",
    "You teach science to curious children. You know animals, plants, oceans, weather, stars and the human body. "
    "Explain what was asked for in one or two short sentences, with simple words and correct facts. Begin with the "
    "answer itself and then add one thing that is surprising about it. Do not use lists, headings or emoji. If you do "
    "not know the answer, say so instead of guessing. Never ask the child a question in return.",
)
"""Of two applications, whose questions take turns."""
WAVES = (
    ("What is the capital of France?", "What is photosynthesis?"),
    (
        "What is the longest river in Africa?",
        "Where do penguins live?",
        "In which country are the pyramids of Giza?",
        "What is the largest ocean on Earth?",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    model: str = "default"
    engine: str = "paged"
    num_replicas: int = 2
    max_tokens: int = 40
    stream_tokens: int = 160
    """Most tokens of an answer in the second act."""


@dataclass(frozen=True, slots=True)
class Question:
    number: int
    """1-based, over all waves."""
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One question's answer; times in seconds, as the client saw them."""

    number: int
    wave: int
    question: str
    text: str
    first_token_s: float
    tokens_per_s: float | None
    """Of the tokens after the first; None for fewer than two."""
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    replica: str
    trace_id: str


class View(Protocol):
    """What the demo shows, called in this order; a wave is begun once all of the one before are answered."""

    def note(self, text: str) -> None: ...

    def cluster_ready(self, status: status_service_pb2.GetStatusResponse, address: str, start_s: float) -> None: ...

    def wave_begun(self, wave: int, questions: Sequence[Question]) -> None: ...

    def said(self, question: Question, text: str) -> None:
        """More of the answer to `question`."""

    def answered(self, answer: Answer) -> None: ...

    def wave_ended(self) -> None: ...

    def all_answered(self, answers: Sequence[Answer]) -> None: ...

    def done(self, answers: Sequence[Answer], total_s: float) -> None: ...


def run(options: DemoOptions, view: View, crash_view: CrashView) -> None:
    """Start a cluster, ask, kill, show, and stop it.

    Raises StartupError, NobodyKilledError, or CallError when a question fails.
    """
    began = time.monotonic()
    arguments = ["--model", options.model, "--engine", options.engine, "--port", "0"]
    arguments += ["--replicas", str(options.num_replicas)]
    with (
        staged(os.environ) as stage,
        served(arguments, timeout_s=START_TIMEOUT_S, note=view.note, variables=stage.variables) as cluster,
    ):
        start_s = time.monotonic() - began
        answers = asyncio.run(_play(cluster, stage, options, view, crash_view, start_s))
        view.note("stopping the cluster")
    view.done(answers, time.monotonic() - began)


async def _play(
    cluster: Served, stage: Stage, options: DemoOptions, view: View, crash_view: CrashView, start_s: float
) -> list[Answer]:
    async with Client(cluster.address) as client:
        view.cluster_ready(await client.status(), cluster.address, start_s)
        answers = await _ask_all(client, options, view)
        view.all_answered(answers)
        if options.num_replicas > 1:
            act = SecondAct(client, cluster.pid, stage, crash_view, num_tokens=options.stream_tokens, note=view.note)
            crash_view.outcome(await act.run())
        else:
            view.note("no second act: it takes two replicas")
    return answers


async def _ask_all(client: Client, options: DemoOptions, view: View) -> list[Answer]:
    answers: list[Answer] = []
    number = 0
    for wave, texts in enumerate(WAVES, start=1):
        questions = [Question(number + place, text) for place, text in enumerate(texts, start=1)]
        number += len(questions)
        view.wave_begun(wave, questions)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(_ask(client, each, wave, options, view)) for each in questions]
        except* CallError as errors:
            raise errors.exceptions[0] from None
        finally:
            view.wave_ended()
        answers += [task.result() for task in tasks]
    return answers


async def _ask(client: Client, question: Question, wave: int, options: DemoOptions, view: View) -> Answer:
    messages: list[Message] = [
        {"role": "system", "content": SYSTEM_PROMPTS[(question.number - 1) % len(SYSTEM_PROMPTS)]},
        {"role": "user", "content": question.text},
    ]
    asked = time.monotonic()
    generation = client.generate(
        messages,
        max_tokens=options.max_tokens,
        temperature=0.0,
        timeout=REQUEST_TIMEOUT_S,
        traceparent=f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01",
    )
    times: list[float] = []
    num_tokens = num_first = 0
    text = ""
    async for delta in generation:
        if delta.token_ids:
            times.append(time.monotonic())
            num_first = num_first or len(delta.token_ids)
            num_tokens += len(delta.token_ids)
        text += delta.text
        view.said(question, delta.text)
    usage = generation.usage
    assert usage is not None, "an answer that ended well has its usage"
    later_s = times[-1] - times[0] if times else 0.0
    answer = Answer(
        number=question.number,
        wave=wave,
        question=question.text,
        text=text.strip(),
        first_token_s=times[0] - asked if times else time.monotonic() - asked,
        tokens_per_s=(num_tokens - num_first) / later_s if later_s > 0 else None,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        generated_tokens=usage.generated_tokens,
        replica=usage.replica,
        trace_id=generation.trace_id,
    )
    view.answered(answer)
    return answer
