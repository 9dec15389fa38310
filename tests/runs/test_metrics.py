"""Metrics: one line per step, without gaps or repeats."""

import json
import math
from datetime import UTC, datetime, timedelta

import pytest

from ft_service.errors import StorageError
from ft_service.runs.metrics import JsonlSink, read_last_metrics, read_metrics, seconds_left
from ft_service.storage.storage import Storage
from tests.runs.run_cases import RUN, Clock, step_metrics


def test_what_is_written_is_what_is_read(storage: Storage) -> None:
    written = [step_metrics(1), step_metrics(2, validation_loss=1.9, grad_norm=math.inf)]
    sink = JsonlSink(storage, RUN)
    sink.rewind(0)
    for metrics in written:
        sink(metrics)
    assert read_metrics(storage, RUN) == written


def test_a_line_is_strict_json_without_unmeasured_values(storage: Storage) -> None:
    sink = JsonlSink(storage, RUN)
    sink(step_metrics(1, grad_norm=math.nan))
    sink(step_metrics(2, validation_loss=1.9))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = storage.read_bytes(f"runs/{RUN}/metrics.jsonl").decode()
    first, second = (json.loads(line, parse_constant=refuse) for line in text.splitlines())
    assert "validation_loss" not in first
    assert second["validation_loss"] == 1.9


def test_a_run_without_steps_has_an_empty_metrics_file(storage: Storage) -> None:
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


def test_an_incomplete_last_line_is_skipped_and_replaced(storage: Storage) -> None:
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


def test_an_error_names_file_and_line_of_a_damaged_line(storage: Storage) -> None:
    sink = JsonlSink(storage, RUN)
    sink(step_metrics(1))
    storage.append_line(f"runs/{RUN}/metrics.jsonl", '{"step": 2')
    sink(step_metrics(3))
    with pytest.raises(StorageError, match=r"metrics\.jsonl:2: not the metrics of a step"):
        read_metrics(storage, RUN)


def test_an_object_store_is_written_every_30_seconds_or_on_flush(remote: Storage) -> None:
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


def test_the_time_left_follows_the_pace_of_the_last_steps(storage: Storage) -> None:
    sink = JsonlSink(storage, RUN)
    assert seconds_left(read_last_metrics(storage, RUN), 400) is None
    start = datetime(2026, 11, 28, tzinfo=UTC)
    sink(step_metrics(1, time=start))
    assert seconds_left(read_last_metrics(storage, RUN), 400) is None
    for step in range(2, 301):
        pause = 3600 if step > 290 else 0  # an attempt has ended between two of them
        sink(step_metrics(step, time=start + timedelta(seconds=2 * step + pause)))
    path = f"runs/{RUN}/metrics.jsonl"
    storage.write_bytes(path, storage.read_bytes(path) + b'{"step": 301')
    assert seconds_left(read_last_metrics(storage, RUN), 400) == 200.0
    assert seconds_left(read_last_metrics(storage, RUN), 100) == 0.0
