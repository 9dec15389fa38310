"""A run seen from outside: its driver as a process of its own, and what its files on local storage tell."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil

from ft_service.errors import TrainingError
from ft_service.runs.events import TrainingStarted, WorkerPlace, read_events
from ft_service.runs.folder import RunFolder
from ft_service.runs.metrics import StepMetrics, read_metrics
from ft_service.train.checkpoints.manifest import Checkpoints
from tests.hosts import ROOT, Cluster, kill_all

_END_SECONDS = 30


class Driver:
    """jobs/train.py on the head's host, working on a run."""

    def __init__(self, cluster: Cluster, spec: Path, run: RunFolder, overrides: Sequence[str], log: Path) -> None:
        self._run = run
        self.log = log
        command = [*cluster.head.inside, sys.executable, "jobs/train.py", str(spec), "--run-id", run.run_id, *overrides]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=cluster.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def kill(self) -> None:
        """SIGKILL the process that does the work; another that only waits for it ends by itself."""
        kill_all([self._worker() or psutil.Process(self._process.pid)])
        self._process.wait(_END_SECONDS)

    def wait(self, seconds: float) -> None:
        """Until it has ended well. Raises `TrainingError` with the end of its log, also after so many seconds."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TrainingError(f"run {self._run.run_id} is not done after {seconds:.0f} s. {self.said()}") from None
        if self._process.returncode != 0:
            raise TrainingError(f"run {self._run.run_id} failed. {self.said()}")

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def processes(self) -> list[psutil.Process]:
        """All of it that has not ended."""
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            found = {process.pid: process for process in (root, *root.children(recursive=True))}
        if (worker := self._worker()) is not None:
            found[worker.pid] = worker
        return [process for process in found.values() if _is_alive(process)]

    def end(self) -> None:
        """Kill what is left of it."""
        kill_all(self.processes())
        self._process.wait(_END_SECONDS)

    def _worker(self) -> psutil.Process | None:
        """The process that says on storage that it drives the run; it need not be the one that was started."""
        try:
            lease = Path(self._run.storage.uri(f"{self._run.path}/lease.json"))
            found = psutil.Process(json.loads(lease.read_bytes())["pid"])
            return found if self._run.run_id in found.cmdline() else None
        except (FileNotFoundError, psutil.NoSuchProcess):
            return None


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@dataclass(frozen=True)
class Attempt:
    """The workers that began to train at a step."""

    step: int
    time: datetime
    workers: list[WorkerPlace]

    def pid(self, rank: int) -> int:
        return self.workers[rank].pid


def attempts(run: RunFolder) -> list[Attempt]:
    """All so far, oldest first."""
    events = read_events(run.storage, run.run_id)
    return [
        Attempt(event.step, event.time, event.workers)
        for event in events
        if isinstance(event, TrainingStarted) and event.time is not None
    ]


def steps(run: RunFolder) -> list[StepMetrics]:
    return read_metrics(run.storage, run.run_id)


def last_step(run: RunFolder) -> int:
    """0 before the first; cheap enough to ask a hundred times a second."""
    path = Path(run.storage.uri(f"{run.path}/metrics.jsonl"))
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 4096))
            whole = file.read().rpartition(b"\n")[0]
    except FileNotFoundError:
        return 0
    return int(json.loads(whole.rpartition(b"\n")[2])["step"]) if whole else 0


def unfinished_checkpoint(run: RunFolder) -> Path | None:
    """The folder of a checkpoint that is being written: the index does not name it, and one part is not there yet."""
    root = Path(run.storage.uri(f"{run.path}/checkpoints"))
    named = {entry.folder for entry in Checkpoints(run).entries()}
    for folder in root.glob("step-*"):
        if folder.name not in named and not (folder / "manifest.json").exists():
            return folder
    return None


def worker_processes(cluster: Cluster) -> list[psutil.Process]:
    """Those of a training, from the moment that Ray Train has made them."""
    return _titled(cluster, "RayTrainWorker")


def run_processes(cluster: Cluster) -> list[psutil.Process]:
    """All on the hosts that work for a training: workers, and what Ray Train controls them with."""
    return _titled(cluster, "RayTrainWorker", "TrainController")


def _titled(cluster: Cluster, *parts: str) -> list[psutil.Process]:
    found = []
    for process in cluster.processes():
        try:
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and any(part in title for part in parts):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def stop_process(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
