"""The engine `vllm`: vLLM's AsyncLLM behind the engine seam.

    submit, abort --call_soon_threadsafe--> event loop of a thread of its own, a task a choice --> outputs, `notify`
    vLLM's engine process --ZeroMQ--> `CacheFeed` --> KV events in our hashes

vLLM computes in a process of its own, schedules, samples and keeps the cache; this file owns who asked for what, and
that each choice ends exactly once. If that process dies, all works are lost, those that follow are turned down and
`failure` says so: Serve then replaces the replica, and routers go on elsewhere. Each choice is a request of vLLM's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import uvloop
from octavo.names import Reason

from workers.config import EngineConfig
from workers.errors import OctavoError, StartupError
from workers.prefix import PrefixHasher
from workers.types import (
    EngineCounts,
    EngineInfo,
    Finish,
    FinishReason,
    GenerateWork,
    KvEvent,
    Load,
    ModelFiles,
    ModelManifest,
    TokenDelta,
    Work,
    WorkId,
)
from workers.vllm_engine import translate, versions
from workers.vllm_engine.cache_feed import CacheFeed
from workers.vllm_engine.choices import Choice
from workers.vllm_engine.description import description
from workers.vllm_engine.directory import has_tokenizer
from workers.vllm_engine.guard import guarded
from workers.vllm_engine.outbox import Outbox
from workers.vllm_engine.setup import Setup, prepared
from workers.vllm_engine.totals import Totals

WATCH_S: Final = 1.0
"""How often vLLM's engine is looked at while nobody asks it anything."""
START_S: Final = 1800.0

_log = logging.getLogger(__name__)


