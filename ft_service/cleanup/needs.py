"""What needs what on storage, and so what can be deleted. Pure: decides from facts, reads and deletes nothing.

    running run ──> its dataset, the model it starts from, what it has published
    run that can be resumed ──> its dataset, the model it starts from
    published adapter ──> its dataset, the model it was trained on
    alias ──> the adapter that is promoted
    published model ──> its dataset
    running server ──> the model it serves, and for a while the files of adapters that were deleted meanwhile

"Model" here is one on the same storage: bases from elsewhere are never deleted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Literal

Kind = Literal["run", "adapter", "model", "dataset", "leftover"]

DELETION_ORDER: tuple[Kind, ...] = ("run", "adapter", "model", "dataset", "leftover")
"""Whatever needs something is deleted before it. So an interrupted deletion leaves nothing that lacks what it needs."""

SERVED_AFTER_HIDING = timedelta(minutes=15)
"""A server that resolved an adapter before it was hidden has answered, or loaded it, by then."""


@dataclass(frozen=True, order=True)
class Item:
    """Something on storage that is deleted as a whole. A leftover's id is its path."""

    kind: Kind
    id: str


@dataclass(frozen=True)
class RunFacts:
    """A run, as far as deleting is concerned."""

    id: str
    state: str
    """As `ft runs` shows it."""
    live: bool
    """A driver may be working on it."""
    joined: bool
    """It has a spec, so it got as far as a cluster and can be resumed. Deleting a run deletes the spec first."""
    succeeded: bool = False
    chose_dataset: bool = True
    """Its dataset is settled; a run that prepares data may still open or continue any dataset."""
    datasets: frozenset[str] = frozenset()
    model: str | None = None
    """Id of the model on this storage that it starts from."""
    unreadable: str = ""
    """Why its files cannot be read; what it needs is then unknown."""


@dataclass(frozen=True)
class PublishedFacts:
    """An adapter or model."""

    kind: Literal["adapter", "model"]
    id: str
    run_id: str
    dataset: str
    base_model: str | None
    """Id of the model on this storage that it was trained on."""
    base_fingerprint: str = ""
    hidden: datetime | None = None
    """When its deletion began; its files may still be there."""
    listed: bool = True
    """It has its record, so it can be resolved. Also True if its deletion was interrupted at once."""
    unreadable: str = ""
    alias: str = ""
    """Under which it is promoted."""

    @property
    def item(self) -> Item:
        return Item(self.kind, self.id)


@dataclass(frozen=True)
class DatasetFacts:
    """A folder of datasets/. Several folders may belong to one digest."""

    folder: str
    digest: str
    complete: bool
    is_remainder: bool = False
    """Shards that were left when the dataset was completed."""


@dataclass(frozen=True)
class ServerFacts:
    """A running server."""

    name: str
    model: str | None
    """Id of the model on this storage that it serves."""
    base_fingerprint: str = ""


@dataclass(frozen=True)
class Leftover:
    """What a process that died has left: an unfinished upload or deletion, an expired notice."""

    path: str
    reason: str
    may_be_in_use: bool = True
    """A running run may be writing it."""


@dataclass(frozen=True)
class Inventory:
    """Everything on a storage root that can be deleted, and the servers that use it."""

    runs: Sequence[RunFacts] = ()
    published: Sequence[PublishedFacts] = ()
    datasets: Sequence[DatasetFacts] = ()
    servers: Sequence[ServerFacts] = ()
    leftovers: Sequence[Leftover] = ()

    @property
    def items(self) -> list[Item]:
        """All items, in `DELETION_ORDER`."""
        items = [
            *(Item("run", run.id) for run in self.runs),
            *(published.item for published in self.published),
            *(Item("dataset", dataset.folder) for dataset in self.datasets),
            *(Item("leftover", leftover.path) for leftover in self.leftovers),
        ]
        return sorted(items, key=lambda item: (DELETION_ORDER.index(item.kind), item.id))

    def without(self, item: Item) -> "Inventory":
        """What is there once `item` is deleted."""
        return replace(
            self,
            runs=[run for run in self.runs if Item("run", run.id) != item],
            published=[published for published in self.published if published.item != item],
            datasets=[dataset for dataset in self.datasets if Item("dataset", dataset.folder) != item],
            leftovers=[leftover for leftover in self.leftovers if Item("leftover", leftover.path) != item],
        )


@dataclass(frozen=True)
class Decision:
    """Whether pruning deletes an item, and why (not)."""

    item: Item
    goes: bool
    reason: str
    cure: str = field(default="")
    """The command that deletes a kept item, or makes that possible; '' if there is none."""


def needed_by(item: Item, inventory: Inventory, now: datetime) -> list[str]:
    """Why nobody may delete `item`: what needs it, as clauses for a person. Empty if nothing does."""
    match item.kind:
        case "run":
            return [f"run {run.id} is {run.state}" for run in inventory.runs if run.id == item.id and run.live]
        case "adapter" | "model":
            return [
                reason
                for published in inventory.published
                if published.item == item
                for reason in _needs_published(published, inventory, now)
            ]
        case "dataset":
            return [
                reason
                for dataset in inventory.datasets
                if dataset.folder == item.id
                for reason in _needs_dataset(dataset, inventory)
            ]
        case "leftover":
            leftover = next((leftover for leftover in inventory.leftovers if leftover.path == item.id), None)
            if leftover is None or not leftover.may_be_in_use:
                return []
            return [f"run {run.id} is {run.state} and may be writing it" for run in inventory.runs if run.live]


