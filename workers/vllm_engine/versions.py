"""All of vLLM that this package touches, and what differs between its releases 0.26 to 0.33.

Everything else here is plain data: vLLM's internals move from release to release, and only this file moves with them.
Imported in the process that runs vLLM, and nowhere else.

Read in all of them; docs/vllm.md says which of them ran. What is used here is in all of them, and this has changed:

    0.27   what it refuses is a `VLLMClientError`, which is no ValueError; `EngineDeadError` is of another base
    0.28   an answer of a shape ends with any token that its request stops at, and before with the tokenizer's own end
           alone, so that a directory made of a file has to name it (`directory.name_end`); `generate` takes a session
    0.29   events of the cache have `ownership` beside `locality`; outputs tell of accepted drafts, if asked
    0.30   events have `session_id`
    0.31   `generate` takes hints for the cache
    0.32   requests that wait for blocks from elsewhere are counted apart (`num_kv_fetch_reqs_by_stage`)
    0.33   events have `lookahead_token_ids`

Before 0.26 events of the cache were arrays, and their salts were not told.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final

from workers.errors import ConfigError

OLDEST: Final = (0, 26)
NEWEST: Final = (0, 33)


def installed() -> str:
    """Return the version of vLLM. Raises ConfigError if there is none, or none that is served."""
    try:
        import vllm
    except ImportError as error:
        raise ConfigError(
            f'engine.engine must not be "vllm" where vLLM cannot be imported ({error}): pip install octavo[vllm], or '
            "set engine.python to the interpreter of an environment that has it and octavo"
        ) from error
    version = str(vllm.__version__)
    release = tuple(int(part) for part in version.split("+", maxsplit=1)[0].split(".")[:2] if part.isdigit())
    if not OLDEST <= release <= NEWEST:
        raise ConfigError(f"vLLM must be of release 0.{OLDEST[1]} to 0.{NEWEST[1]}, is {version}")
    return version


def is_on_cpu() -> bool:
    """Say whether vLLM is there and computes on this machine's processor."""
    try:
        from vllm.platforms import current_platform
    except ImportError:
        return False
    return bool(current_platform.is_cpu())


def start(arguments: Mapping[str, Any], events_endpoint: str, on_stats: Callable[[StepStats], None]) -> Any:
    """Return a started AsyncLLM, with its engine in a process of its own; to be called on the event loop that will use
    it. `arguments` are those of its engine by vLLM's names. `events_endpoint`: where it shall publish its cache's
    events; empty: nowhere.

    Raises ConfigError for an argument that this vLLM does not know or take.
    """
    from vllm.config import KVEventsConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise ConfigError(f"engine.vllm must have arguments of vLLM's engine only, has {', '.join(unknown)}")
    given = dict(arguments)
    if events_endpoint:
        given["kv_events_config"] = KVEventsConfig(
            enable_kv_cache_events=True, publisher="zmq", endpoint=events_endpoint
        )
    for name, value in (("disable_log_stats", True), ("enable_log_requests", False)):
        if name in known:
            given.setdefault(name, value)
    try:
        made = AsyncEngineArgs(**given)
        # Some of its defaults depend on what it is used for: as `vllm serve` has them.
        served = UsageContext.OPENAI_API_SERVER
        return AsyncLLM.from_engine_args(made, usage_context=served, stat_loggers=[_logger(on_stats)])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"engine.vllm is not what this vLLM takes: {error}") from error


def prompt(token_ids: list[int], salt: bytes) -> Any:
    """Return what `AsyncLLM.generate` takes as a prompt. Blocks are shared within a salt alone."""
    from vllm.inputs import tokens_input

    return tokens_input(token_ids, cache_salt=salt.hex() if salt else None)


def sampling(arguments: Mapping[str, Any]) -> Any:
    """Return vLLM's SamplingParams, of which each output tells what is new. Raises ValueError for what vLLM refuses."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    given = dict(arguments)
    structured = given.pop("structured", None)
    if structured is not None:
        from vllm.sampling_params import StructuredOutputsParams

        given["structured_outputs"] = StructuredOutputsParams(**structured)
    return SamplingParams(output_kind=RequestOutputKind.DELTA, detokenize=False, **given)


def is_dead(error: BaseException) -> bool:
    """Say whether vLLM's engine, and not one request, has failed."""
    from vllm.v1.engine.exceptions import EngineDeadError

    return isinstance(error, EngineDeadError)


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    block_size: int
    num_blocks: int
    max_model_len: int
    step_tokens: int
    """The most tokens of a step."""
    max_num_sequences: int
    dtype: str


