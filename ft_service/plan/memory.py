"""Memory model: bytes per GPU and per host by component, from the base's shape alone. No torch, no GPU, no weights.

What rests on a worker (weights, quantisation statistics, gradients, optimizer) is exact: it follows, parameter by
parameter, what DeepSpeed 0.19.8, bitsandbytes and torch's AdamW allocate under `ft_service.train.parallel`. What comes
and goes (activations, loss, gather buffers) is modelled at its peak; the reserve is a judgement.

Sources: Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054) for what each stage shards; Dettmers et al. 2023 (QLoRA,
arXiv:2305.14314) for NF4 with double quantisation; the code of the packages named for padding and copies.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from ft_service.catalog.models import ModelShape
from ft_service.plan.activations import activation_bytes, loss_bytes

GIB = 2**30
FP32_BYTES = 4

# bitsandbytes: a block of 64 weights has a constant in 8 bits, 256 of those an fp32 constant.
_WEIGHTS_PER_BLOCK, _BLOCKS_PER_SUPERBLOCK = 64, 256
# Beside them every weight keeps, in fp32, a table for 4 bits (16), one for 8 bits (256), and an offset.
_QUANTISATION_TABLE_BYTES = FP32_BYTES * (16 + 256 + 1)

MOST_BUCKET_ELEMENTS = 500_000_000
"""Of the bucket in which gradients are reduced: DeepSpeed's default; fewer where fewer parameters are trained."""
# DeepSpeed's defaults, in elements.
_PREFETCH, _MAX_LIVE, _SUB_GROUP = 50_000_000, 1_000_000_000, 1_000_000_000
_PERSISTENCE_THRESHOLD = 100_000
_NVME_PARAMETER_BUFFER, _NVME_OPTIMIZER_BUFFERS = 5 * 100_000_000, 4

# Judgements: no formula gives them, and they differ between drivers and versions.
_CUDA_CONTEXT_BYTES = 3 * GIB // 4
"""The context, loaded kernels and the workspaces of cuBLAS, which no allocator statistic shows."""
_NCCL_BYTES = GIB // 2
_FRAGMENTED_SHARE = 0.1
"""Of what comes and goes; what rests is allocated once, in large blocks."""
_PROCESS_BYTES = 2 * GIB
"""A worker's interpreter, libraries, CUDA's host side and batches."""

_STAGING_BYTES = 8 * 16 * 1024 * 1024
"""Chunks under way in the threads of one worker that read weights (`ft_service.model.load`)."""

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

    @property
    def element_bytes(self) -> int:
        return 2 if self.precision == "bf16" else 4

    @property
    def tokens(self) -> int:
        """Of one forward pass of one worker."""
        return self.micro_batch_size * self.max_seq_len


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


def estimate_memory(shape: ModelShape, layout: Layout) -> MemoryEstimate:
    """Peak memory during a training step, of the worker that holds most."""
    parameters = list(_parameters(shape, layout))
    trained = [parameter for parameter in parameters if parameter.trained]
    groups = _optimizer_groups(trained)
    targets = _target_names(shape, layout)
    loss = loss_bytes(shape, tokens=layout.tokens, element_bytes=layout.element_bytes, full=layout.method == "full")
    activations = activation_bytes(
        shape,
        tokens=layout.tokens,
        element_bytes=layout.element_bytes,
        method=layout.method,
        targets=targets,
        lora_rank=layout.lora_rank,
        use_dora=layout.use_dora,
        checkpointing=layout.activation_checkpointing,
        loss=loss,
    )
    gpu = {
        "weights": _weights(parameters, groups, layout),
        "quantisation_statistics": sum(_statistics(p.numel) for p in parameters if p.four_bit),
        "gradients": _gradients(groups, layout),
        "optimizer": _optimizer(groups, layout),
        "activations": activations,
        "loss": loss,
        "gather_buffers": _gather_buffers(parameters, layout),
    }
    host = {"processes": _PROCESS_BYTES * layout.workers_per_node}
    if layout.offload != "none":
        host |= _move_to_host(gpu, parameters, groups, layout)
    host["loading"] = layout.workers_per_node * _STAGING_BYTES
    if layout.method == "full":  # the tensor that a worker writes, and the one before it
        largest = max(parameter.numel for parameter in parameters)
        host["publishing"] = layout.workers_per_node * 2 * largest * layout.element_bytes
    passing = gpu["activations"] + gpu["loss"] + gpu["gather_buffers"]
    # The update needs copies of its own, at a time when nothing of the passes is left.
    gpu["gather_buffers"] += max(0, _update_copies(groups, layout) - passing)
    nccl = _NCCL_BYTES if layout.num_workers > 1 else 0
    gpu["reserve"] = _CUDA_CONTEXT_BYTES + nccl + round(_FRAGMENTED_SHARE * passing)
    return MemoryEstimate(gpu, host)


