"""The models of one router: each opened apart from the others, so that one that cannot be served leaves the rest alone.

Such a model is tried again from time to time, for its files may come. Knows no replicas.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from router.model import Models, ModelSource, ServedModel, UnservedModel
from workers.errors import ModelFileError, OctavoError
from workers.types import ModelFiles

RETRY_S: Final = 30.0
"""Between two tries to open a model."""

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
        """Open all models, side by side; `stop` must follow.

        Raises what an only model met, or ModelFileError if there are several and none can be served.
        """
        errors = await asyncio.gather(*map(self._open, self._sources), return_exceptions=True)
        for name in self._sources:  # models are listed as they were configured
            self._models[name] = self._models.pop(name)
        if len(errors) == 1 and errors[0] is not None:
            raise errors[0]
        if None not in errors:
            failures = "; ".join(f"{name}: {failure}" for name, failure in self.failures.items())
            raise ModelFileError(f"none of the models can be served: {failures}")
        if self.failures:
            self._retries = asyncio.create_task(self._retry())

    async def stop(self) -> None:
        """Try no more."""
        if self._retries is not None:
            self._retries.cancel()
            await asyncio.gather(self._retries, return_exceptions=True)

    async def _open(self, name: str) -> None:
        """Raises whatever goes wrong, once it is noted."""
        source = self._sources[name]
        try:
            served = await asyncio.to_thread(self._read, source)
            self._on_served(source, served)
        except Exception as error:
            failure = str(error) if isinstance(error, OctavoError) else f"{type(error).__name__}: {error}"
            _log.error("model %s cannot be served: %s", name, failure)
            self._models[name] = UnservedModel(failure)
            raise
        self._models[name] = served

    def _read(self, source: ModelSource) -> ServedModel:
        files = self._find_files(source.files)
        return ServedModel.from_files(files, name=source.name, max_model_len=source.max_model_len)

    async def _retry(self) -> None:
        while failures := self.failures:
            await asyncio.sleep(RETRY_S)
            await asyncio.gather(*map(self._open, failures), return_exceptions=True)