def sizes(llm: Any) -> Sizes:
    """Return what a started engine has settled on."""
    config = llm.vllm_config
    return Sizes(
        block_size=int(config.cache_config.block_size),
        num_blocks=int(config.cache_config.num_gpu_blocks or 0),
        max_model_len=int(config.model_config.max_model_len),
        step_tokens=int(config.scheduler_config.max_num_batched_tokens),
        max_num_sequences=int(config.scheduler_config.max_num_seqs),
        dtype=str(config.model_config.dtype).removeprefix("torch."),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class StepStats:
    """What vLLM says of a step; counts are of this step alone."""

    num_running: int
    num_waiting: int
    kv_usage: float
    """Share of the blocks that sequences hold."""
    cache_queries: int
    cache_hits: int
    num_preempted: int
    num_prompt_tokens: int
    num_generated_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Times:
    """Of one request, on `time.monotonic`'s clock, which all processes of a machine share."""

    scheduled: float
    first_token: float
    last_token: float
    num_preemptions: int


def times(output: Any) -> Times | None:
    """Return when vLLM's engine did what it told of this request by now; None: nothing, or it does not say."""
    told = getattr(output, "metrics", None)
    scheduled, first, last = (getattr(told, name, 0.0) for name in ("scheduled_ts", "first_token_ts", "last_token_ts"))
    if not 0.0 < scheduled <= first <= last:
        return None
    return Times(scheduled, first, last, getattr(told, "num_preemptions", 0))


def step_stats(scheduler: Any, iteration: Any) -> StepStats:
    """Return what is common to the releases; what one does not say is 0."""
    cache = getattr(scheduler, "prefix_cache_stats", None)
    return StepStats(
        num_running=getattr(scheduler, "num_running_reqs", 0),
        num_waiting=getattr(scheduler, "num_waiting_reqs", 0) + getattr(scheduler, "num_skipped_waiting_reqs", 0),
        kv_usage=getattr(scheduler, "kv_cache_usage", 0.0),
        cache_queries=getattr(cache, "queries", 0),
        cache_hits=getattr(cache, "hits", 0),
        num_preempted=getattr(iteration, "num_preempted_reqs", 0),
        num_prompt_tokens=getattr(iteration, "num_prompt_tokens", 0),
        num_generated_tokens=getattr(iteration, "num_generation_tokens", 0),
    )


def _logger(on_stats: Callable[[StepStats], None]) -> Callable[..., Any]:
    """Return what vLLM makes a stat logger of: one that hands on what each step says."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class StepLogger(StatLoggerBase):  # type: ignore[misc]  # vllm has no types here
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            """Nothing is kept."""

        def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
            if scheduler_stats is not None:
                on_stats(step_stats(scheduler_stats, iteration_stats))

        def log_engine_initialized(self) -> None:
            """Our own log says so."""

    return StepLogger


# Events of the cache, as they come over ZeroMQ: msgpack arrays and maps, decoded without vLLM's classes, of which each
# release has more fields than the one before.


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    hashes: list[Any]
    parent: Any
    tokens: list[int]
    salt: bytes
    """Of the first block's request, if it begins a prompt."""


@dataclasses.dataclass(frozen=True, slots=True)
class Removed:
    hashes: list[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Cleared:
    pass


def events(payload: bytes) -> list[Stored | Removed | Cleared]:
    """Return the events of one message, those of the device's first cache group only. Raises ValueError for others."""
    import msgspec

    found: list[Stored | Removed | Cleared] = []
    try:
        batch = msgspec.msgpack.decode(payload)
    except msgspec.DecodeError as error:
        raise ValueError(f"no batch of events: {error}") from error
    for fields in batch[1]:
        if not isinstance(fields, dict):
            raise ValueError(f"an event must be a map, is {type(fields).__name__}")
        if fields.get("group_idx") or fields.get("medium") not in (None, "GPU"):
            continue
        kind = fields["type"]
        if kind == "BlockStored":
            found.append(
                Stored(fields["block_hashes"], fields["parent_block_hash"], fields["token_ids"], _salt(fields))
            )
        elif kind == "BlockRemoved":
            found.append(Removed(fields["block_hashes"]))
        elif kind == "AllBlocksCleared":
            found.append(Cleared())
    return found


def _salt(fields: Mapping[str, Any]) -> bytes:
    """Return the salt of a block at the beginning of a prompt: the only text among its keys, for there are no LoRAs."""
    for key in (fields.get("extra_keys") or [None])[0] or ():
        if isinstance(key, str):
            with contextlib.suppress(ValueError):
                return bytes.fromhex(key)
    return b""
