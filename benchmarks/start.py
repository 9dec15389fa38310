"""How long processes take to start, alternately for this checkout and for another one.

python benchmarks/start.py [--before PATH] [--rounds 2] [--smoke]

`--before` is another checkout of this project, with its own `.venv`. Both are measured on the same small Llama and the
same spec, alternately. Each round starts a Ray cluster of its own per checkout, submits a run of two CPU workers with
`ray job submit`, and kills one of the workers after its first checkpoint.

    CPU-seconds until ready   user + system time of one process: `ft --help` and `ft plan` until they end, the driver
                              until it asks for workers, a worker until the first step, a replica until its model is
                              loaded
    submit to first step      seconds from `ray job submit` to the first line of metrics.jsonl
    kill to next step         seconds from SIGKILL of a worker to the first step of the next attempt

Everything about a run is read from its files and its processes, so checkouts of different layouts can be compared.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from benchmarks.result import add_smoke_option, print_result, shrink
from ft_service.errors import ClusterError
from tests.hosts import Cluster, Host, kill_all, nothing_left_behind
from tests.worlds import SMALL, write_world

GOALS = {
    "driver CPU-s": 0.5,
    "worker CPU-s": 0.5,
    "replica CPU-s": 0.5,
    "submit to first step s": 0.6,
    "kill to next step s": 0.6,
}
"""At most this ratio of what it was before."""
STEPS = 100_000
SAVE_EVERY = 20
RUN_SECONDS = 300
_POLL_SECONDS = 0.02
_IDLE_PERCENT = 10.0
_IDLE_DEADLINE_SECONDS = 30.0
HOST = Host("head", "127.78.0.1", 2)

REPLICA = """
import asyncio
import importlib.util
if importlib.util.find_spec("serve.replica") is None:  # before there were several bases
    import serve.app
    config = serve.app.complete(serve.app.ServeConfig(storage={storage!r}, base={base!r}))
    replica = serve.app.ModelServer.func_or_class
    asyncio.run(replica.__init__(object.__new__(replica), config))
else:
    from ft_service.registry.registry import Registry
    from ft_service.storage.storage import Storage
    from serve.replica import make_engine
    from serve.settings import BaseSettings
    make_engine(BaseSettings(base={base!r}, cache_gib=0.1), Registry(Storage({storage!r})))
"""
"""What a replica does until it is ready: Ray Serve imports the module of its class. The first one was made this way,
because its constructor is asynchronous."""

Figures = dict[str, float]
console = Console(highlight=False, stderr=True, soft_wrap=True)


# -- one process -----------------------------------------------------------------------------------------------------


def python_of(checkout: Path) -> str:
    return str(checkout / ".venv/bin/python")


def cpu_seconds_of(command: list[str], checkout: Path) -> float:
    """User and system time of a command, without its children. Raises `ClusterError` with its output if it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "FT_"))}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, cwd=checkout, env=environment, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            output.seek(0)
            raise ClusterError(f"{' '.join(command)[:200]} failed. {output.read().decode(errors='replace')[-3000:]}")
    return usage.ru_utime + usage.ru_stime


def single_processes(checkout: Path, world: Path, spec: Path) -> Figures:
    cli = "ft_service.cli.app" if (checkout / "ft_service/cli/app.py").exists() else "ft_service.cli"
    ft = [python_of(checkout), "-m", cli]
    (world / "empty").mkdir(exist_ok=True)
    replica = REPLICA.format(storage=str(world / "empty"), base=str(world / "base"))
    return {
        "ft --help CPU-s": cpu_seconds_of([*ft, "--help"], checkout),
        "ft plan CPU-s": cpu_seconds_of([*ft, "plan", str(spec)], checkout),
        "replica CPU-s": cpu_seconds_of([python_of(checkout), "-c", replica], checkout),
    }


# -- a run -----------------------------------------------------------------------------------------------------------


