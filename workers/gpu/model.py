"""The Llama family on a GPU: weights on the device, and what a step computes of them. Needs triton.

    one row    norm+qkv | attend | output+add | norm+gate+up+silu | down+add            5 kernels a layer, all our own
    decode     qkv | attend | output | add+norm | gate and up | gate | down | add+norm  8, products by cuBLAS
    mixed      the same with rotate+store and a flash kernel for `attend`, where rows are those of chunks

Differences between models are numbers of `ModelShape`. The residual stream is fp32, products and cache have `dtype`;
the head adds up and returns fp32. Knows rows, blocks and slots; not sequences, steps or sampling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear, rms_norm

from workers.errors import ModelFileError
from workers.gpu import flash
from workers.gpu.attention import DecodeAttention
from workers.gpu.layout import BlockCache, Rows, StepMemory
from workers.gpu.mixed import most_samples
from workers.gpu.projection import project
from workers.gpu.rows import Heads, add_norm, embed, gate, rotate_store
from workers.gpu.upload import aligned
from workers.rotary import inverse_frequencies
from workers.weights.checkpoint import Checkpoint
from workers.weights.shape import ModelShape

if TYPE_CHECKING:
    from workers.gpu.device import GpuDevice

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True, slots=True)
class _Product:
    weight: torch.Tensor
    """[out, in]."""
    bias: torch.Tensor | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: torch.Tensor
    qkv: _Product
    head_norms: tuple[torch.Tensor, torch.Tensor] | None
    """Of queries and of keys, each [head_dim]."""
    output: _Product
    ffn_norm: torch.Tensor
    gate_up: _Product
    down: _Product


class GpuModel:
    """Raises ModelFileError if `checkpoint` lacks a tensor, one is not finite or of another size than the shape says,
    or rotary embedding has no finite angles."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str = "cuda") -> None:
        self.shape: ModelShape = checkpoint.shape
        self.dtype = dtype
        self.device = torch.device(device)
        self.dtype_name = DTYPE_NAMES.get(dtype, str(dtype))
        self.kernels = "triton"
        """With which kernels prompts are attended to, too, once it was opened."""
        shape = self.shape
        table = (shape.vocab_size, shape.hidden_size)
        self.frequencies = torch.from_numpy(inverse_frequencies(shape.rope, shape.head_dim))
        self.embedding = self._tensor(checkpoint, "model.embed_tokens.weight", *table).to(dtype)
        self.layers = [self._load_layer(checkpoint, i) for i in range(shape.num_layers)]
        self.norm = self._vector(checkpoint, "model.norm", shape.hidden_size)
        self.head = (
            self.embedding if shape.tied_embeddings else self._tensor(checkpoint, "lm_head.weight", *table).to(dtype)
        )

    def bytes_per_block(self, block_size: int) -> int:
        """Return what one block costs, all layers together."""
        shape = self.shape
        return shape.num_layers * 2 * shape.num_kv_heads * block_size * shape.head_dim * self.dtype.itemsize

    def open(
        self, *, num_blocks: int, block_size: int, num_slots: int, max_model_len: int, chunk_tokens: int,
        graph_sizes: tuple[int, ...],
    ) -> GpuDevice:  # fmt: skip
        """Return the model at work with a cache of its own. Steps have at most `chunk_tokens` rows; decode steps of
        `graph_sizes`, and such beside chunks, are captured as graphs now."""
        from workers.gpu.device import GpuDevice

        memory = StepMemory(
            num_slots=num_slots, max_tokens=max_model_len, block_size=block_size, num_blocks=num_blocks,
            device=self.device,
        )  # fmt: skip
        cache = BlockCache(
            num_layers=self.shape.num_layers, num_blocks=num_blocks, block_size=block_size,
            num_kv_heads=self.shape.num_kv_heads, head_dim=self.shape.head_dim, dtype=self.dtype, device=self.device,
        )  # fmt: skip
        forward = GpuForward(
            self, memory, cache, max_decodes=aligned(num_slots), max_graph_samples=most_samples(graph_sizes)
        )
        self.kernels = f"triton, {forward.prompt_kernel}"
        return GpuDevice(forward, memory, cache, chunk_tokens=chunk_tokens, graph_sizes=graph_sizes)

    def _vector(self, checkpoint: Checkpoint, name: str, size: int) -> torch.Tensor:
        return self._tensor(checkpoint, f"{name}.weight", size).float()

    def _tensor(self, checkpoint: Checkpoint, name: str, *size: int) -> torch.Tensor:
        """Return a tensor on the device, in the type that its file has: what is narrow there is so on the way, too."""
        tensor = checkpoint.stored(name, *size).to(self.device)
        if not tensor.sum(dtype=torch.float32).isfinite():
            raise ModelFileError(f"tensor {name}: has numbers that are not finite")
        return tensor

    def _load_layer(self, checkpoint: Checkpoint, number: int) -> _Layer:
        shape, prefix = self.shape, f"model.layers.{number}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        hidden, ffn, dim = shape.hidden_size, shape.ffn_size, shape.head_dim
        queries, keys = shape.num_heads * dim, shape.num_kv_heads * dim

        def stacked(names: dict[str, int], inputs: int, has_bias: bool) -> _Product:
            """Stack the projections `names` (with their output sizes) of the same input into one."""
            weight = torch.empty(sum(names.values()), inputs, dtype=self.dtype, device=self.device)
            bias = torch.empty(sum(names.values()), dtype=self.dtype, device=self.device) if has_bias else None
            first = 0
            for name, size in names.items():
                weight[first : first + size] = self._tensor(checkpoint, f"{name}.weight", size, inputs)
                if bias is not None:
                    bias[first : first + size] = self._tensor(checkpoint, f"{name}.bias", size)
                first += size
            return _Product(weight, bias)

        norms = None
        if shape.qk_norm:
            norms = tuple(self._vector(checkpoint, f"{attention}.{name}", dim) for name in ("q_norm", "k_norm"))
        return _Layer(
            attention_norm=self._vector(checkpoint, f"{prefix}.input_layernorm", hidden),
            qkv=stacked(
                {f"{attention}.q_proj": queries, f"{attention}.k_proj": keys, f"{attention}.v_proj": keys},
                hidden,
                shape.qkv_bias,
            ),
            head_norms=None if norms is None else (norms[0], norms[1]),
            output=stacked({f"{attention}.o_proj": hidden}, queries, shape.output_bias),
            ffn_norm=self._vector(checkpoint, f"{prefix}.post_attention_layernorm", hidden),
            gate_up=stacked({f"{mlp}.gate_proj": ffn, f"{mlp}.up_proj": ffn}, hidden, shape.ffn_bias),
            down=stacked({f"{mlp}.down_proj": hidden}, ffn, shape.ffn_bias),
        )