def trainable_parameters(shape: ModelShape, layout: Layout) -> int:
    """Parameters that are trained: all, or A [rank, in], B [out, rank] and DoRA's magnitude [out] of each target."""
    return sum(parameter.numel for parameter in _parameters(shape, layout) if parameter.trained)


# -- parameters ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parameter:
    shape: tuple[int, ...]
    trained: bool
    four_bit: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def stored(self, element_bytes: int) -> int:
        """Elements of the tensor that holds it: 4-bit weights lie packed in elements of the training type."""
        return self.numel // (2 * element_bytes) if self.four_bit else self.numel


def _parameters(shape: ModelShape, layout: Layout) -> Iterator[_Parameter]:
    """Base and adapters, in the order of `named_parameters` of the model in training."""
    full = layout.method == "full"
    for name, size in shape.parameter_shapes():
        linear = name.endswith("_proj.weight")
        yield _Parameter(size, trained=full, four_bit=linear and layout.method == "qlora")
        if linear and not full and _is_target(name.removesuffix(".weight"), layout.target_modules):
            rows, columns = size
            yield _Parameter((layout.lora_rank, columns), trained=True)
            yield _Parameter((rows, layout.lora_rank), trained=True)
            if layout.use_dora:
                yield _Parameter((rows,), trained=True)


def _is_target(module: str, targets: str | tuple[str, ...]) -> bool:
    """As peft matches them: a string is a regular expression of the whole path, a list holds ends of paths."""
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _target_names(shape: ModelShape, layout: Layout) -> set[str]:
    """The linear maps that are adapted in any layer, such as q_proj."""
    modules = (name.removesuffix(".weight") for name, _ in shape.parameter_shapes() if name.endswith("_proj.weight"))
    return {module.rpartition(".")[2] for module in modules if _is_target(module, layout.target_modules)}


def _optimizer_groups(trained: list[_Parameter]) -> list[list[_Parameter]]:
    """Matrices are decayed, vectors are not: an optimizer group each, where there are any."""
    matrices = [parameter for parameter in trained if len(parameter.shape) > 1]
    vectors = [parameter for parameter in trained if len(parameter.shape) < 2]
    return [group for group in (matrices, vectors) if group]


# -- what rests ------------------------------------------------------------------------------------------------------


