"""The decision of the queue: order, gangs, reservations, quotas, preemption. No storage, no clock, no Ray."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from ft_service.cluster.queue.entry import Entry
from ft_service.cluster.queue.schedule import (
    PASSING_SECONDS,
    Decision,
    Limits,
    Node,
    Quotas,
    could_ever_fit,
    decide,
    room_for,
)
from tests.cluster.queue.queue_cases import GPU, NOW, entry, later, node, running

NO_QUOTAS = Quotas()


def decided(
    entries: Sequence[Entry],
    nodes: Sequence[Node],
    quotas: Quotas = NO_QUOTAS,
    used: dict[str, float] | None = None,
    now: datetime = NOW,
) -> Decision:
    return decide(entries, nodes, quotas, used or {}, now)


# -- order -----------------------------------------------------------------------------------------------------------


def test_priority_goes_before_fairness_and_fairness_before_arrival() -> None:
    entries = [
        entry("early", arrived=1),
        entry("late", arrived=2),
        entry("bob", arrived=3, owner="bob"),
        entry("low", arrived=0, owner="bob", priority="low"),
        entry("high", arrived=4, priority="high"),
    ]
    decision = decided(entries, [], used={"ann": 5.0, "bob": 1.0})
    assert decision.order == ("high", "bob", "early", "late", "low")
    assert decision.place("bob") == 2 and decision.place("unknown") is None


def test_what_an_owner_uses_now_counts_like_what_it_used_before() -> None:
    entries = [running("a", {"n": 1}), entry("ann-2", arrived=1), entry("bob-1", arrived=2, owner="bob")]
    assert decided(entries, [], used={"bob": 0.5}).order == ("bob-1", "ann-2")
    assert decided(entries, [], used={"bob": 1.5}).order == ("ann-2", "bob-1")


# -- gangs -----------------------------------------------------------------------------------------------------------


def test_a_run_starts_only_when_all_its_workers_fit() -> None:
    nodes = [node("a", 2), node("b", 1)]
    assert decided([entry("r", 3)], nodes).starts == {"r": 3}
    decision = decided([entry("r", 4)], nodes)
    assert decision.starts == {} and decision.waits_for["r"].startswith(
        "room for 4 workers with 1 CPU, 1 GPU each; there is room for 3"
    )


def test_a_worker_is_not_spread_over_nodes() -> None:
    two_gpus = {"CPU": 1.0, "GPU": 2.0}
    assert decided([entry("r", 1, worker_resources=two_gpus)], [node("a", 1), node("b", 1)]).starts == {}


def test_an_elastic_run_starts_with_as_many_workers_as_fit() -> None:
    assert decided([entry("r", [8, 4, 2])], [node("a", 5)]).starts == {"r": 4}


def test_claimed_workers_take_room_before_ray_shows_them() -> None:
    claim = entry("claim", 3, state="claiming", workers=3, started=NOW)
    assert decided([claim, entry("r", 2)], [node("a", 4)]).starts == {}
    assert decided([claim, entry("r", 1)], [node("a", 4)]).starts == {"r": 1}


def test_the_room_of_workers_that_have_just_died_stays_theirs() -> None:
    assert decided([running("r", {"a": 3}), entry("s", 2)], [node("a", 4, free=4)]).starts == {}


def test_work_outside_the_queue_takes_room_too() -> None:
    decision = decided([entry("r", 2)], [node("a", 4, free=1)])
    assert decision.waits_for["r"] == (
        "room for 2 workers with 1 CPU, 1 GPU each; there is room for 1, and other work than training has the rest"
    )


def test_nodes_that_may_join_count_as_room() -> None:
    joining = Node("gpu-0", {"CPU": 8, "GPU": 8}, {"CPU": 8, "GPU": 8}, is_joining=True)
    assert decided([entry("r", 8)], [node("head", 0), joining]).starts == {"r": 8}


def test_living_nodes_are_taken_before_those_that_may_join() -> None:
    joining = Node("gpu-0", {"CPU": 8, "GPU": 8}, {"CPU": 8, "GPU": 8}, is_joining=True)
    claim = entry("claim", 2, state="claiming", workers=2, started=NOW)
    assert decided([claim, entry("r", 8)], [node("a", 2), joining]).starts == {"r": 8}


def test_a_claim_that_waits_for_nodes_to_come_back_holds_up_no_other() -> None:
    claim = entry("claim", 4, state="claiming", workers=4, started=NOW)
    assert decided([claim, entry("r", 2)], [node("a", 2)]).starts == {"r": 2}


def test_what_could_never_fit_is_counted_on_empty_nodes() -> None:
    assert could_ever_fit(entry("r", 4), [node("a", 2, free=0), node("b", 1, free=0)]) == 3


def test_room_beside_the_others() -> None:
    assert room_for(entry("r", [4, 2]), [running("s", {"a": 1})], [node("a", 4, free=3)]) == 2


# -- reservations ----------------------------------------------------------------------------------------------------


def test_a_small_run_passes_a_big_one_only_in_room_that_it_does_not_need() -> None:
    nodes = [node("a", 4, free=2), node("b", 2)]
    holder = running("long", {"a": 2}, expected_end=later(600))
    # In ten minutes there are six free slots, of which the big run needs five.
    decision = decided([holder, entry("big", 5, 1), entry("small", 1, 2), entry("second", 1, 3)], nodes)
    assert decision.starts == {"small": 1}
    assert decision.waits_for["second"] == "run big, which is before it and needs that room"


def test_a_run_that_ends_in_time_passes_for_an_hour() -> None:
    nodes = [node("a", 4, free=2)]
    holder = running("long", {"a": 2}, expected_end=later(2 * PASSING_SECONDS))
    quick = entry("quick", 2, 2, expected_seconds=600.0)
    assert decided([holder, entry("big", 4, 1), quick], nodes).starts == {"quick": 2}
    slow = entry("slow", 2, 2, expected_seconds=3 * PASSING_SECONDS)
    assert decided([holder, entry("big", 4, 1), slow], nodes).starts == {}
    unknown = entry("unknown", 2, 2)
    assert decided([holder, entry("big", 4, 1), unknown], nodes).starts == {}
    waited = entry("big", 4, -PASSING_SECONDS - 1)
    assert decided([holder, waited, quick], nodes).starts == {}


def test_a_run_that_does_not_fit_the_nodes_as_they_are_holds_up_no_other() -> None:
    assert decided([entry("big", 9, 1), entry("small", 2, 2)], [node("a", 4)]).starts == {"small": 2}


# -- quotas ----------------------------------------------------------------------------------------------------------


def test_a_quota_of_runs_at_once_holds_back_its_owner_alone() -> None:
    quotas = Quotas(owners={"ann": Limits(max_runs=2)})
    entries = [running("r", {"a": 1}), entry("s", 1, 1), entry("t", 1, 2), entry("b", 1, 3, owner="bob")]
    decision = decided(entries, [node("a", 8, free=7)], quotas)
    assert decision.starts == {"s": 1, "b": 1}
    assert decision.waits_for == {"t": "the quota of ann: 2 runs at once"}
    assert not decision.waits_for_room("t")


def test_a_quota_of_gpu_hours_counts_running_and_ended_runs() -> None:
    quotas = Quotas(default=Limits(max_worker_hours=10))
    entries = [running("r", {"a": 2}), entry("s", 1, 1)]  # two workers for an hour
    assert decided(entries, [node("a", 4, free=2)], quotas, {"ann": 7.9}).starts == {"s": 1}
    decision = decided(entries, [node("a", 4, free=2)], quotas, {"ann": 8.0})
    assert decision.waits_for == {"s": "the quota of ann: 10 GPU-hours in 7 days"}


# -- preemption ------------------------------------------------------------------------------------------------------


def test_only_a_preemptible_run_of_lower_priority_leaves() -> None:
    nodes = [node("a", 4, free=0)]
    high = entry("high", 2, 1, priority="high")
    old = running("old", {"a": 2}, started=-900, preemptible=True)
    new = running("new", {"a": 2}, started=-600, preemptible=True)
    assert decided([high, old, new], nodes).leaves == {"new"}
    low = running("low", {"a": 2}, started=-900, preemptible=True, priority="low")
    assert decided([high, low, new], nodes).leaves == {"low"}
    firm = running("firm", {"a": 2}, started=-600)
    assert decided([high, old, firm], nodes).leaves == {"old"}
    assert decided([entry("same", 2, 1), old, new], nodes).leaves == frozenset()


def test_no_run_leaves_in_vain_and_none_more_than_needed() -> None:
    nodes = [node("a", 4, free=0)]
    one = running("one", {"a": 1}, started=-100, preemptible=True)
    three = running("three", {"a": 3}, started=-600, preemptible=True)
    assert decided([entry("high", 5, 1, priority="high"), one, three], nodes).leaves == frozenset()
    assert decided([entry("high", 3, 1, priority="high"), one, three], nodes).leaves == {"three"}
    leaving = running("three", {"a": 3}, started=-600, preemptible=True).model_copy(update={"state": "leaving"})
    assert decided([entry("high", 3, 1, priority="high"), one, leaving], nodes).leaves == frozenset()


# -- estimates -------------------------------------------------------------------------------------------------------


def test_starts_are_estimated_from_the_ends_of_running_runs() -> None:
    nodes = [node("a", 4, free=0)]
    holders = [running("r", {"a": 2}, expected_end=later(60)), running("s", {"a": 2}, expected_seconds=3600.0 + 300)]
    waiting = [entry("t", 2, 1, expected_seconds=120.0), entry("u", 4, 2)]
    assert decided([*holders, *waiting], nodes).estimated_starts == {"t": later(60), "u": later(300)}


def test_an_unknown_end_makes_the_starts_behind_it_unknown() -> None:
    decision = decided([running("r", {"a": 4}), entry("s", 2, 1)], [node("a", 4, free=0)])
    assert decision.estimated_starts == {}


# -- whole histories -------------------------------------------------------------------------------------------------


class Simulation:
    """Runs a queue to its end: each run that starts holds its workers for its true duration, and then leaves."""

    def __init__(self, sizes: Sequence[int], quotas: Quotas = NO_QUOTAS) -> None:
        self.nodes = {f"n{number}": size for number, size in enumerate(sizes)}
        self.quotas = quotas
        self.entries: dict[str, Entry] = {}
        self.durations: dict[str, float] = {}
        self.used: dict[str, float] = {}
        self.now = NOW
        self.started: dict[str, datetime] = {}
        self.ended: set[str] = set()

    def add(self, run: Entry, duration: float) -> None:
        self.entries[run.run_id] = run.model_copy(update={"arrival": self.now, "since": self.now})
        self.durations[run.run_id] = duration

    def free(self) -> dict[str, int]:
        free = dict(self.nodes)
        for holder in self.entries.values():
            for name, count in holder.nodes.items():
                free[name] -= count
        return free

    def start_what_may(self) -> None:
        free = self.free()
        nodes = [node(name, size, free[name]) for name, size in self.nodes.items()]
        decision = decided(list(self.entries.values()), nodes, self.quotas, self.used, self.now)
        for run_id, count in decision.starts.items():
            placed = {}
            left = count
            for name in sorted(free, key=lambda name: -free[name]):
                placed[name] = min(left, free[name])
                free[name] -= placed[name]
                left -= placed[name]
            assert left == 0, f"{run_id} does not fit"
            update = {"state": "running", "workers": count, "nodes": placed, "started": self.now}
            self.entries[run_id] = self.entries[run_id].model_copy(update=update)
            self.started[run_id] = self.now
        assert set(decision.starts) | set(decision.waits_for) == set(decision.order)

    def end_next(self) -> bool:
        """Advance to the next end of a run; False if none runs."""
        holders = [held for held in self.entries.values() if held.started is not None]
        if not holders:
            return False
        first = min(holders, key=lambda held: (self._end(held), held.run_id))
        self.now = max(self.now, self._end(first))
        self.used[first.owner] = self.used.get(first.owner, 0.0) + first.worker_hours(self.now)
        del self.entries[first.run_id]
        self.ended.add(first.run_id)
        return True

    def _end(self, held: Entry) -> datetime:
        assert held.started is not None
        return held.started + timedelta(seconds=self.durations[held.run_id])

    def finish(self) -> None:
        self.start_what_may()
        while self.end_next():
            self.start_what_may()


sizes = st.lists(st.integers(1, 4), min_size=1, max_size=4)
runs = st.lists(
    st.tuples(
        st.integers(1, 8),
        st.floats(1, 10_000),
        st.sampled_from(["known", "wrong", "unknown"]),
        st.sampled_from(["ann", "bob", "eve"]),
        st.sampled_from(["low", "normal", "high"]),
        st.booleans(),
    ),
    max_size=10,
)


@given(sizes, runs, st.none() | st.integers(1, 3))
def test_every_run_that_fits_gets_its_turn_and_never_more_than_there_is(
    sizes: list[int], runs: list[tuple[int, float, str, str, str, bool]], max_runs: int | None
) -> None:
    simulation = Simulation(sizes, Quotas(default=Limits(max_runs=max_runs)))
    fitting = set()
    for number, (count, duration, known, owner, priority, is_elastic) in enumerate(runs):
        expected = {"known": duration, "wrong": duration / 3, "unknown": None}[known]
        counts = [count, 1] if is_elastic and count > 1 else [count]
        run = entry(f"r{number}", counts, owner=owner, priority=priority, expected_seconds=expected)
        simulation.add(run, duration)
        if counts[-1] <= sum(sizes):
            fitting.add(run.run_id)
        if number % 3 == 2:
            simulation.start_what_may()
            simulation.end_next()
    simulation.finish()
    assert simulation.ended == fitting


@given(sizes, st.lists(st.tuples(st.integers(1, 4), st.floats(10, 1000)), min_size=1, max_size=20))
def test_small_runs_whose_end_is_unknown_never_delay_a_big_one(
    sizes: list[int], small: list[tuple[int, float]]
) -> None:
    """A run that needs every slot starts when the runs that were there before it have ended."""
    total = sum(sizes)
    simulation = Simulation(sizes)
    simulation.add(entry("before", 1), 500.0)
    simulation.start_what_may()
    simulation.add(entry("big", total), 50.0)
    for number, (count, duration) in enumerate(small):
        if count <= total:
            simulation.add(entry(f"s{number}", count), duration)
        simulation.start_what_may()
    simulation.finish()
    assert simulation.started["big"] == later(500.0)


@given(sizes, st.lists(st.tuples(st.integers(1, 4), st.floats(10, 100_000)), max_size=20))
def test_estimates_that_are_wrong_delay_a_big_run_for_an_hour_at_most(
    sizes: list[int], small: list[tuple[int, float]]
) -> None:
    """Whoever promises to end in time passes, and then does not end. After an hour no estimate is believed."""
    total = sum(sizes)
    simulation = Simulation(sizes)
    simulation.add(entry("before", 1, expected_seconds=2 * PASSING_SECONDS), 2 * PASSING_SECONDS)
    simulation.start_what_may()
    simulation.add(entry("big", total), 50.0)
    for number, (count, duration) in enumerate(small):
        if count <= total:
            simulation.add(entry(f"s{number}", count, expected_seconds=1.0), duration)
    simulation.finish()
    hour = later(PASSING_SECONDS)
    passed = [run for run, start in simulation.started.items() if start < simulation.started["big"] and run != "before"]
    assert all(simulation.started[run] < hour for run in passed)


@given(st.integers(1, 3), st.lists(st.floats(60, 600), min_size=12, max_size=30))
def test_two_owners_with_endless_work_use_about_the_same(slots: int, durations: list[float]) -> None:
    """Ann enters everything before Bob does; all the same, their use differs by what is running at most."""
    simulation = Simulation([slots])
    half = len(durations) // 2
    for number, duration in enumerate(durations[:half]):
        simulation.add(entry(f"ann-{number}", owner="ann"), duration)
    for number, duration in enumerate(durations[half:]):
        simulation.add(entry(f"bob-{number}", owner="bob"), duration)
    simulation.start_what_may()
    while all(
        any(run.owner == owner and run.state == "waiting" for run in simulation.entries.values())
        for owner in ("ann", "bob")
    ):
        simulation.end_next()
        simulation.start_what_may()
    hours = {owner: simulation.used.get(owner, 0.0) for owner in ("ann", "bob")}
    for run in simulation.entries.values():
        hours[run.owner] += run.worker_hours(simulation.now)
    assert abs(hours["ann"] - hours["bob"]) <= slots * max(durations) / 3600 + 1e-9


def test_a_resource_that_a_node_lacks_is_not_there() -> None:
    assert (
        decided([entry("r", 1, worker_resources={**GPU, "accelerator_type:H100": 0.001})], [node("a", 4)]).starts == {}
    )
