"""Metrics of a step, and a clock that tests move."""

from datetime import UTC, datetime

from ft_service.runs.metrics import StepMetrics

RUN = "support-bot-1"


def step_metrics(step: int, **changes: object) -> StepMetrics:
    values = {
        "step": step,
        "epoch": step / 100,
        "loss": 1.8342,
        "learning_rate": 1.8e-4,
        "grad_norm": 0.74,
        "tokens": 4096,
        "loss_tokens": 1024,
        "tokens_per_second": 41_200.0,
        "peak_memory_gib": 31.4,
        "time": datetime(2026, 7, 3, 9, 0, tzinfo=UTC),
    }
    return StepMetrics.model_validate({**values, **changes})


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now
