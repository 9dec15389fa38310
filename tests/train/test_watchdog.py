"""Workers that hang notice it in time, leave their stacks, and end; workers that are slow, or were stopped, do not."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ft_service.runs.events import read_events
from ft_service.runs.folder import RunFolder
from ft_service.runs.metrics import read_metrics
from ft_service.storage.storage import Storage
from ft_service.train.watchdog import (
    HANG_EXIT_CODE,
    SAVE_STACKS_SECONDS,
    SecondsWithoutBeat,
    ranks_without_stacks,
    stacks_folder,
)
from tests.forked import Workers
from tests.train.watchdog_cases import run_watched
from tests.worlds import prepared_run, start, write_world

multiprocess = pytest.mark.multiprocess


# -- seconds without a beat ------------------------------------------------------------------------------------------


def test_seconds_without_a_beat_grow_until_the_next_beat() -> None:
    counter = SecondsWithoutBeat(tick_seconds=1.0)
    assert [counter.update(now, beats=7) for now in (100.0, 101.0, 102.5)] == [0.0, 1.0, 2.5]
    assert counter.update(103.0, beats=8) == 0.0
    assert counter.update(104.0, beats=8) == 1.0


def test_time_in_which_the_process_is_stopped_does_not_count() -> None:
    counter = SecondsWithoutBeat(tick_seconds=1.0)
    counter.update(0.0, beats=1)
    assert counter.update(3600.0, beats=1) <= 2.0
    assert counter.update(3601.0, beats=1) <= 3.0


def test_suspect_ranks_are_those_without_stacks(tmp_path: Path) -> None:
    run = RunFolder(Storage(str(tmp_path)), "r")
    assert ranks_without_stacks(run, "first", 3) == []  # nobody noticed a hang
    for rank in (0, 2):
        run.storage.write_bytes(f"{stacks_folder(run, 'first')}/rank-{rank:05}.txt", b"")
    assert ranks_without_stacks(run, "first", 3) == [1]
    assert ranks_without_stacks(run, "second", 3) == []
    run.storage.write_bytes(f"{stacks_folder(run, 'first')}/rank-00001.txt", b"")
    assert ranks_without_stacks(run, "first", 3) == []


# -- one process -----------------------------------------------------------------------------------------------------


def hang(case: str, storage: Path, timeout: float, world_size: int | None = None) -> tuple[Workers, float]:
    """Run a case to its end; also returns the seconds that took."""
    began = time.monotonic()
    workers = start_case(case, storage, timeout, world_size)
    workers.wait(timeout=180)
    return workers, time.monotonic() - began


def start_case(case: str, storage: Path, timeout: float, world_size: int | None = None) -> Workers:
    return Workers(run_watched, case, str(storage), timeout, world_size=world_size)


START_SECONDS = 60.0
"""Most that a process takes to come to its case, on a busy machine."""


@multiprocess
def test_a_hung_process_saves_stacks_and_an_event_and_exits(tmp_path: Path) -> None:
    done, seconds = hang("waits_for_ever", tmp_path, 2)
    assert done.returncode == HANG_EXIT_CODE and seconds < 2 + START_SECONDS
    report = (tmp_path / "runs/r/stacks/first/rank-00000.txt").read_text()
    assert "Worker 0 of 1 made no progress for 2 seconds (in step 12, micro-batch 3 of 4)" in report
    assert "Thread MainThread" in report and "in waits_for_ever" in report
    assert report in done.printed
    (event,) = read_events(Storage(str(tmp_path)), "r")
    reported = event.model_dump()
    assert (reported["type"], reported["rank"], reported["step"], reported["doing"]) == (
        "hang",
        0,
        12,
        "micro-batch 3 of 4",
    )
    assert str(tmp_path / reported["stacks"]) in event.message


@multiprocess
def test_a_slow_process_that_makes_progress_continues(tmp_path: Path) -> None:
    done, seconds = hang("is_slow", tmp_path, 2)
    assert done.returncode == 0, done.printed
    assert seconds > 3 * 2 and not (tmp_path / "runs").exists()


@multiprocess
def test_a_process_stopped_beyond_the_timeout_continues_afterwards(tmp_path: Path) -> None:
    timeout = 3
    workers = start_case("is_suspended", tmp_path, timeout)
    wait(lambda: "now\n" in workers.printed, START_SECONDS, workers)
    os.kill(workers.pids[0], signal.SIGSTOP)
    time.sleep(2 * timeout)
    os.kill(workers.pids[0], signal.SIGCONT)
    printed = workers.wait(timeout=START_SECONDS)
    assert workers.returncode == 0, printed


@multiprocess
def test_a_process_exits_even_if_storage_hangs(tmp_path: Path) -> None:
    done, seconds = hang("storage_hangs", tmp_path, 2)
    assert done.returncode == HANG_EXIT_CODE and seconds < 2 + SAVE_STACKS_SECONDS + START_SECONDS
    assert "in storage_hangs" in done.printed


@multiprocess
def test_a_process_that_holds_the_gil_exits(tmp_path: Path) -> None:
    done, _ = hang("keeps_the_interpreter", tmp_path, 1)
    assert done.returncode not in (0, HANG_EXIT_CODE)
    assert "in keeps_the_interpreter" in done.printed


@multiprocess
def test_process_group_timeouts_are_longer_than_the_watchdogs(tmp_path: Path) -> None:
    done, _ = hang("prints_group_timeouts", tmp_path, 100_000)
    assert done.returncode == 0, done.printed
    timeouts = next(line for line in done.printed.splitlines() if line.startswith("timeouts")).split()[1:]
    assert len(timeouts) > 1  # DeepSpeed's own, too
    assert all(float(seconds) > 100_000 + SAVE_STACKS_SECONDS for seconds in timeouts)


# -- workers ---------------------------------------------------------------------------------------------------------


@multiprocess
def test_a_missing_collective_makes_both_workers_save_stacks(tmp_path: Path) -> None:
    done, _ = hang("skips_a_collective", tmp_path, 4, world_size=2)
    # The end of one breaks the other's collective, which may then fail before its watchdog ends it.
    assert HANG_EXIT_CODE in done.exit_codes.values()
    first, second = ((tmp_path / f"runs/r/stacks/first/rank-0000{rank}.txt").read_text() for rank in (0, 1))
    assert "in step 3, micro-batch 1 of 1" in first and "in all_reduce" in first
    assert "in step 3, validating" in second and "store.wait" in second
    run = RunFolder(Storage(str(tmp_path)), "r")
    assert ranks_without_stacks(run, "first", 2) == []
    assert {event.type for event in read_events(run.storage, "r")} == {"hang"}


def wait(until: Callable[[], bool], seconds: float, workers: Workers) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert workers.poll() is None, workers.printed[-6000:]
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def events_of(run: RunFolder, kind: str) -> list[dict[str, Any]]:
    return [event.model_dump() for event in read_events(run.storage, run.run_id) if event.type == kind]


def training(world: Path, run_id: str, timeout: int, steps: int) -> tuple[RunFolder, Workers, list[int]]:
    """Two workers in the midst of training, and their process ids by rank."""
    settings = {"parallel.hang_timeout_seconds": timeout, "train.max_steps": steps, "train.validate_every_steps": steps}
    run = prepared_run(world, run_id, 2, **settings)
    workers = start(run)
    wait(lambda: len(read_metrics(run.storage, run_id)) >= 3, 240, workers)
    return run, workers, [worker["pid"] for worker in events_of(run, "training")[0]["workers"]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@multiprocess
@pytest.mark.parametrize("hung", [0, 1])
def test_a_stopped_worker_is_the_suspect(world: Path, hung: int) -> None:
    timeout = 10
    alive = 1 - hung
    run, workers, pids = training(world, f"stopped-{hung}", timeout, steps=100_000)
    try:
        os.kill(pids[hung], signal.SIGSTOP)
        began = time.monotonic()
        wait(lambda: is_gone(pids[alive]), 4 * timeout, workers)
        # Its last beat was before the stop; then it waited, and for a time for the file of the other.
        assert timeout - 2 < time.monotonic() - began < 3 * timeout
    finally:
        workers.kill()
    (event,) = events_of(run, "hang")
    assert event["rank"] == alive and f"Worker {alive} of 2" in event["message"]
    # Worker 0 may be stopped behind the collectives of a step and before it writes that step's line.
    assert abs(event["step"] - len(read_metrics(run.storage, run.run_id))) <= 2
    folder = run.storage.folders(f"{run.path}/stacks")
    assert ranks_without_stacks(run, folder[0], 2) == [hung]
    report = run.storage.read_bytes(f"{event['stacks']}/rank-0000{alive}.txt").decode()
    assert "loop.py" in report and "Thread MainThread" in report


@multiprocess
def test_workers_that_were_all_stopped_continue(world: Path) -> None:
    timeout = 5
    steps = 60
    run, workers, pids = training(world, "suspended", timeout, steps)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    before = len(read_metrics(run.storage, run.run_id))
    assert before < steps
    time.sleep(2 * timeout)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    printed = workers.wait(timeout=240)
    assert workers.returncode == 0, printed[-6000:]
    assert len(read_metrics(run.storage, run.run_id)) == steps
    assert events_of(run, "hang") == []
