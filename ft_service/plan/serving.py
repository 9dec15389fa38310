"""What a GPU holds when it serves: weights, keys and values, adapters. Follows from the base's shape alone."""

from dataclasses import dataclass
from typing import Literal

from ft_service.catalog.models import ModelShape
from ft_service.plan.partitions import num_nf4_blocks

GIB = 2**30
Precision = Literal["bf16", "fp16", "fp32", "nf4"]
_ELEMENT_BYTES: dict[str, int] = {"bf16": 2, "fp16": 2, "fp32": 4}
_RESERVE_BYTES = 3 * GIB // 4
"""The CUDA context, loaded kernels and cuBLAS workspaces, as in training's plan (`ft_service.plan.memory`)."""
_USED_FRACTION = 0.97
"""As in training's plan: what a device has is never usable to the last byte."""
_LOGIT_ROWS = 64
"""Sequences of a batch: the default of `max_batch`."""
_STEP_TOKENS = 512
"""Most tokens of one step: `serve.engines.transformers_engine` cuts prompts into such pieces."""


@dataclass(frozen=True)
class ServingPlan:
    """Bytes on each GPU of a replica, and what there is room for."""

    gpus: int
    gpu_bytes: int
    weights: int
    reserve: int
    """Context and the temporary memory of one step."""
    adapters: int
    cache: int
    """What is left for keys and values; negative if the rest does not fit."""
    cache_bytes_per_token: int
    """On all GPUs together."""
    adapter_bytes: int
    """One adapter of the rank asked for, on all GPUs together."""

    @property
    def cache_tokens(self) -> int:
        """Tokens of prompts and answers that all requests can hold at once."""
        return max(0, self.cache * self.gpus // self.cache_bytes_per_token)

    @property
    def num_adapters(self) -> int:
        """Adapters in memory at once; others are loaded when they are asked for."""
        return self.adapters * self.gpus // self.adapter_bytes

    def fits(self, context: int) -> bool:
        """Whether one request of `context` tokens has room."""
        return self.cache_tokens >= context


def plan_serving(
    shape: ModelShape,
    gpu_gib: float,
    gpus: int = 1,
    precision: Precision = "bf16",
    adapter_gib: float = 4.0,
    lora_rank: int = 16,
    max_slots: int | None = None,
) -> ServingPlan:
    """The memory of one replica on `gpus` GPUs of a node, over which layers, keys and values are spread evenly.

    Keys and values take 2 x layers x key/value heads x head width elements a token. An adapter has rank x (in + out)
    elements for each linear layer, in the base's dtype.

    With `max_slots`, adapters have slots as vLLM reserves them: of `lora_rank`, for the embedding and the head too, as
    many as fit in `adapter_gib`, at least one and at most `max_slots`. On several GPUs vLLM keeps some factors whole on
    each; that is not counted.
    """
    element = _ELEMENT_BYTES.get(precision, 2)
    weights = _weight_bytes(shape, precision)
    per_token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * int(element)
    adapter = shape.num_layers * sum(lora_rank * (rows + columns) for _, rows, columns in shape.linear_shapes())
    if max_slots is not None:
        adapter += 2 * lora_rank * (shape.vocab_size + shape.hidden_size)
    adapter_bytes = int(adapter * element)
    # Of one step: the widest intermediate results of a layer, gate and up, and logits in fp32.
    layer = _STEP_TOKENS * (3 * shape.intermediate_size + 4 * shape.hidden_size) * int(element)
    step = layer + _LOGIT_ROWS * shape.vocab_size * 4
    gpu_bytes = int(gpu_gib * GIB)
    adapters = int(adapter_gib * GIB / gpus)
    if max_slots is not None:
        slots = min(max(int(adapter_gib * GIB // adapter_bytes), 1), max_slots)
        adapters = -(-slots * adapter_bytes // gpus)
    reserve = _RESERVE_BYTES + step
    share = -(-weights // gpus)
    return ServingPlan(
        gpus=gpus,
        gpu_bytes=gpu_bytes,
        weights=share,
        reserve=reserve,
        adapters=adapters,
        cache=int(gpu_bytes * _USED_FRACTION) - share - reserve - adapters,
        cache_bytes_per_token=per_token,
        adapter_bytes=adapter_bytes,
    )


def _weight_bytes(shape: ModelShape, precision: Precision) -> int:
    if precision != "nf4":
        return int(shape.num_parameters * _ELEMENT_BYTES[precision])
    # Linear layers in 4 bits with an 8-bit constant per block (double quantisation); the rest in bf16.
    linear = sum(rows * columns for _, rows, columns in shape.linear_shapes()) * shape.num_layers
    return linear // 2 + num_nf4_blocks(linear) + 2 * (shape.num_parameters - linear)
