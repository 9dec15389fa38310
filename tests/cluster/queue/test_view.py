"""Reading the queue without Ray: the interface of the API, and `ft queue`."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from typer.testing import CliRunner

from ft_service.cli.app import app
from ft_service.cli.common import console
from ft_service.cluster.queue import view
from ft_service.cluster.queue.schedule import Node
from ft_service.cluster.queue.usage import USAGE, forget_usage, record_usage, used_hours
from ft_service.errors import UsageError
from ft_service.runs.folder import RunFolder
from tests.cluster.queue.queue_cases import Gave, World, entry, looks, never, running


def ft(world: World, *arguments: str) -> str:
    done = CliRunner().invoke(app, [*arguments, "--storage", world.storage.root], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def ft_json(world: World, *arguments: str) -> Any:
    return json.loads(ft(world, *arguments, "--json"))


@pytest.fixture
def busy(world: World) -> World:
    """One run has all four slots, and two wait: a later one of high priority is the first of them."""
    first = world.driver("first", 4, owner="eve")
    first.take(never)
    first.placed(["n"] * 4, 600.0)
    for run_id, queue in (("second", {}), ("third", {"priority": "high"})):
        with pytest.raises(Gave):
            world.driver(run_id, 2, **queue).take(looks(1))
    return world


def test_place_and_reason_of_a_run(busy: World) -> None:
    assert view.place(busy.storage, "third") == 1
    assert view.waiting_for(busy.storage, "third") == (
        "room for 2 workers with 1 CPU each; there is room for 0; running: first (4 workers)"
    )
    assert view.place(busy.storage, "first") is None and view.waiting_for(busy.storage, "first") is None
    assert view.place(busy.storage, "unknown") is None
    found = view.find(busy.storage, "first")
    assert found is not None and found.state == "running"


def test_a_forecast_for_a_run_that_is_not_there_yet(busy: World) -> None:
    wanted = entry("wanted", 2, owner="bob", worker_resources={"CPU": 1.0})
    nodes = [Node("n", {"CPU": 4.0}, {"CPU": 0.0})]
    active = [one.entry for one in view.read_queue(busy.storage, "cluster-1")]
    forecast = view.estimate(busy.storage, wanted, active, nodes)
    assert forecast.place == 2 and "room for 2 workers" in forecast.waits_for
    assert forecast.estimated_start is not None
    assert 0 < (forecast.estimated_start - datetime.now(UTC)).total_seconds() <= 600
    assert view.estimate(busy.storage, wanted, active).estimated_start is None
    assert view.estimate(busy.storage, wanted, []).place == 0
    assert view.estimate(busy.storage, wanted, [], [Node("n", {"CPU": 4.0}, {"CPU": 4.0})]).place == 0
    assert set(busy.entries()) == {"first", "second", "third"}


def test_ft_queue_lists_who_has_workers_and_then_who_waits(busy: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_width", 200)
    listed = ft_json(busy, "queue")
    assert [(item["run"], item["state"], item["place"]) for item in listed] == [
        ("first", "running", None),
        ("third", "waiting", 1),
        ("second", "waiting", 1),  # as it was written when that run looked last
    ]
    assert [item["workers"] for item in listed] == [4, 2, 2]
    assert listed[0]["expected_end"] is not None and listed[1]["estimated_start"] is not None
    text = ft(busy, "queue")
    assert "estimated start" in text and "high" in text and "running: first (4 workers)" in text


def test_ft_queue_leaves_out_a_driver_that_is_gone_and_removes_nothing(busy: World) -> None:
    busy.storage.delete("runs/first/lease.json")
    assert [item["run"] for item in ft_json(busy, "queue")] == ["third", "second"]
    assert "first" in busy.entries()


def test_an_empty_queue(world: World) -> None:
    assert ft(world, "queue") == "The queue is empty.\n"
    assert ft_json(world, "queue") == []


def test_ft_runs_has_the_place_of_a_queued_run(busy: World) -> None:
    RunFolder(busy.storage, "first").set_state("running")
    places = {run["run_id"]: (run["state"], run["place"]) for run in ft_json(busy, "runs")}
    assert places == {"first": ("running", None), "second": ("queued", 1), "third": ("queued", 1)}
    assert "Place 1 in the queue: waits for room for 2 workers" in ft(busy, "runs")


def test_quotas_are_set_listed_and_removed(world: World) -> None:
    ft(world, "queue", "limit", "ann", "--runs", "2", "--gpu-hours", "10", "--window-hours", "24")
    ft(world, "queue", "limit", "default", "--runs", "1")
    used = ft_json(world, "queue", "usage")
    assert used == {"window_hours": 24.0, "owners": {"ann": {"gpu_hours": 0.0, "max_runs": 2, "max_gpu_hours": 10.0}}}
    assert "no limit" not in ft(world, "queue", "usage")
    ft(world, "queue", "limit", "ann", "--remove")
    assert ft_json(world, "queue", "usage")["owners"] == {}
    for arguments in (["ann"], ["ann", "--remove", "--runs", "2"]):
        with pytest.raises(UsageError):
            ft(world, "queue", "limit", *arguments)


def test_usage_is_what_ended_within_the_window(world: World) -> None:
    now = datetime(2026, 11, 28, 12, tzinfo=UTC)
    for run_id, days_ago in (("a", 0), ("b", 3), ("c", 30)):
        end = now - timedelta(days=days_ago)
        used = running(run_id, {"n": 2}).model_copy(update={"started": end - timedelta(hours=3)})
        record_usage(world.storage, used, end)
        record_usage(world.storage, used, end)  # two drivers may find the same one gone
    assert used_hours(world.storage, now) == {"ann": 12.0}
    assert used_hours(world.storage, now, window_hours=24) == {"ann": 6.0}
    forget_usage(world.storage, now)
    assert len(world.storage.folders(USAGE)) == 2


def test_no_run_that_has_ended_is_read(busy: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        RunFolder(busy.storage, f"old-{number}").set_state("succeeded")
    read: list[str] = []
    real = type(busy.storage).read_bytes
    monkeypatch.setattr(type(busy.storage), "read_bytes", lambda self, path: (read.append(path), real(self, path))[1])
    view.read_queue(busy.storage)
    view.place(busy.storage, "second")
    with pytest.raises(Gave):
        busy.driver("fourth").take(looks(1))
    assert read and not any("old" in path for path in read)
