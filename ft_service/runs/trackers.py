"""Trackers: a copy of a run's metrics in TensorBoard, Weights & Biases or MLflow, live or later.

Offline first: metrics.jsonl on storage is the record of a run, and a tracker can be filled from it at any time.
Without a server in the environment, W&B and MLflow write to folders on storage. A tracker that fails, or whose server
is away, neither ends nor delays the training.

    runs/<run id>/tensorboard/     event files
    runs/<run id>/wandb/           W&B's offline folder, where no API key is found
    mlflow/                        MLflow's file store for all runs, where MLFLOW_TRACKING_URI is not set
"""

import netrc
import os
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from ft_service.errors import FtError, Problem, StorageError, UsageError
from ft_service.runs.metrics import StepMetrics, read_metrics
from ft_service.spec.schema import ReportSpec
from ft_service.storage.storage import Storage
from ft_service.text import error_line

if TYPE_CHECKING:
    from ft_service.runs.folder import RunFolder

_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
_INSTALL = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow-skinny"}
_PLAN_FIGURES = ("num_steps", "zero_stage", "micro_batch_size", "training_digest")
_TENSORBOARD_QUEUE_SIZE = 1000
_CLOSE_SECONDS = 60.0
"""How long the end of a training waits for a tracker's last steps."""


class Tracker(Protocol):
    """One run in one tracker. Steps come in order, each one greater than the last."""

    def open(self) -> int:
        """Create or continue the tracker's run. Returns the last step that it holds, 0 for none."""

    def log(self, metrics: StepMetrics) -> None: ...

    def close(self, complete: bool) -> None:
        """Write what is pending. `complete`: the run has trained all its steps."""

    def where(self) -> tuple[str, str]:
        """Where the run is once it has been opened, and the command that shows it ('' for a page)."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker shows of a run beside its metrics."""

    run_id: str
    project: str
    settings: Mapping[str, Any]
    """Setting -> value, with dotted names, and the figures of the plan."""
    storage: Storage
    name: str | None = None
    """Shown instead of the run's id."""
    entity: str | None = None
    """W&B's user or team."""
    tags: Sequence[str] = ()

    def local_folder(self, name: str) -> Path:
        """The folder `name` below the storage root. Raises `StorageError` on an object store."""
        if not self.storage.is_local:
            raise StorageError(f"{self.storage.uri(name)}: is no folder, and a tracker without a server needs one.")
        return Path(self.storage.uri(name))


def tracked_run(run: "RunFolder") -> TrackedRun:
    """Raises `StorageError` for a run without a plan."""
    plan = run.plan()
    settings = dict(_flat(plan.spec.model_dump(mode="json")))
    for name in _PLAN_FIGURES:
        settings[f"plan.{name}"] = getattr(plan, name)
    report = plan.spec.report
    return TrackedRun(
        run.run_id, report.project, settings, run.storage, report.run_name, report.entity, tuple(report.tags)
    )


