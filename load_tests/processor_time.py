"""Where the processor time of a server under load goes: its engine, everything else of it, and the one who loads it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from load_tests import process_tree


class ProcessorTime:
    """Counts from its making on. `replicas` are the server's processes that compute, if it says which; each with
    `engine_threads` of the engine, which are their busiest ones."""

    def __init__(self, server: int, replicas: Sequence[int], *, engine_threads: int) -> None:
        self._server = server
        self._replicas = replicas
        self._num_threads = engine_threads * len(replicas)
        self._before = self._times()

    def seconds(self) -> dict[str, float]:
        """Return the seconds of the "engine", of the "others" of the server, and of this process, the "driver"."""
        server, threads, own = self._times()
        server_before, threads_before, own_before = self._before
        spent = sorted((s - threads_before.get(thread, 0.0) for thread, s in threads.items()), reverse=True)
        engine = sum(spent[: self._num_threads])
        seconds = {"engine": engine, "others": server - server_before - engine, "driver": own - own_before}
        return {who: round(s, 2) for who, s in seconds.items()}

    def _times(self) -> tuple[float, dict[int, float], float]:
        server = sum(process_tree.cpu_s(process.pid) for process in process_tree.tree(self._server))
        threads = {thread: s for pid in self._replicas for thread, s in process_tree.thread_times_s(pid).items()}
        return server, threads, time.process_time()
