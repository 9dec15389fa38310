"""Faults on purpose: does a run recover by itself, how soon, with how many steps lost, and to the same result?

python benchmarks/faults.py [--faults worker-killed,...] [--methods lora,...] [--moments step,...] [--json FILE]
python benchmarks/faults.py --smoke
python benchmarks/faults.py --random-kills 35 [--methods lora] [--faults ...] [--seed 0]

A small Llama on two workers, each on a host (raylet) of its own, and a third host to spare, all on this machine. Each
cell of the matrix is a run that one fault strikes at one moment; it is compared with a run of the same method that
nothing disturbs. Nothing in the product helps: what it does is seen from its processes and its files.

With `--random-kills` it is one run, which takes so many minutes undisturbed, struck about once a minute by faults drawn
at random.

    recovery   seconds from the fault to the first step after it; where a driver is lost, it is submitted again at once,
               and where Ray is lost, its start counts too
    wasted     steps done before the fault that had to be done again
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from benchmarks.result import add_smoke_option, print_result, shrink
from ft_service.errors import FtError, TrainingError
from ft_service.registry.registry import Registry
from ft_service.runs.folder import RunFolder
from ft_service.spec.load import parse_run_spec
from ft_service.spec.schema import ParallelSpec, RunSpec
from ft_service.storage.storage import Storage
from tests.faults import (
    Driver,
    attempts,
    last_step,
    run_processes,
    steps,
    stop_process,
    unfinished_checkpoint,
    worker_processes,
)
from tests.hosts import QUICK_HEALTH_CHECKS, Cluster, Host, kill_all, nothing_left_behind
from tests.worlds import made_up_texts, write_base, write_records

METHODS = {
    "full": {"method": "{type: full}", "parallel.zero_stage": "3", "train.learning_rate": "1e-3"},
    "lora": {"method": "{type: lora, lora_rank: 64}", "parallel.zero_stage": "2"},
    "qlora": {"method": "{type: qlora, lora_rank: 64}", "parallel.zero_stage": "3"},
}
SIZES = {"hidden_size": 256, "num_layers": 4, "num_heads": 8, "num_kv_heads": 4, "intermediate_size": 704}
VOCAB_SIZE = 1024
VALIDATION_RECORDS = 1000
SMALLEST = {**SIZES, "hidden_size": 128, "num_layers": 1, "intermediate_size": 128}
"""With --smoke, and the next."""
FEWEST_VALIDATION_RECORDS = 20
STEPS = 60
SAVE_EVERY = 10
VALIDATE_EVERY = 35
STRUCK_AFTER = 24
"""Completed steps, where a fault strikes within a step: between two checkpoints."""
STRUCK_SAVE = 20
HANG_SECONDS = 15
MOST_LOSS_DIFFERENCE = 1e-3

MOMENT_SECONDS = 120
RUN_SECONDS = 240
TABLE_WIDTH = 150
"""Where nobody looks on: rich would take 80."""
CLEAN_SECONDS = 20
_POLL_SECONDS = 0.002
"""A step takes some tens of milliseconds, a save as many."""
_LOOK_SECONDS = 0.02
_START_SECONDS = 1.0
"""Age of the workers when a fault strikes them at the start: they load libraries or the model."""

HOSTS = [Host("head", "127.77.0.1", 0), *(Host(name, f"127.77.0.{n}", 1) for n, name in enumerate("abc", start=2))]

console = Console(highlight=False, stderr=True, soft_wrap=True)


# -- a run, and what can be done to it -------------------------------------------------------------------------------


@dataclass
class Stage:
    """A run under way, and what its faults act on."""

    cluster: Cluster
    folder: Path
    spec: Path
    run: RunFolder
    driver: Driver
    overrides: tuple[str, ...] = ()
    victim: int = 0
    """Process id of the worker that a fault strikes."""

    def submit(self) -> None:
        self.driver = submitted(self.cluster, self.folder, self.spec, self.run, *self.overrides)


def submitted(cluster: Cluster, folder: Path, spec: Path, run: RunFolder, *overrides: str) -> Driver:
    return Driver(cluster, spec, run, overrides, folder / f"{run.run_id}.log")


def kill_worker(stage: Stage) -> None:
    kill_all([psutil.Process(stage.victim)])


def stop_worker(stage: Stage) -> None:
    stop_process(stage.victim)


def raise_in_worker(stage: Stage) -> None:
    """See `in_workers/sitecustomize.py`."""
    Path(stage.cluster.environment["FT_RAISE_FOLDER"], str(stage.victim)).touch()


def kill_node(stage: Stage) -> None:
    host = next(h for h in HOSTS if stage.victim in {p.pid for p in stage.cluster.processes(h)})
    stage.cluster.kill(host)


def kill_driver(stage: Stage) -> None:
    stage.driver.kill()
    stage.submit()


def restart_head(stage: Stage) -> None:
    stage.cluster.kill()
    stage.driver.kill()  # it runs on the head
    stage.cluster.start(*HOSTS)
    stage.submit()


@dataclass(frozen=True)
class Fault:
    strike: Callable[[Stage], None]
    about: str
    needs: str = ""
    """A setting of `parallel` without which nothing would notice."""


FAULTS = {
    "worker-killed": Fault(kill_worker, "SIGKILL of a worker"),
    "worker-stopped": Fault(stop_worker, "SIGSTOP of a worker: it hangs", needs="hang_timeout_seconds"),
    "worker-raises": Fault(raise_in_worker, "an exception in a worker's training"),
    "node-killed": Fault(kill_node, "SIGKILL of all processes of a worker's host; another has room"),
    "driver-killed": Fault(kill_driver, "SIGKILL of the driver, then the run is submitted again"),
    "head-restarted": Fault(restart_head, "SIGKILL of all of Ray and the driver, then both again"),
}


# -- the moments: recognised from files and processes ----------------------------------------------------------------


def in_a_step(stage: Stage, whole: "Reference") -> None:
    """Certain: step `STRUCK_AFTER` was just written, and nothing but steps comes before the next save."""
    _wait(stage, lambda: last_step(stage.run) >= STRUCK_AFTER)


def in_a_save(stage: Stage, whole: "Reference") -> None:
    """Certain that it had begun and was not finished; it can still finish beside the fault, which the table tells."""
    _wait(stage, lambda: last_step(stage.run) >= STRUCK_SAVE and unfinished_checkpoint(stage.run) is not None)


def in_validation(stage: Stage, whole: "Reference") -> None:
    """Half a validation after the step before it. Sure as far as a step is much shorter, which is checked."""
    seconds = whole.step_seconds + whole.validation_seconds / 2
    if whole.validation_seconds < 5 * whole.step_seconds:
        raise TrainingError(f"validation takes {whole.validation_seconds:.2f} s: too short to be struck for sure.")
    _wait(stage, lambda: last_step(stage.run) >= VALIDATE_EVERY - 1)
    deadline = time.monotonic() + seconds
    _wait(stage, lambda: time.monotonic() >= deadline)
    if last_step(stage.run) != VALIDATE_EVERY - 1:
        raise TrainingError("missed the validation: its step was done before.")


def at_start(stage: Stage, whole: "Reference") -> None:
    """Certain: both workers exist, and have not said yet that they train."""

    def are_loading() -> bool:
        found = worker_processes(stage.cluster)
        return len(found) == 2 and all(time.time() - process.create_time() > _START_SECONDS for process in found)

    _wait(stage, are_loading)
    if attempts(stage.run):
        raise TrainingError("missed the start: the workers train.")


MOMENTS: dict[str, Callable[[Stage, "Reference"], None]] = {
    "step": in_a_step,
    "save": in_a_save,
    "validation": in_validation,
    "start": at_start,
}


def _wait(stage: Stage, is_time: Callable[[], bool], seconds: float = MOMENT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not is_time():
        if stage.driver.has_ended():
            raise TrainingError(f"the run ended before. {stage.driver.said()}")
        if time.monotonic() > deadline:
            raise TrainingError(f"the moment did not come within {seconds:.0f} s. {stage.driver.said()}")
        time.sleep(_POLL_SECONDS)


# -- undisturbed -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """A run of a method that nothing disturbed."""

    losses: list[float]
    final_loss: float
    digest: str
    step_seconds: float
    validation_seconds: float
    run_seconds: float
    """From submission to the end."""


def reference(cluster: Cluster, folder: Path, spec: Path, run: RunFolder, seconds: float, *overrides: str) -> Reference:
    began = time.monotonic()
    submitted(cluster, folder, spec, run, *overrides).wait(seconds)
    ran = time.monotonic() - began
    metrics = steps(run)
    gaps = {now.step: (now.time - before.time).total_seconds() for before, now in pairwise(metrics)}
    step_seconds = statistics.median(gaps.values())
    return Reference(
        losses=[m.loss for m in metrics],
        final_loss=run.outcome().final_loss,
        digest=published_digest(run),
        step_seconds=step_seconds,
        validation_seconds=gaps.get(VALIDATE_EVERY, step_seconds) - step_seconds,
        run_seconds=ran,
    )


def published_digest(run: RunFolder) -> str:
    status = run.status()
    if status is None or status.published is None:
        raise TrainingError(f"run {run.run_id} published nothing.")
    return Registry(run.storage).resolve(status.published).digest


# -- a cell ----------------------------------------------------------------------------------------------------------


@dataclass
class Cell:
    fault: str
    method: str
    moment: str
    skipped: str = ""
    """Why it was not tried."""
    recovered: bool = False
    recovery_seconds: float | None = None
    wasted_steps: int | None = None
    restarts: int | None = None
    resumed_at: int | None = None
    loss_difference: float | None = None
    """Largest one of all steps, from the undisturbed run."""
    same_digest: bool | None = None
    processes_left: list[str] = dataclasses.field(default_factory=list)
    files_left: list[str] = dataclasses.field(default_factory=list)
    remark: str = ""
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        return (
            self.recovered
            and self.wasted_steps is not None
            and self.wasted_steps <= SAVE_EVERY
            and self.loss_difference is not None
            and self.loss_difference <= MOST_LOSS_DIFFERENCE
            and not self.processes_left
            and not self.files_left
        )


def try_cell(cell: Cell, cluster: Cluster, folder: Path, spec: Path, whole: Reference, storage: Storage) -> None:
    """Run it, strike, wait for the end, and fill in what was found."""
    fault = FAULTS[cell.fault]
    moment = MOMENTS[cell.moment]
    began = time.monotonic()
    run = RunFolder(storage, f"{cell.fault}-{cell.method}-{cell.moment}")
    there_before = litter(storage)
    stage = Stage(cluster, folder, spec, run, submitted(cluster, folder, spec, run))
    try:
        moment(stage, whole)
        lived = attempts(run)
        stage.victim = lived[0].pid(1) if lived else max(p.pid for p in worker_processes(cluster))
        unfinished = unfinished_checkpoint(run)
        struck = datetime.now(UTC)
        seen = last_step(run)
        fault.strike(stage)
        while len(attempts(run)) == len(lived) and not stage.driver.has_ended():
            seen = max(seen, last_step(run))  # the lines of a dying attempt; the next one cuts them off
            if (datetime.now(UTC) - struck).total_seconds() > RUN_SECONDS:
                break
            time.sleep(_LOOK_SECONDS)
        stage.driver.wait(RUN_SECONDS)
        after = attempts(run)[len(lived) :]
        metrics = steps(run)
        if not after:
            raise TrainingError("it went on as if nothing had been.")
        resumed = after[-1].step
        cell.restarts = len(after)
        cell.resumed_at = resumed
        cell.wasted_steps = max(0, seen - resumed)
        cell.recovery_seconds = (metrics[resumed].time - struck).total_seconds()
        losses = [m.loss for m in metrics]
        if [m.step for m in metrics] != list(range(1, STEPS + 1)):
            raise TrainingError(f"its metrics have {len(metrics)} lines for {STEPS} steps.")
        cell.loss_difference = max(abs(a - b) for a, b in zip(losses, whole.losses, strict=True))
        cell.same_digest = published_digest(run) == whole.digest
        if cell.moment == "save":
            cut = unfinished is not None and f"step-{resumed:06}" < unfinished.name[: len("step-000000")]
            cell.remark = "the save was cut" if cut else "the save finished in spite of it"
        cell.recovered = True
    except (FtError, psutil.Error, OSError) as error:
        cell.remark = str(error)
    finally:
        cell.processes_left = left_processes(cluster, stage.driver)
        stage.driver.end()
        cell.files_left = sorted(litter(storage) - there_before)
        start_missing(cluster)
        cell.seconds = time.monotonic() - began


def start_missing(cluster: Cluster) -> None:
    """The hosts that a fault took."""
    cluster.start(*[host for host in HOSTS if host.name not in cluster.running()])


def litter(storage: Storage) -> set[str]:
    """Files and folders on storage that were begun and neither finished nor removed."""
    root = Path(storage.root)
    found = {path.relative_to(root).as_posix() for path in root.rglob("*") if _is_litter(path)}
    return {path for path in found if not path.startswith("ray/")}


def _is_litter(path: Path) -> bool:
    return path.name.startswith(".") or path.name.endswith(".partial") or path.name == "checkpoints"


def left_processes(cluster: Cluster, driver: Driver) -> list[str]:
    """Processes of the run that do not end with it; they are killed."""
    deadline = time.monotonic() + CLEAN_SECONDS
    while (left := [*run_processes(cluster), *driver.processes()]) and time.monotonic() < deadline:
        time.sleep(0.2)
    descriptions = []
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            descriptions.append(f"{process.pid} {process.status()} {' '.join(process.cmdline())[:80]}")
    kill_all(left)
    return descriptions


# -- the matrix ------------------------------------------------------------------------------------------------------


def write_spec(world: Path, method: str) -> Path:
    """The spec of a method; returns the file."""
    spec = f"""
