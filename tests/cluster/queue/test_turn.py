"""A driver's turn in the queue: on real storage, with a cluster that the test describes."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ft_service.cluster.queue import turn as turn_module
from ft_service.cluster.queue.board import Board
from ft_service.cluster.queue.entry import Entry
from ft_service.cluster.queue.schedule import Node
from ft_service.cluster.queue.turn import Turn
from ft_service.cluster.queue.usage import OwnerLimits, QueueLimits, used_hours, write_limits
from ft_service.errors import RunStopped, SpecError, UnreachableError
from ft_service.runs.events import Queued, read_events
from ft_service.runs.folder import LEASE_SECONDS, RunFolder
from ft_service.storage.storage import Storage
from tests.cluster.queue.queue_cases import Gave, World, looks, never


def counting(name: str, method: Any, calls: list[str]) -> Any:
    def call(self: Storage, *args: Any) -> Any:
        calls.append(name)
        return method(self, *args)

    return call


@contextmanager
def counted_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    calls: list[str] = []
    with monkeypatch.context() as patch:
        for name in (
            "exists",
            "read_bytes",
            "files",
            "folders",
            "write_bytes",
            "delete",
            "size",
            "tree",
            "append_line",
        ):
            patch.setattr(Storage, name, counting(name, getattr(Storage, name), calls))
        yield calls


# -- alone -----------------------------------------------------------------------------------------------------------


def test_a_run_that_is_alone_writes_once_looks_once_and_never_sleeps(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = world.driver("r", 2)
    monkeypatch.setattr(turn_module.time, "sleep", lambda seconds: never())
    with counted_calls(monkeypatch) as calls:
        assert turn.take(never) == 2
    assert calls == ["write_bytes", "files", "exists"]  # its entry, the queue, and whether there are quotas
    with counted_calls(monkeypatch) as calls:
        turn.placed(["n", "n"], None)
    assert calls == ["write_bytes"]
    assert world.logged == [] and world.cluster.looks == 1


def test_a_run_that_is_alone_waits_for_other_work_without_holding_up_who_comes_later(world: World) -> None:
    world.cluster.living = [Node("n", {"CPU": 4.0}, {"CPU": 3.0})]
    big = world.driver("big", 4)
    with pytest.raises(Gave):
        big.take(looks(1))
    assert world.entries()["big"].waits_for.endswith("other work than training has the rest")
    assert world.driver("small", 1).take(never) == 1
    world.cluster.living = [Node("n", {"CPU": 4.0}, {"CPU": 4.0})]


def test_storage_that_is_away_is_logged_once_while_a_run_waits(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first = world.driver("first", 4)
    first.take(never)
    second = world.driver("second", 4)
    with pytest.raises(Gave):
        second.take(looks(1))

    def away(*_: object) -> None:
        raise UnreachableError("away")

    with monkeypatch.context() as patch:
        patch.setattr(Board, "others", away)
        with pytest.raises(UnreachableError):
            second.take(never)
        with pytest.raises(Gave):
            second._wait(looks(5), [])
    assert len([line for line in world.logged if "away" in line]) == 1


def test_a_run_that_ends_leaves_the_queue_and_a_record_of_what_it_used(world: World) -> None:
    with world.driver("r", 2) as turn:
        turn.take(never)
        turn.placed(["n", "n"], None)
        own = turn._own
        hour_ago = datetime.now(UTC) - timedelta(hours=1)
        turn._entry = own.model_copy(update={"started": hour_ago})
        assert world.entries()["r"].state == "running"
    assert world.entries() == {}
    assert used_hours(world.storage, datetime.now(UTC)) == pytest.approx({"ann": 2.0}, abs=0.01)


def test_a_run_that_could_never_fit_is_refused_before_it_enters(world: World) -> None:
    with pytest.raises(SpecError, match=r"needs 8 workers with 1 CPU each.*room for 4"):
        world.driver("r", 8).take(never)
    assert world.entries() == {}
    world.cluster.is_open = True
    assert world.driver("s", 8).take(never) == 8


def test_a_run_whose_workers_died_keeps_its_room(world: World) -> None:
    turn = world.driver("r", 2)
    turn.take(never)
    turn.placed(["n", "n"], None)
    assert turn.take(never) == 2
    entry = world.entries()["r"]
    assert (entry.state, entry.workers, entry.nodes) == ("claiming", 2, {})


# -- waiting ---------------------------------------------------------------------------------------------------------


def test_a_run_waits_until_another_has_ended(world: World) -> None:
    first = world.driver("first", 3)
    assert first.take(never) == 3
    first.placed(["n"] * 3, 600.0)
    second = world.driver("second", 2)

    def end_first() -> None:
        entry = world.entries()["second"]
        assert (entry.state, entry.place) == ("waiting", 1)
        assert entry.waits_for == "room for 2 workers with 1 CPU each; there is room for 1; running: first (3 workers)"
        assert entry.estimated_start is not None
        first.leave()

    assert second.take(end_first) == 2
    assert world.entries()["second"].state == "claiming"
    status = RunFolder(world.storage, "second").recorded_status()
    assert status is not None and status.state == "queued"
    assert "Place 1 in the queue" in status.message and "Expected to start in " in status.message
    assert "The run starts after 0s in the queue." in world.logged


def test_the_reason_for_waiting_is_reported_when_it_changes_and_not_at_every_look(world: World) -> None:
    first = world.driver("first", 4)
    first.take(never)
    with pytest.raises(Gave):
        world.driver("second", 1).take(looks(20))
    events = [event for event in read_events(world.storage, "second") if isinstance(event, Queued)]
    assert len(events) == 1 and events[0].place == 1
    assert len([line for line in world.logged if "Place 1" in line]) == 1


def test_a_stop_while_waiting_takes_the_run_out(world: World) -> None:
    world.driver("first", 4).take(never)

    def stop() -> None:
        raise RunStopped("ft stop")

    with pytest.raises(RunStopped), world.driver("second") as second:
        second.take(stop)
    assert set(world.entries()) == {"first"}


def test_a_clock_that_is_behind_does_not_jump_the_queue(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    first = world.driver("first", 2)
    first.take(never)
    first.placed(["n"] * 2, None)
    with pytest.raises(Gave):
        world.driver("second", 4).take(looks(1))

    class Behind(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) - timedelta(hours=1)

    with monkeypatch.context() as patch:
        patch.setattr(turn_module, "datetime", Behind)
        with pytest.raises(Gave):
            world.driver("third").take(looks(1))
    entries = world.entries()
    assert entries["third"].arrival > entries["second"].arrival


def test_a_quota_holds_back_a_run_that_is_alone(world: World) -> None:
    write_limits(world.storage, QueueLimits(owners={"ann": OwnerLimits(max_runs=0)}))
    with pytest.raises(Gave):
        world.driver("r").take(looks(2))
    assert world.entries()["r"].waits_for == "the quota of ann: 0 runs at once"
    assert world.driver("s", owner="bob").take(never) == 1


def test_one_run_at_a_time_asks_an_autoscaler_of_unknown_limits(world: World) -> None:
    world.cluster.is_open = True
    world.cluster.living = [Node("head", {"CPU": 1.0}, {"CPU": 0.0})]
    first = world.driver("first", 4)
    assert first.take(never) == 4
    second = world.driver("second", 4)
    with pytest.raises(Gave):
        second.take(looks(2))
    first.placed(["x"] * 4, None)
    assert second.take(never) == 4


def test_a_claim_that_storage_has_although_its_write_failed_is_withdrawn(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = world.driver("first", 4)
    first.take(never)
    second = world.driver("second", 4)
    real = Board.write

    def lose_answer(self: Board, entry: Entry) -> None:
        real(self, entry)
        if entry.run_id == "second" and entry.state == "claiming" and first._entry is None:
            world.cluster.living = [Node("n", {"CPU": 4.0}, {"CPU": 0.0})]  # the room is gone meanwhile
            raise UnreachableError("no answer")

    seen: list[str] = []

    def end_first() -> None:
        seen.append(world.entries()["second"].state)
        assert len(seen) < 10, "the claim stays"
        if seen[-1] == "claiming":
            return
        if first._entry is None:
            raise Gave
        first.leave()

    with pytest.raises(Gave):
        monkeypatch.setattr(Board, "write", lose_answer)
        second.take(end_first)
    assert world.entries()["second"].state == "waiting"
    assert any("no answer" in line for line in world.logged)


def test_an_entry_that_was_removed_during_a_pause_comes_back(world: World) -> None:
    first = world.driver("first", 4)
    first.take(never)
    first.placed(["n"] * 4, None)
    for name in world.storage.files(first._board.folder):
        world.storage.delete(f"{first._board.folder}/{name}")
    assert first.may_grow()
    assert world.entries()["first"].state == "running"


# -- claims at the same moment ---------------------------------------------------------------------------------------


def claim_without_a_look(world: World, run_id: str, workers: int) -> Turn:
    """A driver that has written its claim, and has not read the queue yet."""
    turn = world.driver(run_id, workers)
    turn._enter(world.cluster.nodes())
    return turn


def test_two_claims_at_the_same_moment_that_do_not_fit_start_one_after_the_other(world: World) -> None:
    first = claim_without_a_look(world, "first", 3)
    second = claim_without_a_look(world, "second", 3)
    for turn in (first, second):
        with pytest.raises(Gave):
            turn._wait(looks(1), turn._arrive())
    assert {entry.state for entry in world.entries().values()} == {"waiting"}
    with pytest.raises(Gave):
        second.take(looks(1))
    assert first.take(never) == 3


def test_two_claims_at_the_same_moment_do_not_exceed_a_quota_together(world: World) -> None:
    write_limits(world.storage, QueueLimits(owners={"ann": OwnerLimits(max_runs=1)}))
    first = claim_without_a_look(world, "first", 1)
    second = claim_without_a_look(world, "second", 1)
    others = [first._arrive(), second._arrive()]
    with pytest.raises(Gave):
        first._wait(looks(1), others[0])
    with pytest.raises(Gave):
        second._wait(looks(1), others[1])
    assert second.take(never) == 1
    with pytest.raises(Gave):
        first.take(looks(3))
    assert world.entries()["first"].waits_for == "the quota of ann: 1 run at once"


def test_claims_that_fit_together_both_start(world: World) -> None:
    late = claim_without_a_look(world, "late", 2)
    assert world.driver("early", 2).take(never) == 2
    assert late._wait(never, late._arrive()) == 2


# -- drivers that are gone -------------------------------------------------------------------------------------------


def rewrite_lease(world: World, run_id: str, **changes: Any) -> None:
    run = RunFolder(world.storage, run_id)
    holder = run.lease_holder()
    assert holder is not None
    changed = holder.model_copy(update=changes)
    world.storage.write_json(f"{run.path}/lease.json", changed.model_dump(mode="json"))


@pytest.mark.parametrize("how", ["no lease", "another driver", "long ago"])
def test_the_entry_of_a_driver_that_is_gone_is_removed(world: World, how: str) -> None:
    world.driver("gone", 4).take(never)
    if how == "no lease":
        world.storage.delete("runs/gone/lease.json")
    elif how == "another driver":
        rewrite_lease(world, "gone", token="other")
    else:
        rewrite_lease(world, "gone", time=datetime.now(UTC) - timedelta(seconds=11 * LEASE_SECONDS))
    assert world.driver("next", 4).take(never) == 4
    assert set(world.entries()) == {"next"}


def test_a_driver_is_watched_by_the_own_clock_whatever_its_clock_shows(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    world.driver("other", 4).take(never)
    for minutes in (-3, 0, 3):
        rewrite_lease(world, "other", time=datetime.now(UTC) + timedelta(minutes=minutes))
        board = Board(world.storage, world.cluster.id, clock=lambda: now[0])
        own = world.entries()["other"].model_copy(update={"run_id": "own", "driver": "own"})
        for seconds, is_alive in ((0, True), (LEASE_SECONDS - 1, True), (LEASE_SECONDS + 1, False)):
            now[0] = 1000.0 + seconds
            alive, left = board.others(own)
            assert (len(alive), len(left)) == ((1, 0) if is_alive else (0, 1)), (minutes, seconds)


def test_a_driver_that_renews_its_lease_stays(world: World) -> None:
    now = [0.0]
    world.driver("other", 4).take(never)
    board = Board(world.storage, world.cluster.id, clock=lambda: now[0])
    own = world.entries()["other"].model_copy(update={"run_id": "own", "driver": "own"})
    for step in range(10):
        now[0] = 30.0 * step
        rewrite_lease(world, "other", time=datetime.now(UTC) - timedelta(minutes=3, seconds=-step))
        assert len(board.others(own)[0]) == 1


def test_what_a_killed_driver_used_until_its_last_sign_of_life_counts(world: World) -> None:
    gone = world.driver("gone", 4)
    gone.take(never)
    renewed = datetime.now(UTC) - timedelta(seconds=11 * LEASE_SECONDS)
    gone._write(started=renewed - timedelta(hours=5))
    rewrite_lease(world, "gone", time=renewed)
    world.driver("next", 4).take(never)
    assert used_hours(world.storage, datetime.now(UTC))["ann"] == pytest.approx(20.0)


def test_a_new_driver_of_a_run_replaces_the_entry_of_the_one_before(world: World) -> None:
    world.driver("r", 4).take(never)
    rewrite_lease(world, "r", time=datetime.now(UTC) - timedelta(seconds=11 * LEASE_SECONDS))
    assert world.driver("r", 4).take(never) == 4
    assert len(world.storage.files(Board(world.storage, world.cluster.id).folder)) == 1


# -- elastic runs, preemption ----------------------------------------------------------------------------------------


def test_an_elastic_run_takes_what_is_there_and_grows_when_nobody_waits(world: World) -> None:
    first = world.driver("first", 2)
    first.take(never)
    first.placed(["n"] * 2, None)
    elastic = world.driver("elastic", {"min": 1, "max": 4})
    assert elastic.take(never) == 2
    elastic.placed(["n"] * 2, None)
    assert elastic.may_grow()
    waiting = world.driver("waiting", 2)
    with pytest.raises(Gave):
        waiting.take(looks(1))
    assert not elastic.may_grow()
    first.leave()
    assert elastic.take(never) == 2  # the room is for the one that waits
    waiting.leave()
    assert elastic.take(never) == 4


def test_a_preempted_run_leaves_and_comes_back(world: World) -> None:
    low = world.driver("low", 4, priority="low", preemptible=True)
    low.take(never)
    low.placed(["n"] * 4, None)
    assert not low.must_leave()
    high = world.driver("high", 4, priority="high")

    def let_low_leave() -> None:
        if world.entries()["low"].state == "running":
            assert low.must_leave() and not low.must_leave()
            return
        with pytest.raises(Gave):
            low.take(looks(1))
        assert world.entries()["low"].state == "waiting"

    assert high.take(let_low_leave) == 4
    high.leave()
    assert low.take(never) == 4


def test_a_run_of_the_same_priority_preempts_nobody(world: World) -> None:
    low = world.driver("low", 4, preemptible=True)
    low.take(never)
    low.placed(["n"] * 4, None)
    with pytest.raises(Gave):
        world.driver("other", 4).take(looks(1))
    assert not low.must_leave()


# -- files -----------------------------------------------------------------------------------------------------------


def test_an_entry_of_a_newer_version_is_left_alone(world: World) -> None:
    world.driver("newer", 4).take(never)
    folder = Board(world.storage, world.cluster.id).folder
    (name,) = world.storage.files(folder)
    content = world.storage.read_json(f"{folder}/{name}") | {"format": 99}
    world.storage.write_bytes(f"{folder}/{name}", json.dumps(content).encode())
    assert world.driver("r", 4).take(never) == 4
    assert name in world.storage.files(folder)


def test_leases_are_not_read_at_every_look(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.driver("other", 4).take(never)
    board = Board(world.storage, world.cluster.id)
    own = world.entries()["other"].model_copy(update={"run_id": "own", "driver": "own"})
    board.others(own)
    with counted_calls(monkeypatch) as calls:
        board.others(own)
    assert calls == ["files", "read_bytes"]
