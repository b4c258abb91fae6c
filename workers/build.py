"""Makes the engine that a configuration asks for.

For `fake` nothing but the manifest is opened, and torch is not imported.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from workers.config import EngineConfig
from workers.errors import ModelFileError
from workers.types import GenerateWork, ModelFiles, ModelManifest, SteppedEngine, WorkId


def build_engine(
    config: EngineConfig,
    files: ModelFiles,
    *,
    hash_key: bytes,
    threads: int,
    clock: Callable[[], float] = time.monotonic,
    packs: Callable[[], object] = lambda: None,
) -> SteppedEngine:
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
    from workers.paged import build_paged

    return build_paged(config, files, manifest, hash_key=hash_key, threads=threads, clock=clock, packs=packs)


def warm(engine: SteppedEngine) -> None:
    """Have an engine that nobody uses yet compute a token, so that the first request does not wait for what is read or
    allocated at first use."""
    engine.submit(GenerateWork(work_id=WorkId("", 0), prompt=(0,), max_tokens=1))
    while engine.step():
        pass
    engine.drain_outputs()


def read_manifest(path: Path) -> ModelManifest:
    """Raises ModelFileError."""
    try:
        return ModelManifest.from_json(path.read_text())
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: is no manifest: {type(error).__name__}: {error}") from error
