"""Leases: one driver works on a run at a time, and a run without a live driver counts as failed."""

import os
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ft_service.errors import UnreachableError, UsageError
from ft_service.runs import lease as lease_module
from ft_service.runs.folder import LEASE_SECONDS, LeaseHolder, RunFolder
from ft_service.runs.lease import Lease, holds_lease
from ft_service.storage.storage import Storage


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr("ft_service.runs.lease._SETTLE_SECONDS", 0.0)
    return RunFolder(Storage(str(tmp_path)), "run-1")


def held(run: RunFolder, *, machine: str = "elsewhere", pid: int = 1, ago: float = 0.0) -> LeaseHolder:
    time = datetime.now(UTC) - timedelta(seconds=ago)
    holder = LeaseHolder(token="theirs", host=socket.gethostname(), machine=machine, pid=pid, time=time)
    run.storage.write_json(f"{run.path}/lease.json", holder.model_dump(mode="json"))
    return holder


def ended_process() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_a_lease_is_held_while_the_block_lasts(run: RunFolder) -> None:
    with Lease(run, log=lambda text: None) as lease:
        holder = run.lease_holder()
        assert holder is not None and (holder.pid, holder.host) == (os.getpid(), socket.gethostname())
        assert holds_lease(run, lease.token)
    assert run.lease_holder() is None


def test_a_driver_that_renews_its_lease_keeps_the_run(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    first = held(run)
    logged: list[str] = []

    def beat(seconds: float) -> None:
        held(run)  # the other driver renews its lease

    monkeypatch.setattr(lease_module.time, "sleep", beat)
    with pytest.raises(UsageError, match="ft stop run-1"), Lease(run, log=logged.append):
        pass
    assert "Waiting to see" in logged[0]
    left = run.lease_holder()
    assert left is not None and left.token == first.token  # still theirs


def test_a_long_expired_lease_is_taken_over_at_once(run: RunFolder) -> None:
    held(run, ago=10 * LEASE_SECONDS + 1)
    logged: list[str] = []
    with Lease(run, log=logged.append) as lease:
        assert holds_lease(run, lease.token)
    assert logged == []


@pytest.mark.parametrize("ago", [0.0, 2 * LEASE_SECONDS, -2 * LEASE_SECONDS])
def test_a_younger_lease_is_watched_whatever_the_clocks_show(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, ago: float
) -> None:
    held(run, ago=ago)
    now = [0.0]
    monkeypatch.setattr(lease_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(lease_module.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    with Lease(run, log=lambda text: None) as lease:
        assert holds_lease(run, lease.token) and LEASE_SECONDS <= now[0] < LEASE_SECONDS + 5


def test_an_ended_process_of_this_machine_is_replaced_at_once(run: RunFolder) -> None:
    held(run, machine=lease_module.machine_name(), pid=ended_process())
    logged: list[str] = []
    with Lease(run, log=logged.append):
        pass
    assert logged == []


def test_process_ids_are_compared_only_within_one_machine(run: RunFolder) -> None:
    assert lease_module._has_ended(held(run, machine=lease_module.machine_name(), pid=ended_process()))
    assert not lease_module._has_ended(held(run, machine="a container", pid=ended_process()))


def test_of_two_simultaneous_drivers_the_last_writer_wins(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module.time, "sleep", lambda seconds: held(run))  # the other driver writes meanwhile
    with pytest.raises(UsageError, match="another driver started"), Lease(run, log=lambda text: None):
        pass
    left = run.lease_holder()
    assert left is not None and left.token == "theirs"


def test_a_driver_that_confirms_later_waits_only_for_the_rest(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    slept: list[float] = []
    monkeypatch.setattr(lease_module, "_SETTLE_SECONDS", 0.5)
    monkeypatch.setattr(lease_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(lease_module.time, "sleep", slept.append)
    for spent in (0.25, 2.0):
        with Lease(run, log=lambda text: None, confirms=False) as lease:
            assert holds_lease(run, lease.token)
            now[0] += spent
            lease.confirm()
    assert slept == [0.25, 0.0]


def test_a_driver_that_confirms_later_finds_another_that_wrote_last(run: RunFolder) -> None:
    with (
        pytest.raises(UsageError, match="another driver started"),
        Lease(run, log=lambda text: None, confirms=False) as lease,
    ):
        held(run)  # the other driver writes meanwhile
        lease.confirm()
    left = run.lease_holder()
    assert left is not None and left.token == "theirs"


def test_an_unreachable_storage_does_not_lose_the_lease(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lease(run, log=lambda text: None) as lease:
        assert lease.is_held()
        held(run)
        assert not lease.is_held()

        def away(*_: object) -> None:
            raise UnreachableError("away")

        with monkeypatch.context() as patch:
            patch.setattr(Storage, "read_versioned", away)
            assert lease.is_held()


def test_a_replaced_driver_neither_writes_nor_deletes_the_lease(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.01)
    with Lease(run, log=lambda text: None) as lease:
        held(run)
        lease._thread.join(timeout=10)  # at its next renewal it sees the new holder
        assert not lease._thread.is_alive()
        assert not holds_lease(run, lease.token)
    left = run.lease_holder()
    assert left is not None and left.token == "theirs"


def test_renewals_keep_a_lease_alive(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.01)
    with Lease(run, log=lambda text: None):
        first = run.lease_holder()
        assert first is not None
        deadline = datetime.now(UTC) + timedelta(seconds=10)
        while (now := run.lease_holder()) is not None and now.time == first.time:
            assert datetime.now(UTC) < deadline


def test_a_lease_outlives_two_renewals_that_fail() -> None:
    assert 3 * lease_module.RENEW_SECONDS < LEASE_SECONDS


def test_a_run_without_a_live_driver_counts_as_failed(run: RunFolder) -> None:
    run.set_state("running")
    held(run, pid=77, ago=LEASE_SECONDS + 1)
    status = run.status()
    assert status is not None and status.state == "failed"
    assert "running" in status.message and "77" in status.message and "ft resume run-1" in status.message


def test_a_run_without_a_lease_failed_unless_it_ended(run: RunFolder) -> None:
    for state in ("preparing", "queued", "running", "checkpointing", "recovering", "stopping", "publishing"):
        run.set_state(state)  # type: ignore[arg-type]
        status = run.status()
        assert status is not None and status.state == "failed"
    for state in ("stopped", "succeeded", "failed"):
        run.set_state(state)  # type: ignore[arg-type]
        status = run.status()
        assert status is not None and status.state == state


def test_a_run_with_a_live_driver_has_its_recorded_state(run: RunFolder) -> None:
    with Lease(run, log=lambda text: None):
        run.set_state("running")
        status = run.status()
        assert status is not None and status.state == "running"