name: faults
model: {{base: {world}/base}}
data:
  train: [{{path: {world}/train.jsonl, source: made up, license: CC0-1.0}}]
  validation: [{{path: {world}/validation.jsonl, source: made up, license: CC0-1.0}}]
  max_seq_len: 128
train: {{max_steps: {STEPS}, global_batch_size: 4, validate_every_steps: {VALIDATE_EVERY}}}
parallel: {{num_workers: 2, use_gpu: false}}
checkpoint: {{every_steps: {SAVE_EVERY}}}
report: {{samples: 0}}
storage: {world}/storage
"""
    settings = dict(METHODS[method])
    if "hang_timeout_seconds" in ParallelSpec.model_fields:
        settings["parallel.hang_timeout_seconds"] = str(HANG_SECONDS)
    parsed: RunSpec = parse_run_spec(spec, [f"{name}={value}" for name, value in settings.items()])
    file = world / f"{method}.yaml"
    file.write_text(json.dumps(parsed.model_dump(mode="json", exclude_unset=True)))  # JSON is YAML
    return file


@contextlib.contextmanager
def stage_set(methods: list[str], smoke: bool) -> Iterator[tuple[Path, Cluster]]:
    """A folder with base, data and specs, and the cluster; all of it is gone after the block."""
    with tempfile.TemporaryDirectory(prefix="ft-faults-") as temporary, nothing_left_behind():
        world = Path(temporary)
        write_records(world / "train.jsonl", 400)
        records = FEWEST_VALIDATION_RECORDS if smoke else VALIDATION_RECORDS
        write_records(world / "validation.jsonl", records, seed=1)
        write_base(world / "base", made_up_texts(), VOCAB_SIZE, SMALLEST if smoke else SIZES)
        for method in methods:
            write_spec(world, method)
        (world / "raise").mkdir()
        in_workers = str(ROOT / "benchmarks" / "in_workers")
        settings = {
            **QUICK_HEALTH_CHECKS,
            "PYTHONPATH": os.pathsep.join(filter(None, [in_workers, os.environ.get("PYTHONPATH")])),
            "FT_RAISE_FOLDER": str(world / "raise"),
        }
        with Cluster(world, HOSTS[0], settings) as cluster:
            console.print("Starting Ray: a head and three hosts for one worker each")
            cluster.start(*HOSTS)
            yield world, cluster


def matrix(arguments: argparse.Namespace) -> dict[str, Any]:
    cells = []
    with stage_set(arguments.methods, arguments.smoke) as (world, cluster):
        storage = Storage(str(world / "storage"))
        wholes: dict[str, Reference] = {}
        for method in arguments.methods:
            run = RunFolder(storage, f"whole-{method}")
            wholes[method] = whole = reference(cluster, world, world / f"{method}.yaml", run, RUN_SECONDS)
            console.print(
                f"{method}: undisturbed in {whole.run_seconds:.0f} s, a step {whole.step_seconds * 1000:.0f} ms, "
                f"validation {whole.validation_seconds:.1f} s, final loss {whole.final_loss:.6f}"
            )
        for fault in arguments.faults:
            for method in arguments.methods:
                for moment in arguments.moments:
                    cell = Cell(fault, method, moment)
                    cells.append(cell)
                    needs = FAULTS[fault].needs
                    if needs and needs not in ParallelSpec.model_fields:
                        cell.skipped = f"needs parallel.{needs}, which this version lacks"
                    else:
                        try_cell(cell, cluster, world, world / f"{method}.yaml", wholes[method], storage)
                    console.print(f"{len(cells):3} {summary(cell)}")
    tried = [cell for cell in cells if not cell.skipped]
    print_table(table_of(cells))
    recoveries = [cell.recovery_seconds for cell in tried if cell.recovery_seconds is not None]
    return {
        "benchmark": "faults",
        "figures": {
            "cells": [{**dataclasses.asdict(cell), "holds": cell.holds} for cell in cells],
            "tried": len(tried),
            "held": sum(cell.holds for cell in tried),
            "median_recovery_seconds": statistics.median(recoveries) if recoveries else None,
            "worst_recovery_seconds": max(recoveries, default=None),
            "worst_wasted_steps": max((c.wasted_steps for c in tried if c.wasted_steps is not None), default=None),
        },
        "goal": {
            "recovered": "every cell",
            "wasted_steps": SAVE_EVERY,
            "loss_difference": MOST_LOSS_DIFFERENCE,
            "left_behind": 0,
        },
        "holds": bool(tried) and all(cell.holds for cell in tried),
    }


def summary(cell: Cell) -> str:
    name = f"{cell.fault} / {cell.method} / {cell.moment}"
    if cell.skipped:
        return f"{name}: not tried, {cell.skipped}"
    if not cell.recovered:
        return f"{name}: NOT RECOVERED after {cell.seconds:.0f} s. {cell.remark}"
    left = "".join(f" LEFT {what}." for what in (cell.processes_left, cell.files_left) if what)
    return (
        f"{name}: {'held' if cell.holds else 'DID NOT HOLD'}, recovered in {cell.recovery_seconds:.1f} s, "
        f"{cell.wasted_steps} steps wasted, loss off by {cell.loss_difference:.1e}, "
        f"digest {'same' if cell.same_digest else 'another'}; cell took {cell.seconds:.0f} s. {cell.remark}{left}"
    )


def table_of(cells: list[Cell]) -> Table:
    columns = ("fault", "method", "moment", "recovered", "in s", "wasted", "loss off by", "digest", "left", "remark")
    table = Table(*columns, title="Faults")
    for cell in cells:
        if cell.skipped:
            table.add_row(cell.fault, cell.method, cell.moment, "not tried", *[""] * 5, cell.skipped)
            continue
        table.add_row(
            cell.fault,
            cell.method,
            cell.moment,
            "yes" if cell.recovered else "[red]no[/red]",
            _or_blank(cell.recovery_seconds, ".1f"),
            _or_blank(cell.wasted_steps, "d"),
            _or_blank(cell.loss_difference, ".1e"),
            {True: "same", False: "another", None: ""}[cell.same_digest],
            str(len(cell.processes_left) + len(cell.files_left)),
            cell.remark[:60],
        )
    return table


def print_table(table: Table) -> None:
    width = None if sys.stderr.isatty() else TABLE_WIDTH
    Console(highlight=False, stderr=True, width=width).print(table)


def _or_blank(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


# -- random kills ----------------------------------------------------------------------------------------------------

_SAVE_SECONDS = 10
_PAUSE_SECONDS = 20, 60
"""From a recovery to the next strike: with the recovery that is about a minute."""


@dataclass(frozen=True)
class Strike:
    fault: str
    step: int
    wasted_steps: int
    seconds: float
    """Until the next group of workers had said that it trains."""

    def __str__(self) -> str:
        return f"{self.fault} at step {self.step}, training again after {self.seconds:.0f} s"


def random_kills(arguments: argparse.Namespace) -> dict[str, Any]:
    """A run of some minutes, struck about once a minute, against the same one undisturbed."""
    method = arguments.methods[0]
    minutes = arguments.random_kills
    rng = random.Random(arguments.seed)
    with stage_set([method], arguments.smoke) as (world, cluster):
        storage = Storage(str(world / "storage"))
        spec = world / f"{method}.yaml"
        short = reference(cluster, world, spec, RunFolder(storage, "sizing"), RUN_SECONDS)
        num_steps = max(STEPS, round(60 * minutes / short.step_seconds))
        save_every = max(SAVE_EVERY, round(_SAVE_SECONDS / short.step_seconds))
        settings = (
            f"train.max_steps={num_steps}",
            f"train.validate_every_steps={num_steps}",
            f"checkpoint.every_steps={save_every}",
            f"parallel.max_failures={10 + round(6 * minutes)}",
        )
        console.print(f"{num_steps} steps of {short.step_seconds * 1000:.0f} ms, saved every {save_every}: undisturbed")
        limit = 60 * minutes * 4 + 600
        whole = reference(cluster, world, spec, RunFolder(storage, "whole"), limit, *settings)
        console.print(f"undisturbed in {whole.run_seconds:.0f} s; now with kills")

        run = RunFolder(storage, "killed")
        began = time.monotonic()
        stage = Stage(cluster, world, spec, run, submitted(cluster, world, spec, run, *settings), settings)

        def goes_on() -> bool:
            return not stage.driver.has_ended() and time.monotonic() - began < limit

        struck: list[Strike] = []
        while goes_on():
            due = time.monotonic() + rng.uniform(*_PAUSE_SECONDS)
            while time.monotonic() < due and goes_on():
                time.sleep(0.1)
            lived = attempts(run)
            seen = last_step(run)
            if not goes_on() or seen >= num_steps:
                break
            if not lived or not psutil.pid_exists(lived[-1].pid(0)):
                continue  # it is recovering
            fault = rng.choice(arguments.faults)
            stage.victim = lived[-1].pid(rng.randrange(2))
            moment = time.monotonic()
            try:
                FAULTS[fault].strike(stage)
            except psutil.NoSuchProcess:
                continue  # it was quicker: the run is done
            while len(attempts(run)) == len(lived) and goes_on():
                seen = max(seen, last_step(run))
                time.sleep(_LOOK_SECONDS)
            if len(attempts(run)) > len(lived):
                resumed = attempts(run)[len(lived)].step
                struck.append(Strike(fault, seen, max(0, seen - resumed), time.monotonic() - moment))
                console.print(f"{len(struck)}: {struck[-1]}, went on from step {resumed}")
            start_missing(cluster)
        stage.driver.wait(max(1.0, limit - (time.monotonic() - began)))
        took = time.monotonic() - began
        metrics = steps(run)
        complete = [m.step for m in metrics] == list(range(1, num_steps + 1))
        difference = max(abs(a - m.loss) for a, m in zip(whole.losses, metrics, strict=True)) if complete else None
        same_digest = published_digest(run) == whole.digest
        left = left_processes(cluster, stage.driver)
    wasted = sum(strike.wasted_steps for strike in struck)
    kills = len(struck)
    figures = {
        "method": method,
        "steps": num_steps,
        "save_every": save_every,
        "kills": kills,
        "kills_of": {fault: sum(strike.fault == fault for strike in struck) for fault in arguments.faults},
        "wasted_steps": wasted,
        "worst_wasted_steps": max((strike.wasted_steps for strike in struck), default=None),
        "median_seconds_to_train_again": statistics.median([s.seconds for s in struck]) if struck else None,
        "worst_seconds_to_train_again": max((strike.seconds for strike in struck), default=None),
        "undisturbed_seconds": whole.run_seconds,
        "disturbed_seconds": took,
        "overhead_percent": 100 * (took / whole.run_seconds - 1),
        "overhead_seconds_per_kill": (took - whole.run_seconds) / kills if kills else None,
        "loss_difference": difference,
        "same_digest": same_digest,
        "processes_left": left,
    }
    table = Table("what", "found", title=f"{method}, a kill about every minute")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    print_table(table)
    holds = kills > 0 and difference is not None and difference <= MOST_LOSS_DIFFERENCE and not left
    return {
        "benchmark": "random_kills",
        "figures": figures,
        "goal": {"loss_difference": MOST_LOSS_DIFFERENCE, "left_behind": 0},
        "holds": holds and all(strike.wasted_steps <= save_every for strike in struck),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, known in (("faults", FAULTS), ("methods", METHODS), ("moments", MOMENTS)):
        parser.add_argument(f"--{name}", type=_names(list(known)), default=list(known), help=", ".join(known))
    parser.add_argument("--random-kills", type=float, metavar="MINUTES", help="one long run instead of the matrix")
    parser.add_argument("--seed", type=int, default=0, help="of the random kills")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    add_smoke_option(parser)
    arguments = parser.parse_args()
    shrink(arguments, faults=["worker-killed"], methods=["lora"], moments=["step"], random_kills=None)
    result = random_kills(arguments) if arguments.random_kills else matrix(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print_result(arguments, **result)
    return 0


def _names(known: list[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
        return chosen

    return parse


if __name__ == "__main__":
    sys.exit(main())
