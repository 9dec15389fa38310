"""The search: of every setting that a run leaves open, the fastest that fits. No torch, no GPU.

ZeRO stage x micro-batch x activation checkpointing x offloading x hpZ are a few hundred layouts; each is judged by the
memory model and the time model, so trying all of them takes milliseconds and nothing is decided by a rule of thumb.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ft_service.catalog.gpus import Gpu
from ft_service.catalog.models import ModelShape
from ft_service.plan.memory import GIB, Layout, MemoryEstimate, Offload, estimate_memory
from ft_service.plan.speed import StepTime, step_time
from ft_service.spec.schema import RunSpec

TIE = 0.02
"""Settings whose estimated speeds differ by less are equally fast: the estimate knows no better."""
MARGIN = 0.05
"""Share of the GPU's memory that is better left free: the memory model is an estimate too."""
_GAIN_OF_OFFLOADING = 1.25
_GAIN_OF_HPZ = 1.10
_GAIN_OF_THE_LAST_MEMORY = 1.10
"""How many times faster these must be to be chosen unasked: they add moving parts or risk."""
_OFFLOADS: tuple[Offload, ...] = ("none", "cpu", "nvme")
Auto = Literal["auto"]


@dataclass(frozen=True)
class Machine:
    """What one worker and one node have. None means not known, and is not judged."""

    gpu: Gpu
    gpu_gib: float | None
    host_gib: float | None = None


@dataclass(frozen=True)
class Question:
    """What is given, in `layout`, and what is asked: a field here overrides the layout's, and "auto" is searched."""

    layout: Layout
    rows_per_worker: int
    """Packed rows of a step that each worker takes, in one or more micro-steps."""
    zero_stage: int | Auto = "auto"
    micro_batch_size: int | Auto = "auto"
    activation_checkpointing: bool | Auto = "auto"
    offload: Offload | Auto = "auto"
    hpz: bool | Auto = "auto"
    has_nvme: bool = False


@dataclass(frozen=True)
class Choice:
    """One layout and what the models say of it."""

    layout: Layout
    accumulation: int
    memory: MemoryEstimate
    time: StepTime
    fits: bool
    fits_host: bool
    leaves_margin: bool

    @property
    def tokens_per_second(self) -> float:
        """Over all workers, as if every row were full."""
        layout = self.layout
        tokens = layout.num_workers * layout.micro_batch_size * self.accumulation * layout.max_seq_len
        return tokens / self.time.seconds

    @property
    def merit(self) -> float:
        """What choices are ranked by: speed, discounted for what should not be chosen for a small gain."""
        discount = _GAIN_OF_OFFLOADING if self.layout.offload != "none" else _GAIN_OF_HPZ if self.layout.hpz else 1.0
        return self.tokens_per_second / discount / (1.0 if self.leaves_margin else _GAIN_OF_THE_LAST_MEMORY)

    @property
    def complexity(self) -> tuple[int, bool, int, int]:
        """Least first: what moves least data about and, of equals, what leaves most memory free."""
        return _OFFLOADS.index(self.layout.offload), self.layout.hpz, self.layout.zero_stage, self.memory.gpu_bytes


def ask(spec: RunSpec, workers_per_node: int) -> Question:
    """What a run spec gives, and what it leaves open."""
    targets = spec.method.target_modules
    layout = Layout(
        method=spec.method.type,
        num_workers=spec.parallel.most_workers,
        workers_per_node=min(workers_per_node, spec.parallel.most_workers),
        max_seq_len=spec.data.max_seq_len,
        precision=spec.train.precision,
        lora_rank=spec.method.lora_rank,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        use_dora=spec.method.use_dora,
    )
    return Question(
        layout,
        rows_per_worker=spec.train.global_batch_size // spec.parallel.most_workers,
        zero_stage=spec.parallel.zero_stage,
        micro_batch_size=spec.train.micro_batch_size,
        activation_checkpointing=spec.train.activation_checkpointing,
        offload=spec.parallel.offload,
        hpz=spec.parallel.hpz,
        has_nvme=spec.parallel.nvme_path is not None,
    )


def layouts(question: Question) -> Iterator[Layout]:
    """Every layout that answers the question and can work."""
    given = question.layout
    offloads: Sequence[Offload]
    if question.offload != "auto":
        offloads = (question.offload,)
    else:
        # Streaming packed 4-bit weights from the host is untried, so it is never chosen unasked.
        offloads = ("none",) if given.method == "qlora" else _OFFLOADS if question.has_nvme else _OFFLOADS[:2]
    for offload in offloads:
        for stage in _stages(question, offload):
            for hpz in _hpz(question, stage, offload):
                for checkpointing in _either(question.activation_checkpointing):
                    for micro in _micro_batch_sizes(question):
                        yield replace(
                            given,
                            zero_stage=stage,
                            offload=offload,
                            hpz=hpz,
                            activation_checkpointing=checkpointing,
                            micro_batch_size=micro,
                        )


