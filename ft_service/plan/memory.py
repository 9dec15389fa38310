"""Memory model: bytes per GPU and per node by component, from the base's shape alone.

Persistent memory (weights, quantisation statistics, gradients, optimizer) is exact: it follows, parameter by parameter,
what DeepSpeed 0.19.8, bitsandbytes and torch's AdamW allocate under `ft_service.train.parallel`. Temporary memory
(activations, loss, gather buffers) is modelled at its peak. The reserve is a rough constant.

Sources: Rajbhandari et al. 2020 (ZeRO, arXiv:1910.02054) for what each stage shards; Dettmers et al. 2023 (QLoRA,
arXiv:2305.14314) for NF4 with double quantisation; the source code of these packages for padding and copies.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Literal

from ft_service.catalog.models import ModelShape
from ft_service.plan.activations import activation_bytes, loss_bytes
from ft_service.plan.partitions import flat_partition_numel, num_nf4_blocks, partition_numel

GIB = 2**30
FP32_BYTES = 4

# bitsandbytes stores an 8-bit constant per block of weights, and an fp32 constant per 256 blocks.
_BLOCKS_PER_SUPERBLOCK = 256
# In addition every 4-bit tensor stores, in fp32, a table for 4 bits (16), one for 8 bits (256), and an offset.
_QUANTISATION_TABLE_BYTES = FP32_BYTES * (16 + 256 + 1)

MAX_BUCKET_ELEMENTS = 500_000_000
"""Upper limit of the gradient bucket: DeepSpeed's default. It is smaller if fewer parameters are trained."""
PERSISTENCE_THRESHOLD = 100_000
"""ZeRO-3 keeps weights of at most so many elements gathered: DeepSpeed's default."""
# DeepSpeed's defaults, in elements.
_PREFETCH_ELEMENTS = 50_000_000
_MAX_LIVE_ELEMENTS = 1_000_000_000
_SUB_GROUP_ELEMENTS = 1_000_000_000
_NVME_PARAMETER_BUFFER_ELEMENTS = 5 * 100_000_000
_NVME_OPTIMIZER_BUFFERS = 4

# Rough constants: no formula gives them, and they differ between drivers and versions.
_CUDA_CONTEXT_BYTES = 3 * GIB // 4
"""The CUDA context, loaded kernels and cuBLAS workspaces, which allocator statistics do not include."""
_COMMUNICATOR_BYTES = GIB // 2
"""Buffers of one NCCL communicator: channels to every peer, and staging for its protocols.

Several workers have two: torch's group of all workers, and the copy of it that DeepSpeed makes
(`deepspeed.utils.groups._clone_world_group`). hpZ adds the group of a node.
"""
_FRAGMENTED_FRACTION = 0.1
"""Of temporary memory. Persistent memory is allocated once, in large blocks."""
_PROCESS_BYTES = 2 * GIB
"""Main memory of a worker's interpreter, libraries, CUDA host state and batches."""

_STAGING_BYTES = 8 * 16 * 1024 * 1024
"""Chunks in flight in the threads of one worker that read weights (`ft_service.model.load`)."""

MIN_STAGING_BYTES = GIB
"""Size of the buffer that a worker copies a checkpoint through, if no more main memory is known to be free."""
PINNED_CACHE_MIB = 1
"""Largest block that torch's allocator of pinned memory rounds up to a power of two, and keeps when it is freed.

`ft_service.train.environment` sets it. torch's default is no limit: every partition of a weight would be rounded up.
"""

Method = Literal["full", "lora", "qlora"]
Offload = Literal["none", "cpu", "nvme"]