class GpuForward:
    """A model over one cache: rows become logits, and their keys and values stay in the cache. Logits are there until
    the next ones. No graph draws behind more than `max_graph_samples` rows."""

    def __init__(
        self, model: GpuModel, memory: StepMemory, cache: BlockCache, *, max_decodes: int, max_graph_samples: int = 0
    ) -> None:
        self._model = model
        self._memory = memory
        self._layers = list(zip(model.layers, cache.layers, strict=True))
        shape = model.shape
        angles = torch.arange(memory.max_tokens, dtype=torch.float32, device=model.device)[:, None]
        angles = angles * model.frequencies.to(model.device)
        self._heads = Heads(
            shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.norm_eps, angles.cos(), angles.sin()
        )
        self._attend = DecodeAttention(self._heads, max_decodes, model.device)
        self.prompt_kernel, self._flash = flash.choose(
            model.dtype, (shape.num_heads, shape.num_kv_heads, shape.head_dim, memory.block_size), model.device
        )
        self.is_capturable = model.device.type != "cuda" or self.prompt_kernel in flash.CAPTURABLE
        """Whether `compute` may be part of a graph."""
        layer = model.layers[0]
        products = (layer.qkv, layer.output, layer.gate_up, layer.down)
        self.flop_per_row = 2.0 * len(model.layers) * sum(product.weight.numel() for product in products)
        """The arithmetic of products, the head's apart."""
        self._head_room = torch.empty(max_graph_samples, shape.vocab_size, dtype=torch.float32, device=model.device)
        """One for the logits of all graphs."""

    @property
    def vocab_size(self) -> int:
        return self._model.shape.vocab_size

    def sizes_of_kinds(self, max_rows: int) -> list[int]:
        """Return a number of rows for each way in which `decode` computes up to `max_rows` rows."""
        return self._attend.sizes_of_kinds(max_rows)

    def decode(self, rows: Rows, num_rows: int) -> torch.Tensor:
        """Compute rows each of a slot of its own; return logits [rows, vocab] in fp32."""
        if num_rows == 1:
            return self._decode_one(rows)
        x, y = self._embed(rows, num_rows)
        mixed = self._new_mixed(num_rows)
        for i, (layer, (keys, values)) in enumerate(self._layers):
            self._attend(layer.qkv(y), layer.head_norms, keys, values, self._memory, rows, mixed)
            y = self._rest(layer, x, y, layer.output(mixed), i)
        return self._logits(y)

    def compute(self, rows: Rows, num_rows: int, spans: flash.Spans | None, sampling: torch.Tensor) -> torch.Tensor:
        """Compute rows each of a slot of its own, and behind them those of `spans`; return the logits [n, vocab], in
        fp32, of those numbered in `sampling` [n]."""
        x, y = self._embed(rows, num_rows)
        mixed = self._new_mixed(num_rows).zero_()  # rows of no chunk must be finite: the spare block is theirs
        num_single = num_rows - (0 if spans is None else len(spans.rows.slots))
        for i, (layer, (keys, values)) in enumerate(self._layers):
            qkv = layer.qkv(y)
            if num_single:
                single = rows.first(num_single)
                self._attend(qkv[:num_single], layer.head_norms, keys, values, self._memory, single, mixed[:num_single])
            if spans is not None:
                chunks = qkv[num_single:]
                queries = rotate_store(chunks, self._heads, layer.head_norms, keys, values, self._memory, spans.rows)
                self._flash(queries, keys, values, spans, mixed[num_single:].view(queries.shape))
            if i == len(self._layers) - 1:  # of rows that do not sample only keys and values were still wanted
                if not len(sampling):
                    break
                x, y, mixed = (every.index_select(0, sampling) for every in (x, y, mixed))
            y = self._rest(layer, x, y, layer.output(mixed), i)
        return self._logits(y) if len(sampling) else y[:0]

    def _new_mixed(self, num_rows: int) -> torch.Tensor:
        """Return memory for what queries attend to."""
        model, heads = self._model, self._heads
        return torch.empty(num_rows, heads.num * heads.dim, dtype=model.dtype, device=model.device)

    def _embed(self, rows: Rows, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the residual stream and the input of the first layer, both [rows, hidden]."""
        model = self._model
        x = torch.empty(num_rows, model.shape.hidden_size, dtype=torch.float32, device=model.device)
        y = torch.empty_like(x, dtype=model.dtype)
        embed(self._memory, rows, model.embedding, x, model.layers[0].attention_norm, y, model.shape.norm_eps)
        return x, y

    def _rest(self, layer: _Layer, x: torch.Tensor, y: torch.Tensor, change: torch.Tensor, number: int) -> torch.Tensor:
        """Add what a layer attended to and what its feed-forward part makes of it to `x`; return the next layer's
        input, or the head's. `y` is overwritten."""
        model = self._model
        following = model.layers[number + 1].attention_norm if number + 1 < len(model.layers) else model.norm
        add_norm(x, change, layer.ffn_norm, y, model.shape.norm_eps)
        return add_norm(x, layer.down(gate(layer.gate_up(y))), following, y, model.shape.norm_eps)

    def _logits(self, y: torch.Tensor) -> torch.Tensor:
        head, fits = self._model.head, len(y) <= len(self._head_room)
        room = self._head_room[: len(y)] if fits else self._head_room.new_empty(len(y), len(head))
        if y.dtype is torch.float32 or y.device.type != "cuda":
            return torch.mm(y.float(), head.float().T, out=room)
        return torch.mm(y, head.T, out_dtype=torch.float32, out=room)

    def _decode_one(self, rows: Rows) -> torch.Tensor:
        model, eps = self._model, self._model.shape.norm_eps
        x = torch.empty(1, model.shape.hidden_size, dtype=torch.float32, device=model.device)
        embed(self._memory, rows, model.embedding, x, model.norm, None, eps)
        mixed = self._new_mixed(1)
        for layer, (keys, values) in self._layers:
            qkv = project(x, layer.qkv.weight, layer.qkv.bias, norm=layer.attention_norm, eps=eps)
            self._attend(qkv, layer.head_norms, keys, values, self._memory, rows, mixed)
            project(mixed, layer.output.weight, layer.output.bias, added_to=x)
            gated = project(x, layer.gate_up.weight, layer.gate_up.bias, norm=layer.ffn_norm, eps=eps, is_gated=True)
            project(gated, layer.down.weight, layer.down.bias, added_to=x)
        return self._logits(rms_norm(x, x.shape[-1:], model.norm, eps).to(model.dtype))
