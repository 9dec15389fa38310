"""What the control plane costs as a service grows: runs, leases, adapters, jobs, votes, the queue, large plans.

python benchmarks/control_plane.py [--smoke]

Two simulated services, one ten times as large as the other: 5,000 runs, 10,000 adapters, 5,000 fine-tuning jobs, 200
nodes, and a study with 20,000 comparisons to vote on. Their files are written without training, into a folder. Every
action is one that a person, a client or a driver waits for. For each, the table shows how often it asks the storage
(files read or written, listings) or the database, how many names the listings had, and how many statements read
a whole table, by SQLite's own query plan. What grows with the service is marked. Seconds are of the
larger one, on a local disk: on an object store, count 10 to 50 ms a call.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pyarrow import fs
from rich.console import Console
from rich.table import Table
from sqlalchemy import event

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.result import add_smoke_option, print_result, shrink
from ft_service.catalog.models import find
from ft_service.cleanup.removal import hide_adapter
from ft_service.cluster.queue.schedule import Node, Quotas, decide
from ft_service.plan.facts import DatasetFacts, Resources
from ft_service.plan.make import make_plan
from ft_service.registry.registry import AdapterRecord, Registry
from ft_service.runs.events import EventLog, Notice, read_events
from ft_service.runs.folder import RunFolder, RunStatus, find_run
from ft_service.runs.lease import Lease
from ft_service.runs.recent import RUNS_BY_DAY, begin, newest_runs
from ft_service.spec.load import dump_run_spec, parse_run_spec
from ft_service.spec.schema import RunSpec
from ft_service.storage.storage import Storage
from serve.database.database import open_database, session
from serve.database.tables import FineTuningJobRow
from serve.fine_tuning.job_records import Job, JobRecords, NewEvent
from serve.voting.ballots import Ballot, Ballots
from serve.voting.links import Rater
from tests.cluster.queue.queue_cases import entry, node, running
from tests.registry.test_registry import DRAFT
from tests.serve.voting.voting_world import make_study

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
GPUS = 8
RUNS_A_DAY = 20
GOAL_SECONDS = 1.0
SMALLER = 10
PAGE_OF_NAMES = 1000
"""What object stores return for a request; the days of two years fit into one."""

console = Console(highlight=False, stderr=True, soft_wrap=True)


@dataclass(frozen=True)
class Size:
    """How large a simulated service is."""

    runs: int
    adapters: int
    jobs: int
    nodes: int
    comparisons: int
    workers: int
    """Of the largest plan."""

    def smaller(self) -> "Size":
        return Size(*(max(1, number // SMALLER) for number in vars(self).values()))


FULL = Size(runs=5_000, adapters=10_000, jobs=5_000, nodes=200, comparisons=20_000, workers=512)


@dataclass
class Counts:
    """What an action asks of storage and database."""

    calls: int = 0
    names: int = 0
    statements: int = 0
    scans: int = 0


class CountedStorage(Storage):
    """Counts calls that reach the storage, and the names that listings return."""

    counts = Counts()

    def retry(self, function: Callable[[], Any], clock: Callable[[], float] | None = None) -> Any:
        CountedStorage.counts.calls += 1
        return super().retry(function, clock)

    def _names(self, path: str, kind: fs.FileType) -> list[str]:
        names = super()._names(path, kind)
        CountedStorage.counts.names += len(names)
        return names


# -- a service that has been in use for months -----------------------------------------------------------------------


class World:
    """A simulated service on a folder, with its database."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.size = size
        self.storage = CountedStorage(str(folder / "storage"))
        self.root = folder / "storage"
        self.registry = Registry(self.storage)
        self.engine = open_database(f"sqlite:///{folder}/service.db")
        self.jobs = JobRecords(self.engine)
        self.spec = RunSpec.model_validate(
            {
                "name": "bot",
                "model": {"base": "meta-llama/Llama-3.1-8B-Instruct"},
                "data": {"train": [{"path": "train.jsonl"}]},
                "storage": str(self.root),
            }
        )
        self.run_ids = [f"bot-{number:08x}" for number in range(size.runs)]
        self._write_runs()
        self.records = self._write_adapters()
        self._write_jobs()
        self.raters = [f"desk-r{number}" for number in range(20)]
        self._write_study()
        event.listen(self.engine, "before_cursor_execute", self._count_statement)

    def _write_runs(self) -> None:
        spec = dump_run_spec(self.spec)
        for number, run_id in enumerate(self.run_ids):
            began = BEGAN + timedelta(seconds=number * 86_400 / RUNS_A_DAY)
            folder = self.root / "runs" / run_id
            folder.mkdir(parents=True)
            status = RunStatus(run_id=run_id, state="succeeded", time=began)
            (folder / "status.json").write_text(status.model_dump_json())
            (folder / "spec.yaml").write_text(spec)
            day = self.root / RUNS_BY_DAY / f"{began:%Y-%m-%d}"
            day.mkdir(parents=True, exist_ok=True)
            (day / f"{began:%H%M%S}~{run_id}").write_bytes(b"\n")

    def _write_adapters(self) -> list[AdapterRecord]:
        with tempfile.TemporaryDirectory() as temporary:
            first = self.registry.publish(weights(Path(temporary)), DRAFT, "llama", "card {id}")
        made = [first]
        for number in range(1, self.size.adapters):
            record = first.model_copy(update={"id": f"llama-bot-{number:08x}", "run_id": f"bot-{number:08x}"})
            folder = self.root / "adapters" / record.id
            shutil.copytree(self.root / "adapters" / first.id, folder)
            (folder / "record.json").write_text(record.model_dump_json())
            made.append(record)
        self.registry.reconcile()
        return made

    def _write_jobs(self) -> None:
        with session(self.engine) as opened:
            opened.add_all(FineTuningJobRow(**vars(self.job(number))) for number in range(self.size.jobs))
            opened.commit()

    def job(self, number: int) -> Job:
        return Job(
            id=f"ftjob-{number:024x}",
            created=BEGAN + timedelta(minutes=number),
            key=f"key-{number % 50}",
            organization=None,
            model="llama",
            request={"model": "llama", "training_file": "file-1"},
            training_file="file-1",
            validation_file=None,
            seed=1,
            run_id=f"job-{number:024x}",
            alias=f"ft:llama::{number:08x}",
            state="succeeded" if number < self.size.jobs else "validating_files",
            since=BEGAN,
        )

    def _write_study(self) -> None:
        names = [f"rater{number}" for number in range(20)]
        number = max(10, self.size.comparisons // len(names))  # three are voted on
        self.study = make_study(self.engine, self.root, questions=number, raters=names, votes_per_item=len(names))

    def _count_statement(self, connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        CountedStorage.counts.statements += 1
        cursor.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
        CountedStorage.counts.scans += sum(row[3].startswith("SCAN") for row in cursor.fetchall())


def weights(folder: Path) -> Path:
    from safetensors.torch import save_file
    from torch import zeros

    (folder / "weights").mkdir()
    save_file({"a": zeros(1)}, folder / "weights" / "adapter_model.safetensors")
    (folder / "weights" / "adapter_config.json").write_text("{}")
    return folder / "weights"


# -- what somebody waits for -----------------------------------------------------------------------------------------


def list_newest(world: World) -> None:
    statuses = newest_runs(world.storage, 20)
    assert [status.run_id for status in statuses] == world.run_ids[:-21:-1][: len(statuses)]


def show_run(world: World) -> None:
    run = find_run(world.storage, world.run_ids[len(world.run_ids) // 2])
    assert run.status() is not None
    read_events(world.storage, run.run_id)


def start_run(world: World) -> None:
    run = RunFolder(world.storage, f"bot-new{time.monotonic_ns()}")
    with Lease(run, lambda text: None, confirms=False):
        begin(run, world.spec)
        run.set_state("preparing")
        EventLog(world.storage, run.run_id).emit(Notice(type="preparing", message="Preparing."))
    world.storage.delete(run.path)


def look_up(world: World) -> None:
    assert Registry(world.storage).resolve(world.records[-1].id).id == world.records[-1].id


def list_adapters(world: World) -> None:
    assert len(Registry(world.storage).records()) >= world.size.adapters - 1


def publish(world: World) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        draft = DRAFT | {"run_name": f"new {time.monotonic_ns()}", "run_id": "bot-new"}
        Registry(world.storage).publish(weights(Path(temporary)), draft, "other", "card")


def delete_over_http(world: World) -> None:
    hide_adapter(world.storage, world.records.pop().id)


def create_job(world: World) -> None:
    number = world.size.jobs + time.monotonic_ns() % 10**9
    job = replace(world.job(number), created=datetime.now(UTC))
    world.jobs.create(job, f"digest-{number}", [NewEvent("Created.")])


def list_jobs(world: World) -> None:
    page, more = world.jobs.list_jobs(FineTuningJobRow.key == "key-7", limit=20)
    assert page and (more or world.size.jobs <= 1_000)


def find_job(world: World) -> None:
    assert world.jobs.find(f"ftjob-{world.size.jobs // 2:024x}") is not None


def active_jobs(world: World) -> None:
    assert len(world.jobs.active()) <= 4


def vote(world: World) -> None:
    rater = Rater(world.raters[3], "desk")
    ballots = Ballots(world.engine, world.storage)
    shown = ballots.state(rater).comparison
    assert shown is not None
    ballots.vote(rater, Ballot(assignment=shown.id, round=shown.round, outcome="left"))


def decide_queue(world: World) -> None:
    """Three of four nodes are taken by runs of two nodes, and one run in five waits."""
    taken = world.size.nodes * 3 // 8
    holders = [running(f"r{n}", {f"n{2 * n}": GPUS, f"n{2 * n + 1}": GPUS}) for n in range(taken)]
    waiting = [entry(f"w{n}", 64, arrived=n, owner=f"owner{n % 20}") for n in range(world.size.nodes)]
    nodes: list[Node] = [node(f"n{n}", GPUS, free=0 if n < 2 * taken else GPUS) for n in range(world.size.nodes)]
    decision = decide([*holders, *waiting], nodes, Quotas(), {}, datetime.now(UTC))
    assert len(decision.order) == len(waiting)


def plan(world: World) -> None:
    workers = max(GPUS, world.size.workers // GPUS * GPUS)
    spec = parse_run_spec(
        (ROOT / "jobs/specs/lora-70b.yaml").read_text(),
        [f"parallel.num_workers={workers}", f"train.global_batch_size={workers * 2}"],
    )
    facts = DatasetFacts(
        digest="d",
        conversations=10**6,
        rows=10**6,
        tokens=4 * 10**9,
        loss_tokens=10**9,
        truncated=0,
        validation_conversations=1_000,
        validation_rows=1_000,
        validation_tokens=4 * 10**6,
        validation_loss_tokens=10**6,
    )
    known = find(spec.model.base)
    assert known is not None
    assert make_plan(spec, facts, known.shape, Resources(num_gpus=workers, gpu_type="H100")).fits


@dataclass(frozen=True)
class Action:
    name: str
    do: Callable[[World], None]
    lists_all: bool = False
    """Its result is a list of everything, so only its calls may not grow."""


ACTIONS = [
    Action("ft runs: the newest 20", list_newest),
    Action("ft show RUN", show_run),
    Action("a driver starts a run and ends", start_run),
    Action("look an adapter up", look_up),
    Action("list all adapters", list_adapters, lists_all=True),
    Action("publish an adapter", publish, lists_all=True),
    Action("DELETE an adapter over HTTP", delete_over_http),
    Action("create a job", create_job),
    Action("list 20 jobs of a key", list_jobs),
    Action("show a job", find_job),
    Action("the jobs that have not ended", active_jobs),
    Action("show a comparison and vote", vote),
    Action("decide the queue (all nodes)", decide_queue, lists_all=True),
    Action("plan 70B LoRA on all workers", plan),
]


@dataclass(frozen=True)
class Figures:
    counts: Counts
    seconds: float


def measure(world: World, action: Action) -> Figures:
    """The least seconds of three; the counts of the last, once caches of the process are warm."""
    seconds = []
    for _ in range(3):
        CountedStorage.counts = Counts()
        started = time.perf_counter()
        action.do(world)
        seconds.append(time.perf_counter() - started)
    return Figures(CountedStorage.counts, min(seconds))


@contextmanager
def worlds(size: Size) -> Iterator[tuple[World, World]]:
    with tempfile.TemporaryDirectory(prefix="ft-control-plane-") as temporary:
        made = []
        for name, one in (("smaller", size.smaller()), ("larger", size)):
            console.print(f"Making the {name} service: {one}")
            folder = Path(temporary, name)
            folder.mkdir()
            made.append(World(folder, one))
        yield made[0], made[1]


def grows(action: Action, smaller: Counts, larger: Counts) -> bool:
    """Whether an action asks for more in the larger service: calls, pages of a listing, or whole tables.

    Two calls more are the days that a list of runs crosses.
    """
    if larger.calls > smaller.calls + 2 or larger.scans > 0:
        return True
    return not action.lists_all and larger.names // PAGE_OF_NAMES > smaller.names // PAGE_OF_NAMES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_smoke_option(parser)
    parser.add_argument("--scale", type=float, default=1.0, help="of the larger service (default 1)")
    arguments = parser.parse_args()
    shrink(arguments, scale=0.02)
    size = Size(*(max(20, round(number * arguments.scale)) for number in vars(FULL).values()))
    table = Table("action", "calls", "names", "statements", "whole tables", "ms", "grows", box=None)
    figures: dict[str, dict[str, Any]] = {}
    with worlds(size) as (smaller, larger):
        for action in ACTIONS:
            before = measure(smaller, action)
            after = measure(larger, action)
            is_growing = grows(action, before.counts, after.counts)
            pairs = [
                f"{getattr(before.counts, name)} / {getattr(after.counts, name)}"
                for name in ("calls", "names", "statements", "scans")
            ]
            table.add_row(action.name, *pairs, f"{1000 * after.seconds:,.1f}", "yes" if is_growing else "")
            figures[action.name] = {
                "smaller": vars(before.counts),
                "larger": vars(after.counts),
                "seconds": round(after.seconds, 4),
                "grows": is_growing,
            }
    Console(width=120).print(table)
    slowest = max(one["seconds"] for one in figures.values())
    holds = slowest <= GOAL_SECONDS and not any(one["grows"] for one in figures.values())
    goal = {"seconds": GOAL_SECONDS, "grows": False}
    print_result(arguments, "control_plane", goal=goal, holds=holds, slowest_seconds=slowest, figures=figures)


if __name__ == "__main__":
    main()
