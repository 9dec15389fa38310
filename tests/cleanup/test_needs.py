"""What needs what: no decision ever breaks what stays. Properties over random storages, and single cases."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_service.cleanup.needs import (
    DELETION_ORDER,
    SERVED_AFTER_HIDING,
    DatasetFacts,
    Inventory,
    Item,
    Leftover,
    PublishedFacts,
    RunFacts,
    ServerFacts,
    needed_by,
    prune,
)

NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)
RUNS = ["r1", "r2", "r3"]
MODELS = ["m1", "m2"]
DIGESTS = ["d1", "d2", "d3"]

one_of_or_none = st.one_of(st.none(), st.sampled_from(MODELS))
unreadable = st.sampled_from(["", "", "", "is damaged"])
runs = st.builds(
    RunFacts,
    id=st.sampled_from(RUNS),
    state=st.sampled_from(["running", "failed", "succeeded"]),
    live=st.booleans(),
    joined=st.booleans(),
    succeeded=st.booleans(),
    chose_dataset=st.booleans(),
    datasets=st.frozensets(st.sampled_from(DIGESTS), max_size=2),
    model=one_of_or_none,
    unreadable=unreadable,
)
hidden = st.one_of(st.none(), st.integers(0, 60).map(lambda minutes: NOW - timedelta(minutes=minutes)))


def published(kind: str, ids: list[str]) -> st.SearchStrategy[PublishedFacts]:
    return st.builds(
        PublishedFacts,
        kind=st.just(kind),
        id=st.sampled_from(ids),
        run_id=st.sampled_from(RUNS),
        dataset=st.sampled_from(DIGESTS),
        base_model=one_of_or_none,
        base_fingerprint=st.sampled_from(["f1", "f2"]),
        hidden=hidden,
        listed=st.booleans(),
        unreadable=unreadable,
    ).filter(lambda facts: facts.listed or facts.hidden is not None)


folders = st.sampled_from([*DIGESTS, *(f"{digest}.preparing" for digest in DIGESTS)])


@st.composite
def datasets(draw: st.DrawFn) -> list[DatasetFacts]:
    names = draw(st.lists(folders, unique=True))
    complete = {name for name in names if "." not in name and draw(st.booleans())}
    return [
        DatasetFacts(name, name.partition(".")[0], name in complete, "." in name and name.partition(".")[0] in complete)
        for name in names
    ]


inventories = st.builds(
    Inventory,
    runs=st.lists(runs, unique_by=lambda run: run.id),
    published=st.builds(
        lambda models, adapters: [*models, *adapters],
        st.lists(published("model", MODELS), unique_by=lambda each: each.id),
        st.lists(published("adapter", ["a1", "a2", "a3"]), unique_by=lambda each: each.id),
    ),
    datasets=datasets(),
    servers=st.lists(st.builds(ServerFacts, st.just("s"), one_of_or_none, st.sampled_from(["f1", "f2"])), max_size=1),
    leftovers=st.lists(
        st.builds(Leftover, st.sampled_from(["adapters/.x", "models/.y"]), st.just("left"), st.booleans()),
        unique_by=lambda leftover: leftover.path,
    ),
)


def dangling(inventory: Inventory) -> set[tuple[str, str]]:
    """References of what is there to what is not, by names alone: an independent reading of the same rules."""
    models = {each.id for each in inventory.published if each.kind == "model" and each.listed}
    digests = {dataset.folder for dataset in inventory.datasets}
    found = set()
    for run in inventory.runs:
        found |= {(run.id, digest) for digest in run.datasets if digest not in digests}
        if run.model not in models and run.model is not None and run.joined and not run.succeeded:
            found.add((run.id, run.model))
    for each in inventory.published:
        if each.listed:
            if each.dataset not in digests:
                found.add((each.id, each.dataset))
            if each.kind == "adapter" and each.base_model is not None and each.base_model not in models:
                found.add((each.id, each.base_model))
    return found


@given(inventories)
def test_pruning_step_by_step_never_breaks_a_reference(inventory: Inventory) -> None:
    before = dangling(inventory)
    for decision in prune(inventory, NOW):
        if decision.goes:
            assert not needed_by(decision.item, inventory, NOW)
            inventory = inventory.without(decision.item)
            # Deleting a hidden item changes nothing: a reference to it was broken when it was hidden.
            assert dangling(inventory) <= before


@given(inventories)
def test_every_item_gets_one_decision_with_a_reason(inventory: Inventory) -> None:
    decisions = prune(inventory, NOW)
    assert [decision.item for decision in decisions] == inventory.items
    assert all(decision.reason for decision in decisions)
    assert decisions == prune(inventory, NOW)


@given(inventories)
def test_pruning_again_finds_nothing(inventory: Inventory) -> None:
    for decision in prune(inventory, NOW):
        if decision.goes:
            inventory = inventory.without(decision.item)
    assert not any(decision.goes for decision in prune(inventory, NOW))


@given(inventories)
def test_what_a_live_run_a_record_or_a_server_needs_never_goes(inventory: Inventory) -> None:
    goes = {decision.item for decision in prune(inventory, NOW) if decision.goes}
    live = [run for run in inventory.runs if run.live]
    for run in live:
        assert Item("run", run.id) not in goes
        assert not {Item("dataset", digest) for digest in run.datasets} & goes
        if run.model and run.joined and not run.succeeded:
            assert Item("model", run.model) not in goes
        for each in inventory.published:
            assert not (each.run_id == run.id and each.item in goes)
    for each in inventory.published:
        if each.hidden is None:
            assert each.item not in goes
            assert Item("dataset", each.dataset) not in goes
    for server in inventory.servers:
        if server.model:
            assert Item("model", server.model) not in goes


@given(inventories)
def test_a_run_that_can_be_resumed_or_has_succeeded_never_goes(inventory: Inventory) -> None:
    goes = {decision.item for decision in prune(inventory, NOW) if decision.goes}
    for run in inventory.runs:
        if run.joined or run.unreadable:
            assert Item("run", run.id) not in goes


@given(inventories)
def test_adding_a_need_never_lets_more_go(inventory: Inventory) -> None:
    """One more live run can only keep more."""
    busy = RunFacts("other", "preparing", live=True, joined=False, chose_dataset=False)
    more = Inventory(
        [*inventory.runs, busy], inventory.published, inventory.datasets, inventory.servers, inventory.leftovers
    )
    before = {decision.item for decision in prune(inventory, NOW) if decision.goes}
    after = {decision.item for decision in prune(more, NOW) if decision.goes}
    assert after <= before


# -- single cases ----------------------------------------------------------------------------------------------------


def fate(inventory: Inventory, kind: str, id: str) -> tuple[bool, str]:
    [decision] = [each for each in prune(inventory, NOW) if each.item == Item(kind, id)]  # type: ignore[arg-type]
    return decision.goes, decision.reason


DATASET = DatasetFacts("d1", "d1", complete=True)


def test_a_dataset_shared_by_runs_goes_with_the_last_of_them() -> None:
    first = RunFacts("r1", "failed", live=False, joined=True, datasets=frozenset({"d1"}))
    second = RunFacts("r2", "succeeded", live=False, joined=True, succeeded=True, datasets=frozenset({"d1"}))
    both = Inventory([first, second], datasets=[DATASET])
    assert fate(both, "dataset", "d1") == (False, "run r1 uses it, run r2 uses it")
    assert not fate(both.without(Item("run", "r1")), "dataset", "d1")[0]
    neither = both.without(Item("run", "r1")).without(Item("run", "r2"))
    assert fate(neither, "dataset", "d1") == (True, "no run or record uses it")


def test_a_dataset_that_a_record_names_stays_without_its_run() -> None:
    adapter = PublishedFacts("adapter", "a1", "gone", "d1", None)
    assert fate(Inventory(published=[adapter], datasets=[DATASET]), "dataset", "d1") == (False, "adapter a1 names it")


def test_a_run_that_never_joined_goes_and_with_it_what_only_it_used() -> None:
    run = RunFacts("r1", "failed", live=False, joined=False, datasets=frozenset({"d1"}))
    inventory = Inventory([run], datasets=[DATASET])
    assert [decision.item.kind for decision in prune(inventory, NOW) if decision.goes] == ["run", "dataset"]
    assert fate(Inventory([RunFacts("r1", "starting", live=True, joined=False)]), "run", "r1")[0] is False


def test_a_preparing_run_keeps_every_dataset_and_every_unfinished_one() -> None:
    run = RunFacts("r1", "preparing", live=True, joined=True, chose_dataset=False)
    unfinished = DatasetFacts("d2.preparing", "d2", complete=False)
    inventory = Inventory([run], datasets=[DATASET, unfinished])
    assert not any(decision.goes for decision in prune(inventory, NOW))
    failed = RunFacts("r1", "failed", live=False, joined=True, chose_dataset=False)
    inventory = Inventory([failed], datasets=[DATASET, unfinished])
    assert fate(inventory, "dataset", "d1")[0] is True
    assert fate(inventory, "dataset", "d2.preparing") == (False, "run r1 (failed) may continue with it")


def test_a_model_stays_while_an_adapter_a_resumable_run_or_a_server_needs_it() -> None:
    model = PublishedFacts("model", "m1", "r1", "d1", None)
    adapter = PublishedFacts("adapter", "a1", "r2", "d1", "m1")
    stopped = RunFacts("r3", "stopped", live=False, joined=True, model="m1")
    server = ServerFacts("s", "m1")
    inventory = Inventory([stopped], [model, adapter], servers=[server])
    assert needed_by(model.item, inventory, NOW) == [
        "run r3 (stopped) starts from it",
        "adapter a1 was trained on it",
        "server s serves it",
    ]
    assert needed_by(model.item, Inventory(published=[model]), NOW) == []
    # A model trained from it has weights of its own.
    other = PublishedFacts("model", "m2", "r4", "d1", "m1")
    assert needed_by(model.item, Inventory(published=[model, other]), NOW) == []


@pytest.mark.parametrize(("minutes", "goes"), [(1, False), (14, False), (15, True), (60, True)])
def test_files_of_a_hidden_adapter_stay_while_a_server_may_read_them(minutes: int, goes: bool) -> None:
    hidden = NOW - timedelta(minutes=minutes)
    adapter = PublishedFacts("adapter", "a1", "r", "d1", None, "f1", hidden=hidden, listed=False)
    assert fate(Inventory(published=[adapter], servers=[ServerFacts("s", None, "f1")]), "adapter", "a1")[0] is goes
    assert fate(Inventory(published=[adapter], servers=[ServerFacts("s", None, "f2")]), "adapter", "a1")[0] is True
    assert timedelta(minutes=15) == SERVED_AFTER_HIDING


def test_what_cannot_be_read_keeps_what_it_may_need() -> None:
    model = PublishedFacts("model", "m1", "r1", "d9", None, hidden=NOW, listed=False)
    damaged = RunFacts("r1", "unreadable", live=False, joined=True, unreadable="is damaged")
    inventory = Inventory([damaged], [model], datasets=[DATASET])
    assert fate(inventory, "dataset", "d1") == (False, "run r1 may use it (unreadable)")
    assert fate(inventory, "model", "m1") == (False, "run r1 may start from it (unreadable)")
    assert fate(inventory, "run", "r1") == (False, "cannot be read: is damaged")
    record = PublishedFacts("adapter", "a1", "", "", None, unreadable="is damaged")
    inventory = Inventory(published=[model, record], datasets=[DATASET])
    assert not any(decision.goes for decision in prune(inventory, NOW))


def test_an_unfinished_upload_stays_while_any_run_is_live() -> None:
    leftover = Leftover("adapters/.x", "an upload that was interrupted")
    run = RunFacts("r1", "publishing", live=True, joined=True)
    assert not fate(Inventory([run], leftovers=[leftover]), "leftover", "adapters/.x")[0]
    assert fate(Inventory(leftovers=[leftover]), "leftover", "adapters/.x")[0]


def test_order_is_what_needs_before_what_is_needed() -> None:
    assert DELETION_ORDER == ("run", "adapter", "model", "dataset", "leftover")