def _either(asked: bool | Auto) -> tuple[bool, ...]:
    return (False, True) if asked == "auto" else (asked,)


def _stages(question: Question, offload: Offload) -> tuple[int, ...]:
    can_work = {"none": (0, 1, 2, 3), "cpu": (1, 2, 3), "nvme": (3,)}[offload]
    if question.zero_stage != "auto":
        return (question.zero_stage,) if question.zero_stage in can_work else ()
    if question.layout.num_workers == 1 and offload == "none":
        return (1,)  # nothing to shard, but unlike stage 0 it sums micro-steps in fp32
    return tuple(stage for stage in can_work if stage >= 2)


def _hpz(question: Question, stage: int, offload: Offload) -> tuple[bool, ...]:
    layout = question.layout
    several_whole_nodes = layout.num_workers > layout.workers_per_node > 1 and (
        layout.num_workers % layout.workers_per_node == 0
    )
    if stage == 3 and offload == "none" and several_whole_nodes:
        return _either(question.hpz)
    return () if question.hpz is True else (False,)


def _micro_batch_sizes(question: Question) -> list[int]:
    if question.micro_batch_size != "auto":
        return [question.micro_batch_size]
    rows = question.rows_per_worker
    return [size for size in range(1, rows + 1) if rows % size == 0]


def judge(shape: ModelShape, layout: Layout, rows_per_worker: int, machine: Machine) -> Choice:
    """What memory and time model say of one layout."""
    memory = estimate_memory(shape, layout)
    accumulation = max(1, rows_per_worker // layout.micro_batch_size)
    fits_host = machine.host_gib is None or memory.host_bytes <= machine.host_gib * GIB
    used = 0.0 if machine.gpu_gib is None else memory.gpu_bytes / (machine.gpu_gib * GIB)
    return Choice(
        layout,
        accumulation,
        memory,
        step_time(shape, layout, accumulation, machine.gpu),
        fits=used <= 1 and fits_host,
        fits_host=fits_host,
        leaves_margin=used <= 1 - MARGIN,
    )


def judge_all(shape: ModelShape, question: Question, machine: Machine) -> list[Choice]:
    """Every answer to the question."""
    return [judge(shape, layout, question.rows_per_worker, machine) for layout in layouts(question)]


def best(choices: Sequence[Choice]) -> Choice:
    """The fastest that fits, and of equally fast ones the simplest; if none fits, the one that lacks least."""
    fitting = [choice for choice in choices if choice.fits]
    if not fitting:
        return min(choices, key=lambda choice: (not choice.fits_host, choice.memory.gpu_bytes))
    most = max(choice.merit for choice in fitting)
    equals = [choice for choice in fitting if choice.merit >= (1 - TIE) * most]
    return min(equals, key=lambda choice: choice.complexity)


def why_not(chosen: Choice, others: Sequence[Choice]) -> str:
    """What the best of the other choices would have cost: "would need 94 GiB", "would be 12 % slower"; '' if none."""
    if not others:
        return ""
    other = best(others)
    if not other.fits:
        if not other.fits_host:
            return f"would need {other.memory.host_bytes / GIB:,.0f} GiB of each node's main memory"
        return f"would need at least {gib(other):,.0f} GiB per GPU"
    slower = 1 - other.tokens_per_second / chosen.tokens_per_second
    if slower > TIE:
        return f"would be about {slower:.0%} slower"
    if slower < -TIE and not other.leaves_margin:
        return f"would be about {-slower:.0%} faster, and with {gib(other):,.1f} GiB per GPU too near the brim"
    if slower < -TIE:
        return f"would be about {-slower:.0%} faster, too little for what it adds"
    return "would be no faster"


def unlike(choices: Sequence[Choice], chosen: Choice, setting: Callable[[Layout], object]) -> list[Choice]:
    """The choices that differ from the chosen one in this setting and, if there are such, not in offloading too."""
    others = [choice for choice in choices if setting(choice.layout) != setting(chosen.layout)]
    moved = (chosen.layout.offload, chosen.layout.hpz)
    return [choice for choice in others if (choice.layout.offload, choice.layout.hpz) == moved] or others


def gib(choice: Choice) -> float:
    """GiB on one GPU."""
    return choice.memory.gpu_bytes / GIB