def _share(elements: int, workers: int) -> int:
    """Of one tensor under ZeRO-3: every worker's share is equally long, the last one padded."""
    return -(-elements // workers)


def _flat_share(group: list[_Parameter], workers: int) -> int:
    """Of a group's flat buffer under ZeRO-1 and 2, which is padded until shares begin at even elements."""
    return 2 * _share(sum(parameter.numel for parameter in group), 2 * workers)


def _weights(parameters: list[_Parameter], groups: list[list[_Parameter]], layout: Layout) -> int:
    element, workers = layout.element_bytes, layout.num_workers
    sizes = [parameter.stored(element) for parameter in parameters]
    if layout.zero_stage == 3:
        held = sum(_share(size, workers) for size in sizes) + _persistent(sizes, workers)
        if layout.hpz:
            # Made when a whole weight is let go, which a small trained one never is after an update.
            for parameter, size in zip(parameters, sizes, strict=True):
                if size > _PERSISTENCE_THRESHOLD or not parameter.trained:
                    held += _share(size, workers) * workers // layout.workers_per_node
        return held * element
    padding = 0
    if layout.zero_stage:
        padding = sum(_flat_share(group, workers) * workers - sum(p.numel for p in group) for group in groups)
    return (sum(sizes) + padding) * element


def _persistent(sizes: list[int], workers: int) -> int:
    """Elements of small tensors, which ZeRO-3 keeps whole on every worker beside their shares."""
    if workers == 1:  # the share is the whole
        return 0
    return sum(_share(size, workers) * workers for size in sizes if size <= _PERSISTENCE_THRESHOLD)


def _statistics(weights: int) -> int:
    """Of one 4-bit weight; ZeRO-3 does not know of them, so every worker has them whole."""
    blocks = -(-weights // _WEIGHTS_PER_BLOCK)
    return blocks + FP32_BYTES * -(-blocks // _BLOCKS_PER_SUPERBLOCK) + _QUANTISATION_TABLE_BYTES


def _gradients(groups: list[list[_Parameter]], layout: Layout) -> int:
    """At the end of a backward pass that adds to an earlier one."""
    workers, whole = layout.num_workers, sum(parameter.numel for group in groups for parameter in group)
    if layout.zero_stage == 3:
        return FP32_BYTES * sum(_share(p.numel, workers) for group in groups for p in group)
    if layout.precision == "fp32":
        return FP32_BYTES * (whole if layout.zero_stage < 2 else _gradients_touching_share(groups, workers))
    if layout.zero_stage == 0:
        return layout.element_bytes * whole
    flat = sum(_flat_share(group, workers) for group in groups)
    # ZeRO-1 sums in fp32 on every worker, and never lets go of the bf16 gradients that it adds.
    return FP32_BYTES * (flat if layout.zero_stage == 2 else flat * workers) + (
        layout.element_bytes * whole if layout.zero_stage == 1 else 0
    )


def _gradients_touching_share(groups: list[list[_Parameter]], workers: int) -> int:
    """Elements of the gradients that reach into a worker's share, whole, and its padding; of the fullest worker.

    In fp32, ZeRO-2 keeps the gradients as autograd made them.
    """
    held = [0] * workers
    for group in groups:
        share, ends = _flat_share(group, workers), list(accumulate(parameter.numel for parameter in group))
        for worker in range(workers):
            first, last = worker * share, (worker + 1) * share
            for parameter, end in zip(group, ends, strict=True):
                if end - parameter.numel < last and end > first:
                    held[worker] += parameter.numel
            held[worker] += last - max(first, min(last, ends[-1]))
    return max(held)


def _optimizer(groups: list[list[_Parameter]], layout: Layout) -> int:
    """fp32 master weights and AdamW's two moments. Its step counters, 4 bytes a tensor, are left out."""
    workers = layout.num_workers
    if layout.zero_stage == 0:
        whole = sum(parameter.numel for group in groups for parameter in group)
        return (2 if layout.precision == "fp32" else 3) * FP32_BYTES * whole
    if layout.zero_stage == 3:
        return 3 * FP32_BYTES * sum(_share(p.numel, workers) for group in groups for p in group)
    return 3 * FP32_BYTES * sum(_flat_share(group, workers) for group in groups)


# -- what comes and goes ---------------------------------------------------------------------------------------------


def _gather_buffers(parameters: list[_Parameter], layout: Layout) -> int:
    """Buckets in which gradients are reduced and, under ZeRO-3, the weights that are gathered at once.

    ZeRO-1 in bf16 reduces in place. ZeRO-3 keeps weights that it needs again within `_MAX_LIVE` elements, fetches
    ahead until `_PREFETCH` are on their way, and is over by at most one tensor.
    """
    element = layout.element_bytes
    if layout.zero_stage == 0 or (layout.zero_stage == 1 and layout.precision == "bf16" and layout.offload == "none"):
        return 0
    bucket = min(MOST_BUCKET_ELEMENTS, sum(parameter.numel for parameter in parameters if parameter.trained))
    if layout.zero_stage < 3 or (layout.num_workers == 1 and layout.offload == "none"):
        return bucket * element
    sizes = [parameter.stored(element) for parameter in parameters]
    gathered = [size for size in sizes if size > _PERSISTENCE_THRESHOLD]
    live = min(sum(gathered), _MAX_LIVE + _PREFETCH + max(gathered, default=0))
    return (bucket + live) * element


def _update_copies(groups: list[list[_Parameter]], layout: Layout) -> int:
    """Copies of gradients that reducing them and updating the weights make, once the passes are over."""
    element, workers = layout.element_bytes, layout.num_workers
    whole = sum(parameter.numel for group in groups for parameter in group)
    if layout.offload != "none":
        return 0
    if layout.zero_stage == 3:
        return FP32_BYTES * min(_SUB_GROUP, sum(_share(p.numel, workers) for group in groups for p in group))
    if layout.precision == "fp32":
        bucket = FP32_BYTES * min(whole, MOST_BUCKET_ELEMENTS)
        return bucket if layout.zero_stage == 0 else FP32_BYTES * sum(_flat_share(group, workers) for group in groups)
    if layout.zero_stage == 0:  # in fp32, one by one and joined
        return 2 * FP32_BYTES * whole
    if layout.zero_stage == 1:  # in the type they travel in, and joined where one bucket takes them all
        return whole * (element + (FP32_BYTES if whole <= MOST_BUCKET_ELEMENTS else 0))
    return 0


# -- offload ---------------------------------------------------------------------------------------------------------


def _move_to_host(
    gpu: dict[str, int], parameters: list[_Parameter], groups: list[list[_Parameter]], layout: Layout
) -> dict[str, int]:
    """What DeepSpeed keeps in pinned host memory instead, per node; takes it out of `gpu`.

    Beside masters and moments that is the gradient of the masters, which ZeRO-1 and 2 keep next to a copy in the
    training type, and ZeRO-3 twice. On a drive, only the buffers remain that swap it piece by piece.
    """
    element, workers = layout.element_bytes, layout.num_workers
    trained = sum(parameter.numel for group in groups for parameter in group)
    share, optimizer = gpu["optimizer"] // (3 * FP32_BYTES), gpu["optimizer"]
    largest = max(parameter.numel for group in groups for parameter in group)
    if layout.zero_stage < 3:
        accumulated = element * trained  # of parameters that reach into the share; at most all
        gradients = share * (FP32_BYTES + element) + min(accumulated, element * (share + 2 * largest))
        gpu["gradients"] = element * largest + (FP32_BYTES * trained if layout.zero_stage == 1 else 0)
        gpu["optimizer"] = 0
        per_worker = {"optimizer": optimizer, "gradients": gradients}
    else:
        gradients = 2 * FP32_BYTES * share
        sizes = [parameter.stored(element) for parameter in parameters]
        persistent = _persistent(sizes, workers) * element
        weights = gpu["weights"] - persistent
        gpu |= {"weights": persistent, "gradients": 0, "optimizer": 0}
        if layout.offload == "nvme":
            piece = FP32_BYTES * min(_SUB_GROUP, share)
            optimizer = min(optimizer, _NVME_OPTIMIZER_BUFFERS * piece)
            weights = min(weights, _NVME_PARAMETER_BUFFER * element)
        per_worker = {"weights": weights, "optimizer": optimizer, "gradients": gradients}
    return {name: size * layout.workers_per_node for name, size in per_worker.items()}