def prune(inventory: Inventory, now: datetime | None = None) -> list[Decision]:
    """A decision about every item, in `DELETION_ORDER`. Deleting what goes, in this order, never breaks what stays.

    An item goes if nothing needs it and nobody can use it: a run that never joined a cluster, a dataset without runs
    and records, what is left of deletions and uploads. What a person may want is kept, with the command to delete it.
    """
    now = now or datetime.now(UTC)
    decisions = []
    for item in inventory.items:
        decision = _decide(item, inventory, now)
        decisions.append(decision)
        if decision.goes:
            inventory = inventory.without(item)
    return decisions


def _decide(item: Item, inventory: Inventory, now: datetime) -> Decision:
    if needs := needed_by(item, inventory, now):
        return Decision(item, goes=False, reason=_list(needs))
    match item.kind:
        case "run":
            return _decide_run(next(run for run in inventory.runs if run.id == item.id), inventory)
        case "adapter" | "model":
            return _decide_published(next(published for published in inventory.published if published.item == item))
        case "dataset":
            dataset = next(dataset for dataset in inventory.datasets if dataset.folder == item.id)
            return Decision(item, goes=True, reason=_why_unused(dataset))
        case "leftover":
            leftover = next(leftover for leftover in inventory.leftovers if leftover.path == item.id)
            return Decision(item, goes=True, reason=leftover.reason)


def _decide_run(run: RunFacts, inventory: Inventory) -> Decision:
    item = Item("run", run.id)
    cure = f"ft runs delete {run.id}"
    if run.unreadable:
        return Decision(item, goes=False, reason=f"cannot be read: {run.unreadable}", cure=cure)
    if not run.joined:
        return Decision(item, goes=True, reason="never joined a cluster, or its deletion was interrupted")
    if not run.succeeded:
        return Decision(item, goes=False, reason=f"{run.state}, can be resumed", cure=cure)
    published = [each.id for each in inventory.published if each.run_id == run.id and each.hidden is None]
    return Decision(item, goes=False, reason=f"published {_list(published) or 'what was deleted since'}", cure=cure)


def _decide_published(published: PublishedFacts) -> Decision:
    if published.hidden is not None:
        return Decision(published.item, goes=True, reason=f"was deleted at {published.hidden:%Y-%m-%d %H:%M} UTC")
    if published.unreadable:
        return Decision(published.item, goes=False, reason=f"cannot be read: {published.unreadable}")
    return Decision(published.item, goes=False, reason="published", cure=f"ft adapters delete {published.id}")


def _why_unused(dataset: DatasetFacts) -> str:
    if dataset.is_remainder:
        return "shards of a dataset that is complete"
    return "no run or record uses it" if dataset.complete else "unfinished, and no run can continue with it"


def _needs_published(published: PublishedFacts, inventory: Inventory, now: datetime) -> Iterator[str]:
    if published.alias and published.hidden is None:
        yield f"it is promoted as {published.alias}"
    for run in inventory.runs:
        if run.live and run.id == published.run_id:
            yield f"run {run.id}, which published it, is {run.state}"
    if published.kind == "model":
        yield from _needs_model(published.id, inventory)
    elif not published.listed and published.hidden is not None and now - published.hidden < SERVED_AFTER_HIDING:
        for server in inventory.servers:
            if server.base_fingerprint == published.base_fingerprint:
                yield f"server {server.name} may be answering with it until {_until(published.hidden)}"


def _needs_model(model: str, inventory: Inventory) -> Iterator[str]:
    for run in inventory.runs:
        if run.model == model and run.joined and not run.succeeded:
            yield f"run {run.id} ({run.state}) starts from it"
        elif run.unreadable:
            yield f"run {run.id} may start from it (unreadable)"
        elif run.live and not run.joined:
            yield f"run {run.id} is {run.state} and may start from it"
    for adapter in inventory.published:
        if adapter.kind != "adapter" or not adapter.listed:
            continue
        if adapter.unreadable:
            yield f"adapter {adapter.id} may need it (unreadable)"
        elif adapter.base_model == model:
            yield f"adapter {adapter.id} was trained on it"
    for server in inventory.servers:
        if server.model == model:
            yield f"server {server.name} serves it"


def _needs_dataset(dataset: DatasetFacts, inventory: Inventory) -> Iterator[str]:
    for run in inventory.runs:
        if not dataset.is_remainder and dataset.digest in run.datasets:
            yield f"run {run.id} uses it"
        elif run.unreadable:
            yield f"run {run.id} may use it (unreadable)"
        elif run.live and not run.chose_dataset:
            yield f"run {run.id} is {run.state} and may use it"
        elif run.joined and not run.chose_dataset and not dataset.complete and not dataset.is_remainder:
            yield f"run {run.id} ({run.state}) may continue with it"
    for published in inventory.published:
        if not published.listed or dataset.is_remainder:
            continue
        if published.unreadable:
            yield f"{published.kind} {published.id} may name it (unreadable)"
        elif published.dataset == dataset.digest:
            yield f"{published.kind} {published.id} names it"


def _until(hidden: datetime) -> str:
    return f"{hidden + SERVED_AFTER_HIDING:%H:%M} UTC"


def _list(parts: Sequence[str]) -> str:
    """At most three of the parts, and how many more there are."""
    more = len(parts) - 3
    return ", ".join(parts[:3]) + (f" and {more} more" if more > 0 else "")
