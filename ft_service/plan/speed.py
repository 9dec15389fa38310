"""Time model: seconds of an optimizer step from the base's shape and the GPU's datasheet.

An estimate for comparing layouts and budgeting, not a measurement. FLOPs per token are counted from first principles
(Kaplan et al. 2020, arXiv:2001.08361, section 2.1: 2 per weight forward, 4 backward; Chowdhery et al. 2022,
arXiv:2204.02311, appendix B, for attention and for the meaning of MFU). Traffic of ZeRO after Rajbhandari et al. 2020
(arXiv:1910.02054, section 7), of hpZ after Wang et al. 2023 (ZeRO++, arXiv:2306.10209).
"""

from dataclasses import dataclass

from ft_service.catalog.gpus import Gpu
from ft_service.catalog.models import ModelShape
from ft_service.plan.memory import Layout, trainable_parameters

MFU = 0.40
"""Assumed fraction of the peak rate, of all executed FLOPs including recomputation.

Published, bf16, H100: 41 % for LoRA of 8B on one GPU and 32 % for 70B on eight (48 % with its recomputation counted)
(NVIDIA NeMo AutoModel, docs/performance-summary.mdx); 33-39 % for pretraining 8B on eight (torchtitan,
benchmarks/llama3_h100_202412_torchtitan.md).
"""
MFU_SOURCE = "published LoRA and pretraining runs on H100; this software has not been measured on GPUs"
LINK_EFFICIENCY = 0.7
"""Fraction of a link's bandwidth that large collectives and copies reach."""
EXPOSED_FRACTION = 0.5
"""Fraction of the transfers that could overlap with the computation but do not: prefetching is never perfect."""
OVERHEAD_SECONDS_PER_LAYER = 0.5e-3
"""Per micro-step: kernels too small to fill the GPU, launches, synchronisation."""
HOST_SECONDS_PER_LAYER = {
    ("adapter", 3): (0.009, 0.004),
    ("adapter", 1): (0.004, 0.003),
    ("full", 3): (0.007, 0.002),
    ("full", 1): (0.003, 0.001),
}
"""CPU time of Python per micro-step, and how much more if the layer is recomputed: by what is trained, and whether the
stage is 3. As benchmarks/host_time.py measures it on one core of an AMD EPYC, without a GPU."""
HOST_BANDWIDTH = 100.0
"""GB/s of main memory that AdamW reaches on the CPUs of one node."""
NVME_BANDWIDTH = 6.0
"""GB/s of one node's local drives."""
NF4_BYTES_PER_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)
"""4 bits, an 8-bit constant per 64 weights, and an fp32 constant per 256 of those (QLoRA, arXiv:2305.14314)."""
_GB = 1e9


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step. Communication and offloading count only what does not overlap with compute."""

    compute: float
    """Of the GPU or, where that is longer, of the Python that launches its kernels."""
    communication: float
    offload: float

    @property
    def seconds(self) -> float:
        return self.compute + self.communication + self.offload


def matmul_parameters(shape: ModelShape) -> int:
    """Weights that take part in matrix products: the linear layers and the head, not the embedding."""
    return _linear_parameters(shape) + shape.vocab_size * shape.hidden_size


def flops_per_token(shape: ModelShape, layout: Layout) -> float:
    """FLOPs executed per trained token.

    Per weight 2 forward, 2 backward to the input and, where it is trained, 2 to the weight itself: 6 N for `full`, 4 N
    for a frozen base and 6 for each adapter weight. Causal attention over a full row of T tokens: 2 x heads x head_dim
    x T per layer forward (half of the square, two products), twice that backward. Checkpointing runs the forward pass
    of the layers that it applies to once more. Rows of many short documents need less attention than this estimate.
    """
    weights = matmul_parameters(shape)
    attention = 2.0 * shape.num_layers * shape.num_heads * shape.head_dim * layout.max_seq_len
    forward = 2.0 * weights + attention
    trained = weights if layout.method == "full" else trainable_parameters(shape, layout)
    flops = forward + 2.0 * weights + 2 * attention + 2.0 * trained
    if layout.method != "full":
        flops += 4.0 * trained  # the adapter's own forward and backward to its input
    flops += recomputed_share(shape, layout) * (forward - 2.0 * shape.vocab_size * shape.hidden_size)
    return flops


def recomputed_share(shape: ModelShape, layout: Layout) -> float:
    """The fraction of the layers whose forward pass runs twice."""
    return 1 - layout.kept_layers / shape.num_layers if layout.activation_checkpointing else 0.0


def forward_share(shape: ModelShape, layout: Layout) -> float:
    """FLOPs per validation token, as a fraction of those per trained token."""
    attention = 2.0 * shape.num_layers * shape.num_heads * shape.head_dim * layout.max_seq_len
    return (2.0 * matmul_parameters(shape) + attention) / flops_per_token(shape, layout)


def step_time(shape: ModelShape, layout: Layout, accumulation: int, gpu: Gpu) -> StepTime:
    """Seconds of an optimizer step of `accumulation` micro-steps on every worker."""
    tokens = layout.micro_batch_size * layout.max_seq_len
    rate = MFU * gpu.bf16_tflops * 1e12 * (1.0 if layout.precision == "bf16" else 0.25)
    per_micro_step = tokens * flops_per_token(shape, layout) / rate
    per_micro_step += shape.num_layers * OVERHEAD_SECONDS_PER_LAYER
    if layout.method == "qlora":  # each pass over the weights reads 4 bits, writes 16 and reads them again
        passes = 2 + recomputed_share(shape, layout)
        per_micro_step += passes * _linear_parameters(shape) * (NF4_BYTES_PER_WEIGHT + 4) / (gpu.memory_bandwidth * _GB)
    compute = accumulation * max(per_micro_step, host_seconds(shape, layout))
    communication = _communication(shape, layout, accumulation, gpu)
    streamed, update = _offloading(shape, layout, accumulation, gpu)
    return StepTime(
        compute=compute, communication=_exposed(communication, compute), offload=_exposed(streamed, compute) + update
    )


def host_seconds(shape: ModelShape, layout: Layout) -> float:
    """CPU time of Python in a micro-step. It runs ahead of the GPU, so it matters only where it takes longer."""
    trains = "full" if layout.method == "full" else "adapter"
    once, recomputed = HOST_SECONDS_PER_LAYER[trains, 3 if layout.zero_stage == 3 else 1]
    return shape.num_layers * (once + recomputed_share(shape, layout) * recomputed)


def _linear_parameters(shape: ModelShape) -> int:
    return shape.num_layers * sum(rows * columns for _, rows, columns in shape.linear_shapes())


def _exposed(transfer: float, compute: float) -> float:
    """Seconds that transfers add to the step: what exceeds the computation, and a fraction of the rest."""
    hidden = min(transfer, compute)
    return transfer - hidden + EXPOSED_FRACTION * hidden


def _weight_bytes(shape: ModelShape, layout: Layout) -> float:
    """Bytes of all weights when they are gathered."""
    element = 2 if layout.precision == "bf16" else 4
    if layout.method != "qlora":
        return float(shape.num_parameters * element)
    linear = _linear_parameters(shape)
    return linear * 0.5 + (shape.num_parameters - linear) * element


def _communication(shape: ModelShape, layout: Layout, accumulation: int, gpu: Gpu) -> float:
    workers = layout.num_workers
    per_node = max(1, layout.workers_per_node)
    if workers == 1:
        return 0.0
    nodes = max(1, -(-workers // per_node))

    def within(size: float, members: int) -> float:
        return size * (members - 1) / members / (gpu.peer * LINK_EFFICIENCY * _GB)

    def everywhere(size: float) -> float:
        """Each node receives what it does not hold over all its network adapters; each GPU over its own link."""
        network = size * (nodes - 1) / nodes / (gpu.network * LINK_EFFICIENCY * _GB)
        return max(within(size, workers), network)

    element = 2 if layout.precision == "bf16" else 4
    trained = float(trainable_parameters(shape, layout) * element)
    if layout.zero_stage < 3:
        reductions = accumulation if layout.zero_stage == 2 else 1
        return (reductions + 1) * everywhere(trained)  # reduce-scatter, and a gather of the updated weights
    weights = _weight_bytes(shape, layout)
    gathers = 2 * accumulation  # forward; recomputation and backward together
    if layout.hpz:  # the first gather of a step fills the node's copy; the other gathers read that copy
        gathering = everywhere(weights) + (gathers - 1) * within(weights, per_node)
    else:
        gathering = gathers * everywhere(weights)
    return gathering + accumulation * everywhere(trained)


def _offloading(shape: ModelShape, layout: Layout, accumulation: int, gpu: Gpu) -> tuple[float, float]:
    """Seconds of copies that can overlap with the computation, and of the optimizer step that follows it."""
    if layout.offload == "none":
        return 0.0, 0.0
    workers = layout.num_workers
    per_node = max(1, layout.workers_per_node)
    trained = trainable_parameters(shape, layout) / workers  # per worker
    link = gpu.pcie * LINK_EFFICIENCY * _GB
    drive = NVME_BANDWIDTH * _GB / per_node
    streamed = accumulation * 4 * trained / link
    if layout.zero_stage == 3:
        weights = _weight_bytes(shape, layout) / workers
        streamed += 2 * accumulation * weights / (min(link, drive) if layout.offload == "nvme" else link)
    # AdamW reads gradient, master weight and both moments in fp32, and writes three of them and the bf16 weight.
    update = trained * 30 * per_node / (HOST_BANDWIDTH * _GB) + 2 * trained / link
    if layout.offload == "nvme":
        update = max(update, 24 * trained / drive)
    return streamed, update
