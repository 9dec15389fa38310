"""Metrics: a line per step without gaps or repeats, a readable progress line, a warning that can be trusted."""

import io
import json
import math
import random
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ft_service.errors import SpecError, StorageError
from ft_service.runs.metrics import (
    EventLog,
    JsonlSink,
    ProgressLine,
    StepMetrics,
    TensorBoardSink,
    find_overfitting,
    format_count,
    format_duration,
    format_progress,
    read_events,
    read_metrics,
)
from ft_service.storage.storage import Storage

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


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A storage that writes as to an object store."""
    monkeypatch.setattr(Storage, "is_local", property(lambda self: False))
    return Storage(str(tmp_path))


def fails(*_: object) -> None:
    raise StorageError("away")


# -- files -----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_what_is_read(storage: Storage) -> None:
    written = [step_metrics(1), step_metrics(2, validation_loss=1.9, grad_norm=math.inf)]
    sink = JsonlSink(storage, RUN)
    sink.rewind(0)
    for metrics in written:
        sink(metrics)
    assert read_metrics(storage, RUN) == written


def test_a_line_is_strict_json_and_has_validation_loss_only_where_measured(storage: Storage) -> None:
    sink = JsonlSink(storage, RUN)
    sink(step_metrics(1, grad_norm=math.nan))
    sink(step_metrics(2, validation_loss=1.9))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = storage.read_bytes(f"runs/{RUN}/metrics.jsonl").decode()
    first, second = (json.loads(line, parse_constant=refuse) for line in text.splitlines())
    assert "validation_loss" not in first
    assert second["validation_loss"] == 1.9


def test_a_run_without_steps_has_a_metrics_file_and_no_metrics(storage: Storage) -> None:
    assert read_metrics(storage, RUN) == []
    JsonlSink(storage, RUN).rewind(0)
    assert storage.exists(f"runs/{RUN}/metrics.jsonl")
    assert read_metrics(storage, RUN) == []


def test_a_resumed_run_has_each_step_once(storage: Storage) -> None:
    killed = JsonlSink(storage, RUN)
    for step in range(1, 8):
        killed(step_metrics(step, loss=1.0))
    resumed = JsonlSink(storage, RUN)
    resumed.rewind(5)
    for step in range(6, 10):
        resumed(step_metrics(step, loss=2.0))
    assert [(m.step, m.loss) for m in read_metrics(storage, RUN)] == [
        *((step, 1.0) for step in range(1, 6)),
        *((step, 2.0) for step in range(6, 10)),
    ]


def test_a_torn_last_line_is_left_out_and_does_not_spoil_the_next(storage: Storage) -> None:
    sink = JsonlSink(storage, RUN)
    for step in (1, 2, 3):
        sink(step_metrics(step))
    path = f"runs/{RUN}/metrics.jsonl"
    storage.write_bytes(path, storage.read_bytes(path)[:-40])
    assert [m.step for m in read_metrics(storage, RUN)] == [1, 2]
    resumed = JsonlSink(storage, RUN)
    resumed.rewind(2)
    resumed(step_metrics(3))
    assert [m.step for m in read_metrics(storage, RUN)] == [1, 2, 3]


def test_a_damaged_line_within_is_named_by_file_and_line(storage: Storage) -> None:
    sink = JsonlSink(storage, RUN)
    sink(step_metrics(1))
    storage.append_line(f"runs/{RUN}/metrics.jsonl", '{"step": 2')
    sink(step_metrics(3))
    with pytest.raises(StorageError, match=r"metrics\.jsonl:2: not the metrics of a step"):
        read_metrics(storage, RUN)


def test_an_object_store_is_written_every_thirty_seconds_and_never_loses_a_flushed_step(remote: Storage) -> None:
    clock = Clock()
    sink = JsonlSink(remote, RUN, clock)
    sink.rewind(0)

    def steps() -> list[int]:
        return [m.step for m in read_metrics(remote, RUN)]

    sink(step_metrics(1))
    clock.now = 29.9
    sink(step_metrics(2))
    assert steps() == []
    clock.now = 30.0
    sink(step_metrics(3))
    assert steps() == [1, 2, 3]
    sink(step_metrics(4))
    sink.flush()
    assert steps() == [1, 2, 3, 4]
    sink(step_metrics(5))
    sink.close()
    assert steps() == [1, 2, 3, 4, 5]


def test_events_keep_their_order_and_their_data(storage: Storage) -> None:
    log = EventLog(storage, RUN)
    log.emit("running", "8 workers")
    log.emit("resumed", "from the checkpoint of step 40", step=40)
    first, second = read_events(storage, RUN)
    assert (first.type, first.message) == ("running", "8 workers")
    assert second.model_extra == {"step": 40}
    assert first.time is not None
    assert second.time is not None
    assert first.time <= second.time


def test_writers_to_an_object_store_lose_nothing_of_each_other(
    remote: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, worker = EventLog(remote, RUN), EventLog(remote, RUN)
    driver.emit("running", "8 workers")
    write = Storage.write_bytes

    def overtaken(self: Storage, path: str, content: bytes) -> None:
        monkeypatch.setattr(Storage, "write_bytes", write)
        worker.emit("checkpoint", "step 10")  # between the driver's decision what to write and its writing
        write(self, path, content)

    monkeypatch.setattr(Storage, "write_bytes", overtaken)
    driver.emit("stopping", "asked to stop")
    worker.emit("checkpoint", "step 12")
    assert [event.message for event in read_events(remote, RUN)] == ["8 workers", "asked to stop", "step 10", "step 12"]


def test_an_event_that_could_not_be_written_comes_with_the_next(
    remote: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = EventLog(remote, RUN)
    with monkeypatch.context() as away:
        away.setattr(Storage, "write_bytes", fails)
        assert not log.emit("running", "8 workers")
    assert log.emit("checkpoint", "step 10")
    assert [event.type for event in read_events(remote, RUN)] == ["running", "checkpoint"]


def test_a_damaged_event_is_shown_not_dropped(storage: Storage) -> None:
    storage.append_line(f"runs/{RUN}/events.jsonl", '{"time": "2026')
    EventLog(storage, RUN).emit("running", "8 workers")
    damaged, running = read_events(storage, RUN)
    assert damaged.type == "damaged"
    assert '{"time": "2026' in damaged.message
    assert running.type == "running"


def test_tensorboard_shows_what_was_measured_and_a_resumed_run_replaces_the_steps_after(tmp_path: Path) -> None:
    killed = TensorBoardSink(tmp_path)
    killed(step_metrics(1, loss=3.0))
    killed(step_metrics(2, loss=2.0, validation_loss=2.5))
    killed.close()
    resumed = TensorBoardSink(tmp_path, step=1)
    resumed(step_metrics(2, loss=1.5))
    resumed.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gib"} <= set(
        events.Tags()["scalars"]
    )
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 3.0), (2, 1.5)]


def test_tensorboard_without_its_package_names_setting_and_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(SpecError, match=r"report\.tensorboard = True: needs the package .* pip install tensorboardX"):
        TensorBoardSink(tmp_path)


# -- progress --------------------------------------------------------------------------------------------------------


def test_progress_is_one_dense_line() -> None:
    assert format_progress(step_metrics(120), 1500, validation_loss=1.9021, seconds_left=723) == (
        "step  120/1500  loss 1.8342  val 1.9021  lr 1.8e-04  gnorm 0.74  41.2k tok/s  31.4 GiB  eta 12m03s"
    )


def test_progress_says_nothing_of_what_is_not_known() -> None:
    line = format_progress(step_metrics(1), 10, validation_loss=None, seconds_left=None)
    assert "val" not in line
    assert "eta" not in line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (45, "45s"), (59.6, "1m00s"), (723, "12m03s"), (3 * 3600 + 7 * 60 + 59, "3h07m"), (187_200, "2d04h")],
)
def test_durations_show_their_two_largest_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(980, "980"), (41_200, "41.2k"), (3_120_000, "3.1M"), (1.3e9, "1.3G")])
def test_counts_are_short(value: float, text: str) -> None:
    assert format_count(value) == text


def shown_steps(stream: io.StringIO) -> list[int]:
    return [int(line.split()[1].split("/")[0]) for line in stream.getvalue().splitlines()]


def test_a_log_gets_the_first_step_each_validation_one_line_in_five_seconds_and_the_last_step() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = ProgressLine(12, stream, clock)
    for step in range(1, 13):
        progress(step_metrics(step, validation_loss=1.9 if step == 3 else None))
        clock.now += 1.0
    progress.close()
    # 1 is the first, 3 validates, 8 comes five seconds after it, 12 is the last.
    assert shown_steps(stream) == [1, 3, 8, 12]


def test_a_log_ends_with_the_step_at_which_a_run_stopped_early() -> None:
    stream = io.StringIO()
    progress = ProgressLine(100, stream, Clock())
    for step in (1, 2, 3):
        progress(step_metrics(step))
    progress.close()
    assert shown_steps(stream) == [1, 3]


def test_time_left_follows_the_pace_of_this_session_and_the_last_validation_stays_in_sight() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = ProgressLine(100, stream, clock)
    progress(step_metrics(41, validation_loss=1.9021))
    clock.now = 20.0
    progress(step_metrics(51))
    # Ten steps took 20 s since the session began at step 41, so 49 more take 98 s.
    assert stream.getvalue().splitlines()[-1].endswith("eta 1m38s")
    assert "val 1.9021" in stream.getvalue().splitlines()[-1]


def test_a_terminal_line_is_rewritten_in_place() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = ProgressLine(2, stream, Clock())
    progress(step_metrics(1))
    progress(step_metrics(2))
    progress.close()
    assert stream.getvalue().count("\r") == 2
    assert stream.getvalue().count("\n") == 1


# -- overfitting -----------------------------------------------------------------------------------------------------

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
def test_overfitting_is_found_under_noise(seed: int) -> None:
    found = find_overfitting(curves(falling, turning_up, noise=0.004, seed=seed))
    assert found is not None
    assert found.best_step in (30, 40, 50)


def test_overfitting_says_where_how_much_and_what_to_do() -> None:
    found = find_overfitting(curves(falling, turning_up))
    assert found is not None
    assert (found.best_step, found.last_step) == (40, 100)
    assert found.best_validation_loss == pytest.approx(1.5)
    assert found.last_validation_loss == pytest.approx(1.68)
    assert found.training_loss_at_last < found.training_loss_at_best
    for part in ("step 40 (1.5000)", "rose to 1.6800 (+12.0%) by step 100", "train.epochs", "lora_rank", "varied data"):
        assert part in found.message


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("validation", [falling, lambda x: 1.5], ids=["falling", "level"])
def test_noise_on_a_falling_or_level_curve_is_not_overfitting(validation: Curve, seed: int) -> None:
    assert find_overfitting(curves(falling, validation, noise=0.004, seed=seed)) is None


def test_a_validation_loss_that_jumps_up_and_down_is_not_overfitting() -> None:
    zigzag = [1.6, 1.5, 1.6, 1.45, 1.6, 1.5, 1.6, 1.5, 1.6, 1.52]
    # The last two stand 5 % above the lowest, but so does nearly every other validation.
    assert find_overfitting(curves(falling, lambda x: zigzag[round(10 * x) - 1])) is None


def test_a_run_that_diverges_is_not_called_overfitting() -> None:
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


def test_a_validation_that_is_not_a_number_is_passed_over() -> None:
    metrics = curves(falling, turning_up)
    metrics[19] = metrics[19].model_copy(update={"validation_loss": math.nan})
    found = find_overfitting(metrics)
    assert found is not None
    assert found.best_step == 40
