"""Memory model: GiB per GPU by component, from the base's shape alone. No torch, no GPU, no weights.

Sources: Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054) for what each stage shards; Dettmers et al. 2023 (QLoRA,
arXiv:2305.14314) for the bits of NF4 with double quantisation; Korthikanti et al. 2022 (arXiv:2205.05198) for
activations.
"""

from dataclasses import dataclass
from typing import Literal

from ft_service.catalog import ModelShape

GIB = 2**30

# NF4: 4 bits a weight, an 8-bit constant per block of 64, and an fp32 constant per 256 of those.
NF4_BYTES_PER_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)
# fp32 master weight, first and second moment.
ADAM_BYTES_PER_PARAMETER = 12
GRADIENT_BYTES_PER_PARAMETER = 4
LOSS_CHUNK_BYTES = 512 * 1024 * 1024
CUDA_CONTEXT_GIB = 1.0
FRAGMENTATION = 0.06


@dataclass(frozen=True)
class MemoryEstimate:
    """GiB on one GPU, by what fills it."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float
    gather_buffers: float
    reserve: float

    @property
    def total(self) -> float:
        return sum(self.by_component().values())

    def by_component(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def trainable_parameters(shape: ModelShape, method: Literal["full", "lora", "qlora"], lora_rank: int) -> int:
    """Parameters that are trained; for LoRA, those of A [rank, in] and B [out, rank] on every linear layer."""
    if method == "full":
        return shape.num_parameters
    per_layer = sum(lora_rank * (rows + columns) for _, rows, columns in shape.linear_shapes())
    return shape.num_layers * per_layer


def estimate_memory(
    shape: ModelShape,
    *,
    method: Literal["full", "lora", "qlora"],
    lora_rank: int,
    zero_stage: int,
    num_workers: int,
    offload: Literal["none", "cpu", "nvme"],
    micro_batch_tokens: int,
    activation_checkpointing: bool,
    weight_bytes: int = 2,
) -> MemoryEstimate:
    """Memory of one GPU during a step, in GiB.

    `micro_batch_tokens` is micro-batch size x row length; `weight_bytes` is 2 for bf16 and 4 for fp32.
    """
    linear = shape.num_layers * sum(rows * columns for _, rows, columns in shape.linear_shapes())
    rest = shape.num_parameters - linear
    weights = linear * (NF4_BYTES_PER_WEIGHT if method == "qlora" else weight_bytes) + rest * weight_bytes
    trained = trainable_parameters(shape, method, lora_rank)
    if method != "full":
        weights += trained * weight_bytes
    gradients = float(trained * GRADIENT_BYTES_PER_PARAMETER)
    optimizer = float(trained * ADAM_BYTES_PER_PARAMETER)

    sharded = num_workers if zero_stage else 1
    optimizer /= sharded
    if zero_stage >= 2:
        gradients /= sharded
    gather = 0.0
    if zero_stage == 3:
        layer = shape.layer_parameters * (NF4_BYTES_PER_WEIGHT if method == "qlora" else weight_bytes)
        embedding = shape.vocab_size * shape.hidden_size * weight_bytes
        gather = 2 * layer + embedding  # the layer at work, the one prefetched, and the head
        weights /= sharded
    if offload != "none":
        optimizer, gradients = 0.0, gradients / max(1, shape.num_layers)
        weights = 0.0 if zero_stage == 3 else weights

    return MemoryEstimate(
        weights=weights / GIB,
        gradients=gradients / GIB,
        optimizer=optimizer / GIB,
        activations=micro_batch_tokens * _activation_bytes(shape, activation_checkpointing, weight_bytes) / GIB,
        loss=2.5 * LOSS_CHUNK_BYTES / GIB,
        gather_buffers=gather / GIB,
        reserve=CUDA_CONTEXT_GIB + FRAGMENTATION * (weights + gradients + optimizer + gather) / GIB,
    )


def _activation_bytes(shape: ModelShape, checkpointing: bool, element_bytes: int) -> float:
    """Bytes of activations per token: what the backward pass finds of every layer, and one layer whole."""
    key_value = 2 * shape.num_kv_heads * shape.head_dim
    query = shape.num_heads * shape.head_dim
    # Input and output of the two norms (fp32 inside), q k v and the attention's output, gate, up, their product, down.
    whole_layer = element_bytes * (8 * shape.hidden_size + 2 * query + key_value + 4 * shape.intermediate_size)
    if checkpointing:
        return element_bytes * shape.hidden_size * shape.num_layers + 2 * whole_layer
    return whole_layer * (shape.num_layers + 1)
