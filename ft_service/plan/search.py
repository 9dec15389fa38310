"""The search for a layout: among all values of the settings left at "auto", the fastest combination that fits.

ZeRO stage x micro-batch x activation checkpointing x offloading x hpZ are a few hundred layouts. The memory model and
the time model evaluate all of them in milliseconds, so no rule of thumb is needed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ft_service.catalog.gpus import Gpu
from ft_service.catalog.models import ModelShape
from ft_service.plan.memory import GIB, Layout, MemoryEstimate, Offload, estimate_memory, most_kept_layers
from ft_service.plan.speed import StepTime, step_time
from ft_service.spec.schema import RunSpec

TIE = 0.02
"""Layouts whose estimated speeds differ by less count as equally fast: the estimate is no more exact."""
USABLE_FRACTION = 0.97
"""Of the GPU memory. A layout that needs more does not fit: the memory model is an estimate, and other processes and
the driver need some."""
MARGIN = 0.05
"""Fraction of the GPU memory to leave free if possible."""
_OFFLOADING_GAIN = 1.25
_HPZ_GAIN = 1.10
_FULL_MEMORY_GAIN = 1.10
"""How many times faster a layout must be to be chosen with offloading, with hpZ, or without the memory margin."""
_OFFLOADS: tuple[Offload, ...] = ("none", "cpu", "nvme")
Auto = Literal["auto"]


@dataclass(frozen=True)
class Machine:
    """The GPU of a worker and the main memory of a node. None: unknown, and not checked."""

    gpu: Gpu
    gpu_gib: float | None
    host_gib: float | None = None


@dataclass(frozen=True)
class SearchSpace:
    """The settings to search. A field here overrides the one in `layout`; "auto" means that every value is tried."""

    layout: Layout
    """The settings that are not searched: method, workers, row length, precision, adapter."""
    rows_per_worker: int
    """Packed rows that each worker processes per step, in one or more micro-steps."""
    zero_stage: int | Auto = "auto"
    micro_batch_size: int | Auto = "auto"
    activation_checkpointing: bool | Auto = "auto"
    offload: Offload | Auto = "auto"
    hpz: bool | Auto = "auto"
    has_nvme: bool = False


@dataclass(frozen=True)
class Candidate:
    """A layout with its estimated memory and time."""

    layout: Layout
    accumulation: int
    """Micro-steps per step."""
    memory: MemoryEstimate
    time: StepTime
    fits: bool
    fits_host: bool
    leaves_margin: bool

    @property
    def gpu_gib(self) -> float:
        """GiB on one GPU."""
        return self.memory.gpu_bytes / GIB

    @property
    def host_gib(self) -> float:
        """GiB of main memory on one node."""
        return self.memory.host_bytes / GIB

    @property
    def tokens_per_second(self) -> float:
        """Over all workers, if every row is full."""
        layout = self.layout
        tokens = layout.num_workers * layout.micro_batch_size * self.accumulation * layout.max_seq_len
        return tokens / self.time.seconds

    @property
    def score(self) -> float:
        """The rank of a candidate: its speed, reduced for what is not worth a small gain."""
        discount = _OFFLOADING_GAIN if self.layout.offload != "none" else _HPZ_GAIN if self.layout.hpz else 1.0
        return self.tokens_per_second / discount / (1.0 if self.leaves_margin else _FULL_MEMORY_GAIN)

    @property
    def complexity(self) -> tuple[int, bool, int, bool, int]:
        """Sort key, simplest first: least data movement, then all layers alike, then least memory."""
        layout = self.layout
        is_partial = layout.kept_layers > 0
        return _OFFLOADS.index(layout.offload), layout.hpz, layout.zero_stage, is_partial, self.memory.gpu_bytes


def search_space(spec: RunSpec, workers_per_node: int) -> SearchSpace:
    """The settings that a run spec fixes, and those that it leaves at "auto"."""
    targets = spec.method.target_modules
    layout = Layout(
        method=spec.method.type,
        num_workers=spec.parallel.max_workers,
        workers_per_node=min(workers_per_node, spec.parallel.max_workers),
        max_seq_len=spec.data.max_seq_len,
        precision=spec.train.precision,
        lora_rank=spec.method.lora_rank,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        use_dora=spec.method.use_dora,
        has_dropout=spec.method.lora_dropout > 0,
    )
    return SearchSpace(
        layout,
        rows_per_worker=spec.train.global_batch_size // spec.parallel.max_workers,
        zero_stage=spec.parallel.zero_stage,
        micro_batch_size=spec.train.micro_batch_size,
        activation_checkpointing=spec.train.activation_checkpointing,
        offload=spec.parallel.offload,
        hpz=spec.parallel.hpz,
        has_nvme=spec.parallel.nvme_path is not None,
    )


# -- layouts ---------------------------------------------------------------------------------------------------------


def possible_layouts(space: SearchSpace) -> Iterator[Layout]:
    """Every layout in the search space whose settings work together."""
    for offload in _offloads(space):
        for stage in _stages(space, offload):
            for hpz in _hpz(space, stage, offload):
                for checkpointing in _yes_or_no(space.activation_checkpointing):
                    for micro_batch_size in _micro_batch_sizes(space):
                        yield replace(
                            space.layout,
                            zero_stage=stage,
                            offload=offload,
                            hpz=hpz,
                            activation_checkpointing=checkpointing,
                            micro_batch_size=micro_batch_size,
                        )


def _offloads(space: SearchSpace) -> Sequence[Offload]:
    if space.offload != "auto":
        return (space.offload,)
    if space.layout.method == "qlora":
        return ("none",)  # streaming packed 4-bit weights from the host is untested, so auto never chooses it
    return _OFFLOADS if space.has_nvme else _OFFLOADS[:2]


def _yes_or_no(setting: bool | Auto) -> tuple[bool, ...]:
    return (False, True) if setting == "auto" else (setting,)


def _stages(space: SearchSpace, offload: Offload) -> tuple[int, ...]:
    supported = {"none": (0, 1, 2, 3), "cpu": (1, 2, 3), "nvme": (3,)}[offload]
    if space.zero_stage != "auto":
        return (space.zero_stage,) if space.zero_stage in supported else ()
    if space.layout.num_workers == 1 and offload == "none":
        return (1,)  # nothing to shard, but unlike stage 0 it accumulates gradients in fp32
    return tuple(stage for stage in supported if stage >= 2)


def _hpz(space: SearchSpace, stage: int, offload: Offload) -> tuple[bool, ...]:
    layout = space.layout
    several_whole_nodes = layout.num_workers > layout.workers_per_node > 1 and (
        layout.num_workers % layout.workers_per_node == 0
    )
    if stage == 3 and offload == "none" and several_whole_nodes:
        return _yes_or_no(space.hpz)
    return () if space.hpz is True else (False,)


def _micro_batch_sizes(space: SearchSpace) -> list[int]:
    if space.micro_batch_size != "auto":
        return [space.micro_batch_size]
    rows = space.rows_per_worker
    return [size for size in range(1, rows + 1) if rows % size == 0]


# -- candidates ------------------------------------------------------------------------------------------------------


def evaluate_layout(shape: ModelShape, layout: Layout, rows_per_worker: int, machine: Machine) -> Candidate:
    """Estimate the memory and the time of one layout."""
    memory = estimate_memory(shape, layout)
    accumulation = max(1, rows_per_worker // layout.micro_batch_size)
    fits_host = machine.host_gib is None or memory.host_bytes <= machine.host_gib * GIB
    used = 0.0 if machine.gpu_gib is None else memory.gpu_bytes / (machine.gpu_gib * GIB)
    return Candidate(
        layout,
        accumulation,
        memory,
        step_time(shape, layout, accumulation, machine.gpu),
        fits=used <= USABLE_FRACTION and fits_host,
        fits_host=fits_host,
        leaves_margin=used <= 1 - MARGIN,
    )


def evaluate_layouts(shape: ModelShape, space: SearchSpace, machine: Machine) -> list[Candidate]:
    """Estimate the memory and the time of every layout in the search space.

    If recomputation is open, a layout that recomputes and leaves memory free is also tried with as many layers as have
    room for their activations.
    """
    candidates = []
    for layout in possible_layouts(space):
        candidate = evaluate_layout(shape, layout, space.rows_per_worker, machine)
        candidates.append(candidate)
        is_open = space.activation_checkpointing == "auto" and layout.activation_checkpointing
        if is_open and candidate.leaves_margin and machine.gpu_gib is not None:
            kept_layers = most_kept_layers(shape, layout, int((1 - MARGIN) * machine.gpu_gib * GIB))
            if kept_layers:
                layout = replace(layout, kept_layers=kept_layers)
                candidates.append(evaluate_layout(shape, layout, space.rows_per_worker, machine))
    return candidates


def best_candidate(candidates: Sequence[Candidate]) -> Candidate:
    """The fastest that fits, and among equally fast ones the simplest. If none fits, the one that needs least memory.

    `candidates` must not be empty.
    """
    fitting = [candidate for candidate in candidates if candidate.fits]
    if not fitting:
        return min(candidates, key=lambda candidate: (not candidate.fits_host, candidate.memory.gpu_bytes))
    highest = max(candidate.score for candidate in fitting)
    equally_fast = [candidate for candidate in fitting if candidate.score >= (1 - TIE) * highest]
    return min(equally_fast, key=lambda candidate: candidate.complexity)


def alternatives(
    candidates: Sequence[Candidate], chosen: Candidate, setting: Callable[[Layout], object]
) -> list[Candidate]:
    """The candidates with another value of `setting`; if possible, those with the same offloading and hpZ."""
    others = [candidate for candidate in candidates if setting(candidate.layout) != setting(chosen.layout)]
    placement = (chosen.layout.offload, chosen.layout.hpz)
    return [other for other in others if (other.layout.offload, other.layout.hpz) == placement] or others
