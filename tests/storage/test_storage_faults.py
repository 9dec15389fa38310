"""Failing storage: passing errors are retried, permanent ones are raised at once, and no intact checkpoint is lost."""

import errno
import hashlib
import http.server
import itertools
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import boto3
import pytest
import torch

import ft_service.storage.retry
from ft_service.errors import StorageError, TrainingError, UnreachableError
from ft_service.model.writer import TensorFormat
from ft_service.runs.events import EventLog, Notice, read_events
from ft_service.runs.folder import RunFolder
from ft_service.runs.metrics import JsonlSink, StepMetrics, read_metrics
from ft_service.runs.trackers import BackgroundTracker, TrackedRun, new_tracker
from ft_service.spec.schema import CheckpointSpec
from ft_service.storage.failures import is_transient
from ft_service.storage.storage import Storage
from ft_service.train.checkpoints import save as saving
from ft_service.train.checkpoints import waiting
from ft_service.train.checkpoints.manifest import Checkpoints, Manifest, Part
from ft_service.train.checkpoints.resume import resume
from ft_service.train.checkpoints.save import Checkpointer
from ft_service.train.protocol import TrainingState
from ft_service.train.weights import WeightsOnStorage, write_model
from tests.worlds import prepared_run, start, work, write_world

RUN = "bot-1"


# -- what waiting can fix --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number",
    [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENOTCONN],
    ids=errno.errorcode.get,
)
def test_a_storage_that_comes_back_is_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    storage = away_for(3, OSError(number, "gone"), Storage(str(tmp_path), retry_seconds=60), monkeypatch)
    storage.write_bytes("file", b"content")
    assert storage.read_bytes("file") == b"content"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert str(tmp_path) in said[0] and "gone" in said[0] and "Retrying for up to 60 s" in said[0]
    assert "answers again" in said[1]


@pytest.mark.parametrize(
    "number",
    [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENOENT],
    ids=errno.errorcode.get,
)
def test_permanent_errors_are_raised_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    storage = away_for(1, OSError(number, "no"), Storage(str(tmp_path), retry_seconds=1e9), monkeypatch)
    with pytest.raises(StorageError, match="no") as error:
        storage.write_bytes("file", b"content")
    assert not isinstance(error.value, UnreachableError)


def test_a_full_disk_is_permanent_for_a_whole_folder(tmp_path: Path) -> None:
    """shutil tells the errors of a folder's files as text."""
    (tmp_path / "full").mkdir()
    copies = shutil.Error([("a", "b", str(OSError(errno.ENOSPC, "No space left on device")))])
    assert not is_transient(copies)
    assert is_transient(shutil.Error([("a", "b", str(OSError(errno.EIO, "Input/output error")))]))


def test_retries_end_after_the_given_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    storage = away_for(10**6, OSError(errno.EIO, "gone"), Storage(str(tmp_path), retry_seconds=300), monkeypatch)
    with pytest.raises(UnreachableError, match="Gave up after 300 s"):
        storage.write_bytes("file", b"content")
    assert clock.now == pytest.approx(300)


def test_a_storage_does_not_retry_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    storage = away_for(1, OSError(errno.EIO, "gone"), Storage(str(tmp_path)), monkeypatch)
    with pytest.raises(UnreachableError, match="gone"):
        storage.exists("file")
    assert clock.now == 0


GONE_CALLS: dict[str, Callable[[Storage], object]] = {
    "exists": lambda storage: storage.exists("a/file"),
    "size": lambda storage: storage.size("a/other"),
    "read": lambda storage: storage.read_bytes("a/file"),
    "files": lambda storage: storage.files("a"),
    "folders": lambda storage: storage.folders(""),
    "write": lambda storage: storage.write_bytes("b/file", b""),
    "append": lambda storage: storage.append_line("a/log", "line"),
    "move": lambda storage: storage.move("a/file", "b/file"),
    "delete": lambda storage: storage.delete("a/file"),
    "put_folder": lambda storage: storage.put_folder(Path(__file__).parent, "b/folder", marker="__init__.py"),
    "publish_within": lambda storage: storage.publish_within("a", ["file"], "b/c", {"m": b""}, marker="m"),
}


@pytest.mark.parametrize("call", GONE_CALLS)
def test_a_folder_that_is_gone_is_away_and_not_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """It is not made again: what was written there would be hidden once it is back."""
    root = tmp_path / "root"
    storage = Storage(str(root))
    storage.write_bytes("a/file", b"content")
    root.rename(tmp_path / "elsewhere")
    with pytest.raises(UnreachableError, match="the folder is gone"):
        GONE_CALLS[call](storage)
    assert not root.exists()
    (tmp_path / "elsewhere").rename(root)
    GONE_CALLS[call](storage)