def new_tracker(name: str, run: TrackedRun) -> Tracker:
    """`name` is one of `report.trackers`. Opens nothing. Raises `UsageError` for an unknown name."""
    kinds: dict[str, Callable[[TrackedRun], Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow}
    if name not in kinds:
        raise UsageError(f"tracker = {name!r}: is unknown. Use one of {', '.join(kinds)}.")
    return kinds[name](run)


def tracker_problems(report: ReportSpec, storage: Storage) -> list[Problem]:
    """Trackers that cannot work with the packages, the environment and the storage of this process."""
    problems = []
    for name in report.trackers:
        if find_spec(_PACKAGES[name]) is None:
            cure = f"Run pip install {_INSTALL[name]} on every machine, or leave it out."
            problems.append(Problem("report.trackers", name, f"needs the package {_INSTALL[name]}", cure))
        elif not storage.is_local and name != "tensorboard" and not _has_server(name):
            setting = "WANDB_API_KEY" if name == "wandb" else "MLFLOW_TRACKING_URI"
            cure = f"Set {setting} in the job's environment, or send the run later: ft runs send RUN --to {name}."
            problems.append(Problem("report.trackers", name, "has no server, and storage is no folder", cure))
    return problems


@dataclass(frozen=True)
class Sent:
    """What `send` has done."""

    num_steps: int
    place: str
    """URI of a folder, or address of a server."""
    look: str
    """The command that shows it; empty where the place is a page."""


def send(run: "RunFolder", name: str) -> Sent:
    """Copy the steps of a run that tracker `name` lacks. Raises `FtError`."""
    if name in _PACKAGES and find_spec(_PACKAGES[name]) is None:
        raise UsageError(f"tracker = {name!r}: needs the package {_INSTALL[name]}. Run pip install {_INSTALL[name]}.")
    steps = read_metrics(run.storage, run.run_id)
    tracker = new_tracker(name, tracked_run(run))
    try:
        last = tracker.open()
        missing = [metrics for metrics in steps if metrics.step > last]
        for metrics in missing:
            tracker.log(metrics)
        tracker.close(complete=run.recorded_state() == "succeeded")
    except FtError:
        raise
    except Exception as error:  # of whatever kind its library raises
        raise StorageError(f"{name}: the run could not be sent: {error_line(error)}") from None
    return Sent(len(missing), *tracker.where())


class BackgroundTracker:
    """A sink that feeds a tracker from a thread of its own: training neither waits for it nor fails with it.

    `earlier` are the steps before this attempt: those that the tracker lacks are sent first.
    """

    def __init__(self, name: str, tracker: Tracker, earlier: Sequence[StepMetrics]) -> None:
        self._name = name
        self._tracker = tracker
        self._steps: SimpleQueue[StepMetrics | bool] = SimpleQueue()
        for metrics in earlier:
            self._steps.put(metrics)
        self._thread = threading.Thread(target=self._run, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def __call__(self, metrics: StepMetrics) -> None:
        self._steps.put(metrics)

    def flush(self) -> None:
        """Nothing waits for a tracker: what it lacks at a checkpoint, metrics.jsonl has."""

    def close(self, complete: bool = True) -> None:
        self._steps.put(complete)
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            self._warn(f"still sends after {_CLOSE_SECONDS:g} s, and is left behind")

    def _run(self) -> None:
        try:
            last = self._tracker.open()
            while not isinstance(metrics := self._steps.get(), bool):
                if metrics.step > last:
                    self._tracker.log(metrics)
            self._tracker.close(complete=metrics)
        except Exception as error:  # of whatever kind its library raises
            self._warn(f"gets no more steps ({error_line(error)})")

    def _warn(self, problem: str) -> None:
        print(
            f"The tracker {self._name} {problem}. Training is not affected; to send what is missing: "
            f"ft runs send RUN --to {self._name}",
            file=sys.stderr,
            flush=True,
        )


class TensorBoard:
    """Event files in the run's folder, on any storage. Each attempt writes all steps again and hides earlier files."""

    def __init__(self, run: TrackedRun) -> None:
        self._folder = run.storage.uri(f"runs/{run.run_id}/tensorboard")

    def open(self) -> int:
        from tensorboardX import SummaryWriter

        # File names hold whole seconds; without the suffix a quick resume would overwrite the previous file.
        suffix = f".{os.getpid()}"
        self._writer = SummaryWriter(
            self._folder, purge_step=1, filename_suffix=suffix, max_queue=_TENSORBOARD_QUEUE_SIZE
        )
        return 0

    def log(self, metrics: StepMetrics) -> None:
        for name, value in _figures(metrics).items():
            # The first write that fails ends the writer's thread. Its queue then fills up, and this one would block.
            if not self._writer.file_writer.event_writer._worker.is_alive():
                raise StorageError(f"{self._folder}: the event files cannot be written.")
            self._writer.add_scalar(name, value, metrics.step, walltime=metrics.time.timestamp())

    def close(self, complete: bool) -> None:
        self._writer.close()

    def where(self) -> tuple[str, str]:
        return self._folder, f"tensorboard --logdir {shlex.quote(self._folder)}"


class Wandb:
    """A W&B run whose id is that of the run: online where an API key is found, else in the run's folder.

    Offline, each attempt writes a whole run and replaces the folder of the attempt before: `wandb sync` of the one that
    is there uploads every step once. Online, W&B keeps the first of two values of a step that was repeated.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._tracked = run

    def open(self) -> int:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE") or ("online" if _has_server("wandb") else "offline")
        folder = self._folder(mode)
        self._run = wandb.init(
            project=self._tracked.project,
            id=self._tracked.run_id,
            name=self._tracked.name or self._tracked.run_id,
            entity=self._tracked.entity,
            tags=list(self._tracked.tags) or None,
            config=dict(self._tracked.settings),
            dir=folder,
            mode=mode,  # never the default: it asks for a key on the terminal
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
        )
        self._url = str(self._run.url or "")  # None offline
        return self._run.step - 1 if self._run.resumed else 0

    def _folder(self, mode: str) -> Path | None:
        if mode != "offline":
            return None
        folder = self._tracked.local_folder(f"runs/{self._tracked.run_id}")
        for earlier in folder.glob("wandb/offline-run-*"):
            shutil.rmtree(earlier)
        return folder

    def log(self, metrics: StepMetrics) -> None:
        self._run.log(_figures(metrics), step=metrics.step)

    def close(self, complete: bool) -> None:
        import wandb

        self._run.finish()
        wandb.teardown()  # waits for W&B's own process, which may write the file after `finish` has returned

    def where(self) -> tuple[str, str]:
        if self._url:
            return self._url, ""
        folder = str(self._tracked.local_folder(f"runs/{self._tracked.run_id}") / "wandb")
        return folder, f"wandb sync {shlex.quote(folder)}/offline-run-*"


class Mlflow:
    """An MLflow run named like the run, in the experiment `report.project`: on MLFLOW_TRACKING_URI, else on storage."""

    _TAG = "ft_service.run_id"

    def __init__(self, run: TrackedRun) -> None:
        self._tracked = run

    def open(self) -> int:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            # MLflow's other local store is SQLite, which several machines cannot share.
            os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
            uri = self._tracked.local_folder("mlflow").as_uri()
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        experiment = self._client.get_experiment_by_name(self._tracked.project)
        experiment_id = (
            experiment.experiment_id if experiment else self._client.create_experiment(self._tracked.project)
        )
        found = self._client.search_runs([experiment_id], f"tags.`{self._TAG}` = '{self._tracked.run_id}'")
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            tags = {**dict.fromkeys(self._tracked.tags, "true"), self._TAG: self._tracked.run_id}
            name = self._tracked.name or self._tracked.run_id
            created = self._client.create_run(experiment_id, run_name=name, tags=tags)
            self._id = created.info.run_id
        self._record_settings(found[0].data.params if found else {})
        return max((metric.step for metric in self._client.get_metric_history(self._id, "loss")), default=0)

    def _record_settings(self, recorded: Mapping[str, str]) -> None:
        for name, value in self._tracked.settings.items():
            if name not in recorded:
                self._client.log_param(self._id, name, value)
            elif recorded[name] != str(value):
                self._client.set_tag(self._id, f"changed.{name}", value)  # a parameter cannot be written twice

    def log(self, metrics: StepMetrics) -> None:
        from mlflow.entities import Metric

        milliseconds = int(metrics.time.timestamp() * 1000)
        figures = _figures(metrics).items()
        self._client.log_batch(self._id, [Metric(name, value, milliseconds, metrics.step) for name, value in figures])

    def close(self, complete: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if complete else "KILLED")

    def where(self) -> tuple[str, str]:
        if uri := os.environ.get("MLFLOW_TRACKING_URI"):
            return uri, ""
        folder = str(self._tracked.local_folder("mlflow"))
        return folder, f"MLFLOW_ALLOW_FILE_STORE=true mlflow server --backend-store-uri {shlex.quote(folder)}"


def _has_server(name: str) -> bool:
    """Whether the environment names a server of W&B or MLflow that this process may use."""
    if name == "mlflow":
        return bool(os.environ.get("MLFLOW_TRACKING_URI"))
    mode = os.environ.get("WANDB_MODE")
    if mode:
        return mode != "offline"
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        logged_in = netrc.netrc().authenticators(host or "") is not None  # `wandb login` writes there
    except (OSError, netrc.NetrcParseError):
        logged_in = False
    return logged_in or bool(os.environ.get("WANDB_API_KEY"))


def _figures(metrics: StepMetrics) -> dict[str, float]:
    return metrics.model_dump(exclude={"step", "time"}, exclude_none=True)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
