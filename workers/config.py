"""How an engine is set up; `cluster` fills it from TOML and environment and checks it with `check`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from workers.errors import ConfigError

ENGINES = ("paged", "fake", "transformers", "vllm")
PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size")
"""Arguments of vLLM's that say over how many GPUs a replica is spread."""
ENGINES_OF_OTHERS = ("transformers", "vllm")
"""Those that compute with model code of others: they say themselves which models they serve."""
DTYPES = ("auto", "fp32", "bf16", "int8")
WEIGHTS = ("auto", "exact", "bf16", "int8", "int4")
KERNELS = ("auto", "native", "torch")
DEVICES = ("auto", "cpu", "cuda")
CHUNK_TOKENS = 256
"""On a CPU; on a GPU it is `GPU_CHUNK_TOKENS`."""
GPU_CHUNK_TOKENS = 8_192


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    engine: str = "paged"
    """paged: computes models. transformers: computes those that transformers has code for, over our blocks, and models
    that embed, score and classify. fake: no model, tokens follow from those before; for measuring the cluster.
    vllm: vLLM's own engine."""
    device: str = "auto"
    """Engine `paged` only. cuda: the first GPU that this replica sees (resources.num_gpus). auto: that, if there is
    one, else cpu."""
    dtype: str = "auto"
    """What activations are computed in. int8: rounded to int8 per token and group of 32 before each product with 4-bit
    or 8-bit weights, keys and values kept in fp16. bf16: native kernels round nothing but keys and values, to fp16;
    torch computes in bf16 where the CPU multiplies it, and elsewhere rounds nothing but weights, to fp16.
    auto: int8 with native kernels, otherwise bf16 where the CPU multiplies it, else fp32; on a GPU bf16."""
    weights: str = "auto"
    """How native kernels store them. exact: as the file has them (Q4_0, Q4_1, Q8_0, bf16, fp32). bf16, int8, int4:
    rounded to that, unless the file has fewer bits. auto: int8 with dtype int8, else exact."""
    kernels: str = "auto"
    """native: the C library. torch: any machine. auto: native where it was built and can compute the model."""
    block_size: int = 16
    """Tokens of a KV block."""
    num_blocks: int = 0
    """KV blocks; 0: as many as `kv_memory_fraction` allows, but no more than `max_num_sequences` sequences of 1,024
    tokens (or of `max_model_len`, if that is less) need, and never less than one sequence of `max_model_len` does; on a
    GPU as many as `gpu_memory_utilization` allows. A pool that does not fit into free memory is refused."""
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
    """Sequences that run at once; more wait."""
    chunk_tokens: int = 0
    """The token budget of a step: decodes first, prefill chunks fill the rest. 0: 256, and 8,192 on a GPU;
    with engine `vllm` 512 on a CPU, and vLLM's own on a GPU."""
    gpu_memory_utilization: float = 0.9
    """How much of a GPU's memory may be in use, by whomever, when the KV cache is there; the rest is for computing."""
    max_graph_rows: int = 512
    """Steps of up to so many sequences that decode run as CUDA graphs, with chunks of prompts beside them if
    FlashAttention 3 computes these; graphs cost the host nearly nothing but take memory and time to make; 0: none."""
    threads: int = 0
    """Of one replica; 0: cores of the node // replicas of all models, at least 1."""
    prefix_cache: bool = True
    """Keep what was computed of prompts, and find it again."""
    lookup_tokens: int = 0
    """Prompt lookup: how many tokens at most are guessed per sequence and step, and verified in it. Answers stay the
    same, token for token. 0: off."""
    reserve: bool = False
    """Admit a sequence only when the blocks of its prompt and of max_tokens are free, and keep them for it: memory is
    predictable and nothing is ever preempted, but fewer sequences run at once."""
    max_token_age_s: float = 0.016
    """How long a token may wait for the next ones, so that one message carries them all, while no more than 128
    wait; the more do, the shorter. The first and the last of an answer never wait. 0: a message for each step."""
    python: str = ""
    """The interpreter of replicas, where it is not the cluster's: one of an environment that has octavo, the same Ray,
    and for instance vLLM."""
    vllm: Mapping[str, Any] = field(default_factory=dict)
    """Engine `vllm` only: arguments of its engine by vLLM's own names, over all that follows from the keys above, for
    instance {tensor_parallel_size = 2, max_num_batched_tokens = 4096}. Block size is vLLM's, unless said here. A
    replica that is spread over several GPUs needs as many: resources.num_gpus = 2. On a CPU, say how much memory its
    cache may have: {kv_cache_memory_bytes = 4_000_000_000}; otherwise a replica takes most of the node's."""
    stall_file: str = ""
    """For tests: when this file appears, the next step takes as many seconds more as it says, and it is removed."""
    fake_step_s: float = 0.0
    """Engine `fake` only: how long a step takes."""
    fake_load_s: float = 0.0
    """Engine `fake` only: how long a replica is about to load its model."""

    @property
    def devices_of_vllm(self) -> int:
        """How many GPUs one replica computes with as `vllm` says, if it is one of vLLM's and does so on GPUs."""
        return math.prod(self.vllm.get(name, 1) for name in PARALLEL) if self.engine == "vllm" else 1

    def check(self) -> None:
        """Raises ConfigError with the rule and the value."""
        rules = [
            (self.engine in ENGINES, "engine.engine", f"must be one of {', '.join(ENGINES)}", self.engine),
            (self.device in DEVICES, "engine.device", f"must be one of {', '.join(DEVICES)}", self.device),
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
            (self.chunk_tokens >= 0, "engine.chunk_tokens", "must be >= 0", self.chunk_tokens),
            (
                0 < self.gpu_memory_utilization < 1,
                "engine.gpu_memory_utilization",
                "must be in (0, 1)",
                self.gpu_memory_utilization,
            ),
            (0 <= self.max_graph_rows <= 4096, "engine.max_graph_rows", "must be in [0, 4096]", self.max_graph_rows),
            (0 <= self.lookup_tokens <= 64, "engine.lookup_tokens", "must be in [0, 64]", self.lookup_tokens),
            (self.threads >= 0, "engine.threads", "must be >= 0", self.threads),
            (
                0 <= self.max_token_age_s <= 1,
                "engine.max_token_age_s",
                "must be in [0, 1]",
                self.max_token_age_s,
            ),
            *(
                (
                    type(value) is int and value >= 1,
                    f"engine.vllm.{name}",
                    "must be a whole number >= 1",
                    value,
                )
                for name in PARALLEL
                if (value := self.vllm.get(name)) is not None
            ),
            (self.fake_step_s >= 0, "engine.fake_step_s", "must be >= 0", self.fake_step_s),
            (self.fake_load_s >= 0, "engine.fake_load_s", "must be >= 0", self.fake_load_s),
        ]
        for holds, key, rule, value in rules:
            if not holds:
                raise ConfigError(f"{key} {rule}, is {value!r}")
