"""The training loop, with fake workers that play back losses: no model, no engine."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from ft_service.catalog.models import ModelShape
from ft_service.data.order import step_rows
from ft_service.errors import TrainingError
from ft_service.plan.facts import DatasetFacts, Resources
from ft_service.plan.make import make_plan
from ft_service.plan.plan import RunPlan
from ft_service.runs.metrics import StepMetrics
from ft_service.spec.schema import RunSpec
from ft_service.train.batches import Batches, MicroBatch, prefetched
from ft_service.train.loop import is_complete, train
from ft_service.train.protocol import BatchLoss, Hooks, TrainingState, Update

LENGTHS = [3, 4, 5, 6, 7, 8, 9, 10]


@dataclass(frozen=True)
class Row:
    input_ids: np.ndarray
    loss_mask: np.ndarray
    document_lengths: np.ndarray


ROWS = [Row(np.arange(n, dtype=np.int32), np.ones(n, dtype=bool), np.array([n], dtype=np.int32)) for n in LENGTHS]


@dataclass
class PlayedWorkers:
    """One worker of `world_size`: plays back given losses per token, and records the calls."""

    validation_losses: list[float] = field(default_factory=list)
    training_losses: list[float] = field(default_factory=list)
    world_size: int = 1
    calls: list[Any] = field(default_factory=list)
    validating: bool = False
    finished: int = 0
    bad_rows: tuple[int, ...] = ()
    """Rows whose loss is NaN."""
    norm: float = 0.5
    accuracy: float = 0.25
    """Of every batch."""

    def loss(self, batch: MicroBatch) -> BatchLoss:
        return BatchLoss(self._loss_sum(batch), torch.tensor(self.accuracy * len(batch.targets)))

    def _loss_sum(self, batch: MicroBatch) -> torch.Tensor:
        if any(LENGTHS[row] in batch.document_lengths for row in self.bad_rows):
            return torch.tensor(math.nan, requires_grad=not self.validating)
        if self.validating:
            return torch.tensor((self.validation_losses or [2.0])[0] * len(batch.targets))
        self.calls.append("loss")
        per_token = self.training_losses[0] if self.training_losses else 2.0
        return torch.tensor(per_token * len(batch.targets), requires_grad=True)

    def backward(self, loss: torch.Tensor) -> None:
        self.calls.append(("backward", float(loss.detach())))

    def micro_step(self) -> None:
        self.calls.append("micro_step")

    def update(self, learning_rate: float, sums: BatchLoss, leaving: bool) -> Update:
        total, correct, num_leaving = self.sum_over_ranks(sums.loss_sum, sums.correct, float(leaving))
        usable = math.isfinite(total) and math.isfinite(self.norm)
        self.calls.append(("update" if usable else "skipped update", learning_rate))
        return Update(total, correct, num_leaving, 2.5, 3.75, self.norm)

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        self.calls.append("validate")
        self.validating = True
        yield
        self.validating = False
        self.finished += 1

    def sum_over_ranks(self, *values: torch.Tensor | float) -> list[float]:
        if self.finished:  # the sum of a validation
            self.finished = 0
            self.validation_losses.pop(0)
        elif self.training_losses:
            self.training_losses.pop(0)
        return [float(value) * self.world_size for value in values]  # all workers alike

    def all_gather_object(self, value: Any) -> list[Any]:
        return [[]] * (self.world_size - 1) + [value]  # this is the last worker


def a_plan(max_steps: int = 6, micro: int = 2, stopping: dict[str, Any] | None = None, **settings: Any) -> RunPlan:
    spec = RunSpec.model_validate(
        {
            "name": "loop",
            "model": {"base": "some/base"},
            "method": {"type": "lora", "lora_rank": 4},
            "data": {"train": [{"path": "unused"}], "validation": {"fraction": 0.5}},
            "train": {
                "max_steps": max_steps,
                "global_batch_size": 4,
                "micro_batch_size": micro,
                "learning_rate": 1e-2,
                "validate_every_steps": settings.get("validate_every", 1),
                "early_stopping": stopping,
                "warmup_ratio": 0.0,
                "schedule": "linear",
            },
            "parallel": {"use_gpu": False},
            "checkpoint": {"every_steps": settings.get("checkpoint_every")},
            "storage": "unused",
        }
    )
    facts = DatasetFacts(
        digest="d",
        conversations=8,
        rows=len(ROWS),
        tokens=sum(LENGTHS),
        loss_tokens=sum(LENGTHS) - len(ROWS),
        truncated=0,
        validation_loss_tokens=1,
    )
    shape = ModelShape(
        hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, intermediate_size=8, vocab_size=16
    )
    return make_plan(spec, facts, shape, Resources())


@dataclass
class Watched:
    state: TrainingState
    metrics: list[StepMetrics]
    best: list[tuple[int, float]]
    """Step and validation loss at each call of on_best."""
    order: list[str]


def run(
    plan: RunPlan,
    workers: PlayedWorkers,
    validation: bool = True,
    state: TrainingState | None = None,
    leave_after: int | None = None,
    on_progress: Callable[[str, int], None] = lambda doing, step: None,
) -> Watched:
    seen = Watched(state or TrainingState(), [], [], [])

    def on_step(metrics: StepMetrics) -> None:
        seen.metrics.append(metrics)
        seen.order.append(f"step {metrics.step}")

    def on_best(state: TrainingState) -> None:
        seen.best.append((state.step, state.best_validation_loss))
        seen.order.append(f"best {state.step}")

    def on_checkpoint(state: TrainingState) -> None:
        seen.order.append(f"checkpoint {state.step}")

    batches = Batches(ROWS, 0, plan.global_batch_size, plan.micro_batch_size, 0, 1)

    def leave_requested() -> bool:
        return leave_after is not None and len(seen.metrics) >= leave_after

    hooks = Hooks(
        on_step=on_step,
        on_best=on_best,
        on_checkpoint=on_checkpoint,
        leave_requested=leave_requested,
        on_progress=on_progress,
        text_of_row=lambda row: f"the text of row {row}",
    )
    seen.state = train(plan, workers, batches, batches if validation else None, hooks, seen.state)
    return seen


# -- validation and early stopping -----------------------------------------------------------------------------------


def test_early_stopping_ends_the_run_and_keeps_the_best_step() -> None:
    seen = run(a_plan(stopping={"patience": 2}), PlayedWorkers([3.0, 2.0, 2.5, 2.1, 1.0, 1.0]))
    assert seen.state.step == 4  # two validations after the best of step 2
    assert seen.state.stopped_early
    assert (seen.state.best_step, seen.state.best_validation_loss) == (2, pytest.approx(2.0))
    assert [m.step for m in seen.metrics] == [1, 2, 3, 4]


def test_an_improvement_resets_patience() -> None:
    seen = run(a_plan(stopping={"patience": 2}), PlayedWorkers([3.0, 3.5, 2.0, 2.5, 1.9, 2.5]))
    assert seen.state.step == 6
    assert not seen.state.stopped_early


def test_improvement_below_min_delta_is_a_stall_but_the_best() -> None:
    losses = [3.0, 2.95, 2.9, 2.0, 1.0, 0.5]
    seen = run(a_plan(stopping={"patience": 2, "min_delta": 0.1}), PlayedWorkers(losses))
    assert seen.state.step == 3
    assert seen.state.stopped_early
    assert [step for step, _ in seen.best] == [1, 2, 3]
    assert seen.state.best_validation_loss == pytest.approx(2.9)


def test_without_early_stopping_rising_validation_loss_ends_nothing() -> None:
    seen = run(a_plan(), PlayedWorkers([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    assert seen.state.step == 6
    assert not seen.state.stopped_early
    assert seen.state.best_step == 1


def test_on_best_is_called_at_improvements_only() -> None:
    seen = run(a_plan(), PlayedWorkers([3.0, 3.0, 2.0, 2.5, 1.0, 1.5]))
    assert seen.best == [(1, pytest.approx(3.0)), (3, pytest.approx(2.0)), (5, pytest.approx(1.0))]


def test_validation_runs_every_n_steps_and_at_the_last_step() -> None:
    seen = run(a_plan(max_steps=7, validate_every=3), PlayedWorkers([3.0, 2.0, 1.0]))
    validated = {m.step: m.validation_loss for m in seen.metrics if m.validation_loss is not None}
    assert {m.step for m in seen.metrics if m.validation_accuracy == pytest.approx(0.25)} == set(validated)
    assert validated == {3: pytest.approx(3.0), 6: pytest.approx(2.0), 7: pytest.approx(1.0)}


def test_without_validation_data_there_is_no_best_step() -> None:
    workers = PlayedWorkers()
    seen = run(a_plan(), workers, validation=False)
    assert "validate" not in workers.calls
    assert seen.best == [] and seen.state.best_step is None
    assert all(m.validation_loss is None for m in seen.metrics)


# -- a step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_nonfinite_loss_ends_the_run_and_names_the_step(loss: float) -> None:
    with pytest.raises(TrainingError, match=rf"^step 3: the loss is {loss}.*train\.learning_rate"):
        run(a_plan(), PlayedWorkers([1.0] * 6, training_losses=[2.0, 2.0, loss]))


def test_nonfinite_loss_is_neither_logged_nor_kept_as_best() -> None:
    seen = TrainingState()
    with pytest.raises(TrainingError):
        run(a_plan(), PlayedWorkers([1.0] * 6, training_losses=[2.0, math.nan]), state=seen)
    assert seen.best_step == 1


def bad_step(row: int) -> tuple[int, list[int]]:
    """The first step that has the row, counted from 1, and all its rows."""
    for step in range(6):
        rows = step_rows(0, step, 4, len(ROWS)).tolist()
        if row in rows:
            return step + 1, rows
    raise AssertionError("every row is in the first epoch")


@pytest.mark.parametrize("world_size", [1, 2])
def test_error_names_the_nonfinite_row_its_worker_and_text(world_size: int) -> None:
    step, rows = bad_step(5)
    workers = PlayedWorkers(bad_rows=(5,), world_size=world_size)
    with pytest.raises(TrainingError) as error:
        run(a_plan(), workers, validation=False)
    reported = str(error.value)
    assert reported.startswith(f"step {step}: the loss is nan.")
    assert f"5 (worker {world_size - 1})" in reported and "Row 5 begins 'the text of row 5'" in reported
    assert not any(f" {row} (worker" in reported for row in rows if row != 5)
    updates = [call[0] for call in workers.calls if "update" in call[0]]
    assert updates == ["update"] * (step - 1) + ["skipped update"]


def test_if_every_row_is_nonfinite_none_is_to_be_removed() -> None:
    with pytest.raises(TrainingError, match=r"Lower train\.learning_rate\.$") as error:
        run(a_plan(), PlayedWorkers(bad_rows=tuple(range(len(ROWS)))), validation=False)
    for row in step_rows(0, 0, 4, len(ROWS)):
        assert f"{row} (worker 0)" in str(error.value)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_nonfinite_gradient_ends_the_run_and_names_the_rows(norm: float) -> None:
    rows = ", ".join(map(str, step_rows(0, 0, 4, len(ROWS))))
    with pytest.raises(TrainingError, match=rf"^step 1: the gradient norm is {norm}.* evaluated alone: {rows}\."):
        run(a_plan(), PlayedWorkers([1.0] * 6, norm=norm))


def test_every_forward_pass_follows_a_progress_report() -> None:
    workers = PlayedWorkers([2.0] * 6)
    run(a_plan(), workers, on_progress=lambda doing, step: workers.calls.append(("progress", step)))
    for before, call in pairwise(workers.calls):
        assert call != "loss" or before[0] == "progress"
    assert {call[1] for call in workers.calls if call[0] == "progress"} == {1, 2, 3, 4, 5, 6}


def test_hooks_are_called_in_order_best_then_step_then_checkpoint() -> None:
    plan = a_plan(max_steps=4, validate_every=2, checkpoint_every=2)
    seen = run(plan, PlayedWorkers([2.0, 3.0]))
    assert seen.order == ["step 1", "best 2", "step 2", "checkpoint 2", "step 3", "step 4", "checkpoint 4"]


@pytest.mark.parametrize("checkpoint_every", [2, 5])
def test_leave_request_finishes_the_step_saves_and_returns(checkpoint_every: int) -> None:
    plan = a_plan(checkpoint_every=checkpoint_every)
    seen = run(plan, PlayedWorkers([3.0] * 6), validation=False, leave_after=3)
    regular = ["checkpoint 2"] if checkpoint_every == 2 else []
    assert seen.order == ["step 1", "step 2", *regular, "step 3", "step 4", "checkpoint 4"]
    assert not is_complete(seen.state, plan)


def test_leave_request_at_the_last_step_completes_the_run() -> None:
    plan = a_plan(max_steps=3)
    seen = run(plan, PlayedWorkers([3.0] * 6), leave_after=2)
    assert seen.state.step == 3 and is_complete(seen.state, plan)


def test_micro_batches_are_scaled_by_world_size_over_loss_tokens() -> None:
    workers = PlayedWorkers(world_size=2)
    batches = Batches(ROWS, 0, 4, 1, 1, 2)  # the second of two workers: 2 micro-steps of one row
    plan = a_plan(max_steps=1, micro=1)
    nothing = Hooks(lambda metrics: None, lambda state: None, lambda state: None)
    train(plan, workers, batches, None, nothing, TrainingState())
    rows = step_rows(0, 0, 4, len(ROWS))
    loss_tokens = [LENGTHS[row] - 1 for row in rows]
    mine = [loss_tokens[1], loss_tokens[3]]
    # ZeRO and DDP average over workers: only times world_size is the step's gradient the sum over its tokens.
    scaled = [2.0 * tokens * 2 / sum(loss_tokens) for tokens in mine]
    backwards = [call[1] for call in workers.calls if call[0] == "backward"]
    assert backwards == pytest.approx(scaled)
    order = [call if isinstance(call, str) else call[0] for call in workers.calls]
    assert order == ["loss", "backward", "micro_step", "loss", "backward", "update"]


def test_each_step_reports_its_own_figures() -> None:
    training = [4.0, 3.0, 2.0, 1.0]
    seen = run(a_plan(max_steps=4), PlayedWorkers([1.0] * 4, training_losses=list(training)))
    assert [m.step for m in seen.metrics] == [1, 2, 3, 4]
    assert [m.loss for m in seen.metrics] == pytest.approx(training)
    assert [m.epoch for m in seen.metrics] == [0.5, 1.0, 1.5, 2.0]  # 4 of 8 rows a step
    assert [m.learning_rate for m in seen.metrics] == pytest.approx([1e-2, 0.75e-2, 0.5e-2, 0.25e-2])
    for m in seen.metrics:
        lengths = [LENGTHS[row] for row in step_rows(0, m.step - 1, 4, len(ROWS))]
        assert (m.tokens, m.loss_tokens) == (sum(lengths), sum(lengths) - 4)
        assert (m.grad_norm, m.peak_memory_gib, m.peak_reserved_gib) == (0.5, 2.5, 3.75)
    assert seen.state.loss == pytest.approx(1.0)


def test_training_continues_from_a_given_state() -> None:
    state = TrainingState(step=3, best_step=2, best_validation_loss=1.5, stalled_validations=1)
    seen = run(a_plan(stopping={"patience": 2}), PlayedWorkers([1.6, 1.0, 1.0]), state=state)
    assert [m.step for m in seen.metrics] == [4]  # the stall before counts
    assert seen.metrics[0].learning_rate == pytest.approx(0.5e-2)
    assert seen.metrics[0].accuracy == pytest.approx(0.25)
    assert seen.state.stopped_early and seen.state.best_step == 2
    assert seen.metrics[0].tokens == sum(LENGTHS[row] for row in step_rows(0, 3, 4, len(ROWS)))


# -- prefetching -----------------------------------------------------------------------------------------------------


def test_prefetched_steps_keep_order_and_pass_on_errors() -> None:
    made: list[int] = []

    def make(step: int) -> Any:
        if step == 4:
            raise TrainingError("row 4 cannot be read")
        made.append(step)
        return step

    assert list(prefetched(make, 1, 4)) == [1, 2, 3]
    assert made == [1, 2, 3]  # none beyond the last
    with pytest.raises(TrainingError, match="row 4"):
        list(prefetched(make, 3, 6))