def test_a_folder_that_was_never_there_is_made_by_the_first_write(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "new"))
    assert storage.files("a") == [] and not storage.exists("a")
    storage.write_bytes("a/file", b"content")
    assert storage.read_bytes("a/file") == b"content"


def test_pickling_keeps_the_retry_time(tmp_path: Path) -> None:
    storage = pickle.loads(pickle.dumps(Storage(str(tmp_path), retry_seconds=300)))
    assert (storage.root, storage.retry_seconds) == (str(tmp_path), 300)
    assert storage.without_retries().retry_seconds == 0


def test_nested_calls_are_not_retried_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    storage = away_for(10**6, OSError(errno.EIO, "gone"), Storage(str(tmp_path), retry_seconds=300), monkeypatch)
    with pytest.raises(UnreachableError):
        storage.retry(lambda: storage.exists("file"))
    assert clock.now == pytest.approx(300)


def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path), retry_seconds=60)
    storage.append_line("log", "first")
    monkeypatch.setattr(Path, "open", Tearing(Path.open, after=3))
    storage.append_line("log", "second")  # torn once, and written again
    assert storage.read_bytes("log") == b"first\nsecond\n"


def test_a_line_after_an_incomplete_one_is_intact(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write_bytes("log", b"first\nsec")
    storage.append_line("log", "third")
    assert storage.read_bytes("log").splitlines() == [b"first", b"sec", b"third"]


@pytest.mark.parametrize(
    ("status", "code", "passes"),
    [
        (503, "SlowDown", True),
        (500, "InternalError", True),
        (429, "TooManyRequests", True),
        (501, "NotImplemented", False),
        (403, "AccessDenied", False),
        (403, "InvalidAccessKeyId", False),
        (403, "SignatureDoesNotMatch", False),
        (400, "ExpiredToken", False),
        (404, "NoSuchBucket", False),
    ],
)
def test_object_store_errors_are_transient_or_permanent(
    monkeypatch: pytest.MonkeyPatch, status: int, code: str, passes: bool
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    with refusing_server(status, code) as port:
        storage = Storage(f"s3://bucket/root?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1")
        for ask in (lambda: storage.write_bytes("file", b"content"), lambda: storage.read_bytes("file")):
            with pytest.raises(StorageError) as error:
                ask()
            assert isinstance(error.value, UnreachableError) == passes, error.value


# -- metrics and events ----------------------------------------------------------------------------------------------


def test_training_does_not_wait_for_metrics_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    storage = Storage(str(tmp_path), retry_seconds=300)
    sink = JsonlSink(storage, RUN, clock)
    sink.rewind(0)
    sink(metrics_of(1))
    with full_disk(monkeypatch, number=errno.ESTALE):
        sink(metrics_of(2))
        assert clock.now == 0
        with pytest.raises(UnreachableError):
            sink.flush()
        assert clock.now == pytest.approx(300)
        clock.now = 400
        sink(metrics_of(3))
    sink(metrics_of(4))
    assert [m.step for m in read_metrics(storage, RUN)] == [1]  # it is not asked again at every step
    clock.now = 430
    sink(metrics_of(5))
    assert [m.step for m in read_metrics(storage, RUN)] == [1, 2, 3, 4, 5]


def test_an_event_that_fails_is_printed_and_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = Storage(str(tmp_path))
    log = EventLog(storage, RUN)
    log.emit(Notice(type="preparing", message="data and plan"))
    with full_disk(monkeypatch):
        assert not log.emit(Notice(type="moving", message="it is getting late"))
    assert "it is getting late" in capsys.readouterr().err
    assert log.emit(Notice(type="succeeded", message="done"))
    assert [event.type for event in read_events(storage, RUN)] == ["preparing", "moving", "succeeded"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_training_does_not_wait_for_tensorboard_files_that_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    writes = threading.Semaphore(0)

    def refuse(*_: object) -> None:
        writes.release()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tensorboardX.event_file_writer.EventsWriter.write_event", refuse)
    storage = Storage(str(tmp_path))
    sink = BackgroundTracker("tensorboard", new_tracker("tensorboard", TrackedRun(RUN, "p", {}, storage)), [])
    for step in range(1, 300):
        sink(metrics_of(step))
    sink.flush()
    sink.close()
    assert writes.acquire(timeout=60)
    assert capsys.readouterr().err.count("The tracker tensorboard") == 1


# -- what a crash leaves ---------------------------------------------------------------------------------------------


class CrashError(BaseException):
    """The process is gone."""


class Crashing(Storage):
    """Crashes before, after, or in the middle of the n-th change."""

    def __init__(self, root: str, at: int, when: str) -> None:
        super().__init__(root)
        self.at = at
        self.when = when
        self.changes = 0

    def _crash(self, when: str) -> bool:
        if when == "before":
            self.changes += 1
        return self.changes == self.at and self.when == when

    def write_bytes(self, path: str, content: bytes) -> None:
        if self._crash("before"):
            raise CrashError
        super().write_bytes(path, content)
        if self._crash("amid") or self._crash("after"):
            raise CrashError

    def delete(self, path: str) -> None:
        if self._crash("before"):
            raise CrashError
        if self._crash("amid"):  # half of the files, the manifest last or first as it comes
            files = sorted(file for file in Path(self.root, path).rglob("*") if file.is_file())
            for file in files[: len(files) // 2]:
                file.unlink()
            raise CrashError
        super().delete(path)
        if self._crash("after"):
            raise CrashError


def save_as_one_worker(run: RunFolder, step: int, token: str, keep: int = 2) -> None:
    """What the workers write, in their order."""
    checkpoints = Checkpoints(run)
    folder = f"step-{step:06}-{token}"
    parts = []
    for rank in range(2):
        content = f"{step} {rank} {token}".encode()
        part = part_of(f"part-{rank}", content)
        run.storage.write_bytes(f"{checkpoints.path}/{folder}/{part.file}", content)
        run.storage.write_bytes(f"{checkpoints.path}/{folder}/part-{rank}.json", part.model_dump_json().encode())
        parts.append(part)
    checkpoints.commit(folder, manifest_of(step, parts))
    checkpoints.keep_newest(keep)


def part_of(name: str, content: bytes) -> Part:
    digest = hashlib.sha256(content).hexdigest()
    size = len(content)
    return Part(file=f"{name}.safetensors", bytes=size, sha256=digest, shards={}, rng_offset=size, rng_bytes={})


def manifest_of(step: int, parts: list[Part]) -> Manifest:
    state = asdict(TrainingState(step=step))
    return Manifest(
        step=step, adam_step=step, state=state, weights="", training_digest="c", created=datetime.now(UTC), parts=parts
    )


def sound_steps(run: RunFolder) -> list[int]:
    """The steps of what the index names; each of them must be whole."""
    checkpoints = Checkpoints(run)
    entries = checkpoints.entries()
    for entry in entries:
        manifest = checkpoints.manifest(entry)
        assert [checkpoints.part_problem(entry.folder, part) for part in manifest.parts] == ["", ""]
        assert manifest.step == entry.step
    return [entry.step for entry in entries]


@pytest.mark.parametrize("when", ["before", "amid", "after"])
@pytest.mark.parametrize(
    ("earlier", "keep"), [((), 2), ((10,), 2), ((10, 20), 2), ((10, 20), 1), ((10, 20, 60), 2)], ids=str
)
def test_a_crash_at_any_write_keeps_earlier_checkpoints(
    tmp_path: Path, when: str, earlier: tuple[int, ...], keep: int
) -> None:
    """60 is of a course that was given up: the run was resumed from 20 and comes to 30."""
    for at in itertools.count(1):
        root = str(tmp_path / str(at))
        run = RunFolder(Storage(root), RUN)
        for step in earlier:
            save_as_one_worker(run, step, "a", keep=3)
        assert sound_steps(run) == list(earlier)
        crashing = Crashing(root, at, when)
        try:
            save_as_one_worker(RunFolder(crashing, RUN), 30, "b", keep)
        except CrashError:
            crashed = True
        else:
            crashed = False
        found = sound_steps(run)
        before = [step for step in earlier if step < 30]
        assert set(before[-1:]) <= set(found) or 30 in found
        assert set(found) <= {*earlier, 30}
        # And the next attempt is hindered by nothing that was left.
        save_as_one_worker(run, 40, "c", keep)
        assert sound_steps(run)[-1] == 40 and len(sound_steps(run)) <= keep
        assert len(run.storage.folders(f"runs/{RUN}/checkpoints")) == len(sound_steps(run))
        if not crashed:
            assert at > 6
            break


@pytest.mark.parametrize(
    "damage",
    [b"", b'{"checkpoints": [{"folder": "st', b"\0" * 300, b"[]", b'{"checkpoints": [{"step": 1}]}', None],
    ids=["empty", "torn", "zeros", "another", "fields", "gone"],
)
def test_without_an_index_the_manifests_count(tmp_path: Path, damage: bytes | None) -> None:
    run = RunFolder(Storage(str(tmp_path)), RUN)
    for step in (10, 20):
        save_as_one_worker(run, step, "a")
    run.storage.write_bytes(f"runs/{RUN}/checkpoints/step-000030-b/part-0.json", b"{}")  # no manifest: not whole
    index = Path(tmp_path, f"runs/{RUN}/checkpoints/index.json")
    index.unlink() if damage is None else index.write_bytes(damage)
    assert sound_steps(run) == [10, 20]
    events = EventLog(run.storage, RUN)
    with pytest.raises(TrainingError, match="another model"):  # it came as far as to read a manifest
        resume(run, Alone(), SimpleNamespace(continues=lambda digest, step: False), events)  # type: ignore[arg-type]
    reported = read_events(run.storage, RUN)[-1]
    assert reported.type == "checkpoint_damaged" and str(index) in reported.message
    save_as_one_worker(run, 30, "c")
    assert sound_steps(run) == [20, 30]
    assert Checkpoints(run).read_index()[1] == ""


def test_a_damaged_index_is_never_a_new_run(tmp_path: Path) -> None:
    run = RunFolder(Storage(str(tmp_path)), RUN)
    index = f"runs/{RUN}/checkpoints/index.json"
    run.storage.write_bytes(index, b"{")
    with pytest.raises(StorageError, match=r"index\.json: damaged \(JSONDecodeError: .*\)\. .*another --run-id"):
        resume(run, Alone(), "c", EventLog(run.storage, RUN))  # type: ignore[arg-type]


def test_an_unreachable_checkpoint_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(Storage(str(tmp_path)), RUN)
    save_as_one_worker(run, 10, "a")

    def away(*_: object) -> bytes:
        raise UnreachableError("gone")

    monkeypatch.setattr(Storage, "read_range", away)
    with pytest.raises(UnreachableError, match="gone"):
        resume(run, Alone(), "c", EventLog(run.storage, RUN))  # type: ignore[arg-type]
    assert read_events(run.storage, RUN) == []


# -- a save that fails -----------------------------------------------------------------------------------------------


class Alone:
    """Stands for `Parallel` with one worker, or, in threads, for one of several."""

    def __init__(self, rank: int = 0, meeting: "Meeting | None" = None) -> None:
        self.rank = rank
        self.meeting = meeting
        self.world_size = meeting.size if meeting else 1
        self.is_rank_zero = rank == 0

    def on_progress(self) -> None:
        """Nobody watches."""

    def all_gather_object(self, value: Any) -> list[Any]:
        return self.meeting.exchange(self.rank, value) if self.meeting else [value]

    def broadcast_from_rank_zero(self, value: Any) -> Any:
        return self.all_gather_object(value)[0]

    def sum_over_ranks(self, *values: float) -> list[float]:
        return [sum(column) for column in zip(*self.all_gather_object(values), strict=True)]

    def random_state(self) -> dict[str, torch.Tensor]:
        return {"cpu": torch.zeros(8, dtype=torch.uint8)}

    def optimizer_state(self) -> Any:
        class NoState:
            step = 0

            def shards(self) -> list[Any]:
                return []

        return NoState()


class Meeting:
    """All workers' values, on every worker; each worker is a thread."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: dict[int, Any] = {}
        self._barrier = threading.Barrier(size, timeout=60)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        found = [self._values[other] for other in range(self.size)]
        self._barrier.wait()
        return found


def checkpointer(run: RunFolder, parallel: Any = None, **more: Any) -> Checkpointer:
    settings = CheckpointSpec(on_failure=more.pop("on_failure", "continue"), keep=more.pop("keep", 2))
    return Checkpointer(run, parallel or Alone(), "c", settings, **more)


def save(saver: Checkpointer, step: int) -> None:
    saver.save(TrainingState(step=step), "", lambda kept: None)
    saver.wait()


def folders(run: RunFolder) -> list[str]:
    return [folder[:11] for folder in run.storage.folders(f"{run.path}/checkpoints")]


def events_of(run: RunFolder, kind: str) -> list[dict[str, Any]]:
    return [event.model_dump() for event in read_events(run.storage, run.run_id) if event.type == kind]


def test_a_failed_save_is_reported_and_the_next_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(Storage(str(tmp_path)), RUN)
    saver = checkpointer(run)
    save(saver, 5)
    with full_disk(monkeypatch, but="events.jsonl"):
        save(saver, 10)
    assert [entry.step for entry in Checkpoints(run).entries()] == [5]
    assert folders(run) == ["step-000005"]
    (reported,) = events_of(run, "checkpoint_failed")
    assert reported["step"] == 10 and reported["workers"] == [0] and reported["newest_step"] == 5
    for part in (
        "step 10",
        "worker 0",
        "No space left",
        "not full",
        "newest checkpoint is that of step 5",
        "tries again",
    ):
        assert part in reported["message"]
    assert capsys.readouterr().err.count("The checkpoint of step 10") == 1
    save(saver, 15)
    assert [entry.step for entry in Checkpoints(run).entries()] == [5, 15]
    assert "after 1 failed save" in events_of(run, "checkpoint")[-1]["message"]


def test_a_full_disk_without_space_for_the_event_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(Storage(str(tmp_path)), RUN)
    saver = checkpointer(run)
    save(saver, 5)
    with full_disk(monkeypatch):
        save(saver, 10)
    assert capsys.readouterr().err.count("The checkpoint of step 10") == 1
    save(saver, 15)
    assert [reported["step"] for reported in events_of(run, "checkpoint_failed")] == [10]


def test_a_storage_away_beyond_all_retries_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(Storage(str(tmp_path), retry_seconds=300), RUN)
    saver = checkpointer(run)
    save(saver, 5)
    with monkeypatch.context() as world:
        clock = Clock(world)
        with full_disk(world, number=errno.ESTALE):
            save(saver, 10)
        assert clock.now == pytest.approx(300)  # and not as long again for the event
    save(saver, 15)
    assert "Gave up after 300 s" in events_of(run, "checkpoint_failed")[0]["message"]
    assert [entry.step for entry in Checkpoints(run).entries()] == [5, 15]
    assert folders(run) == ["step-000005", "step-000015"]


def test_on_failure_stop_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(Storage(str(tmp_path)), RUN)
    saver = checkpointer(run, on_failure="stop")
    save(saver, 5)
    with full_disk(monkeypatch, but="events.jsonl"), pytest.raises(TrainingError, match=r"on_failure = 'stop'"):
        save(saver, 10)
    assert [entry.step for entry in Checkpoints(run).entries()] == [5]
    assert len(events_of(run, "checkpoint_failed")) == 1


def test_missing_checkpoints_are_reported_each_time_they_double(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(Storage(str(tmp_path)), RUN)
    saver = checkpointer(run)
    save(saver, 5)
    with full_disk(monkeypatch, but="events.jsonl"):
        for step in range(10, 75, 5):
            save(saver, step)
    alarms = events_of(run, "no_checkpoint")
    assert [alarm["failures"] for alarm in alarms] == [3, 6, 12]
    assert "15 steps are lost" in alarms[0]["message"]


def test_the_first_worker_does_not_wait_for_failed_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "PART_TIMEOUT_SECONDS", 1e9)
    run = RunFolder(Storage(str(tmp_path)), RUN)
    meeting = Meeting(2)
    savers: dict[int, Checkpointer] = {}
    raised: dict[int, Exception] = {}

    def work(rank: int) -> None:
        try:
            savers[rank] = checkpointer(run, Alone(rank, meeting), on_failure="stop")
            save(savers[rank], 5)
            save(savers[rank], 10)
        except Exception as error:
            raised[rank] = error

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(2)]
    with full_disk(monkeypatch, only="step-000010", part="part-00001"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert all(isinstance(raised[rank], TrainingError) and "worker 1:" in str(raised[rank]) for rank in range(2))
    assert [entry.step for entry in Checkpoints(run).entries()] == [5]
    assert folders(run) == ["step-000005"]
    assert events_of(run, "checkpoint_failed")[0]["workers"] == [1]


@pytest.mark.parametrize("gets_on", [True, False])
def test_a_save_beats_only_while_it_makes_progress(monkeypatch: pytest.MonkeyPatch, gets_on: bool) -> None:
    monkeypatch.setattr(waiting, "_STUCK_SECONDS", 10.0)
    monkeypatch.setattr(waiting, "_POLL_SECONDS", 0.0)
    clock = [0.0]
    beats = []
    monkeypatch.setattr(waiting.time, "monotonic", lambda: clock[0])
    answers = threading.Event()
    thread = threading.Thread(target=answers.wait, daemon=True)
    thread.start()

    class Watched(Alone):
        def on_progress(self) -> None:
            beats.append(clock[0])

    def look() -> None:
        clock[0] += 1.0
        if clock[0] == 40.0:
            answers.set()
            thread.join()

    waiting.wait_for_threads(Watched(), thread, lambda: int(clock[0]) if gets_on else 0, look)  # type: ignore[arg-type]
    assert not thread.is_alive()
    assert max(beats) >= 39.0 if gets_on else max(beats) <= 11.0


def test_a_save_of_unknown_outcome_is_kept_if_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server may do what was asked and its answer be lost."""
    run = RunFolder(Storage(str(tmp_path)), RUN)
    saver = checkpointer(run)
    real = Storage.write_json

    def lose_answer(self: Storage, path: str, value: Any) -> None:
        real(self, path, value)
        raise StorageError("no answer")

    with monkeypatch.context() as world:
        world.setattr(Storage, "write_json", lose_answer)
        save(saver, 5)
    assert len(events_of(run, "checkpoint_failed")) == 1
    (entry,) = Checkpoints(run).entries()
    assert Checkpoints(run).manifest(entry).step == 5


def test_undeletable_old_checkpoints_do_not_fail_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(Storage(str(tmp_path)), RUN)
    saver = checkpointer(run, keep=1)
    save(saver, 5)

    def refuse(*_: object) -> None:
        raise StorageError("read-only folder")

    with monkeypatch.context() as world:
        world.setattr(Storage, "delete", refuse)
        save(saver, 10)
    assert [entry.step for entry in Checkpoints(run).entries()] == [10]
    assert events_of(run, "checkpoint_failed") == []
    assert "read-only folder" in events_of(run, "checkpoints_left")[0]["message"]
    save(saver, 15)
    assert folders(run) == ["step-000015"]


def test_a_checkpoint_needs_the_metrics_of_its_steps(tmp_path: Path) -> None:
    run = RunFolder(Storage(str(tmp_path)), RUN)

    def refuse() -> None:
        raise StorageError("metrics cannot be written")

    save(checkpointer(run, flush=refuse), 5)
    assert Checkpoints(run).entries() == []
    assert "metrics cannot be written" in events_of(run, "checkpoint_failed")[0]["message"]


@pytest.mark.parametrize("on_failure", ["continue", "stop"])
def test_a_replaced_driver_commits_no_checkpoint(tmp_path: Path, on_failure: str) -> None:
    run = RunFolder(Storage(str(tmp_path)), RUN)
    ours = [True]
    saver = checkpointer(run, on_failure=on_failure, still_ours=lambda: ours[0])
    save(saver, 5)
    before = run.storage.read_bytes(f"{run.path}/checkpoints/index.json")
    ours[0] = False
    with pytest.raises(TrainingError, match="another driver has taken over this run"):
        save(saver, 10)
    assert run.storage.read_bytes(f"{run.path}/checkpoints/index.json") == before
    assert folders(run) == ["step-000005"]
    assert events_of(run, "checkpoint_failed") == []  # the other driver's log now


def test_failed_best_weights_leave_the_previous_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        is_adapter = True

        def export_adapter(self, weights: dict[str, object], folder: Path) -> None:
            folder.mkdir()
            (folder / "adapter_config.json").write_text("{}")

    parallel = Alone()
    parallel.gather_trained = dict  # type: ignore[attr-defined]
    run = RunFolder(Storage(str(tmp_path)), RUN)
    weights = WeightsOnStorage(run, Model(), parallel)  # type: ignore[arg-type]
    state = TrainingState(step=3, best_step=3, best_validation_loss=2.0)
    assert weights.keep_if_possible(state) == ""
    state.step = 6
    state.best_step = 6
    state.best_validation_loss = 1.0
    with monkeypatch.context() as world:

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        world.setattr(shutil, "copytree", refuse)
        assert "No space left" in weights.keep_if_possible(state)
    assert (state.best_step, state.best_validation_loss, weights.path) == (3, 2.0, "weights/step-3")
    weights.delete_all_but(set())
    assert run.storage.folders(f"{run.path}/weights") == ["step-3"]
    state.step = 9
    state.best_step = 9
    state.best_validation_loss = 1.5  # not as good as the lost one, but better
    assert weights.keep_if_possible(state) == "" and weights.path == "weights/step-9"


class WithWeights(Alone):
    """Brings each weight together as `Parallel` does: with the help of all workers."""

    weights: ClassVar = {f"w{number}": torch.full((4, 4), float(number)) for number in range(6)}

    def trained_formats(self) -> dict[str, TensorFormat]:
        return {name: TensorFormat("F32", tuple(tensor.shape)) for name, tensor in self.weights.items()}

    def gather_to_owners(self, owners: dict[str, int]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.weights.items():
            self.all_gather_object(name)
            if owners[name] == self.rank:
                yield name, tensor


def write_by_two(storage: Storage) -> dict[int, Exception]:
    """Two workers write a model; returns what they raised."""

    class Model:
        def config_and_tokenizer_files(self) -> dict[str, bytes]:
            return {"config.json": b"{}"}

    meeting = Meeting(2)
    raised = {}

    def work(rank: int) -> None:
        try:
            write_model(Model(), WithWeights(rank, meeting), storage, "model", max_file_bytes=128)  # type: ignore[arg-type]
        except Exception as error:
            raised[rank] = error

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return raised


def test_all_workers_rewrite_a_model_after_one_file_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Storage(str(tmp_path / "whole"))
    broken = Storage(str(tmp_path / "broken"), retry_seconds=60)
    assert write_by_two(whole) == {}
    real = Storage.writing
    breaks = itertools.count()

    @contextmanager
    def break_once(self: Storage, path: str) -> Iterator[Any]:
        with real(self, path) as stream:
            yield stream
            if path.endswith("00004.safetensors") and self is broken and next(breaks) == 0:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Storage, "writing", break_once)
    assert write_by_two(broken) == {}
    assert next(breaks) >= 2
    written = {file.name: file.read_bytes() for file in (tmp_path / "broken/model").iterdir()}
    assert written == {file.name: file.read_bytes() for file in (tmp_path / "whole/model").iterdir()}
    assert len(written) == 7  # four of weights, two to a file; index, digests, config


def test_all_workers_raise_the_error_of_one_model_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with full_disk(monkeypatch, only="00004-of"):
        raised = write_by_two(Storage(str(tmp_path), retry_seconds=60))
    assert str(raised[0]) == str(raised[1])
    assert "worker 1: " in str(raised[0]) and "No space left" in str(raised[0])
    assert not (tmp_path / "model/config.json").exists()


# -- real runs -------------------------------------------------------------------------------------------------------

STEPS = 300
REAL = {
    "train.max_steps": STEPS,
    "train.global_batch_size": 4,
    "train.validate_every_steps": STEPS,
    "train.learning_rate": 1e-3,
    "checkpoint.every_steps": 10,
    "method": "{type: full}",
    "parallel.zero_stage": 2,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(world: Path) -> RunFolder:
    run = prepared_run(world, "undisturbed", 2, **REAL)
    work(run)
    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Write until nothing fits any more; deleting the file makes room again."""
    file = disk / "filler"
    with file.open("ab", buffering=0) as stream, suppress(OSError):
        while True:
            stream.write(bytes(4096))
    return file


@pytest.mark.multiprocess
def test_a_run_survives_a_full_disk(world: Path, undisturbed: RunFolder, small_disk: Path) -> None:
    run = prepared_run(world, "full", 2, **REAL, storage=small_disk / "storage")
    with Running(run) as running:
        running.until(lambda: len(Checkpoints(run).entries()) >= 2)
        filler = fill(small_disk)
        running.until(lambda: running.said("No space left") and running.said("NO CHECKPOINT"))
        kept = sound_steps(run)
        assert len(kept) >= 2  # and an index that names them, on a disk that is full
        filler.unlink()
        running.until(lambda: sound_steps(run)[-1] > kept[-1])
        printed = running.end()
    ended_as_if_nothing_had_happened(run, undisturbed)
    failed = [reported["step"] for reported in events_of(run, "checkpoint_failed")]
    assert len(failed) >= 3
    assert all(printed.count(f"The checkpoint of step {step} ") == 1 for step in failed)
    assert {folder[:11] for folder in folders(run)} == {f"step-{step:06}" for step in (STEPS - 10, STEPS)}


@pytest.mark.multiprocess
def test_on_failure_stop_at_a_full_disk_can_resume(world: Path, undisturbed: RunFolder, small_disk: Path) -> None:
    stop = {"checkpoint.on_failure": "stop"}
    run = prepared_run(world, "stopped", 2, **REAL, **stop, storage=small_disk / "storage")
    with Running(run) as running:
        running.until(lambda: len(Checkpoints(run).entries()) >= 2)
        filler = fill(small_disk)
        printed = running.end(succeeds=False)
    assert "on_failure = 'stop'" in printed and "No space left" in printed
    assert len(sound_steps(run)) >= 2
    filler.unlink()
    work(run)
    ended_as_if_nothing_had_happened(run, undisturbed)


@pytest.mark.multiprocess
def test_a_run_survives_an_object_store_that_is_away(
    world: Path, undisturbed: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with object_store(monkeypatch) as (server, gate, uri):
        run = prepared_run(world, "away", 2, **REAL, storage=uri)
        with Running(run) as running:
            running.until(lambda: len(Checkpoints(run).entries()) >= 1)
            gate.close()  # nobody answers: connections are refused, those under way break
            running.until(lambda: running.said("Retrying for up to 300 s"))
            gate.open()
            running.until(lambda: running.said("answers again"))
            newest = Checkpoints(run).newest_step()
            running.until(lambda: Checkpoints(run).newest_step() > newest)
            server.send_signal(signal.SIGSTOP)  # connections are accepted, and nothing comes
            asked = gate.connections
            running.until(lambda: gate.connections >= asked + 3)
            server.send_signal(signal.SIGCONT)
            printed = running.end()
        assert events_of(run, "checkpoint_failed") == [], printed[-4000:]
        ended_as_if_nothing_had_happened(run, undisturbed)


def ended_as_if_nothing_had_happened(run: RunFolder, undisturbed: RunFolder) -> None:
    ours = read_metrics(run.storage, run.run_id)
    theirs = read_metrics(undisturbed.storage, undisturbed.run_id)
    assert [m.step for m in ours] == list(range(1, STEPS + 1))
    assert [(m.loss, m.validation_loss) for m in ours] == [(m.loss, m.validation_loss) for m in theirs]
    assert run.outcome() == undisturbed.outcome()
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        place = f"{undisturbed.outcome().weights}/{name}"
        mine, other = (r.storage.read_bytes(f"{r.path}/{place}") for r in (run, undisturbed))
        assert mine == other


class Running:
    """The workers of a run, and what they have said so far."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run

    def __enter__(self) -> "Running":
        self._workers = start(self._run)
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.kill()

    def said(self, text: str) -> bool:
        return text in self._workers.printed

    def until(self, is_time: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 200
        while not is_time():
            assert self._workers.poll() is None and time.monotonic() < deadline, self._workers.printed[-6000:]
            time.sleep(0.02)

    def end(self, succeeds: bool = True) -> str:
        printed = self._workers.wait(timeout=300)
        assert (self._workers.returncode == 0) == succeeds, printed[-6000:]
        return printed


class Gate:
    """The way to a server: while it is closed nobody answers, and whatever was under way has ended."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self.port = 0
        self.connections = 0
        self.requests = 0
        self.open()

    def open(self) -> None:
        self._sockets: list[socket.socket] = []
        self._door = socket.create_server(("127.0.0.1", self.port))
        self.port = self._door.getsockname()[1]
        threading.Thread(target=self._let_in, args=(self._door,), daemon=True).start()

    def close(self) -> None:
        for each in (self._door, *self._sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _let_in(self, door: socket.socket) -> None:
        with suppress(OSError):
            while True:
                here, _ = door.accept()
                self.connections += 1
                there = socket.create_connection(("127.0.0.1", self._server_port))
                self._sockets += [here, there]
                for source, target, is_request in ((here, there, True), (there, here, False)):
                    threading.Thread(target=self._carry, args=(source, target, is_request), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, is_request: bool) -> None:
        with suppress(OSError):
            while content := source.recv(65536):
                self.requests += is_request and re.match(rb"(GET|HEAD|PUT|POST|DELETE) /", content) is not None
                target.sendall(content)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


@contextmanager
def object_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple["subprocess.Popen[bytes]", Gate, str]]:
    """An S3 server in a process of its own, the gate to it, and a storage root behind the gate."""
    for name, value in (("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    bucket = f"bucket-{uuid.uuid4().hex}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
        boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}").create_bucket(Bucket=bucket)
        gate = Gate(port)
        yield server, gate, f"s3://{bucket}/root?endpoint_override=127.0.0.1:{gate.port}&scheme=http&region=us-east-1"
        gate.close()
    finally:
        server.kill()
        server.wait()
        # Workers fetch the dataset to where all runs of this machine have theirs.
        shutil.rmtree(Path("~/.cache/ft_service").expanduser() / bucket, ignore_errors=True)


# -- faults on purpose -----------------------------------------------------------------------------------------------


class Clock:
    """Time that passes by sleeping alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(ft_service.storage.retry, "time", self)

    def monotonic(self) -> float:
        return self.now

    __call__ = monotonic

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def time(self) -> float:
        return time.time()


def away_for(calls: int, error: OSError, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """The first so many calls to the file system fail."""
    monkeypatch.setattr(ft_service.storage.retry, "_FIRST_PAUSE_SECONDS", 0.01 if calls < 10 else 0.5)
    left = [calls]
    real = storage._fs

    class Away:
        def __getattr__(self, name: str) -> Any:
            def ask(*args: Any, **kwargs: Any) -> Any:
                if left[0] > 0:
                    left[0] -= 1
                    raise error
                return getattr(real, name)(*args, **kwargs)

            return ask

    storage._fs = Away()  # type: ignore[assignment]
    monkeypatch.setattr(type(storage), "is_local", property(lambda self: True))
    return storage


@contextmanager
def full_disk(
    monkeypatch: pytest.MonkeyPatch, but: str = "\0", only: str = "", part: str = "", number: int = errno.ENOSPC
) -> Iterator[None]:
    """Within, no file whose path contains `only` and `part` can be written, except those that contain `but`."""
    real = Path.open

    def refuse(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if set(mode) & set("wa") and but not in str(self) and only in str(self) and part in str(self):
            raise OSError(number, os.strerror(number))
        return real(self, mode, *args, **kwargs)

    with monkeypatch.context() as world:
        world.setattr(Path, "open", refuse)
        yield


class Tearing:
    """`Path.open` whose first file to append to takes only some bytes, and then fails."""

    def __init__(self, real: Callable[..., Any], after: int) -> None:
        self.real = real
        self.after = after
        self.torn = False

    def __get__(self, path: Any, kind: Any) -> Callable[..., Any]:
        def opened(mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            stream = self.real(path, mode, *args, **kwargs)
            return self._tear(stream) if "a" in mode and not self.torn else stream

        return opened

    def _tear(self, stream: Any) -> Any:
        outer = self

        class Torn:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *_: object) -> None:
                stream.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(stream, name)

            def write(self, content: bytes) -> int:
                if outer.torn:
                    raise OSError(errno.EIO, "Input/output error")
                outer.torn = True
                return int(stream.write(content[: outer.after]))

        return Torn()


@contextmanager
def refusing_server(status: int, code: str) -> Iterator[int]:
    """An object store that answers everything with one error; yields its port."""

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def metrics_of(step: int) -> StepMetrics:
    return StepMetrics(
        step=step,
        epoch=0.1,
        loss=1.0,
        learning_rate=1e-3,
        grad_norm=1.0,
        tokens=1,
        loss_tokens=1,
        tokens_per_second=1.0,
        peak_memory_gib=1.0,
    )
