"""Why the search chose what it chose, and what would fit where nothing does. Every figure is asked of the models."""

from collections.abc import Iterator, Sequence
from typing import Any

from ft_service.catalog.gpus import GPUS, GPUS_PER_NODE
from ft_service.catalog.models import ModelShape
from ft_service.plan.memory import GIB
from ft_service.plan.search import Choice, Machine, Question, ask, best, gib, judge_all, unlike, why_not
from ft_service.spec.schema import RunSpec
from ft_service.text import counted

MOST_SUGGESTIONS = 3
_MOST_WORKERS = 1024
_SHORTEST_ROW = 512
_METHODS = ("full", "lora", "qlora")
_SOLD_TYPES = ("L4", "L40S", "A100-80G", "H100", "H200", "B200")
"""Suggested, least memory first; of types of one size the one that can still be rented."""


def reasons(question: Question, chosen: Choice, choices: Sequence[Choice]) -> list[str]:
    """One sentence for each setting that was left to the planner: what, and why not otherwise."""
    if not chosen.fits:
        return ["Nothing that the spec leaves open fits: this is what lacks least."]
    layout, said = chosen.layout, []
    if question.zero_stage == "auto":
        said.append(_zero_reason(chosen, choices))
    if question.activation_checkpointing == "auto":
        other = why_not(chosen, unlike(choices, chosen, lambda layout: layout.activation_checkpointing))
        state, opposite = ("on", "keeping all") if layout.activation_checkpointing else ("off", "recomputing them")
        said.append(f"Activation checkpointing {state}: {opposite} {other}.")
    if question.micro_batch_size == "auto":
        said.append(_micro_batch_reason(chosen, choices))
    if question.offload == "auto":
        others = unlike(choices, chosen, lambda layout: layout.offload)
        if layout.offload == "none":
            tail = f"; offloading {why_not(chosen, others)}" if others else ""
            said.append(f"No offloading: everything fits on the GPUs{tail}.")
        else:
            said.append(
                f"Offload to {layout.offload}: staying on the GPUs {why_not(chosen, others)}. Each node then needs "
                f"{chosen.memory.host_bytes / GIB:,.0f} GiB of main memory."
            )
    hpz_matters = layout.zero_stage == 3 and layout.num_workers > layout.workers_per_node
    if question.hpz == "auto" and hpz_matters:
        others = unlike(choices, chosen, lambda layout: layout.hpz)
        if others and layout.hpz:
            said.append(
                f"hpZ on, a second copy of the weights within each node: without it, it {why_not(chosen, others)}."
            )
        elif others:
            said.append(f"No hpZ: a second copy of the weights within each node {why_not(chosen, others)}.")
    return said


def _zero_reason(chosen: Choice, choices: Sequence[Choice]) -> str:
    layout = chosen.layout
    if layout.num_workers == 1 and layout.offload == "none":
        return "ZeRO-1: one worker has nothing to shard, and unlike stage 0 it sums micro-steps in fp32."
    what = {2: "gradients and optimizer are sharded, and each GPU keeps whole weights", 3: "weights are sharded too"}
    others = unlike(choices, chosen, lambda layout: layout.zero_stage)
    if not others:
        return f"ZeRO-{layout.zero_stage}: offloading to {layout.offload} needs it."
    other = best(others).layout.zero_stage
    return f"ZeRO-{layout.zero_stage}: {what[layout.zero_stage]}; ZeRO-{other} {why_not(chosen, others)}."


def _micro_batch_reason(chosen: Choice, choices: Sequence[Choice]) -> str:
    size = chosen.layout.micro_batch_size
    rows = counted(size, "row")
    head = f"Micro-batch of {rows}, {size * chosen.layout.max_seq_len:,} tokens"
    others = unlike(choices, chosen, lambda layout: layout.micro_batch_size)
    larger = [choice for choice in others if choice.layout.micro_batch_size > size]
    # More rows with recomputation against fewer without: that is told of recomputation.
    alike = [c for c in larger if c.layout.activation_checkpointing == chosen.layout.activation_checkpointing]
    if larger := alike or larger:
        return f"{head}: {best(larger).layout.micro_batch_size} rows {why_not(chosen, larger)}."
    return f"{head}: all that a worker takes of a batch, in one forward pass."


# -- what would fit --------------------------------------------------------------------------------------------------