@dataclass(frozen=True)
class Layout:
    """The settings that, with the base's shape, determine the memory and the speed of a run."""

    method: Method
    num_workers: int = 1
    workers_per_node: int = 1
    zero_stage: int = 1
    hpz: bool = False
    """A second copy of the weights sharded within each node (ZeRO++ hpZ); only for ZeRO-3 on several nodes."""
    offload: Offload = "none"
    micro_batch_size: int = 1
    """Packed rows per forward pass of one worker."""
    max_seq_len: int = 2048
    activation_checkpointing: bool = True
    kept_layers: int = 0
    """With activation checkpointing: the last layers, which keep their activations all the same."""
    precision: Literal["bf16", "fp32"] = "bf16"
    lora_rank: int = 16
    target_modules: str | tuple[str, ...] = "all-linear"
    use_dora: bool = False
    has_dropout: bool = False
    """Whether adapters have dropout, so that each saves an input of its own."""

    @property
    def element_bytes(self) -> int:
        return 2 if self.precision == "bf16" else 4

    @property
    def tokens(self) -> int:
        """Tokens per forward pass of one worker."""
        return self.micro_batch_size * self.max_seq_len


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by component."""

    gpu: dict[str, int]
    """On one GPU. Always these components in this order: weights, quantisation_statistics, gradients,
    optimizer, activations, loss, gather_buffers, reserve."""
    host: dict[str, int]
    """In the main memory of one node: offloaded weights, gradients, optimizer; the processes; buffers."""

    @property
    def gpu_bytes(self) -> int:
        return sum(self.gpu.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


def estimate_memory(shape: ModelShape, layout: Layout) -> MemoryEstimate:
    """Peak memory during a training step, of the worker that uses most."""
    parameters = _parameters(shape, layout)
    trained = [parameter for parameter in parameters if parameter.trained]
    groups = _optimizer_groups(trained)
    loss = _loss_bytes(shape, layout)
    activations = _activation_bytes(shape, layout, loss)
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
    staging = min(MIN_STAGING_BYTES, checkpoint_bytes(shape, layout))
    host["checkpoint"] = layout.workers_per_node * staging
    if layout.method == "full":  # the tensor that a worker writes, and the previous one
        largest = max(parameter.numel for parameter in parameters)
        host["publishing"] = layout.workers_per_node * 2 * largest * layout.element_bytes
    temporary = gpu["activations"] + gpu["loss"] + gpu["gather_buffers"]
    # The optimizer step makes copies too, after the memory of the passes is freed.
    gpu["gather_buffers"] += max(0, _update_copies(parameters, groups, layout) - temporary)
    communicators = 0 if layout.num_workers == 1 else 2 + layout.hpz
    gpu["reserve"] = _CUDA_CONTEXT_BYTES + communicators * _COMMUNICATOR_BYTES + round(_FRAGMENTED_FRACTION * temporary)
    return MemoryEstimate(gpu, host)


def most_kept_layers(shape: ModelShape, layout: Layout, limit_bytes: int) -> int:
    """The most layers that can keep their activations with at most `limit_bytes` on a GPU; fewer than all layers.

    0 if `layout`, with activation checkpointing in all layers, already needs more.
    """
    loss = _loss_bytes(shape, layout)

    def bytes_above_layout(kept_layers: int) -> int:
        kept = _activation_bytes(shape, replace(layout, kept_layers=kept_layers), loss)
        return round((1 + _FRAGMENTED_FRACTION) * (kept - _activation_bytes(shape, layout, loss)))

    free = limit_bytes - estimate_memory(shape, layout).gpu_bytes
    return max(0, bisect_right(range(1, shape.num_layers), free, key=bytes_above_layout))


def checkpoint_bytes(shape: ModelShape, layout: Layout) -> int:
    """Bytes that one worker writes into a checkpoint: fp32 master weights and both moments of its share."""
    groups = _optimizer_groups([parameter for parameter in _parameters(shape, layout) if parameter.trained])
    if layout.zero_stage == 0:
        return 3 * FP32_BYTES * -(-sum(map(_numel, groups)) // layout.num_workers)
    return _optimizer(groups, layout)


def trainable_parameters(shape: ModelShape, layout: Layout) -> int:
    """Number of trained parameters: all, or A [rank, in], B [out, rank] and DoRA's magnitude [out] of each target."""
    return sum(parameter.numel for parameter in _parameters(shape, layout) if parameter.trained)


