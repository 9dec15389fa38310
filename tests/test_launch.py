"""What the driver says of a run on storage, and what it leaves to others to say."""

import signal
from pathlib import Path
from typing import Any

import pytest

from ft_service import launch
from ft_service.errors import RunStopped, StorageError, TrainingError, UsageError
from ft_service.runs.events import read_events
from ft_service.runs.folder import RunFolder, resumed_spec
from ft_service.spec.load import parse_run_spec
from ft_service.spec.schema import RunSpec
from ft_service.storage.storage import Storage
from tests.worlds import write_world


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunSpec:
    monkeypatch.setattr("ft_service.runs.lease._SETTLE_SECONDS", 0.0)
    write_world(tmp_path)
    return parse_run_spec(f"""
name: words
model: {{base: {tmp_path}/base}}
data: {{train: [{{path: {tmp_path}/train.jsonl}}], max_seq_len: 128}}
parallel: {{num_workers: 1, use_gpu: false}}
storage: {tmp_path}/storage
""")


def end_with(monkeypatch: pytest.MonkeyPatch, error: BaseException, taken_over: bool) -> None:
    """Neither Ray nor data: the driver comes as far as to prepare, and that ends so."""

    def prepare(spec: RunSpec, folder: RunFolder, log: Any) -> Any:
        folder.set_state("running")
        if taken_over:
            other = folder.storage.read_json(f"{folder.path}/lease.json") | {"token": "theirs"}
            folder.storage.write_json(f"{folder.path}/lease.json", other)
        raise error

    monkeypatch.setattr(launch, "connect", lambda: None)
    monkeypatch.setattr(launch, "prepare", prepare)


@pytest.mark.parametrize("error", [RunStopped("Another driver has taken over."), TrainingError("lost"), OSError("odd")])
def test_a_replaced_driver_writes_nothing_more_to_the_run(
    spec: RunSpec, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    end_with(monkeypatch, error, taken_over=True)
    with pytest.raises(type(error)):
        launch.run(spec, "r", lambda text: None)
    run = RunFolder(Storage(spec.storage), "r")
    status = run.status()
    holder = run.lease_holder()
    assert status is not None and status.state == "running"  # as the other driver says
    assert holder is not None and holder.token == "theirs"
    assert [event.type for event in read_events(run.storage, "r")] == ["preparing"]
    assert not run.storage.exists("runs/r/report.html")


def test_the_loser_of_two_simultaneous_drivers_changes_nothing(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(Storage(spec.storage), "r")

    def connect() -> None:  # the other driver writes while this one joins the cluster
        other = run.storage.read_json(f"{run.path}/lease.json") | {"token": "theirs"}
        run.storage.write_json(f"{run.path}/lease.json", other)

    monkeypatch.setattr(launch, "connect", connect)
    with pytest.raises(UsageError, match="another driver started this run at the same moment"):
        launch.run(spec, "r", lambda text: None)
    assert run.status() is None and read_events(run.storage, "r") == []
    assert [file.name for file in Path(spec.storage, run.path).iterdir()] == ["lease.json"]


@pytest.mark.parametrize(("error", "state"), [(RunStopped("SIGTERM"), "stopped"), (TrainingError("nan"), "failed")])
def test_a_driver_records_how_its_run_ended(
    spec: RunSpec, monkeypatch: pytest.MonkeyPatch, error: Exception, state: str
) -> None:
    end_with(monkeypatch, error, taken_over=False)
    with pytest.raises(type(error)):
        launch.run(spec, "r", lambda text: None)
    status = RunFolder(Storage(spec.storage), "r").status()
    assert status is not None and (status.state, status.message) == (state, str(error))


def test_a_signal_that_a_library_turns_into_its_own_error_stops_the_run(
    spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(spec: RunSpec, folder: RunFolder, log: Any) -> Any:
        try:
            signal.raise_signal(signal.SIGINT)
        except RunStopped:
            raise SystemError("returned a result with an exception set") from None  # as Ray's compiled code does

    monkeypatch.setattr(launch, "connect", lambda: None)
    monkeypatch.setattr(launch, "prepare", prepare)
    with pytest.raises(RunStopped, match="SIGINT received"):
        launch.run(spec, "r", lambda text: None)
    status = RunFolder(Storage(spec.storage), "r").status()
    assert status is not None and status.state == "stopped"


def test_the_traceback_of_a_library_is_kept_in_a_file(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    end_with(monkeypatch, OSError("odd"), taken_over=False)
    with pytest.raises(OSError, match="odd"):
        launch.run(spec, "r", lambda text: None)
    run = RunFolder(Storage(spec.storage), "r")
    file = Path(spec.storage, "runs/r/tracebacks/001.txt")
    status = run.status()
    assert status is not None and status.message == f"OSError: odd. Traceback: {file}"
    assert file.read_text().endswith("raise error\nOSError: odd\n")


def test_a_run_that_failed_in_preparation_resumes_with_its_first_spec(
    spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError):
        resumed_spec("r", spec.storage)
    end_with(monkeypatch, KeyboardInterrupt(), taken_over=False)
    with pytest.raises(KeyboardInterrupt):
        launch.run(spec, "r", lambda text: None)
    assert resumed_spec("r", spec.storage) == spec
    changed = spec.model_copy(update={"name": "other"})
    with pytest.raises(KeyboardInterrupt):
        launch.run(changed, "r", lambda text: None)
    assert resumed_spec("r", spec.storage) == spec  # until a plan is made, which may refuse the change


def test_requests_from_before_the_start_are_ignored(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    from ft_service.runs.folder import Request

    run = RunFolder(Storage(spec.storage), "r")
    run.write_request(Request(kind="stop", reason="yesterday"))
    end_with(monkeypatch, TrainingError("as far as that"), taken_over=False)
    with pytest.raises(TrainingError):
        launch.run(spec, "r", lambda text: None)
    assert run.request() is None
