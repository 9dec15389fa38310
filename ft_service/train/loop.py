"""The training loop. It knows neither Ray nor DeepSpeed: it sees batches, a `Parallel`, and hooks to report to."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

import torch

from ft_service.errors import TrainingError
from ft_service.metrics import StepMetrics
from ft_service.plan import RunPlan
from ft_service.train.batches import Batches, MicroBatch, prefetched
from ft_service.train.schedule import learning_rate


class Workers(Protocol):
    """What the loop needs of parallelism; `ft_service.train.parallel.Parallel` is the one that trains."""

    world_size: int

    def loss(self, batch: MicroBatch) -> torch.Tensor: ...
    def backward(self, loss: torch.Tensor) -> None: ...
    def micro_step(self, learning_rate: float) -> None: ...
    def grad_norm(self) -> float: ...
    def evaluating(self) -> AbstractContextManager[None]: ...
    def sums_over_workers(self, *values: torch.Tensor | float) -> list[float]: ...
    def peak_memory_gib(self) -> float: ...


@dataclass
class TrainingState:
    """What the loop must remember between steps; together with weights and optimizer it is enough to resume."""

    step: int = 0
    """Completed updates."""
    best_step: int | None = None
    best_validation_loss: float = math.inf
    stalled_validations: int = 0
    stopped_early: bool = False
    loss: float = math.nan
    """Training loss of the last step, in nats per loss token."""


@dataclass(frozen=True)
class Hooks:
    """What happens around the loop. Every worker calls each at the same step."""

    on_step: Callable[[StepMetrics], None]
    on_best: Callable[[TrainingState], None]
    """The validation loss is the lowest so far: keep these weights."""
    on_checkpoint: Callable[[TrainingState], None]
    is_leaving: Callable[[], bool] = lambda: False
    """Whether this worker was told to leave; once one was, all checkpoint after the step under way, and return."""


def train(
    plan: RunPlan, parallel: Workers, batches: Batches, validation: Batches | None, hooks: Hooks, state: TrainingState
) -> TrainingState:
    """Train from `state` to the plan's last step, or until validation loss stalls; returns the state reached.

    Also returns, after a checkpoint, when a worker is told to leave: the state is then not complete.

    The loss of a step is the sum over its loss tokens divided by their global number. ZeRO and DDP *average* gradients
    over workers, hence the factor `world_size`; then neither the number of workers nor of micro-batches changes it.
    """
    steps = prefetched(batches.step, state.step, plan.num_steps)
    for step in steps:
        started = time.perf_counter()
        rate = learning_rate(
            state.step,
            peak=plan.learning_rate,
            num_steps=plan.num_steps,
            warmup_steps=plan.warmup_steps,
            schedule=plan.spec.train.schedule,
            min_ratio=plan.spec.train.min_learning_rate_ratio,
        )
        loss, leaving, loss_sums = math.nan, 0.0, []
        for number, micro_batch in enumerate(step.micro_batches, start=1):
            loss_sum = parallel.loss(micro_batch)
            parallel.backward(loss_sum * (parallel.world_size / step.global_loss_tokens))
            loss_sums.append(loss_sum.detach())
            if number == len(step.micro_batches):  # the next call updates the weights
                # That a worker leaves travels with the loss: all must learn of it at the same step.
                total, leaving = parallel.sums_over_workers(torch.stack(loss_sums).sum(), float(hooks.is_leaving()))
                loss = total / step.global_loss_tokens
                _refuse_unless_finite("loss", loss, state.step + 1)
            parallel.micro_step(rate)
        state.step += 1
        _refuse_unless_finite("gradient norm", parallel.grad_norm(), state.step)
        seconds = time.perf_counter() - started

        validation_loss = None
        if validation is not None and _is_due(state.step, plan.validate_every_steps, plan.num_steps):
            validation_loss = mean_loss(parallel, validation)
            if _remember(state, validation_loss, plan):
                hooks.on_best(state)
        state.loss = loss
        hooks.on_step(
            StepMetrics(
                step=state.step,
                time=datetime.now(UTC),
                epoch=state.step * plan.global_batch_size / plan.dataset.rows,
                loss=loss,
                validation_loss=validation_loss,
                learning_rate=rate,
                grad_norm=parallel.grad_norm(),
                tokens=step.global_tokens,
                loss_tokens=step.global_loss_tokens,
                tokens_per_second=step.global_tokens / seconds,
                peak_memory_gib=parallel.peak_memory_gib(),
            )
        )
        if state.stopped_early:
            break
        if leaving or _is_due(state.step, plan.spec.checkpoint.every_steps, None):
            hooks.on_checkpoint(state)
        if leaving:
            break
    steps.close()
    return state


def is_complete(state: TrainingState, plan: RunPlan) -> bool:
    """Whether there is nothing left to train."""
    return state.stopped_early or state.step >= plan.num_steps


def _refuse_unless_finite(what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise TrainingError(
            f"step {step}: the {what} is {value}. Lower train.learning_rate, or look at the rows of this step."
        )


def mean_loss(parallel: Workers, batches: Batches) -> float:
    """Loss per loss token over every row once, in nats; the same for every number of workers."""
    total, tokens = 0.0, 0
    with parallel.evaluating():
        for step in batches.in_order():
            total += float(sum(parallel.loss(micro_batch) for micro_batch in step.micro_batches))
            tokens += step.global_loss_tokens
    return parallel.sums_over_workers(total)[0] / tokens


def _is_due(step: int, every: int | None, last: int | None) -> bool:
    return (every is not None and step % every == 0) or step == last


def _remember(state: TrainingState, validation_loss: float, plan: RunPlan) -> bool:
    """Note a validation loss in `state`; returns whether it is the best so far."""
    stopping = plan.spec.train.early_stopping
    best_before = state.best_validation_loss
    if validation_loss < best_before:
        state.best_validation_loss, state.best_step = validation_loss, state.step
    stalled = stopping is not None and validation_loss >= best_before - stopping.min_delta
    state.stalled_validations = state.stalled_validations + 1 if stalled else 0
    state.stopped_early = stopping is not None and state.stalled_validations >= stopping.patience
    return validation_loss < best_before
