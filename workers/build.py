"""Makes the engine that a configuration asks for.

For `fake` nothing but the manifest is opened, and torch is not imported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Set
from functools import partial
from pathlib import Path

from workers import garbage
from workers.config import EngineConfig
from workers.errors import ModelFileError
from workers.start import PACKING, WARMING
from workers.step_watch import WatchableEngine
from workers.thread import EngineThread
from workers.types import (
    CAPABILITY_CLASSIFY,
    CAPABILITY_GENERATE,
    CLASSIFY,
    GenerateWork,
    ModelFiles,
    ModelManifest,
    PoolWork,
    RunningEngine,
    SteppedEngine,
    WorkId,
)


def start_engine(
    config: EngineConfig,
    files: ModelFiles,
    notify: Callable[[], None],
    *,
    hash_key: bytes,
    reach: Callable[[str], None],
) -> RunningEngine:
    """Return the engine of a replica, warm and running. Blocks for as long as it takes to load the model.

    `notify`: see `EngineThread`. `reach` hears how far it has come. Raises what `build_engine` does, and StartupError.
    """
    if config.engine == "vllm":
        from workers.vllm_engine.engine import VllmEngine

        config.check()
        manifest = read_manifest(files.manifest)
        return VllmEngine(config, files, manifest, notify, hash_key=hash_key, threads=config.threads)
    engine = build_engine(config, files, hash_key=hash_key, threads=config.threads, packs=partial(reach, PACKING))
    reach(WARMING)
    warm(engine)
    garbage.settle()
    return EngineThread(engine, notify, max_token_age_s=config.max_token_age_s)


def build_engine(
    config: EngineConfig,
    files: ModelFiles,
    *,
    hash_key: bytes,
    threads: int,
    clock: Callable[[], float] = time.monotonic,
    packs: Callable[[], object] = lambda: None,
) -> WatchableEngine:
    """Load the model and return its engine, ready to step. `hash_key` is the cluster's prefix-hash key; `packs` is
    called when weights are to be packed first, which may take minutes.

    Where torch computes it, sets how many threads torch uses in this process. Raises ConfigError and ModelFileError
    with the rule and the value.
    """
    config.check()
    manifest = read_manifest(files.manifest)
    if config.engine == "fake":
        from workers.fake import FakeEngine

        time.sleep(config.fake_load_s)
        return FakeEngine(config, manifest=manifest, hash_key=hash_key, clock=clock)
    if config.engine == "transformers":
        from workers.build_pooling import build_pooling, is_pooling

        if is_pooling(files, manifest):
            return build_pooling(config, files, manifest, hash_key=hash_key, threads=threads, clock=clock)
    from workers.paged import build_paged

    return build_paged(config, files, manifest, hash_key=hash_key, threads=threads, clock=clock, packs=packs)


def warm(engine: SteppedEngine) -> None:
    """Have an engine that nobody uses yet compute a token, so that the first request does not wait for what is read or
    allocated at first use."""
    work_id = WorkId("", 0)
    if CAPABILITY_GENERATE in engine.info.capabilities:
        engine.submit(GenerateWork(work_id=work_id, prompt=(0,), max_tokens=1))
    else:
        engine.submit(PoolWork(work_id=work_id, tokens=(0,), method=_method(engine.info.capabilities)))
    while engine.step():
        pass
    engine.drain_outputs()


def _method(capabilities: Set[str]) -> str:
    return CLASSIFY if CAPABILITY_CLASSIFY in capabilities else "model"


def read_manifest(path: Path) -> ModelManifest:
    """Raises ModelFileError."""
    try:
        return ModelManifest.from_json(path.read_text())
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: is no manifest: {type(error).__name__}: {error}") from error
