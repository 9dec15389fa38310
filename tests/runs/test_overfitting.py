"""Overfitting: detected under noise, and never where the curves do not show it."""

import math
import random
from collections.abc import Callable

import pytest

from ft_service.runs.metrics import StepMetrics
from ft_service.runs.overfitting import find_overfitting
from tests.runs.run_cases import step_metrics

Curve = Callable[[float], float]


def falling(x: float) -> float:
    return 1.0 + math.exp(-3 * x)


def turning_up(x: float) -> float:
    """Lowest at x = 0.4, and 0.18 higher at the end."""
    return 1.5 + 0.5 * (x - 0.4) ** 2


def curves(training: Curve, validation: Curve, noise: float = 0.0, seed: int = 0) -> list[StepMetrics]:
    """100 steps with ten validations."""
    rng = random.Random(seed)
    return [
        step_metrics(
            step,
            loss=training(step / 100) + rng.gauss(0, 10 * noise),
            validation_loss=validation(step / 100) + rng.gauss(0, noise) if step % 10 == 0 else None,
        )
        for step in range(1, 101)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_overfitting_is_detected_under_noise(seed: int) -> None:
    overfitting = find_overfitting(curves(falling, turning_up, noise=0.004, seed=seed))
    assert overfitting is not None
    assert overfitting.best_step in (30, 40, 50)


def test_overfitting_is_described_with_a_fix() -> None:
    overfitting = find_overfitting(curves(falling, turning_up))
    assert overfitting is not None
    assert (overfitting.best_step, overfitting.last_step) == (40, 100)
    assert overfitting.best_validation_loss == pytest.approx(1.5)
    assert overfitting.last_validation_loss == pytest.approx(1.68)
    assert overfitting.training_loss_at_last < overfitting.training_loss_at_best
    for part in ("step 40 (1.5000)", "rose to 1.6800 (+12.0%) by step 100", "train.epochs", "lora_rank", "varied data"):
        assert part in overfitting.message


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("validation", [falling, lambda x: 1.5], ids=["falling", "level"])
def test_noise_on_a_falling_or_level_curve_is_not_overfitting(validation: Curve, seed: int) -> None:
    assert find_overfitting(curves(falling, validation, noise=0.004, seed=seed)) is None


def test_a_zigzag_validation_loss_is_not_overfitting() -> None:
    zigzag = [1.6, 1.5, 1.6, 1.45, 1.6, 1.5, 1.6, 1.5, 1.6, 1.52]
    # The last two stand 5 % above the lowest, but so does nearly every other validation.
    assert find_overfitting(curves(falling, lambda x: zigzag[round(10 * x) - 1])) is None


def test_a_diverging_run_is_not_overfitting() -> None:
    assert find_overfitting(curves(turning_up, turning_up)) is None


def test_one_validation_above_the_lowest_is_not_yet_overfitting() -> None:
    metrics = curves(falling, turning_up)
    assert find_overfitting(metrics[:50]) is None
    spike = [m if m.step != 90 else m.model_copy(update={"validation_loss": 3.0}) for m in curves(falling, falling)]
    assert find_overfitting(spike) is None


def test_a_rise_too_small_to_matter_is_not_overfitting() -> None:
    # 0.36 * 0.05 = 0.018 nats on 1.5 is 1.2 %: above the least rise in nats, below the least share.
    assert find_overfitting(curves(falling, lambda x: 1.5 + 0.05 * (x - 0.4) ** 2)) is None


@pytest.mark.parametrize("count", [0, 1, 15, 25])
def test_too_few_validations_are_no_evidence(count: int) -> None:
    assert find_overfitting(curves(falling, lambda x: 1 + x)[:count]) is None


def test_a_nan_validation_is_ignored() -> None:
    metrics = curves(falling, turning_up)
    metrics[19] = metrics[19].model_copy(update={"validation_loss": math.nan})
    overfitting = find_overfitting(metrics)
    assert overfitting is not None
    assert overfitting.best_step == 40
