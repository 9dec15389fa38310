"""The training loop. It uses batches, parallelism behind a protocol, and hooks: no Ray, no DeepSpeed."""

import math
import time
from collections.abc import Callable
from datetime import UTC, datetime

import torch

from ft_service.plan.plan import RunPlan
from ft_service.runs.metrics import StepMetrics
from ft_service.train.batches import Batches, prefetched
from ft_service.train.nonfinite import nonfinite_error
from ft_service.train.protocol import Hooks, TrainingState, Workers
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
        loss = math.nan
        num_leaving = 0.0
        loss_sums = []
        for number, micro_batch in enumerate(step.micro_batches, start=1):
            hooks.on_progress(f"micro-batch {number} of {len(step.micro_batches)}", state.step + 1)
            loss_sum = parallel.loss(micro_batch)
            parallel.backward(loss_sum * (parallel.world_size / step.global_loss_tokens))
            loss_sums.append(loss_sum.detach())
            if number == len(step.micro_batches):  # the next micro_step updates the weights
                # One collective for both: every rank must learn at the same step that one was asked to leave.
                loss_total, num_leaving = parallel.sum_over_ranks(
                    torch.stack(loss_sums).sum(), float(hooks.leave_requested())
                )
                loss = loss_total / step.global_loss_tokens
                if not math.isfinite(loss):
                    problem = f"step {state.step + 1}: the loss is {loss}."
                    raise nonfinite_error(problem, step, batches, parallel, hooks.text_of_row)
            parallel.micro_step(rate)
        state.step += 1
        if not math.isfinite(parallel.grad_norm()):
            problem = f"step {state.step}: the gradient norm is {parallel.grad_norm()}."
            raise nonfinite_error(problem, step, batches, parallel, hooks.text_of_row)
        seconds = time.perf_counter() - started

        validation_loss = None
        if validation is not None and _is_due(state.step, plan.validate_every_steps, plan.num_steps):
            validation_loss = mean_loss(parallel, validation, lambda: hooks.on_progress("validating", state.step))
            if _record_validation(state, validation_loss, plan):
                hooks.on_progress("writing the best weights", state.step)
                hooks.on_best(state)
        state.loss = loss
        hooks.on_progress("writing measurements", state.step)
        peak_allocated_gib, peak_reserved_gib = parallel.peak_memory_gib()
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
                peak_memory_gib=peak_allocated_gib,
                peak_reserved_gib=peak_reserved_gib,
            )
        )
        if state.stopped_early:
            break
        if num_leaving or _is_due(state.step, plan.spec.checkpoint.every_steps, None):
            hooks.on_progress("writing a checkpoint", state.step)
            hooks.on_checkpoint(state)
        if num_leaving:
            break
    steps.close()
    return state


def is_complete(state: TrainingState, plan: RunPlan) -> bool:
    """Whether the run has reached its last step or was stopped early."""
    return state.stopped_early or state.step >= plan.num_steps


def mean_loss(parallel: Workers, batches: Batches, on_batch: Callable[[], None] = lambda: None) -> float:
    """Loss per loss token over all rows, in nats; the same for every number of ranks.

    `on_batch` is called before each batch.
    """
    loss_sum = 0.0
    loss_tokens = 0
    with parallel.evaluation_mode():
        for step in batches.in_order():
            on_batch()
            loss_sum += float(sum(parallel.loss(micro_batch) for micro_batch in step.micro_batches))
            loss_tokens += step.global_loss_tokens
    return parallel.sum_over_ranks(loss_sum)[0] / loss_tokens


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