class VllmEngine:
    """Implements `RunningEngine`. Blocks until vLLM is ready. `notify`: see `EngineThread`.

    Raises ConfigError and ModelFileError with the rule and the value, StartupError with what vLLM said.
    """

    def __init__(
        self,
        config: EngineConfig,
        files: ModelFiles,
        manifest: ModelManifest,
        notify: Callable[[], None],
        *,
        hash_key: bytes,
        threads: int,
    ) -> None:
        self._manifest = manifest
        self._loop = uvloop.new_event_loop()
        self._outbox = Outbox(self._loop, notify)
        self._lock = threading.Lock()
        """Guards `_is_closed`."""
        self._choices: dict[WorkId, list[Choice]] = {}
        """Of works that have not ended; the loop's alone, as is what follows."""
        self._num_open = 0
        self._totals = Totals()
        self._is_closed = False
        self.failure: BaseException | None = None
        self._load = Load()
        self._stopped = asyncio.Event()
        ready: list[BaseException | None] = []
        has_started = threading.Event()

        def run() -> None:
            try:
                with (
                    prepared(config, files, threads) as setup,
                    guarded(setup.directory) as all_started,
                    contextlib.closing(self._loop),
                ):
                    self._loop.run_until_complete(self._serve(setup, hash_key, all_started, has_started))
            except BaseException as error:
                if has_started.is_set():
                    _log.error("the engine is broken", exc_info=error)
                ready.append(error)
            finally:
                has_started.set()

        self._thread = threading.Thread(target=run, name="octavo-vllm", daemon=True)
        self._thread.start()
        if not has_started.wait(START_S):
            self.close()  # whenever it comes so far
            raise StartupError(f"vLLM was not ready after {START_S:g} s")
        if ready and ready[0] is not None:
            raise ready[0] if isinstance(ready[0], OctavoError) else StartupError(f"vLLM: {ready[0]}") from ready[0]

    # Any thread.

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, work: Work) -> None:
        with self._lock:
            if not self._is_closed:
                self._loop.call_soon_threadsafe(self._submit, work)
                return
        for index in range(work.num_choices):
            self._outbox.emit(_ended(work, index, FinishReason.CANCELLED))

    def abort(self, work_id: WorkId, index: int | None = None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: everything has ended
            self._loop.call_soon_threadsafe(self._abort, work_id, index)

    def drain_outputs(self) -> list[TokenDelta]:
        return self._outbox.take_outputs()

    def kv_events(self, *, anew: bool = False) -> list[KvEvent]:
        if anew:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._tell_cache)
        return self._outbox.take_events()

    def load(self) -> Load:
        """Return the load as it was after the last step that vLLM told of."""
        return self._load

    def counts(self) -> EngineCounts:
        """Return what only metrics need."""
        load = self._load
        return self._totals.counts(
            num_findable=self._feed.num_findable,
            num_removed=self._feed.num_removed,
            num_used=load.num_blocks - load.num_free_blocks,
        )

    def close(self) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stopped.set)

    def join(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # The loop's thread.

    async def _serve(
        self, setup: Setup, hash_key: bytes, all_started: Callable[[], None], has_started: threading.Event
    ) -> None:
        version = versions.installed()
        llm = self._llm = versions.start(setup.arguments, setup.events_endpoint, self._on_stats)
        feed: CacheFeed | None = None
        try:
            sizes = self._sizes = versions.sizes(llm)
            hasher = PrefixHasher(hash_key, sizes.block_size)
            feed = self._feed = CacheFeed(setup.events_endpoint, hasher, self._outbox.add_events)
            holds_formats = has_tokenizer(Path(setup.arguments["model"]))
            self._info = description(version, sizes, self._manifest, hasher, holds_formats=holds_formats)
            await feed.start()
            await self._warm()
            self._load = self._make_load()
            all_started()
            has_started.set()
            await self._stopped_or_dead(llm)
            for work_id in list(self._choices):
                self._abort(work_id, None)
            await asyncio.to_thread(llm.shutdown)
        finally:
            if feed is not None:
                feed.stop()
            llm.shutdown()

    async def _stopped_or_dead(self, llm: Any) -> None:
        """Wait for `close`; meanwhile see whether vLLM's engine dies, which it tells nobody who asks it nothing."""
        while not self._stopped.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), WATCH_S)
            if self.failure is None and llm.errored:
                self.failure = llm.dead_error
                _log.error("vLLM's engine is dead: %s", self.failure)

    async def _warm(self) -> None:
        """Have a token computed before anybody waits for one."""
        sampling = versions.sampling({"temperature": 0.0, "max_tokens": 1, "ignore_eos": True})
        async for _ in self._llm.generate(versions.prompt([0], b""), sampling, "warm"):
            pass

    def _submit(self, work: Work) -> None:
        if work.work_id in self._choices:
            return
        self._totals.num_taken += 1
        refusal = self._refusal(work)
        if refusal is not None or not isinstance(work, GenerateWork):
            reason, message = refusal or (Reason.ENGINE_CAPABILITY, "engine vllm generates only")
            for index in range(work.num_choices):
                self._outbox.emit(_ended(work, index, FinishReason.ERROR, reason, message))
            return
        now = time.monotonic()
        choices = self._choices[work.work_id] = [Choice(work, index, now, self._outbox.emit) for index in range(work.n)]
        self._num_open += len(choices)
        for choice in choices:
            choice.task = self._loop.create_task(self._generate(choice))

    def _refusal(self, work: Work) -> tuple[str, str] | None:
        if self.failure is not None:
            return Reason.DRAINING, f"the engine of this replica failed ({type(self.failure).__name__})"
        if isinstance(work, GenerateWork) and len(work.prompt) + work.max_tokens > self._info.max_model_len:
            return Reason.PROMPT_TOO_LONG, (
                f"prompt ({len(work.prompt)} tokens) + max_tokens ({work.max_tokens}) must be at most "
                f"{self._info.max_model_len} tokens"
            )
        if isinstance(work, GenerateWork) and not work.prompt:
            return Reason.EMPTY_PROMPT, "prompt must have at least one token"
        return None

    async def _generate(self, choice: Choice) -> None:
        work, index = choice.work, choice.index
        try:
            if choice.is_ended:  # before it began
                return
            left_s = None if work.deadline is None else work.deadline - time.monotonic()
            async with asyncio.timeout(left_s):
                if translate.num_received(work, index) >= work.max_tokens:
                    choice.end(FinishReason.LENGTH, time.monotonic())
                    return
                sampling = versions.sampling(translate.sampling_of(work, index))
                prompt = versions.prompt(translate.prompt_of(work, index), work.salt)
                name = f"{work.work_id.owner}/{work.work_id.number}/{index}"
                async for output in self._llm.generate(prompt, sampling, name, priority=work.priority):
                    choice.add(output, time.monotonic())
            choice.end(FinishReason.CANCELLED, time.monotonic())  # if vLLM has said nothing of an end
        except TimeoutError:
            choice.end(FinishReason.DEADLINE, time.monotonic())
        except asyncio.CancelledError:
            choice.end(FinishReason.CANCELLED, time.monotonic())
        except Exception as error:
            self._failed(choice, error)
        finally:
            self._forget(choice)

    def _failed(self, choice: Choice, error: Exception) -> None:
        """One request of vLLM's has failed, or its engine has."""
        now, kind = time.monotonic(), type(error).__name__
        words = translate.refusal_of(error)
        if words is not None and not choice.has_begun:
            _log.info("vLLM refuses request %s: %s", choice.work.request_id, words)
            choice.end(FinishReason.ERROR, now, (Reason.ENGINE_CAPABILITY, f"vLLM refuses this request: {words}"))
            return
        if not versions.is_dead(error):
            _log.error("request %s failed in vLLM", choice.work.request_id, exc_info=error)
            choice.end(FinishReason.ERROR, now, (Reason.INTERNAL, f"vLLM could not compute this request ({kind})"))
            return
        if self.failure is None:
            _log.error("vLLM's engine is dead: %s", error)
            self.failure = error
        choice.end(FinishReason.ERROR, now, (Reason.REPLICA_LOST, f"the engine of this replica failed ({kind})"))

    def _forget(self, choice: Choice) -> None:
        self._num_open -= 1
        choices = self._choices.get(choice.work.work_id, [])
        if all(other.is_ended for other in choices):
            self._choices.pop(choice.work.work_id, None)
        self._load = self._make_load()
        self._outbox.tell()  # an abort was told of before there was its place again

    def _abort(self, work_id: WorkId, index: int | None) -> None:
        now = time.monotonic()
        for choice in self._choices.get(work_id, ()):
            if index is None or index == choice.index:
                choice.end(FinishReason.CANCELLED, now)
                if choice.task is not None:
                    # Has vLLM abort it. Not at once: a task that has not begun would end without `_generate`'s own end.
                    self._loop.call_soon(choice.task.cancel)

    def _on_stats(self, stats: versions.StepStats) -> None:
        self._totals.add(stats)
        self._load = self._make_load()

    def _tell_cache(self) -> None:
        self._outbox.add_events(self._feed.anew(), anew=True)

    def _make_load(self) -> Load:
        owed = sum(choice.owed_tokens for choices in self._choices.values() for choice in choices)
        return self._totals.load(self._sizes, owed_tokens=owed, num_open=self._num_open)


def _ended(work: Work, index: int, reason: FinishReason, error: str = "", message: str = "") -> TokenDelta:
    return TokenDelta(work.work_id, index, finish=Finish(reason=reason, error_reason=error, error_message=message))
