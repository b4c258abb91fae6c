"""How an engine is set up; `cluster` fills it from TOML and environment and checks it with `check`."""

from __future__ import annotations

from dataclasses import dataclass

from workers.errors import ConfigError

ENGINES = ("paged", "fake")
DTYPES = ("auto", "fp32", "bf16", "int8")
WEIGHTS = ("auto", "exact", "bf16", "int8", "int4")
KERNELS = ("auto", "native", "torch")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    engine: str = "paged"
    dtype: str = "auto"
    """What activations are computed in. int8: rounded to int8 per token and group of 32 before each product with 4-bit
    or 8-bit weights, keys and values kept in fp16. bf16: native kernels round nothing but keys and values, to fp16;
    torch computes in bf16 where the CPU multiplies it, and elsewhere rounds nothing but weights, to fp16.
    auto: int8 with native kernels, otherwise bf16 where the CPU multiplies it, else fp32."""
    weights: str = "auto"
    """How native kernels store them. exact: as the file has them (Q4_0, Q4_1, Q8_0, bf16, fp32). bf16, int8, int4:
    rounded to that, unless the file has fewer bits. auto: int8 with dtype int8, else exact."""
    kernels: str = "auto"
    """native: the C library. torch: any machine. auto: native where it was built and can compute the model."""
    block_size: int = 16
    num_blocks: int = 0
    """KV blocks; 0: as many as `kv_memory_fraction` allows, but no more than `max_num_sequences` sequences of 1,024
    tokens (or of `max_model_len`, if that is less) need, and never less than one sequence of `max_model_len` does.
    Either way a pool that does not fit into free memory is refused."""
    kv_memory_fraction: float = 0.3
    """Of the memory that is free on a node once the model is loaded, for all replicas there together: each replica
    measures for itself, and divides by `replicas_per_node`."""
    replicas_per_node: int = 0
    """How many replicas share a node's memory; 0: all that a node must have room for (replicas.max_replicas),
    of all models, as if there were one node. The replacement of a draining replica is not counted: what the fraction
    leaves is for it, too."""
    max_model_len: int = 0
    """The most tokens of prompt and answer together, for routers and replicas alike; 0: what the model's files say."""
    max_num_sequences: int = 64
    chunk_tokens: int = 256
    """The token budget of a step: decodes first, prefill chunks fill the rest."""
    threads: int = 0
    """Of one replica; 0: cores of the node // replicas of all models, at least 1."""
    prefix_cache: bool = True
    lookup_tokens: int = 0
    """Prompt lookup: how many tokens at most are guessed per sequence and step, and verified in it. Answers stay the
    same, token for token. 0: off."""
    reserve: bool = False
    """Admit a sequence only when the blocks of its prompt and of max_tokens are free, and keep them for it: memory is
    predictable and nothing is ever preempted, but fewer sequences run at once."""
    max_token_age_s: float = 0.016
    """How long a token may wait for the next ones, so that one message carries them all, while no more than 128
    wait; the more do, the shorter. The first and the last of an answer never wait. 0: a message for each step."""
    fake_step_s: float = 0.0
    """Engine `fake` only: how long a step takes."""
    fake_load_s: float = 0.0
    """Engine `fake` only: how long a replica is about to load its model."""

    def check(self) -> None:
        """Raises ConfigError with the rule and the value."""
        rules = [
            (self.engine in ENGINES, "engine.engine", f"must be one of {', '.join(ENGINES)}", self.engine),
            (self.dtype in DTYPES, "engine.dtype", f"must be one of {', '.join(DTYPES)}", self.dtype),
            (self.weights in WEIGHTS, "engine.weights", f"must be one of {', '.join(WEIGHTS)}", self.weights),
            (self.kernels in KERNELS, "engine.kernels", f"must be one of {', '.join(KERNELS)}", self.kernels),
            (1 <= self.block_size <= 256, "engine.block_size", "must be in [1, 256]", self.block_size),
            (self.num_blocks >= 0, "engine.num_blocks", "must be >= 0", self.num_blocks),
            (
                0 < self.kv_memory_fraction < 1,
                "engine.kv_memory_fraction",
                "must be in (0, 1)",
                self.kv_memory_fraction,
            ),
            (self.replicas_per_node >= 0, "engine.replicas_per_node", "must be >= 0", self.replicas_per_node),
            (self.max_model_len >= 0, "engine.max_model_len", "must be >= 0", self.max_model_len),
            (self.max_num_sequences >= 1, "engine.max_num_sequences", "must be >= 1", self.max_num_sequences),
            (self.chunk_tokens >= 1, "engine.chunk_tokens", "must be >= 1", self.chunk_tokens),
            (0 <= self.lookup_tokens <= 64, "engine.lookup_tokens", "must be in [0, 64]", self.lookup_tokens),
            (self.threads >= 0, "engine.threads", "must be >= 0", self.threads),
            (
                0 <= self.max_token_age_s <= 1,
                "engine.max_token_age_s",
                "must be in [0, 1]",
                self.max_token_age_s,
            ),
            (self.fake_step_s >= 0, "engine.fake_step_s", "must be >= 0", self.fake_step_s),
            (self.fake_load_s >= 0, "engine.fake_load_s", "must be >= 0", self.fake_load_s),
        ]
        for holds, key, rule, value in rules:
            if not holds:
                raise ConfigError(f"{key} {rule}, is {value!r}")
