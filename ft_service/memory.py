"""Memory model: bytes per GPU and per host by component, from the base's shape alone. No torch, no GPU, no weights.

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
CUDA_CONTEXT_BYTES = GIB
FRAGMENTATION = 0.06

Method = Literal["full", "lora", "qlora"]
Offload = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True)
class Layout:
    """What decides, beside the base's shape, how much memory a run takes."""

    method: Method
    num_workers: int = 1
    workers_per_node: int = 1
    zero_stage: int = 1
    hpz: bool = False
    """A second copy of the weights sharded within each node (ZeRO++ hpZ); only ZeRO-3 over several nodes."""
    offload: Offload = "none"
    micro_batch_size: int = 1
    """Packed rows per forward pass of one worker."""
    max_seq_len: int = 2048
    activation_checkpointing: bool = True
    precision: Literal["bf16", "fp32"] = "bf16"
    lora_rank: int = 16
    target_modules: str | tuple[str, ...] = "all-linear"
    use_dora: bool = False


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what fills them."""

    gpu: dict[str, int]
    """On one GPU. Components, always all of them and in this order: weights, quantisation_statistics, gradients,
    optimizer, activations, loss, gather_buffers, reserve."""
    host: dict[str, int]
    """In one node's main memory: offloaded weights, gradients, optimizer; the processes themselves; buffers."""

    @property
    def gpu_bytes(self) -> int:
        return sum(self.gpu.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


def trainable_parameters(shape: ModelShape, layout: Layout) -> int:
    """Parameters that are trained; for LoRA, those of A [rank, in] and B [out, rank] on every targeted linear layer."""
    if layout.method == "full":
        return shape.num_parameters
    per_layer = sum(layout.lora_rank * (rows + columns) for _, rows, columns in shape.linear_shapes())
    return shape.num_layers * per_layer


def estimate_memory(shape: ModelShape, layout: Layout) -> MemoryEstimate:
    """Peak memory during a training step."""
    weight_bytes = 2 if layout.precision == "bf16" else 4
    four_bit = layout.method == "qlora"
    linear = shape.num_layers * sum(rows * columns for _, rows, columns in shape.linear_shapes())
    rest = shape.num_parameters - linear
    weights = linear * (0.5 if four_bit else weight_bytes) + rest * weight_bytes
    statistics = linear * (NF4_BYTES_PER_WEIGHT - 0.5) if four_bit else 0.0
    trained = trainable_parameters(shape, layout)
    if layout.method != "full":
        weights += trained * weight_bytes
    gradients = float(trained * GRADIENT_BYTES_PER_PARAMETER)
    optimizer = float(trained * ADAM_BYTES_PER_PARAMETER)

    sharded = layout.num_workers if layout.zero_stage else 1
    optimizer /= sharded
    if layout.zero_stage >= 2:
        gradients /= sharded
    gather = 0.0
    if layout.zero_stage == 3:
        layer = shape.layer_parameters * (0.5 if four_bit else weight_bytes)
        gather = 2 * layer + shape.vocab_size * shape.hidden_size * weight_bytes
        weights /= sharded
    host = {"processes": 2 * GIB * layout.workers_per_node}
    if layout.offload != "none":
        host["optimizer"] = round(optimizer * layout.workers_per_node)
        optimizer, gradients = 0.0, gradients / max(1, shape.num_layers)
        if layout.zero_stage == 3:
            host["weights"], weights = round(weights * layout.workers_per_node), 0.0
    resting = weights + statistics + gradients + optimizer + gather
    tokens = layout.micro_batch_size * layout.max_seq_len
    gpu = {
        "weights": weights,
        "quantisation_statistics": statistics,
        "gradients": gradients,
        "optimizer": optimizer,
        "activations": tokens * _activation_bytes(shape, layout.activation_checkpointing, weight_bytes),
        "loss": 2.5 * LOSS_CHUNK_BYTES,
        "gather_buffers": gather,
        "reserve": CUDA_CONTEXT_BYTES + FRAGMENTATION * resting,
    }
    return MemoryEstimate({name: round(size) for name, size in gpu.items()}, host)


def _activation_bytes(shape: ModelShape, checkpointing: bool, element_bytes: int) -> float:
    """Bytes of activations per token: what the backward pass finds of every layer, and one layer whole."""
    key_value = 2 * shape.num_kv_heads * shape.head_dim
    query = shape.num_heads * shape.head_dim
    # Input and output of the two norms (fp32 inside), q k v and the attention's output, gate, up, their product, down.
    whole_layer = element_bytes * (8 * shape.hidden_size + 2 * query + key_value + 4 * shape.intermediate_size)
    if checkpointing:
        return element_bytes * shape.hidden_size * shape.num_layers + 2 * whole_layer
    return whole_layer * (shape.num_layers + 1)