class Run:
    """A submitted run, known by its files alone."""

    def __init__(self, cluster: Cluster, checkout: Path, spec: Path, storage: Path, run_id: str) -> None:
        self._folder = storage / "runs" / run_id
        self.log = cluster.folder / f"{run_id}.log"
        ray = str(checkout / ".venv/bin/ray")
        command = [ray, "job", "submit", "--address", cluster.dashboard, "--working-dir", ".", "--"]
        command += ["python", "jobs/train.py", str(spec), "--run-id", run_id]
        self.submitted = time.time()
        with self.log.open("wb") as output:
            self._job = subprocess.Popen(
                command, cwd=checkout, env=cluster.environment, stdout=output, stderr=subprocess.STDOUT
            )

    def wait_for(self, what: str, is_time: Callable[[], Any]) -> Any:
        """The first true value of `is_time`. Raises `ClusterError` when the job ends, or takes too long."""
        deadline = time.monotonic() + RUN_SECONDS
        while not (found := is_time()):
            if self._job.poll() is not None or time.monotonic() > deadline:
                raise ClusterError(f"No {what}. {self.log.read_text(errors='replace')[-3000:]}")
            time.sleep(_POLL_SECONDS)
        return found

    def end(self) -> None:
        kill_all([psutil.Process(self._job.pid)] if self._job.poll() is None else [])
        self._job.wait()

    def is_queued(self) -> bool:
        """Whether the driver has asked for workers."""
        state = self._json("status.json").get("state")
        return state is not None and state != "preparing"

    def driver(self) -> psutil.Process:
        return psutil.Process(int(self._json("lease.json")["pid"]))

    def attempts(self) -> list[list[int]]:
        """Process ids of the workers of each attempt that began to train."""
        events = self._lines("events.jsonl")
        return [[worker["pid"] for worker in event["workers"]] for event in events if event["type"] == "training"]

    def step_times(self) -> list[float]:
        """When each step was done, in seconds since the epoch."""
        return [datetime.fromisoformat(line["time"]).timestamp() for line in self._lines("metrics.jsonl")]

    def has_checkpoint(self) -> bool:
        return any(self._folder.glob("checkpoints/step-*/manifest.json"))

    def _json(self, name: str) -> dict[str, Any]:
        with suppress(FileNotFoundError, ValueError):
            return dict(json.loads((self._folder / name).read_bytes()))
        return {}

    def _lines(self, name: str) -> list[dict[str, Any]]:
        try:
            whole = (self._folder / name).read_bytes().rpartition(b"\n")[0]
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in whole.splitlines()]


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def run_and_kill(cluster: Cluster, checkout: Path, spec: Path, storage: Path, run_id: str) -> Figures:
    run = Run(cluster, checkout, spec, storage, run_id)
    try:
        run.wait_for("request for workers", run.is_queued)
        driver = cpu_seconds(run.driver())
        workers = run.wait_for("training", run.attempts)[0]
        first = run.wait_for("first step", run.step_times)[0]
        worker = statistics.mean(cpu_seconds(psutil.Process(pid)) for pid in workers)
        run.wait_for("checkpoint", run.has_checkpoint)
        struck = time.time()
        kill_all([psutil.Process(workers[1])])
        run.wait_for("second attempt", lambda: len(run.attempts()) > 1)
        going_on = run.wait_for("step after the kill", lambda: [t for t in run.step_times() if t > struck + 1])[0]
    finally:
        run.end()
    return {
        "driver CPU-s": driver,
        "worker CPU-s": worker,
        "submit to first step s": first - run.submitted,
        "kill to next step s": going_on - struck,
    }


# -- rounds ----------------------------------------------------------------------------------------------------------


