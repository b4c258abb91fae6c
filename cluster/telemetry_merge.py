"""All processes' metrics in one text: asks each of them, in parallel, and goes on without who does not answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from cluster.telemetry_port import fetch
from cluster.telemetry_text import is_text, merged

TIMEOUT_S: Final = 1.0
"""For each process."""
MAX_PARALLEL: Final = 32


class MergedMetrics:
    """Call it for the text. `own` is this process's, called `instance`; `targets` are the addresses of the others by
    their names; `missed` is told how many did not answer."""

    def __init__(
        self,
        instance: str,
        own: Callable[[], str],
        targets: Callable[[], Mapping[str, str]],
        missed: Callable[[int], object],
    ) -> None:
        self._instance, self._own, self._targets, self._missed = instance, own, targets, missed

    def __call__(self) -> str:
        targets = {name: address for name, address in self._targets().items() if name != self._instance}
        answers = dict(zip(targets, _ask(targets.values()), strict=True))
        texts = {name: text for name, text in answers.items() if text is not None}
        if missing := len(answers) - len(texts):
            self._missed(missing)
        return merged({self._instance: self._own(), **texts})


def _ask(addresses: Iterable[str]) -> list[str | None]:
    addresses = list(addresses)
    if not addresses:
        return []
    with ThreadPoolExecutor(min(len(addresses), MAX_PARALLEL), thread_name_prefix="octavo-metrics") as threads:
        return list(threads.map(_answer, addresses))


def _answer(address: str) -> str | None:
    try:
        text = fetch(address, TIMEOUT_S)
    except (OSError, ValueError):
        return None
    return text if is_text(text) else None
