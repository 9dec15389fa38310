"""`ft logs`: events and steps in order, followed until the run has ended; and `ft runs` in 80 columns."""

import json
import math
from datetime import UTC, datetime

from ft_service.cli.runs import run_lines
from ft_service.runs.events import CheckpointSaved, EventLog, Notice
from ft_service.runs.folder import RunFolder, RunStatus
from ft_service.runs.log_lines import follow, json_lines, log_lines
from ft_service.runs.metrics import JsonlSink
from ft_service.storage.storage import Storage
from tests.runs.run_cases import step_metrics


def test_events_and_steps_are_listed_in_the_order_of_time(storage: Storage) -> None:
    EventLog(storage, "r").emit(Notice(type="stopped", message="SIGTERM\nreceived"))  # now, after the steps
    sink = JsonlSink(storage, "r")
    sink(step_metrics(1))
    sink(step_metrics(2, validation_loss=1.5))
    lines = log_lines(RunFolder(storage, "r"))
    assert [line.split("  ")[1] for line in lines] == ["step 1/0", "step 2/0", "stopped: SIGTERM received"]
    assert lines[0].startswith("2026-07-03 09:00:00  ") and "val 1.5000" in lines[1]


def test_each_line_of_the_structured_log_has_the_id_of_the_run(storage: Storage) -> None:
    EventLog(storage, "r").emit(CheckpointSaved(step=2, message="日本語\nsaved"))
    sink = JsonlSink(storage, "r")
    sink(step_metrics(1))
    sink(step_metrics(2, loss=math.nan))
    first, second, event = map(json.loads, json_lines(RunFolder(storage, "r")))
    assert {line["run"] for line in (first, second, event)} == {"r"}
    assert (first["type"], first["step"], first["loss"]) == ("step", 1, 1.8342)
    assert first["time"] == "2026-07-03T09:00:00Z"
    assert second["loss"] == "NaN"
    assert (event["type"], event["step"], event["message"]) == ("checkpoint", 2, "日本語\nsaved")
    (line, *_) = follow_ended(storage)
    assert json.loads(line) == first


def follow_ended(storage: Storage) -> list[str]:
    RunFolder(storage, "r").set_state("succeeded")
    return list(follow(RunFolder(storage, "r"), lambda: None, json_lines))


def test_following_ends_with_the_run_and_shows_each_line_once(storage: Storage) -> None:
    run = RunFolder(storage, "r")
    sink = JsonlSink(storage, "r")
    sink(step_metrics(1))
    waited = 0

    def wait() -> None:
        nonlocal waited
        waited += 1
        sink(step_metrics(1 + waited))
        if waited == 2:
            EventLog(storage, "r").emit(Notice(type="succeeded", message="done"))
            run.set_state("succeeded")

    lines = list(follow(run, wait))
    assert [line.split("  ")[1] for line in lines] == ["step 1/0", "step 2/0", "step 3/0", "succeeded: done"]
    assert waited == 2


def test_a_run_is_listed_in_80_columns_and_its_ids_are_whole() -> None:
    status = RunStatus(
        run_id="support-bot-for-the-whole-company-1a2b3c4d",
        state="checkpointing",
        time=datetime(2026, 11, 28, 9, 0, tzinfo=UTC),
        message="worker 3 failed: " + "a long reason " * 20,
        published="llama-3.1-8b-instruct-support-bot-12345678",
    )
    lines = run_lines(status, 12, 345, 80)
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith(status.run_id) and f"  published {status.published}" in lines
    assert "2026-11-28 09:00  12 attempts, 345 wasted steps" in " ".join(lines)
    short = status.model_copy(update={"run_id": "bot-1", "state": "running", "message": "", "published": None})
    assert run_lines(short, 1, 0, 80) == ["bot-1  running  2026-11-28 09:00  1 attempt"]