def write_spec(world: Path) -> Path:
    spec = world / "spec.yaml"
    spec.write_text(
        f"""
name: start
model: {{base: {world}/base}}
method: {{type: lora, lora_rank: 4}}
data:
  train: [{{path: {world}/train.jsonl, source: made up, license: CC0-1.0}}]
  max_seq_len: 128
train: {{max_steps: {STEPS}, global_batch_size: 4, precision: fp32}}
parallel: {{num_workers: 2, use_gpu: false}}
checkpoint: {{every_steps: {SAVE_EVERY}}}
report: {{samples: 0}}
storage: {world}/storage
""",
        encoding="utf-8",
    )
    return spec


def wait_until_idle() -> None:
    """Ray's dashboard loads its modules for some seconds after `ray start` has returned."""
    deadline = time.monotonic() + _IDLE_DEADLINE_SECONDS
    while psutil.cpu_percent(interval=1.0) > _IDLE_PERCENT and time.monotonic() < deadline:
        pass


def measure(checkout: Path, side: str, number: int, world: Path, spec: Path, own_operators: bool) -> Figures:
    figures = single_processes(checkout, world, spec)
    folder = world / f"{side}-{number}"
    folder.mkdir()
    # Each checkout has a dataset and runs of its own: formats may differ.
    own = folder / "spec.yaml"
    own.write_text(spec.read_text().replace(f"{world}/storage", f"{folder}/storage"))
    # Two checkouts may use two versions of ninja, each of which takes the other's build for outdated.
    settings = {"TORCH_EXTENSIONS_DIR": str(world / f"{side}-operators")} if own_operators else {}
    with Cluster(folder, HOST, settings) as cluster:
        cluster.start(HOST)
        wait_until_idle()
        figures |= run_and_kill(cluster, checkout, own, folder / "storage", f"{side}-{number}")
    return figures


def commit_of(checkout: Path) -> str:
    return subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=checkout, text=True).strip()


def show(medians: dict[str, Figures], ratios: Figures) -> None:
    table = Table("what", *medians, "ratio", "goal", title="Start: medians")
    for name in medians["after"]:
        values = [f"{figures[name]:.2f}" for figures in medians.values()]
        goal = f"{GOALS[name]:.1f}" if name in GOALS and ratios else ""
        table.add_row(name, *values, f"{ratios[name]:.2f}" if ratios else "", goal)
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout to compare with; it needs a .venv")
    parser.add_argument("--rounds", type=int, default=2)
    add_smoke_option(parser)
    arguments = parser.parse_args()
    shrink(arguments, before=None, rounds=1)
    sides = {"after": ROOT}
    if arguments.before is not None:
        sides = {"before": arguments.before.resolve(), "after": ROOT}
    rounds: dict[str, list[Figures]] = {side: [] for side in sides}
    with (
        nothing_left_behind(),
        tempfile.TemporaryDirectory(prefix="ft-start-", ignore_cleanup_errors=True) as temporary,
    ):
        world = Path(temporary)
        write_world(world, sizes=SMALL)
        spec = write_spec(world)
        is_compared = len(sides) > 1
        for number in range(-1 if is_compared else 0, arguments.rounds):
            for side, checkout in sides.items():
                figures = measure(checkout, side, number, world, spec, own_operators=is_compared)
                console.print(f"round {number + 1} {side}: {figures}")
                if number >= 0:  # the round before the first one compiles DeepSpeed's operators
                    rounds[side].append(figures)
    medians = {
        side: {name: statistics.median(figures[name] for figures in measured) for name in measured[0]}
        for side, measured in rounds.items()
    }
    ratios = {}
    if "before" in medians:
        ratios = {name: medians["after"][name] / medians["before"][name] for name in medians["after"]}
    show(medians, ratios)
    holds = all(ratios[name] <= goal for name, goal in GOALS.items()) if ratios else None
    print_result(
        arguments,
        "start",
        commits={side: commit_of(checkout) for side, checkout in sides.items()},
        rounds=len(rounds["after"]),
        figures=medians,
        ratios=ratios,
        goal=GOALS if ratios else None,
        holds=holds,
    )


if __name__ == "__main__":
    main()