# -- parameters ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parameter:
    shape: tuple[int, ...]
    trained: bool
    four_bit: bool = False
    layer: int | None = None
    """Number of the decoder layer; None outside of the layers."""

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    def stored_numel(self, element_bytes: int) -> int:
        """Elements of the stored tensor: 4-bit weights are packed into elements of the training type."""
        return self.numel // (2 * element_bytes) if self.four_bit else self.numel


def _parameters(shape: ModelShape, layout: Layout) -> Sequence[_Parameter]:
    """Base and adapters, in the order of `named_parameters` of the training model."""
    return _parameters_of_method(shape, layout.method, layout.lora_rank, layout.target_modules, layout.use_dora)


@lru_cache(maxsize=64)  # a search compares many layouts of the same model and method
def _parameters_of_method(
    shape: ModelShape, method: Method, lora_rank: int, targets: str | tuple[str, ...], use_dora: bool
) -> Sequence[_Parameter]:
    full = method == "full"
    parameters: list[_Parameter] = []
    for name, size in shape.parameter_shapes():
        linear = name.endswith("_proj.weight")
        numbered = re.search(r"\.layers\.(\d+)\.", name)
        layer = int(numbered[1]) if numbered else None
        parameters.append(_Parameter(size, trained=full, four_bit=linear and method == "qlora", layer=layer))
        if linear and not full and is_target(name.removesuffix(".weight"), targets):
            rows, columns = size
            parameters.append(_Parameter((lora_rank, columns), trained=True, layer=layer))
            parameters.append(_Parameter((rows, lora_rank), trained=True, layer=layer))
            if use_dora:
                parameters.append(_Parameter((rows,), trained=True, layer=layer))
    return tuple(parameters)


def is_target(module: str, targets: str | tuple[str, ...]) -> bool:
    """Matches like peft: a string is a regular expression for the whole path, a list contains path suffixes."""
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


@lru_cache(maxsize=64)
def _target_names(shape: ModelShape, targets: str | tuple[str, ...]) -> frozenset[str]:
    """The linear layers that are adapted in any decoder layer, such as q_proj."""
    modules = (name.removesuffix(".weight") for name, _ in shape.parameter_shapes() if name.endswith("_proj.weight"))
    return frozenset(module.rpartition(".")[2] for module in modules if is_target(module, targets))


def _optimizer_groups(trained: list[_Parameter]) -> list[list[_Parameter]]:
    """Weight decay applies to matrices and not to vectors: one optimizer group for each, if not empty."""
    matrices = [parameter for parameter in trained if len(parameter.shape) > 1]
    vectors = [parameter for parameter in trained if len(parameter.shape) < 2]
    return [group for group in (matrices, vectors) if group]


def _numel(group: list[_Parameter]) -> int:
    return sum(parameter.numel for parameter in group)


def _sharded_numel(groups: list[list[_Parameter]], workers: int) -> int:
    """Trained elements of one worker under ZeRO-3, padding included."""
    return sum(partition_numel(parameter.numel, workers) for group in groups for parameter in group)


def _flat_sharded_numel(groups: list[list[_Parameter]], workers: int) -> int:
    """Trained elements of one worker under ZeRO-1 and 2, padding included."""
    return sum(flat_partition_numel(_numel(group), workers) for group in groups)


# -- persistent memory -----------------------------------------------------------------------------------------------


