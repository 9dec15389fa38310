"""The newest runs are listed without reading the others."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from ft_service.runs.folder import RunFolder
from ft_service.runs.recent import RUNS_BY_DAY, begin, newest_runs, unlist_deleted_runs
from ft_service.spec.schema import RunSpec
from ft_service.storage.storage import Storage
from tests.registry.test_index import CountingStorage

SPEC = RunSpec.model_validate(
    {"name": "bot", "model": {"base": "llama"}, "data": {"train": [{"path": "t.jsonl"}]}, "storage": "s"}
)
BEGAN = datetime(2026, 3, 1, 12, tzinfo=UTC)


def begin_runs(storage: Storage, number: int, hours: int) -> list[str]:
    """Runs that ended, oldest first, one every `hours`; their ids are in another order."""
    run_ids = [f"run-{(index * 7) % 1000:03}" for index in range(number)]
    for index, run_id in enumerate(run_ids):
        run = RunFolder(storage, run_id)
        begin(run, SPEC, BEGAN + timedelta(hours=hours * index))
        run.set_state("succeeded")
    return run_ids


def test_the_newest_runs_come_first_and_only_they_are_read(tmp_path: Path) -> None:
    run_ids = begin_runs(Storage(str(tmp_path)), 200, hours=8)
    counting = CountingStorage(str(tmp_path))
    assert [status.run_id for status in newest_runs(counting, 10)] == run_ids[:-11:-1]
    assert len(counting.calls) <= 1 + 10 // 3 + 2 + 10  # the days, each day of three runs, the state of each run
    assert not [call for call in counting.calls if call.endswith(" runs")]
    begin_runs(Storage(str(tmp_path)), 400, hours=8)  # which begins none of the first 200 again
    again = CountingStorage(str(tmp_path))
    assert len(newest_runs(again, 10)) == 10 and len(again.calls) == len(counting.calls)


def test_a_run_that_goes_on_later_keeps_its_day(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    first, _ = begin_runs(storage, 2, hours=24)
    before = storage.tree(RUNS_BY_DAY)
    begin(RunFolder(storage, first), SPEC.model_copy(update={"name": "other"}), BEGAN + timedelta(days=9))
    assert storage.tree(RUNS_BY_DAY) == before
    assert RunFolder(storage, first).spec().name == "bot"


def test_deleted_runs_are_left_out_and_pruned_after_two_days(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    run_ids = begin_runs(storage, 6, hours=24)
    for run_id in run_ids[1:4]:
        storage.delete(f"runs/{run_id}")
    assert [status.run_id for status in newest_runs(storage, 3)] == [run_ids[5], run_ids[4], run_ids[0]]
    unlist_deleted_runs(storage, BEGAN + timedelta(days=4))
    listed = {file.path.partition("~")[2] for file in storage.tree(RUNS_BY_DAY)}
    assert listed == {run_ids[index] for index in (0, 2, 3, 4, 5)}  # runs 2 and 3 began in the last two days


def test_runs_of_an_earlier_version_are_listed(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for run_id in ("b", "a"):
        RunFolder(storage, run_id).set_state("succeeded")
    assert [status.run_id for status in newest_runs(storage, 1)] == ["a"]
    begin_runs(storage, 1, hours=1)
    assert [status.run_id for status in newest_runs(storage, 5)] == ["run-000"]
    assert [status.run_id for status in newest_runs(storage)] == ["a", "b", "run-000"]
