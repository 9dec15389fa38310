"""Events: one line each, typed by what happened, and never lost."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from ft_service.errors import StorageError
from ft_service.runs.events import (
    CheckpointFailed,
    CheckpointSaved,
    Event,
    EventLog,
    Hang,
    Notice,
    Recovering,
    TrainingStarted,
    WorkerPlace,
    read_events,
)
from ft_service.storage.storage import Storage
from tests.runs.run_cases import RUN

PREPARING = Notice(type="preparing", message="data and plan")
STOPPING = Notice(type="stopping", message="asked to stop")

LINES = {
    "notice": '{"time":"2026-11-02T09:00:00Z","type":"preparing","message":"Preparing data and plan of bot."}',
    "training": '{"time":"2026-11-02T09:01:00Z","type":"training","message":"Training from step 20 on 2 workers.",'
    '"step":20,"repeated":7,"workers":[{"host":"h0","pid":11,"node":"a1"},{"host":"h1","pid":12,"node":"b2"}]}',
    "hang": '{"time":"2026-11-02T09:02:00Z","type":"hang","message":"Worker 1 of 2 has not got on.","rank":1,'
    '"step":23,"doing":"micro-batch 1 of 2","stacks":"runs/bot-1/stacks/20261102-090100"}',
    "recovering": '{"time":"2026-11-02T09:03:00Z","type":"recovering","message":"worker 0 failed","step":20,'
    '"failures":1}',
    "checkpoint": '{"time":"2026-11-02T09:04:00Z","type":"checkpoint","message":"Checkpoint at step 30.","step":30}',
    "checkpoint_failed": '{"time":"2026-11-02T09:05:00Z","type":"checkpoint_failed","message":"disk full","step":40,'
    '"workers":[0,1],"newest_step":30}',
    "published": '{"time":"2026-11-02T09:06:00Z","type":"published","message":"Published bot-1.","digest":"ab12"}',
    "another": '{"time":"2026-11-02T09:07:00Z","type":"resumed","message":"of a version before or after","step":30}',
}
"""Lines as earlier versions wrote them."""


STORED = Path(__file__).parents[1] / "formats/1/events.jsonl"


def fails(*_: object) -> None:
    raise StorageError("away")


def only_event(storage: Storage, line: str) -> Event:
    storage.append_line(f"runs/{RUN}/events.jsonl", line)
    return read_events(storage, RUN)[-1]


def test_events_keep_their_order_and_their_data(storage: Storage) -> None:
    log = EventLog(storage, RUN)
    log.emit(PREPARING)
    log.emit(CheckpointSaved(message="Checkpoint at step 40.", step=40))
    first, second = read_events(storage, RUN)
    assert (first.type, first.message, first.data) == ("preparing", "data and plan", {})
    assert second.data == {"step": 40}
    assert first.time is not None
    assert second.time is not None
    assert first.time <= second.time


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_line_reads_and_writes_unchanged(storage: Storage, line: str) -> None:
    assert only_event(storage, line).model_dump_json(exclude_none=True) == line


def test_a_stored_run_of_an_earlier_version_reads(storage: Storage) -> None:
    lines = STORED.read_text().splitlines()
    storage.write_bytes(f"runs/{RUN}/events.jsonl", STORED.read_bytes())
    events = read_events(storage, RUN)
    assert [event.model_dump_json(exclude_none=True) for event in events] == lines
    assert not any(type(event) is Event for event in events)


def test_lines_become_events_of_their_type(storage: Storage) -> None:
    training = only_event(storage, LINES["training"])
    assert isinstance(training, TrainingStarted)
    assert (training.step, training.repeated) == (20, 7)
    assert training.workers[1] == WorkerPlace(host="h1", pid=12, node="b2")
    hang = only_event(storage, LINES["hang"])
    assert isinstance(hang, Hang) and (hang.rank, hang.attempt) == (1, "20261102-090100")
    recovering = only_event(storage, LINES["recovering"])
    assert isinstance(recovering, Recovering) and (recovering.step, recovering.failures) == (20, 1)
    failed = only_event(storage, LINES["checkpoint_failed"])
    assert isinstance(failed, CheckpointFailed) and failed.workers == [0, 1]


def test_an_unknown_type_is_a_plain_event_with_its_data(storage: Storage) -> None:
    event = only_event(storage, LINES["another"])
    assert type(event) is Event and event.data == {"step": 30}


def test_a_known_type_without_its_data_is_damaged(storage: Storage) -> None:
    line = json.dumps({key: value for key, value in json.loads(LINES["hang"]).items() if key != "stacks"})
    event = only_event(storage, line)
    assert event.type == "damaged" and line in event.message


def test_an_event_cannot_be_made_with_wrong_data() -> None:
    with pytest.raises(ValidationError, match="step"):
        CheckpointSaved(message="", step="soon")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="type"):
        Notice(type="prepared", message="")  # type: ignore[arg-type]


def test_writers_on_an_object_store_keep_each_others_events(remote: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = EventLog(remote, RUN)
    worker = EventLog(remote, RUN)
    driver.emit(PREPARING)
    write = Storage.write_bytes

    def overtaken(self: Storage, path: str, content: bytes) -> None:
        monkeypatch.setattr(Storage, "write_bytes", write)
        # Between the driver's decision what to write and its write.
        worker.emit(CheckpointSaved(message="step 10", step=10))
        write(self, path, content)

    monkeypatch.setattr(Storage, "write_bytes", overtaken)
    driver.emit(STOPPING)
    worker.emit(CheckpointSaved(message="step 12", step=12))
    messages = [event.message for event in read_events(remote, RUN)]
    assert messages == ["data and plan", "asked to stop", "step 10", "step 12"]


def test_an_event_that_fails_is_written_with_the_next(remote: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(remote, RUN)
    with monkeypatch.context() as away:
        away.setattr(Storage, "write_bytes", fails)
        assert not log.emit(PREPARING)
    assert log.emit(STOPPING)
    assert [event.type for event in read_events(remote, RUN)] == ["preparing", "stopping"]


def test_a_damaged_event_is_shown_not_dropped(storage: Storage) -> None:
    storage.append_line(f"runs/{RUN}/events.jsonl", '{"time": "2026')
    EventLog(storage, RUN).emit(PREPARING)
    damaged, preparing = read_events(storage, RUN)
    assert damaged.type == "damaged" and damaged.time is None
    assert '{"time": "2026' in damaged.message
    assert preparing.type == "preparing"
