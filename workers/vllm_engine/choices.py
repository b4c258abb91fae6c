"""One choice of one work in vLLM: what came of it so far, and when.

vLLM does not say into how many steps it cut a prompt, nor how many drafts it accepted in one: its steps are taken to be
as many as its tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from workers.types import Finish, FinishReason, GenerateWork, TokenDelta
from workers.vllm_engine import translate, versions


class Choice:
    """`emit` takes its deltas, exactly one of which has a finish: its last. Nothing is emitted after that."""

    def __init__(self, work: GenerateWork, index: int, now: float, emit: Callable[[TokenDelta], None]) -> None:
        self.work = work
        self.index = index
        self.task: asyncio.Task[None] | None = None
        self.has_begun = False
        """Whether a token has come."""
        self.is_ended = False
        self.num_tokens = 0
        self._emit = emit
        self._arrived_at = now
        self._begun_at = now

    @property
    def owed_tokens(self) -> int:
        """Prompt tokens that vLLM may still have to compute."""
        return 0 if self.has_begun or self.is_ended else len(self.work.prompt)

    def add(self, output: Any, now: float) -> None:
        """Take in one RequestOutput of vLLM's, which tells what is new."""
        if self.is_ended:
            return
        told = output.outputs[0]
        tokens = tuple(told.token_ids)
        cached = None
        if not self.has_begun and tokens:
            self.has_begun, self._begun_at = True, now
            if self.index == 0:
                cached = min(int(output.num_cached_tokens or 0), len(self.work.prompt))
        self.num_tokens += len(tokens)
        finish = translate.finish_of(told.finish_reason, told.stop_reason, tokens)
        if finish is not None:
            finish = self._timed(finish, now, versions.times(output))
        elif not tokens:
            return
        self.is_ended = finish is not None
        self._emit(
            TokenDelta(
                self.work.work_id,
                self.index,
                tokens,
                translate.logprobs_of(tokens, told.logprobs, self.work.num_logprobs),
                finish,
                cached,
            )
        )

    def end(self, reason: FinishReason, now: float, error: tuple[str, str] = ("", "")) -> None:
        """End it here, whatever vLLM does. No effect if it has ended."""
        if not self.is_ended:
            self.is_ended = True
            finish = Finish(reason=reason, error_reason=error[0], error_message=error[1])
            self._emit(TokenDelta(self.work.work_id, self.index, finish=self._timed(finish, now)))

    def _timed(self, finish: Finish, now: float, told: versions.Times | None = None) -> Finish:
        """What vLLM did not tell is measured here: then the wait for the first step is part of the prefill."""
        finish = replace(finish, num_tokens=self.num_tokens, num_steps=self.num_tokens)
        if told is not None:
            return replace(
                finish,
                queue_s=max(0.0, told.scheduled - self._arrived_at),
                prefill_s=told.first_token - told.scheduled,
                decode_s=told.last_token - told.first_token,
                num_preemptions=told.num_preemptions,
                ended_at=told.last_token,
            )
        if not self.has_begun:
            return replace(finish, queue_s=now - self._arrived_at)
        return replace(finish, prefill_s=self._begun_at - self._arrived_at, decode_s=now - self._begun_at, ended_at=now)
