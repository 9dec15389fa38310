"""report.html is there from the first step, shows the run as it is, and stops reloading when the run has ended."""

import threading
from pathlib import Path

import pytest

from ft_service.errors import StorageError
from ft_service.pages.live_report import LiveReport
from ft_service.pages.run_report import write_report
from ft_service.runs.folder import RunFolder
from ft_service.runs.lease import Lease
from ft_service.runs.metrics import JsonlSink
from ft_service.storage.storage import Storage
from tests.runs.run_cases import step_metrics

REFRESH = '<meta http-equiv="refresh" content="10">'


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr("ft_service.runs.lease._SETTLE_SECONDS", 0.0)
    return RunFolder(Storage(str(tmp_path)), "r")


def page(run: RunFolder) -> str:
    return run.storage.read_bytes(f"{run.path}/report.html").decode()


def ignore(text: str) -> None:
    pass


def test_the_page_is_there_from_the_first_step_and_reloads_itself(run: RunFolder) -> None:
    with Lease(run, ignore):
        run.set_state("running")
        report = LiveReport(run.storage, "r", ignore)
        assert not report.update()
        assert not run.storage.exists(f"{run.path}/report.html")
        JsonlSink(run.storage, "r")(step_metrics(1))
        assert report.update()
        assert REFRESH in page(run) and "running" in page(run)
        assert not report.update()  # nothing new
        JsonlSink(run.storage, "r")(step_metrics(2))
        assert report.update()
        run.set_state("succeeded")
        write_report(run.storage, "r")
        assert REFRESH not in page(run)


def test_the_page_of_a_resumed_run_does_not_say_failed(run: RunFolder) -> None:
    run.set_state("failed", "its workers died")
    write_report(run.storage, "r")
    assert "This run failed" in page(run)
    with Lease(run, ignore):
        run.set_state("queued")
        assert LiveReport(run.storage, "r", ignore).update()
    assert "This run failed" not in page(run) and REFRESH in page(run)


def test_a_page_that_cannot_be_written_is_logged_once(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    failures = 0
    has_failed_twice = threading.Event()

    def fail(self: LiveReport) -> bool:
        nonlocal failures
        failures += 1
        if failures == 2:
            has_failed_twice.set()
        raise StorageError("the disk is full")

    monkeypatch.setattr(LiveReport, "update", fail)
    with LiveReport(run.storage, "r", logged.append, seconds=0.01):
        assert has_failed_twice.wait(60)
    assert logged == ["report.html is not up to date: the disk is full"]