def _weights(parameters: Sequence[_Parameter], groups: list[list[_Parameter]], layout: Layout) -> int:
    element = layout.element_bytes
    workers = layout.num_workers
    sizes = [parameter.stored_numel(element) for parameter in parameters]
    if layout.zero_stage == 3:
        held = sum(partition_numel(size, workers) for size in sizes) + _persistent_numel(parameters, layout)
        if layout.hpz:
            # DeepSpeed makes the copy when it releases a gathered weight; trained weights that stay gathered have none.
            for parameter, size in zip(parameters, sizes, strict=True):
                if not (parameter.trained and _stays_gathered(parameter, layout)):
                    held += partition_numel(size, workers) * workers // layout.workers_per_node
        return held * element
    padding = 0
    if layout.zero_stage:
        padding = sum(flat_partition_numel(_numel(group), workers) * workers - _numel(group) for group in groups)
    return (sum(sizes) + padding) * element


def _persistent_numel(parameters: Sequence[_Parameter], layout: Layout) -> int:
    """Elements of tensors that ZeRO-3 keeps whole on every worker in addition to their partitions."""
    workers = layout.num_workers
    if workers == 1:  # the partition is the whole tensor
        return 0
    kept = (p.stored_numel(layout.element_bytes) for p in parameters if _stays_gathered(p, layout))
    return sum(partition_numel(size, workers) * workers for size in kept)


def _gathers_whole_layers(layout: Layout) -> bool:
    """As `ft_service.train.parallel.Parallel.gathers_whole_layers`."""
    return layout.zero_stage == 3 and layout.offload != "nvme"


def _stays_gathered(parameter: _Parameter, layout: Layout) -> bool:
    """Whether ZeRO-3 keeps the parameter whole between its uses: small ones, and those of an adapter."""
    is_adapter = parameter.trained and layout.method != "full"
    small = parameter.stored_numel(layout.element_bytes) <= PERSISTENCE_THRESHOLD
    return small or (is_adapter and _gathers_whole_layers(layout))


