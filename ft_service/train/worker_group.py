"""The workers of one attempt, run by Ray Train. Runs in the job's driver."""

import os
import secrets
import sys
import threading
import time
import traceback
from typing import Any

import ray
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray._raylet import RAY_NODE_ID_KEY  # type: ignore[attr-defined]
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.callbacks import DatasetsCallback, WorkingDirectorySetupCallback
from ray.train.v2._internal.callbacks.metrics import WorkerMetricsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import ENABLE_PRINT_PATCH_ENV_VAR, get_env_vars_to_propagate
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import state as train_state
from ray.train.v2._internal.execution.worker_group import worker_group as train_worker_group
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from ft_service.cluster.ray_cluster import kill_actors, remove_placement_groups, this_node_id
from ft_service.cluster.room import ray_accelerator_type, resources_per_worker
from ft_service.errors import FtError, ModelUnreachableError, StorageError, TrainingError
from ft_service.plan.plan import RunPlan
from ft_service.runs.folder import RunFolder
from ft_service.spec.schema import ParallelSpec
from ft_service.train.deaths import RAY_FAILED, DeathReason, TrainingDied, reason_line
from ft_service.train.environment import allocator_environment
from ft_service.train.ray_worker import Config, ProcessGroup, work

_AFTER_HANG_TIMEOUT_SECONDS = 120
_END_SECONDS = 30.0
_END_POLL_SECONDS = 0.5
WORKER = "RayTrainWorker"
"""Ray Train's actor of one worker."""
_NO_ROOM = ("WorkerGroupStartupTimeoutError", "InsufficientClusterResourcesError")
_MAY_PASS = (StorageError, ModelUnreachableError)
"""Errors of this project that may not happen again in the next attempt."""


class NoRoom(TrainingError):
    """The cluster had no room for all workers, and none of them started training."""