def suggestions(shape: ModelShape, spec: RunSpec, workers_per_node: int, machine: Machine) -> list[str]:
    """At most three changes, each enough by itself: of settings up to two, nearest first, then of hardware."""

    def choice(spec: RunSpec, machine: Machine = machine, per_node: int = workers_per_node) -> Choice | None:
        choices = judge_all(shape, ask(spec, per_node), machine)
        found = best(choices) if choices else None
        return found if found and found.fits else None

    def on_settings() -> Iterator[str]:
        lengths = (spec.data.max_seq_len // 2**halvings for halvings in (1, 2, 3))
        shorter = [("data.max_seq_len", length) for length in lengths if length >= _SHORTEST_ROW]
        lighter = [("method.type", method) for method in ("lora", "qlora")[_METHODS.index(spec.method.type) :]]
        for changes in ([*_relaxed(spec), *shorter], lighter):
            for setting, value in changes:
                if found := choice(_with(spec, {setting: value})):
                    yield _fits_with(f"{setting}: {_resolved(found, setting, value)}", found)
                    break

    def on_hardware() -> Iterator[str]:
        workers = spec.parallel.most_workers
        more = 2 ** workers.bit_length()
        while more <= _MOST_WORKERS:
            batch = spec.train.global_batch_size
            changes: dict[str, Any] = {"parallel.num_workers": more}
            per_worker = spec.train.micro_batch_size if isinstance(spec.train.micro_batch_size, int) else 1
            if batch % (more * per_worker):
                changes["train.global_batch_size"] = more * per_worker
            per_node = workers_per_node if workers > workers_per_node else GPUS_PER_NODE
            if found := choice(_with(spec, changes), per_node=min(per_node, more)):
                yield _fits_with(" and ".join(f"{name}: {value}" for name, value in changes.items()), found)
                break
            more *= 2
        larger = [name for name in _SOLD_TYPES if machine.gpu_gib and GPUS[name].memory_gib > 1.05 * machine.gpu_gib]
        for name in larger:
            on_type = Machine(GPUS[name], GPUS[name].memory_gib, machine.host_gib)
            if found := choice(spec, on_type):
                yield f"Fits on {workers} x {name}: {gib(found):.0f} GiB of {GPUS[name].memory_gib:.0f} per GPU."
                break

    return [*on_settings(), *on_hardware()][:MOST_SUGGESTIONS]


def _relaxed(spec: RunSpec) -> Iterator[tuple[str, Any]]:
    """Settings that the spec fixes and that could be left to the planner, least intrusive first."""
    if spec.parallel.zero_stage != "auto":
        yield "parallel.zero_stage", "auto"
    if spec.train.activation_checkpointing is False:
        yield "train.activation_checkpointing", True
    if spec.train.micro_batch_size != "auto":
        yield "train.micro_batch_size", "auto"
    if spec.parallel.offload != "auto":
        yield "parallel.offload", "auto"


def _resolved(choice: Choice, setting: str, value: Any) -> Any:
    """What "auto" came to: a suggestion names a value."""
    if value == "auto":
        return getattr(choice.layout, setting.rpartition(".")[2])
    return str(value).lower() if isinstance(value, bool) else value


def _with(spec: RunSpec, changes: dict[str, Any]) -> RunSpec:
    for setting, value in changes.items():
        section, _, name = setting.partition(".")
        changed = getattr(spec, section).model_copy(update={name: value})
        spec = spec.model_copy(update={section: changed})
    return spec


def _fits_with(change: str, choice: Choice) -> str:
    per_gpu = choice.tokens_per_second / choice.layout.num_workers
    host = choice.memory.host_bytes / GIB
    offloading = "" if choice.layout.offload == "none" else f", and {host:,.0f} GiB of each node's main memory"
    return f"Fits with {change}: {gib(choice):.0f} GiB per GPU{offloading}, about {per_gpu:,.0f} tokens/s per GPU."


def shortage(choice: Choice, machine: Machine) -> str:
    """What is lacking, in one sentence."""
    if not choice.fits_host and machine.host_gib is not None:
        needed = choice.memory.host_bytes / GIB
        return f"Needs about {needed:,.0f} GiB of each node's main memory, and one has {machine.host_gib:,.0f} GiB."
    return f"Needs about {gib(choice):,.0f} GiB per GPU, and one has {machine.gpu_gib:,.0f} GiB."