def _statistics(weights: int) -> int:
    """Bytes for one 4-bit tensor. ZeRO-3 does not partition them, so every worker has all of them."""
    blocks = num_nf4_blocks(weights)
    return blocks + FP32_BYTES * -(-blocks // _BLOCKS_PER_SUPERBLOCK) + _QUANTISATION_TABLE_BYTES


def _gradients(groups: list[list[_Parameter]], layout: Layout) -> int:
    """At the end of a backward pass that accumulates onto an earlier one."""
    workers = layout.num_workers
    whole = sum(map(_numel, groups))
    if layout.zero_stage == 3:
        return FP32_BYTES * _sharded_numel(groups, workers)
    if layout.precision == "fp32":
        return FP32_BYTES * (whole if layout.zero_stage < 2 else _gradients_touching_partition(groups, workers))
    if layout.zero_stage == 0:
        return layout.element_bytes * whole
    flat = _flat_sharded_numel(groups, workers)
    # ZeRO-1 accumulates in fp32 on every worker, and does not free the bf16 gradients that it adds.
    return FP32_BYTES * (flat if layout.zero_stage == 2 else flat * workers) + (
        layout.element_bytes * whole if layout.zero_stage == 1 else 0
    )


def _gradients_touching_partition(groups: list[list[_Parameter]], workers: int) -> int:
    """Elements of whole gradients that overlap a worker's partition, plus its padding; of the worker with most.

    In fp32, ZeRO-2 keeps the gradients as autograd made them.
    """
    held = [0] * workers
    for group in groups:
        size = flat_partition_numel(_numel(group), workers)
        ends = list(accumulate(parameter.numel for parameter in group))
        for worker in range(workers):
            first = worker * size
            last = first + size
            for parameter, end in zip(group, ends, strict=True):
                if end - parameter.numel < last and end > first:
                    held[worker] += parameter.numel
            held[worker] += last - max(first, min(last, ends[-1]))
    return max(held)


def _optimizer(groups: list[list[_Parameter]], layout: Layout) -> int:
    """fp32 master weights and AdamW's two moments, without its step counters (4 bytes per tensor)."""
    workers = layout.num_workers
    if layout.zero_stage == 0:
        whole = sum(map(_numel, groups))
        return (2 if layout.precision == "fp32" else 3) * FP32_BYTES * whole
    if layout.zero_stage == 3:
        return 3 * FP32_BYTES * _sharded_numel(groups, workers)
    return 3 * FP32_BYTES * _flat_sharded_numel(groups, workers)


# -- temporary memory ------------------------------------------------------------------------------------------------


def _loss_bytes(shape: ModelShape, layout: Layout) -> int:
    return loss_bytes(shape, tokens=layout.tokens, element_bytes=layout.element_bytes, full=layout.method == "full")


def _activation_bytes(shape: ModelShape, layout: Layout, loss: int) -> int:
    return activation_bytes(
        shape,
        tokens=layout.tokens,
        element_bytes=layout.element_bytes,
        method=layout.method,
        targets=_target_names(shape, layout.target_modules),
        lora_rank=layout.lora_rank,
        use_dora=layout.use_dora,
        has_dropout=layout.has_dropout,
        checkpointing=layout.activation_checkpointing,
        kept_layers=layout.kept_layers,
        loss=loss,
    )


def _gather_buffers(parameters: Sequence[_Parameter], layout: Layout) -> int:
    """The gradient bucket and, under ZeRO-3, the weights that are gathered at the same time.

    ZeRO-1 in bf16 reduces in place. For ZeRO-3 see `_live_numel`.
    """
    element = layout.element_bytes
    if layout.zero_stage == 0 or (layout.zero_stage == 1 and layout.precision == "bf16" and layout.offload == "none"):
        return 0
    bucket = min(MAX_BUCKET_ELEMENTS, sum(parameter.numel for parameter in parameters if parameter.trained))
    if layout.zero_stage < 3 or (layout.num_workers == 1 and layout.offload == "none"):
        return bucket * element
    buffers = (bucket + _live_numel(parameters, layout)) * element
    if bucket == MAX_BUCKET_ELEMENTS:  # then buckets fill up, and are reduced, while the backward pass runs
        buffers += _reduction_copies(bucket, partition_numel(bucket, layout.num_workers), layout)
    return buffers


def _live_numel(parameters: Sequence[_Parameter], layout: Layout) -> int:
    """Most elements that ZeRO-3 has gathered at the same time, without those that stay gathered.

    Legend: L elements of the largest layer, W of the largest weight in a layer, E of the largest weight outside.

    A layer is gathered as one. DeepSpeed prefetches weight by weight until M = L + max(L, E) elements are gathered, and
    releases everything that it does not need next (`ft_service.train.gathers`). If E <= L, a layer and the whole next
    one make exactly M = 2 L, and the weight that ends a prefetch exceeds M by less than W: 2 L + W. If E > L, the head
    may be prefetched while two layers are gathered: 2 L + E.

    Without whole layers (NVMe), DeepSpeed's own limits: `_MAX_LIVE_ELEMENTS` + `_PREFETCH_ELEMENTS` + one weight.
    """
    element = layout.element_bytes
    gathered = [p for p in parameters if not _stays_gathered(p, layout)]
    sizes = [p.stored_numel(element) for p in gathered]
    if not _gathers_whole_layers(layout):
        return min(sum(sizes), _MAX_LIVE_ELEMENTS + _PREFETCH_ELEMENTS + max(sizes, default=0))
    layers: dict[int, int] = {}
    for parameter, size in zip(gathered, sizes, strict=True):
        if parameter.layer is not None:
            layers[parameter.layer] = layers.get(parameter.layer, 0) + size
    largest_layer = max(layers.values(), default=0)
    inside = max((n for p, n in zip(gathered, sizes, strict=True) if p.layer is not None), default=0)
    outside = max((n for p, n in zip(gathered, sizes, strict=True) if p.layer is None), default=0)
    return min(sum(sizes), 2 * largest_layer + (outside if outside > largest_layer else inside))


def _update_copies(parameters: Sequence[_Parameter], groups: list[list[_Parameter]], layout: Layout) -> int:
    """Copies of gradients for their reduction and for the optimizer step, after the passes."""
    element = layout.element_bytes
    workers = layout.num_workers
    whole = sum(map(_numel, groups))
    if layout.offload != "none":
        return 0
    if layout.zero_stage == 3:
        sharded = _sharded_numel(groups, workers)
        step = FP32_BYTES * min(_SUB_GROUP_ELEMENTS, sharded)
        if workers == 1 or whole > MAX_BUCKET_ELEMENTS:
            return step
        # The bucket, which is reduced once, and its copies; a weight outside the layers is still gathered.
        outside = max((p.stored_numel(element) for p in parameters if p.layer is None), default=0)
        return element * (whole + outside) + max(step, _reduction_copies(whole, sharded, layout))
    if layout.precision == "fp32":
        bucket = FP32_BYTES * min(whole, MAX_BUCKET_ELEMENTS)
        return bucket if layout.zero_stage == 0 else FP32_BYTES * _flat_sharded_numel(groups, workers)
    if layout.zero_stage == 0:  # in fp32: each one, and all joined
        return 2 * FP32_BYTES * whole
    if layout.zero_stage == 1:  # in the communication type, and joined if all fit in one bucket
        return whole * (element + (FP32_BYTES if whole <= MAX_BUCKET_ELEMENTS else 0))
    return 0


def _reduction_copies(bucket: int, sharded: int, layout: Layout) -> int:
    """ZeRO-3 joins the partitions of a bucket's gradients for each worker, and converts its own ones to fp32."""
    return layout.element_bytes * bucket + FP32_BYTES * sharded


# -- offloading ------------------------------------------------------------------------------------------------------


def _move_to_host(
    gpu: dict[str, int], parameters: Sequence[_Parameter], groups: list[list[_Parameter]], layout: Layout
) -> dict[str, int]:
    """Bytes per node that DeepSpeed keeps in pinned host memory instead; removes them from `gpu`.

    In addition to master weights and moments, this is the gradient of the master weights: ZeRO-1 and 2 also keep a copy
    in the training type, ZeRO-3 keeps it twice. With NVMe, only the swap buffers stay in main memory.
    """
    element = layout.element_bytes
    workers = layout.num_workers
    trained = sum(map(_numel, groups))
    optimizer = gpu["optimizer"]
    partition = optimizer // (3 * FP32_BYTES)
    largest = max(parameter.numel for group in groups for parameter in group)
    if layout.zero_stage < 3:
        accumulated = element * trained  # of parameters that overlap the partition; at most all
        gradients = partition * (FP32_BYTES + element) + min(accumulated, element * (partition + 2 * largest))
        gpu["gradients"] = element * largest + (FP32_BYTES * trained if layout.zero_stage == 1 else 0)
        gpu["optimizer"] = 0
        per_worker = {"optimizer": optimizer, "gradients": gradients}
    else:
        gradients = 2 * FP32_BYTES * partition
        sizes = [parameter.stored_numel(element) for parameter in parameters]
        persistent = _persistent_numel(parameters, layout) * element
        weights = sum(_pinned_bytes(partition_numel(size, workers) * element) for size in sizes)
        gpu |= {"weights": persistent, "gradients": 0, "optimizer": 0}
        if layout.offload == "nvme":
            piece = FP32_BYTES * min(_SUB_GROUP_ELEMENTS, partition)
            optimizer = min(optimizer, _NVME_OPTIMIZER_BUFFERS * piece)
            weights = min(weights, _NVME_PARAMETER_BUFFER_ELEMENTS * element)
        per_worker = {"weights": weights, "optimizer": optimizer, "gradients": gradients}
    return {name: size * layout.workers_per_node for name, size in per_worker.items()}


def _pinned_bytes(size: int) -> int:
    """Bytes that torch allocates for `size` bytes of pinned memory."""
    if size > PINNED_CACHE_MIB * 2**20:
        return size
    return 1 << max(0, size - 1).bit_length()