class WorkerGroup:
    """Workers that train a run. They start when this is constructed, and end with this process at the latest."""

    def __init__(self, plan: RunPlan, run: RunFolder, driver: str, controller: "Controller") -> None:
        """`driver` is the token of the driver's lease."""
        config = {"storage": run.storage.root, "run_id": run.run_id, "driver": driver}
        config["method"] = plan.spec.method.type
        self._trainer = _trainer(plan, run, config, controller)
        self._error: BaseException | None = None
        self._ended = threading.Event()
        # In a thread, because `fit` blocks the driver. (In the main thread Ray Train would also handle SIGINT.)
        threading.Thread(target=self._fit, name="workers", daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Wait at most this long. Returns whether the workers have ended.

        Raises `NoRoom` if they could not start, `TrainingDied` if they died, or the first worker's own `FtError`.
        """
        if not self._ended.wait(seconds):
            return False
        if _had_no_room(self._error):
            raise NoRoom(str(self._error)) from self._error
        if isinstance(self._error, ray.train.TrainingFailedError):
            raise _as_ft_error(self._error) from self._error
        if self._error is not None:
            raise TrainingDied(f"Ray could not run the workers: {self._error}", RAY_FAILED) from self._error
        return True

    def end(self) -> None:
        """Kill the workers if they still run, and wait until `fit` has returned.

        Trap: `ray.shutdown` crashes the process with a segmentation fault while another thread waits in a Ray call.
        """
        deadline = time.monotonic() + _END_SECONDS
        while not self._ended.is_set() and time.monotonic() < deadline:
            try:
                # Workers end with it. If the thread has only just started, this does nothing yet.
                kill_actors(LastingTrainController.__name__)
            except Exception as error:  # Ray raises many kinds; this must not hide why the run ends
                print(f"Could not end the workers yet: {error}", file=sys.stderr, flush=True)
            self._ended.wait(_END_POLL_SECONDS)

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:  # raised by `wait`
            self._error = error
        finally:
            try:
                remove_placement_groups()  # of a controller that was killed; Ray removes them with the driver only
            except Exception as error:  # Ray raises many kinds; `fit` knows more about why the workers ended
                print(f"Could not release what the workers reserved: {error}", file=sys.stderr, flush=True)
            self._ended.set()


class LastingTrainController(TrainController):
    """Ray Train's controller as an actor that can start and watch the workers of one attempt after another."""

    def __init__(self) -> None:
        # Ray Train's own constructor begins an attempt, see `train`.
        start_no_synchronization_actor()

    async def train(self, **arguments: Any) -> ray.train.Result:
        super().__init__(**arguments)
        await self.run()
        return self.get_result()


class _NoSynchronizationActor:
    """Takes the place of Ray Train's actor class."""

    @classmethod
    def options(cls, **_: Any) -> "type[_NoSynchronizationActor]":
        return cls

    @staticmethod
    def remote(**_: Any) -> str:
        return "no synchronization actor"  # sent to the workers, which could not unpickle a class of this module soon


def start_no_synchronization_actor() -> None:
    """Let this process, a controller, start workers without Ray Train's synchronization actor.

    The actor is for `ray.train.report` and Ray Train's collectives, which no worker calls. It is a process that imports
    Ray Train while the workers do, and Ray starts it before them.
    """
    train_worker_group.SynchronizationActor = _NoSynchronizationActor  # type: ignore[assignment,misc]
    train_state._shutdown_sync_actor = lambda sync_actor: None


class Controller:
    """The process of Ray Train's controller, on the driver's node. It ends with the driver at the latest.

    Ray Train would start one for each attempt, and the attempt would wait until it has imported Ray Train.
    """

    def __init__(self, parallel: ParallelSpec) -> None:
        self._parallel = parallel
        self._actor: Any = None

    def start(self) -> None:
        """Start the process unless it runs, and return at once: the earlier this is called, the less is waited for."""
        if self._actor is not None:
            return
        self._configure_ray_train()
        here = {RAY_NODE_ID_KEY: this_node_id()}
        # The coroutine of Ray Train's controller blocks, which Ray would warn of.
        environment = {RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: "0"} | get_env_vars_to_propagate()
        remote = ray.remote(num_cpus=0, label_selector=here, runtime_env={"env_vars": environment})
        self._actor = remote(LastingTrainController).remote()

    def train(self, **arguments: Any) -> ray.train.Result:
        """Run workers to their end. Raises a `RayActorError` if the controller dies, as when it is killed."""
        self.start()
        actor, self._actor = self._actor, None
        result = ray.get(actor.train.remote(**arguments))
        if result.error is None or isinstance(result.error, ray.train.WorkerGroupError) or _had_no_room(result.error):
            self._actor = actor  # after any other error a new one is safer
        return result

    def _configure_ray_train(self) -> None:
        os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = _longer_than_hang(self._parallel)
        # The driver watches for preemption itself, and Ray's watcher logs an error at every start.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # How often Ray Train looks whether its workers live: the seconds from a death to its notice, at most.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")


_LEFT_OUT = (
    DatasetsCallback,  # starts an actor for datasets; rows come from storage
    PlacementGroupCleanerCallback,  # starts an actor that does what `remove_placement_groups` does
    WorkerMetricsCallback,  # measures `ray.train.report`, which no worker calls
    WorkingDirectorySetupCallback,  # changes into a folder where the spec's relative paths do not resolve
)
"""Parts of Ray Train that every attempt would wait for. An actor is a process that imports Ray Train and pandas."""


class _Trainer(DataParallelTrainer):
    """Ray Train with a lasting controller, and without the parts of it that do nothing here."""

    def __init__(self, *arguments: Any, controller: Controller, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._controller = controller

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        callbacks = super()._create_default_callbacks()
        return [callback for callback in callbacks if not isinstance(callback, _LEFT_OUT)]

    def _initialize_and_run_controller(self, **arguments: Any) -> ray.train.Result:
        arguments["scaling_policy"] = _FixedNumber(self.scaling_config)  # type: ignore[arg-type]
        return self._controller.train(**arguments)


class _FixedNumber(FixedScalingPolicy):
    """Asks the autoscaler for nothing: the placement group that waits for room does so already.

    Ray's own starts an actor that asks for Ray Train and Ray Data together, and so replaces what an elastic run has
    requested (`ray_cluster.request_resources`).
    """

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass


def _had_no_room(error: BaseException | None) -> bool:
    return type(getattr(error, "controller_failure", None)).__name__ in _NO_ROOM


def worker_environment(parallel: ParallelSpec) -> dict[str, str]:
    """The environment variables of a worker."""
    environment = {
        "OMP_NUM_THREADS": str(parallel.reserved_cpus),  # `run_worker` raises it where it knows the node
        "DS_ACCELERATOR": "cuda" if parallel.use_gpu else "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        # Ray Train's `print` also logs each line, and both appear in the driver's log.
        ENABLE_PRINT_PATCH_ENV_VAR: "0",
        # These timeouts must be longer than the watchdog's, or the worker ends before the watchdog saves its stacks.
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": _longer_than_hang(parallel),
    }
    if parallel.use_gpu:  # here too, because a library may use CUDA when it is imported
        environment |= allocator_environment()
    return environment


def _longer_than_hang(parallel: ParallelSpec) -> str:
    return str(parallel.hang_timeout_seconds + _AFTER_HANG_TIMEOUT_SECONDS)


def _trainer(plan: RunPlan, run: RunFolder, config: Config, controller: Controller) -> _Trainer:
    parallel = plan.spec.parallel
    storage_filesystem, storage_path = run.storage.arrow("ray")
    return _Trainer(
        work,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=parallel.max_workers,
            use_gpu=parallel.use_gpu,
            resources_per_worker=resources_per_worker(parallel),
            accelerator_type=ray_accelerator_type(parallel.accelerator_type),
        ),
        backend_config=ProcessGroup(),
        controller=controller,
        run_config=RunConfig(
            # A new name, because Ray Train would continue an earlier attempt of the same name.
            name=f"{run.run_id}-{secrets.token_hex(4)}",
            storage_path=storage_path,
            storage_filesystem=storage_filesystem,
            worker_runtime_env={"env_vars": worker_environment(parallel)},  # type: ignore[call-arg]
            # The driver decides how to continue; Ray would restart the same number of workers without asking it.
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _as_ft_error(error: ray.train.TrainingFailedError) -> FtError:
    """The first worker's own `FtError`; for anything else a `TrainingDied`."""
    failures = getattr(error, "worker_failures", {})
    causes = [getattr(failure, "cause", None) or failure for failure in failures.values()]
    project_errors = [cause for cause in causes if isinstance(cause, FtError) and not isinstance(cause, _MAY_PASS)]
    if project_errors:
        return project_errors[0]
    if not failures:
        return TrainingDied(f"Ray could not run the workers: {error}", RAY_FAILED)
    rank, failure = next(iter(failures.items()))
    details = "".join(traceback.format_exception(failure))
    print(details, file=sys.stderr)
    # The full text of Ray's error may fill a screen: it goes to log and file, and its first line into the message.
    reason = DeathReason("worker", type(causes[0]).__name__, str(causes[0]))
    return TrainingDied(f"worker {rank} failed: {reason_line(causes[0])}", reason, details)
