"""What the training loop needs of the world around it, and what it hands back: no engine, no Ray."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ft_service.runs.metrics import StepMetrics
from ft_service.train.batches import MicroBatch


class Workers(Protocol):
    """What the loop needs of parallelism; `ft_service.train.parallel.Parallel` is the one that trains."""

    world_size: int

    def loss(self, batch: MicroBatch) -> torch.Tensor: ...
    def backward(self, loss: torch.Tensor) -> None: ...
    def micro_step(self, learning_rate: float) -> None: ...
    def grad_norm(self) -> float: ...
    def evaluating(self) -> AbstractContextManager[None]: ...
    def sum_over_ranks(self, *values: torch.Tensor | float) -> list[float]: ...
    def all_gather_object(self, value: Any) -> list[Any]: ...
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
    on_progress: Callable[[str, int], None] = lambda doing, step: None
    """What comes next, and in which step: called often, and never again once the loop hangs."""
    text_of_row: Callable[[int], str] = lambda row: ""
    """How a row of the training data begins, for people."""
