"""In a long queue one waiting driver reads all entries, and the others read what it has written."""

import pytest

from ft_service.cluster.queue import turn as turn_module
from ft_service.cluster.queue.board import CLUSTERS, Board
from ft_service.cluster.queue.entry import Entry
from ft_service.cluster.queue.snapshot import PATIENCE_SECONDS, SHORT_QUEUE, SNAPSHOTS, Snapshots
from ft_service.cluster.queue.turn import Turn
from ft_service.cluster.queue.usage import QueueLimits
from tests.cluster.queue.queue_cases import Gave, World, entry, looks, never
from tests.cluster.queue.test_turn import counted_calls

COUNT = SHORT_QUEUE + 4
FILE = f"{SNAPSHOTS}/cluster-1.json"


@pytest.fixture
def crowd(world: World) -> list[Turn]:
    """A run that has all room, and others that wait for all of it."""
    first = world.driver("run-00", 4)
    first.take(never)
    first.placed(["n"] * 4, None)
    waiting = [world.driver(f"run-{number:02}", 4) for number in range(1, COUNT + 1)]
    for turn in waiting:
        look(turn)
    for _ in range(3):  # the early ones see how many have come, one of them writes, and the others read it
        for turn in waiting:
            look_again(turn)
    return [first, *waiting]


def look(turn: Turn) -> int | None:
    """One look of a driver. The number of its workers, if it starts."""
    try:
        return turn.take(looks(1))
    except Gave:
        return None


def look_again(turn: Turn) -> int | None:
    """A later look of a driver that waits already, within the same wait."""
    return turn._look(turn._others_while_waiting())


def test_a_look_in_a_long_queue_reads_one_file(
    crowd: list[Turn], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, turn in enumerate(crowd[1:]):
        with counted_calls(monkeypatch) as calls:
            look_again(turn)
        if number:
            assert calls == ["read_bytes"]
        else:
            assert calls.count("write_bytes") == 1 and calls.count("files") == 1
    assert [entry.place for entry in world.entries().values()] == [None, *range(1, COUNT + 1)]


def test_all_runs_of_a_long_queue_have_their_turn_in_order_and_one_at_a_time(crowd: list[Turn], world: World) -> None:
    started = ["run-00"]
    runs = {f"run-{number:02}": turn for number, turn in enumerate(crowd)}
    for _ in range(4 * COUNT):
        runs[started[-1]].leave()
        for run_id, turn in runs.items():
            if run_id not in started and look_again(turn):
                turn.placed(["n"] * 4, None)
                started.append(run_id)
        assert sum(entry.holds_workers for entry in world.entries().values()) <= 1
        if len(started) == len(runs):
            break
    assert started == list(runs)


def test_a_snapshot_that_is_old_starts_nothing(crowd: list[Turn], world: World) -> None:
    """It shows room that another run has taken since: the claim is withdrawn, and is not made again on it."""
    crowd[0].leave()
    assert look_again(crowd[1]) == 4  # it was the writer, and wrote nothing since
    old = Snapshots(world.storage, "cluster-1")
    old.read()
    assert old.current is not None
    own = next(one for one in old.current.entries if one.run_id == "run-02")
    others = [one for one in old.current.entries if one.run_id not in ("run-00", "run-01", "run-02")]
    writer = Snapshots(world.storage, "cluster-1")
    writer.read()
    writer.write(world.entries()["run-09"], [own, *others], {}, QueueLimits())
    states: list[str] = []
    write = Board.write

    def record(self: Board, entry: Entry) -> None:
        states.append(entry.state)
        write(self, entry)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Board, "write", record)
        for _ in range(3):
            assert look_again(crowd[2]) is None
    assert states.count("claiming") == 1 and world.entries()["run-02"].state == "waiting"


def test_limits_and_usage_come_with_the_snapshot(crowd: list[Turn], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_module, "_USAGE_SECONDS", 10.0)
    assert all(turn._used is not None for turn in crowd[1:])


def test_when_the_writer_is_gone_the_next_in_line_writes_and_then_the_one_behind_it(world: World) -> None:
    now = [0.0]
    entries = [entry(f"w{number}", arrived=number) for number in range(SHORT_QUEUE + 3)]
    writer, first, second = entries[5], entries[0], entries[1]
    shared = Snapshots(world.storage, "c", lambda: now[0])
    shared.read()
    assert shared.must_write(first, others(entries, first)) and not shared.must_write(second, others(entries, second))
    shared.write(writer, others(entries, writer), {}, QueueLimits())
    found = {one.run_id: Snapshots(world.storage, "c", lambda: now[0]) for one in (writer, first, second)}
    for seconds, expected in ((0, 0), (PATIENCE_SECONDS - 1, 0), (PATIENCE_SECONDS, 1), (2 * PATIENCE_SECONDS, 2)):
        now[0] = 1000.0 + seconds if seconds else 1000.0
        for one in (first, second):
            found[one.run_id].read()
        writing = [found[one.run_id].must_write(one, others(entries, one)) for one in (first, second)]
        assert sum(writing) == expected
    found["w5"].read()
    assert found["w5"].is_writer(writer) and not found["w0"].is_fresh()
    found["w5"].resign(writer, others(entries, writer))
    found["w0"].read()
    found["w1"].read()
    assert found["w0"].must_write(first, others(entries, first))
    assert not found["w1"].must_write(second, others(entries, second))


def others(entries: list[Entry], own: Entry) -> list[Entry]:
    return [one for one in entries if one != own]


@pytest.mark.parametrize("content", [b"{", b'{"format": 99}', b'{"format": 2}'])
def test_a_snapshot_that_cannot_be_read_is_written_again(crowd: list[Turn], world: World, content: bytes) -> None:
    world.storage.write_bytes(FILE, content)
    for turn in reversed(crowd[1:]):
        assert look_again(turn) is None
    assert len(Snapshots(world.storage, "cluster-1")._stored().entries) == COUNT + 1  # type: ignore[union-attr]


def test_an_entry_that_a_snapshot_no_longer_has_comes_back(crowd: list[Turn], world: World) -> None:
    world.storage.delete(f"{CLUSTERS}/cluster-1/{crowd[3]._own.file}")
    for turn in crowd[1:]:
        look_again(turn)
    assert "run-03" in world.entries()


def test_a_queue_that_has_become_short_is_read_whole_again(crowd: list[Turn], world: World) -> None:
    for turn in crowd[SHORT_QUEUE:]:
        turn.leave()
    for _ in range(2):
        for turn in crowd[1:SHORT_QUEUE]:
            look_again(turn)
    assert all(len(turn._known) == SHORT_QUEUE - 1 for turn in crowd[1:SHORT_QUEUE])
    crowd[0].leave()
    assert look_again(crowd[1]) == 4


def test_a_running_run_asks_the_snapshot_whether_it_is_in_the_way(
    world: World, crowd: list[Turn], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = crowd[0]
    assert not first.may_grow()  # it reads all entries, and knows from now on that they are many
    with counted_calls(monkeypatch) as calls:
        assert not first.may_grow()
    assert calls == ["read_bytes"]
    first._entry = first._own.model_copy(update={"preemptible": True, "priority": "low"})
    assert first.must_leave()
