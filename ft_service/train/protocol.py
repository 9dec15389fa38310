"""What the training loop needs from outside, and what it reports: without DeepSpeed or Ray."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ft_service.runs.metrics import StepMetrics
from ft_service.train.batches import MicroBatch


class Workers(Protocol):
    """What the loop needs from parallelism. `ft_service.train.parallel.Parallel` implements it with DeepSpeed."""

    world_size: int

    def loss(self, batch: MicroBatch) -> torch.Tensor: ...
    def backward(self, loss: torch.Tensor) -> None: ...
    def micro_step(self, learning_rate: float) -> None: ...
    def grad_norm(self) -> float: ...
    def evaluation_mode(self) -> AbstractContextManager[None]: ...
    def sum_over_ranks(self, *values: torch.Tensor | float) -> list[float]: ...
    def all_gather_object(self, value: Any) -> list[Any]: ...
    def peak_memory_gib(self) -> tuple[float, float]: ...


@dataclass
class TrainingState:
    """What the loop carries from step to step. With weights and optimizer state it is enough to resume."""

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
    """Callbacks of the loop. Every rank calls each of them at the same step."""

    on_step: Callable[[StepMetrics], None]
    on_best: Callable[[TrainingState], None]
    """The validation loss is the lowest so far: save these weights."""
    on_checkpoint: Callable[[TrainingState], None]
    leave_requested: Callable[[], bool] = lambda: False
    """Whether this rank was asked to leave. If any was, all finish the step, save a checkpoint and return."""
    on_progress: Callable[[str, int], None] = lambda doing, step: None
    """What comes next, and in which step. Called often, so that silence means that the loop hangs."""
    text_of_row: Callable[[int], str] = lambda row: ""
    """The first words of a row of the training data."""
