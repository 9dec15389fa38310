"""The training loop. It knows neither Ray nor DeepSpeed: it sees batches, a `Parallel`, and hooks to report to."""

import math
import time
from collections.abc import Callable
from datetime import UTC, datetime

import torch

from ft_service.plan.plan import RunPlan
from ft_service.runs.metrics import StepMetrics
from ft_service.train.batches import Batches, prefetched
from ft_service.train.nonfinite import refusal
from ft_service.train.protocol import Hooks, TrainingState, Workers
from ft_service.train.schedule import learning_rate


def train(
    plan: RunPlan, parallel: Workers, batches: Batches, validation: Batches | None, hooks: Hooks, state: TrainingState
) -> TrainingState:
    """Train from `state` to the plan's last step, or until validation loss stalls; returns the state reached.

    Also returns, after a checkpoint, when a worker is told to leave: the state is then not complete. Raises
    `TrainingError`, with the rows, when a loss or a gradient is not finite; it has then changed no weight.

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
            hooks.on_progress(f"micro-batch {number} of {len(step.micro_batches)}", state.step + 1)
            loss_sum = parallel.loss(micro_batch)
            parallel.backward(loss_sum * (parallel.world_size / step.global_loss_tokens))
            loss_sums.append(loss_sum.detach())
            if number == len(step.micro_batches):  # the next call updates the weights
                # That a worker leaves travels with the loss: all must learn of it at the same step.
                total, leaving = parallel.sum_over_ranks(torch.stack(loss_sums).sum(), float(hooks.is_leaving()))
                loss = total / step.global_loss_tokens
                if not math.isfinite(loss):
                    problem = f"step {state.step + 1}: the loss is {loss}."
                    raise refusal(problem, step, batches, parallel, hooks.text_of_row)
            parallel.micro_step(rate)
        state.step += 1
        if not math.isfinite(parallel.grad_norm()):
            problem = f"step {state.step}: the gradient norm is {parallel.grad_norm()}."
            raise refusal(problem, step, batches, parallel, hooks.text_of_row)
        seconds = time.perf_counter() - started

        validation_loss = None
        if validation is not None and _is_due(state.step, plan.validate_every_steps, plan.num_steps):
            validation_loss = mean_loss(parallel, validation, lambda: hooks.on_progress("validating", state.step))
            if _remember(state, validation_loss, plan):
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
            hooks.on_progress("writing a checkpoint", state.step)
            hooks.on_checkpoint(state)
        if leaving:
            break
    steps.close()
    return state


def is_complete(state: TrainingState, plan: RunPlan) -> bool:
    """Whether there is nothing left to train."""
    return state.stopped_early or state.step >= plan.num_steps


def mean_loss(parallel: Workers, batches: Batches, on_batch: Callable[[], None] = lambda: None) -> float:
    """Loss per loss token over every row once, in nats; the same for every number of workers.

    `on_batch` is called before each batch.
    """
    total, tokens = 0.0, 0
    with parallel.evaluating():
        for step in batches.in_order():
            on_batch()
            total += float(sum(parallel.loss(micro_batch) for micro_batch in step.micro_batches))
            tokens += step.global_loss_tokens
    return parallel.sum_over_ranks(total)[0] / tokens


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
