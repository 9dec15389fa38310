"""The training loop. It uses batches, parallelism behind a protocol, and hooks: no Ray, no DeepSpeed."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import torch

from ft_service.plan.plan import RunPlan
from ft_service.runs.metrics import StepMetrics
from ft_service.train.batches import Batches, prefetched
from ft_service.train.nonfinite import nonfinite_error
from ft_service.train.protocol import BatchLoss, Hooks, TrainingState, Workers
from ft_service.train.schedule import planned_learning_rate


def train(
    plan: RunPlan, parallel: Workers, batches: Batches, validation: Batches | None, hooks: Hooks, state: TrainingState
) -> TrainingState:
    """Train from `state` to the plan's last step, or until validation loss stalls; returns the state reached.

    If a rank is asked to leave, saves a checkpoint and returns early, with an incomplete state. Raises `TrainingError`,
    naming the rows, if a loss or gradient is not finite; no weight has then changed.

    The loss of a step is the sum over its loss tokens divided by their global number. ZeRO and DDP *average* gradients
    over ranks, hence the factor `world_size`. So the loss depends neither on the number of ranks nor on the number of
    micro-batches.
    """
    steps = prefetched(batches.step, state.step, plan.num_steps)
    for step in steps:
        started = time.perf_counter()
        rate = planned_learning_rate(plan, state.step)
        figures = []
        for number, micro_batch in enumerate(step.micro_batches, start=1):
            hooks.on_progress(f"micro-batch {number} of {len(step.micro_batches)}", state.step + 1)
            batch_loss = parallel.loss(micro_batch)
            parallel.backward(batch_loss.loss_sum * (parallel.world_size / step.global_loss_tokens))
            figures.append(torch.stack([batch_loss.loss_sum.detach(), batch_loss.correct]))
            del batch_loss
            if number < len(step.micro_batches):
                parallel.micro_step()
        # One collective, one wait for the device. Every rank must learn at the same step that one was asked to leave.
        update = parallel.update(rate, BatchLoss(*torch.stack(figures).sum(0)), hooks.leave_requested())
        loss = update.loss_sum / step.global_loss_tokens
        state.step += 1
        for name, value in (("loss", loss), ("gradient norm", update.grad_norm)):
            if not math.isfinite(value):
                problem = f"step {state.step}: the {name} is {value}."
                raise nonfinite_error(problem, step, batches, parallel, hooks.text_of_row)
        seconds = time.perf_counter() - started

        validated = None
        if validation is not None and _is_due(state.step, plan.validate_every_steps, plan.num_steps):
            validated = validate(parallel, validation, lambda: hooks.on_progress("validating", state.step))
            if _record_validation(state, validated.loss, plan):
                hooks.on_progress("writing the best weights", state.step)
                hooks.on_best(state)
        state.loss = loss
        hooks.on_progress("writing measurements", state.step)
        hooks.on_step(
            StepMetrics(
                step=state.step,
                time=datetime.now(UTC),
                epoch=state.step * plan.global_batch_size / plan.dataset.rows,
                loss=loss,
                accuracy=update.correct / step.global_loss_tokens,
                validation_loss=None if validated is None else validated.loss,
                validation_accuracy=None if validated is None else validated.accuracy,
                learning_rate=rate,
                grad_norm=update.grad_norm,
                tokens=step.global_tokens,
                loss_tokens=step.global_loss_tokens,
                tokens_per_second=step.global_tokens / seconds,
                peak_memory_gib=update.peak_memory_gib,
                peak_reserved_gib=update.peak_reserved_gib,
            )
        )
        if state.stopped_early:
            break
        if update.num_leaving or _is_due(state.step, plan.spec.checkpoint.every_steps, None):
            hooks.on_progress("writing a checkpoint", state.step)
            hooks.on_checkpoint(state)
        if update.num_leaving:
            break
    steps.close()
    return state


def is_complete(state: TrainingState, plan: RunPlan) -> bool:
    """Whether the run has reached its last step or was stopped early."""
    return state.stopped_early or state.step >= plan.num_steps


@dataclass(frozen=True)
class Validation:
    """Figures of all rows, the same for every number of ranks."""

    loss: float
    """Nats per loss token."""
    accuracy: float
    """Share of loss tokens whose most likely prediction is right."""


def validate(parallel: Workers, batches: Batches, on_batch: Callable[[], None] = lambda: None) -> Validation:
    """Measure all rows once. `on_batch` is called before each batch."""
    figures = []
    loss_tokens = 0
    with parallel.evaluation_mode():
        for step in batches.in_order():
            on_batch()
            for micro_batch in step.micro_batches:
                batch_loss = parallel.loss(micro_batch)
                figures.append(torch.stack([batch_loss.loss_sum, batch_loss.correct]))
            loss_tokens += step.global_loss_tokens
    # Read once, at the end, so that the device never waits for the host. fp64, because there may be many.
    loss_sum, correct = parallel.sum_over_ranks(*torch.stack(figures).double().sum(0))
    return Validation(loss_sum / loss_tokens, correct / loss_tokens)


def _is_due(step: int, every: int | None, last: int | None) -> bool:
    return (every is not None and step % every == 0) or step == last


def _record_validation(state: TrainingState, validation_loss: float, plan: RunPlan) -> bool:
    """Update `state` with a validation loss; returns whether it is the best so far."""
    stopping = plan.spec.train.early_stopping
    best_before = state.best_validation_loss
    if validation_loss < best_before:
        state.best_validation_loss = validation_loss
        state.best_step = state.step
    stalled = stopping is not None and validation_loss >= best_before - stopping.min_delta
    state.stalled_validations = state.stalled_validations + 1 if stalled else 0
    state.stopped_early = stopping is not None and state.stalled_validations >= stopping.patience
    return validation_loss < best_before
