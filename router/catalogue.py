"""The models of one router: each opened apart from the others, so that one that cannot be served leaves the rest alone.

Such a model is tried again from time to time, for its files may come; one whose files take long follows the others.
Knows no replicas.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from router.model import Models, ModelSource, ServedModel, UnservedModel
from workers.errors import ModelFileError, OctavoError
from workers.types import ModelFiles

RETRY_S: Final = 30.0
"""Between two tries to open a model."""
PATIENCE_S: Final = 30.0
"""How long models that can be served wait for the others when a router starts."""
LATE: Final = "its files are still being fetched"

Opening: TypeAlias = "asyncio.Task[Exception | None]"

_log = logging.getLogger(__name__)


class Catalogue:
    """`find_files` blocks, and is called from several threads. `on_served` is called with each model that can be
    served, once, before requests find it."""

    def __init__(
        self,
        sources: Sequence[ModelSource],
        find_files: Callable[[str], ModelFiles],
        on_served: Callable[[ModelSource, ServedModel], None],
    ) -> None:
        self._sources = {source.name: source for source in sources}
        self._find_files = find_files
        self._on_served = on_served
        self._models: dict[str, ServedModel | UnservedModel] = {}
        self._retries: asyncio.Task[None] | None = None

    @property
    def models(self) -> Models:
        """All models, once `load` has returned."""
        return self._models

    @property
    def failures(self) -> dict[str, str]:
        """Why models cannot be served, by their names."""
        return {name: model.failure for name, model in self._models.items() if isinstance(model, UnservedModel)}

    async def load(self) -> None:
        """Open all models, side by side; `stop` must follow. Returns once all were tried, or after `PATIENCE_S` if one
        can be served; those that take longer follow when they are there.

        Raises what an only model met, or ModelFileError if there are several and none can be served.
        """
        opening = {name: asyncio.create_task(self._open(name)) for name in self._sources}
        late = await self._await_most(set(opening.values()))
        for name, task in opening.items():  # models are listed as they were configured
            self._models[name] = UnservedModel(LATE) if task in late else self._models.pop(name)
        if len(self.failures) == len(opening):
            if len(opening) == 1 and (error := opening.popitem()[1].result()) is not None:
                raise error
            failures = "; ".join(f"{name}: {failure}" for name, failure in self.failures.items())
            raise ModelFileError(f"none of the models can be served: {failures}")
        if self.failures:
            self._retries = asyncio.create_task(self._retry(late))

    async def stop(self) -> None:
        """Try no more."""
        if self._retries is not None:
            self._retries.cancel()
            await asyncio.gather(self._retries, return_exceptions=True)

    async def _await_most(self, opening: set[Opening]) -> set[Opening]:
        """Return those that go on although there has been time enough."""
        _, late = await asyncio.wait(opening, timeout=PATIENCE_S)
        while late and len(self._models) == len(self.failures):
            _, late = await asyncio.wait(late, return_when=asyncio.FIRST_COMPLETED)
        return late

    async def _open(self, name: str) -> Exception | None:
        """Return what went wrong, once it is noted."""
        source = self._sources[name]
        try:
            served = await asyncio.to_thread(self._read, source)
            self._on_served(source, served)
        except Exception as error:
            failure = str(error) if isinstance(error, OctavoError) else f"{type(error).__name__}: {error}"
            _log.error("model %s cannot be served: %s", name, failure)
            self._models[name] = UnservedModel(failure)
            return error
        self._models[name] = served
        return None

    def _read(self, source: ModelSource) -> ServedModel:
        files = self._find_files(source.files)
        return ServedModel.from_files(files, name=source.name, max_model_len=source.max_model_len)

    async def _retry(self, late: set[Opening]) -> None:
        await asyncio.gather(*late)
        while failures := self.failures:
            await asyncio.sleep(RETRY_S)
            await asyncio.gather(*map(self._open, failures))
