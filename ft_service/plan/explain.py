"""Why the search chose a layout, and what would fit if nothing does. Every figure comes from the models."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ft_service.catalog.gpus import GPUS, GPUS_PER_NODE
from ft_service.catalog.models import ModelShape
from ft_service.plan.search import (
    TIE,
    USABLE_FRACTION,
    Candidate,
    Machine,
    SearchSpace,
    alternatives,
    best_candidate,
    evaluate_layouts,
    search_space,
)
from ft_service.spec.schema import RunSpec
from ft_service.text import counted

MAX_SUGGESTIONS = 3
_MAX_WORKERS = 1024
_MIN_ROW_TOKENS = 512
_MIN_RANK = 8
_METHODS = ("full", "lora", "qlora")
_RENTED_TYPES = ("L4", "L40S", "A100-80G", "H100", "H200", "B200")
"""GPU types to suggest, by memory; of types with equal memory, the one that is still offered."""


# -- why -------------------------------------------------------------------------------------------------------------


def reasons(space: SearchSpace, chosen: Candidate, candidates: Sequence[Candidate]) -> list[str]:
    """One sentence for each setting left at "auto": its value, and why not another."""
    if not chosen.fits:
        return ["No value of the settings left at auto fits. These values come closest."]
    return [
        reason
        for setting, reason in (
            (space.zero_stage, _zero_reason(chosen, candidates)),
            (space.activation_checkpointing, _checkpointing_reason(chosen, candidates)),
            (space.micro_batch_size, _micro_batch_reason(chosen, candidates)),
            (space.offload, _offload_reason(chosen, candidates)),
            (space.hpz, _hpz_reason(chosen, candidates)),
        )
        if setting == "auto" and reason
    ]


def _zero_reason(chosen: Candidate, candidates: Sequence[Candidate]) -> str:
    layout = chosen.layout
    if layout.num_workers == 1 and layout.offload == "none":
        return "ZeRO-1: one worker has nothing to shard, but unlike stage 0 it accumulates gradients in fp32."
    others = alternatives(candidates, chosen, lambda layout: layout.zero_stage)
    if not others:
        return f"ZeRO-{layout.zero_stage}: offloading to {layout.offload} needs it."
    sharded = {
        2: "gradients and optimizer are sharded; each GPU holds all weights",
        3: "weights, gradients and optimizer are sharded",
    }
    other_stage = best_candidate(others).layout.zero_stage
    return f"ZeRO-{layout.zero_stage}: {sharded[layout.zero_stage]}. ZeRO-{other_stage} {_compared(chosen, others)}."


def _checkpointing_reason(chosen: Candidate, candidates: Sequence[Candidate]) -> str:
    others = alternatives(candidates, chosen, lambda layout: layout.activation_checkpointing)
    kept_layers = chosen.layout.kept_layers
    if not chosen.layout.activation_checkpointing:
        in_all_layers = [other for other in others if other.layout.kept_layers == 0]
        return f"Activation checkpointing off: with it, the run {_compared(chosen, in_all_layers)}."
    reason = f"without it, the run {_compared(chosen, others)}."
    if not kept_layers:
        return f"Activation checkpointing on: {reason}"
    in_all_layers = [other for other in candidates if other.layout == replace(chosen.layout, kept_layers=0)]
    return (
        f"Activation checkpointing on except for the last {counted(kept_layers, 'layer')}: {reason} With it in all "
        f"layers, the run {_compared(chosen, in_all_layers)}."
    )


def _micro_batch_reason(chosen: Candidate, candidates: Sequence[Candidate]) -> str:
    size = chosen.layout.micro_batch_size
    head = f"Micro-batch of {counted(size, 'row')} ({size * chosen.layout.max_seq_len:,} tokens)"
    others = alternatives(candidates, chosen, lambda layout: layout.micro_batch_size)
    larger = [other for other in others if other.layout.micro_batch_size > size]
    # Comparing with a candidate that also recomputes (or also does not) isolates the effect of the rows.
    same_checkpointing = [
        other for other in larger if other.layout.activation_checkpointing == chosen.layout.activation_checkpointing
    ]
    if larger := same_checkpointing or larger:
        return f"{head}: {best_candidate(larger).layout.micro_batch_size} rows {_compared(chosen, larger)}."
    return f"{head}: the worker's whole share of the batch in one forward pass."


def _offload_reason(chosen: Candidate, candidates: Sequence[Candidate]) -> str:
    others = alternatives(candidates, chosen, lambda layout: layout.offload)
    if chosen.layout.offload == "none":
        comparison = f" Offloading {_compared(chosen, others)}." if others else ""
        return f"No offloading: everything fits on the GPUs.{comparison}"
    return (
        f"Offload to {chosen.layout.offload}: without offloading, the run {_compared(chosen, others)}. Each node needs "
        f"{chosen.host_gib:,.0f} GiB of main memory."
    )


def _hpz_reason(chosen: Candidate, candidates: Sequence[Candidate]) -> str:
    """Empty where hpZ cannot be used."""
    layout = chosen.layout
    others = alternatives(candidates, chosen, lambda layout: layout.hpz)
    if layout.zero_stage != 3 or layout.num_workers <= layout.workers_per_node or not others:
        return ""
    if layout.hpz:
        return (
            f"hpZ on (a second copy of the weights within each node): without it, the run {_compared(chosen, others)}."
        )
    return f"No hpZ: a second copy of the weights within each node {_compared(chosen, others)}."


def _compared(chosen: Candidate, others: Sequence[Candidate]) -> str:
    """The cost of the best alternative: "would need 94 GiB", "would be 12% slower". Empty if there is none."""
    if not others:
        return ""
    other = best_candidate(others)
    if not other.fits_host and not other.fits:
        return f"would need {other.host_gib:,.0f} GiB of main memory per node"
    if not other.fits:
        return f"would need at least {other.gpu_gib:,.0f} GiB per GPU"
    slower = 1 - other.tokens_per_second / chosen.tokens_per_second
    if slower > TIE:
        return f"would be about {slower:.0%} slower"
    if slower < -TIE and not other.leaves_margin:
        return f"would be about {-slower:.0%} faster, but {other.gpu_gib:,.1f} GiB per GPU is too close to the limit"
    if slower < -TIE:
        return f"would be about {-slower:.0%} faster, which is not worth the added complexity"
    return "would be no faster"


# -- what would fit --------------------------------------------------------------------------------------------------


def why_it_does_not_fit(candidate: Candidate, machine: Machine) -> str:
    """The missing memory, in one sentence."""
    if not candidate.fits_host and machine.host_gib is not None:
        return (
            f"Does not fit: needs about {candidate.host_gib:,.0f} GiB of main memory per node, but only "
            f"{machine.host_gib:,.0f} GiB are available."
        )
    capacity = machine.gpu_gib or 0.0
    return (
        f"Does not fit: needs about {candidate.gpu_gib:,.1f} GiB per GPU, but only {USABLE_FRACTION * capacity:,.1f} "
        f"({USABLE_FRACTION:.0%} of {capacity:,.1f}) are available."
    )


def suggestions(shape: ModelShape, spec: RunSpec, workers_per_node: int, machine: Machine) -> list[str]:
    """At most three changes, each of which alone makes the run fit: first settings, up to two, then hardware."""
    on_settings = _settings_that_fit(shape, spec, workers_per_node, machine)
    on_hardware = _hardware_that_fits(shape, spec, workers_per_node, machine)
    return [*on_settings, *on_hardware][:MAX_SUGGESTIONS]


def _fitting_candidate(shape: ModelShape, spec: RunSpec, workers_per_node: int, machine: Machine) -> Candidate | None:
    candidates = evaluate_layouts(shape, search_space(spec, workers_per_node), machine)
    best = best_candidate(candidates) if candidates else None
    return best if best and best.fits else None


def _settings_that_fit(shape: ModelShape, spec: RunSpec, workers_per_node: int, machine: Machine) -> Iterator[str]:
    lengths = (spec.data.max_seq_len // 2**halvings for halvings in (1, 2, 3))
    shorter_rows = [("data.max_seq_len", length) for length in lengths if length >= _MIN_ROW_TOKENS]
    lighter_methods = [("method.type", method) for method in ("lora", "qlora")[_METHODS.index(spec.method.type) :]]
    for changes in ([*_relaxed_settings(spec), *_lower_ranks(spec), *shorter_rows], lighter_methods):
        for setting, value in changes:
            if fitting := _fitting_candidate(shape, _with(spec, {setting: value}), workers_per_node, machine):
                yield _fits_with(f"{setting}: {_resolved(fitting, setting, value)}", fitting)
                break


def _hardware_that_fits(shape: ModelShape, spec: RunSpec, workers_per_node: int, machine: Machine) -> Iterator[str]:
    workers = spec.parallel.max_workers
    more = 2 ** workers.bit_length()
    per_node = workers_per_node if workers > workers_per_node else GPUS_PER_NODE
    rows = spec.train.micro_batch_size if isinstance(spec.train.micro_batch_size, int) else 1
    while more <= _MAX_WORKERS:
        changes: dict[str, Any] = {"parallel.num_workers": more}
        if spec.train.global_batch_size % (more * rows):
            changes["train.global_batch_size"] = more * rows
        if fitting := _fitting_candidate(shape, _with(spec, changes), min(per_node, more), machine):
            yield _fits_with(" and ".join(f"{name}: {value}" for name, value in changes.items()), fitting)
            break
        more *= 2
    larger = [name for name in _RENTED_TYPES if machine.gpu_gib and GPUS[name].memory_gib > 1.05 * machine.gpu_gib]
    for name in larger:
        machine_of_type = Machine(GPUS[name], GPUS[name].memory_gib, machine.host_gib)
        if fitting := _fitting_candidate(shape, spec, workers_per_node, machine_of_type):
            yield f"Fits on {workers} x {name}: {fitting.gpu_gib:.0f} GiB of {GPUS[name].memory_gib:.0f} per GPU."
            break


def _relaxed_settings(spec: RunSpec) -> Iterator[tuple[str, Any]]:
    """Settings that the spec fixes and that could be "auto", least intrusive first."""
    if spec.parallel.zero_stage != "auto":
        yield "parallel.zero_stage", "auto"
    if spec.train.activation_checkpointing is False:
        yield "train.activation_checkpointing", True
    if spec.train.micro_batch_size != "auto":
        yield "train.micro_batch_size", "auto"
    if spec.parallel.offload != "auto":
        yield "parallel.offload", "auto"


def _lower_ranks(spec: RunSpec) -> Iterator[tuple[str, int]]:
    """Halved ranks, down to one that is usual. Empty for full fine-tuning."""
    rank = spec.method.lora_rank if spec.method.type != "full" else 0
    while rank // 2 >= _MIN_RANK:
        rank //= 2
        yield "method.lora_rank", rank


def _resolved(candidate: Candidate, setting: str, value: Any) -> Any:
    """The value to print: what the search chose for "auto"."""
    if value == "auto":
        return getattr(candidate.layout, setting.rpartition(".")[2])
    return str(value).lower() if isinstance(value, bool) else value


def _with(spec: RunSpec, changes: dict[str, Any]) -> RunSpec:
    for setting, value in changes.items():
        section, _, name = setting.partition(".")
        changed = getattr(spec, section).model_copy(update={name: value})
        spec = spec.model_copy(update={section: changed})
    return spec


def _fits_with(change: str, candidate: Candidate) -> str:
    per_gpu = candidate.tokens_per_second / candidate.layout.num_workers
    host = "" if candidate.layout.offload == "none" else f", {candidate.host_gib:,.0f} GiB of main memory per node"
    return f"Fits with {change}: {candidate.gpu_gib:.0f} GiB per GPU{host}, about {per_gpu:,.0f} tokens/s per GPU."
