"""The workers of one attempt, run by Ray Train. Runs in the job's driver."""

import os
import secrets
import sys
import threading
import time
import traceback
from typing import Any

import ray
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks import placement_group_callback
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import ENABLE_PRINT_PATCH_ENV_VAR
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.train.v2._internal.execution.controller.placement_group_cleaner import PlacementGroupCleaner

from ft_service.catalog.gpus import find_gpu
from ft_service.cluster.ray_cluster import kill_actors
from ft_service.errors import FtError, ModelUnreachableError, StorageError, TrainingError
from ft_service.plan.plan import RunPlan
from ft_service.runs.folder import RunFolder
from ft_service.spec.schema import ParallelSpec
from ft_service.train.deaths import RAY_FAILED, DeathReason, TrainingDied, reason_line
from ft_service.train.environment import allocator_environment

_AFTER_HANG_TIMEOUT_SECONDS = 120
_COORDINATOR_SECONDS = 60
_END_SECONDS = 30.0
_END_POLL_SECONDS = 0.5
_CONTROLLER = "TrainController"
"""Ray Train's actor that starts the workers; the only actor that the driver starts."""
WORKER = "RayTrainWorker"
"""Ray Train's actor of one worker."""
_CONFIG = dict[str, str]
_NO_ROOM = ("WorkerGroupStartupTimeoutError", "InsufficientClusterResourcesError")
_MAY_PASS = (StorageError, ModelUnreachableError)
"""Errors of this project that may not happen again in the next attempt."""


class NoRoom(TrainingError):
    """The cluster had no room for all workers, and none of them started training."""


class WorkerGroup:
    """Workers that train a run. They start when this is constructed, and end with this process at the latest."""

    def __init__(self, plan: RunPlan, run: RunFolder, driver: str) -> None:
        """`driver` is the token of the driver's lease."""
        config = {"storage": run.storage.root, "run_id": run.run_id, "driver": driver}
        config["method"] = plan.spec.method.type
        self._trainer = _trainer(plan, run, config)
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
        if type(getattr(self._error, "controller_failure", None)).__name__ in _NO_ROOM:
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
                kill_actors(_CONTROLLER)  # does nothing if the thread has only just started; workers end with it
            except Exception as error:  # Ray raises many kinds; this must not hide why the run ends
                print(f"Could not end the workers yet: {error}", file=sys.stderr, flush=True)
            self._ended.wait(_END_POLL_SECONDS)

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:  # raised by `wait`
            self._error = error
        finally:
            self._ended.set()


class _Trainer(TorchTrainer):
    """Ray Train without the actor that serves datasets: rows come from storage, and each attempt would wait for it.

    Its cleaner asks this cluster.
    """

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        left_out = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [CleanerCallback(), *(callback for callback in callbacks if not isinstance(callback, left_out))]


class Cleaner(PlacementGroupCleaner):
    """Ray Train's actor that frees the workers' resources when their controller has died.

    Trap: it asks Ray's state API for the controller, which chooses its Ray by the environment or by what runs on this
    machine. With another Ray there it fails, or finds no controller and takes the resources of a run that lives.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        os.environ.pop("RAY_API_SERVER_ADDRESS", None)  # of the cluster that jobs are submitted to
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        super().__init__(*args, **kwargs)


class CleanerCallback(PlacementGroupCleanerCallback):
    """Starts a `Cleaner`. Runs in the controller's process."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Runs when the controller's process receives this, before that process calls any other actor.

        Trap: the controller waits 5 s for Ray Data's coordinator. On a busy machine its process starts slower, and the
        controller logs a traceback at every try.
        """
        from ray.train.v2._internal.execution.scaling_policy import autoscaling_coordinator_client  # imports ray.data

        autoscaling_coordinator_client.AUTOSCALING_REQUESTS_GET_TIMEOUT_S = _COORDINATOR_SECONDS
        self.__dict__.update(state)

    def after_controller_start(self, train_run_context: Any) -> None:
        setattr(placement_group_callback, "PlacementGroupCleaner", Cleaner)  # noqa: B010 - to mypy, a type's name
        super().after_controller_start(train_run_context)


def resources_per_worker(parallel: ParallelSpec) -> dict[str, float]:
    """What Ray reserves for each worker."""
    return {"CPU": parallel.reserved_cpus, **({"GPU": 1} if parallel.use_gpu else {})}


def worker_environment(parallel: ParallelSpec) -> dict[str, str]:
    """The environment variables of a worker."""
    environment = {
        "OMP_NUM_THREADS": str(parallel.reserved_cpus),  # `run_worker` raises it where it knows the node
        "DS_ACCELERATOR": "cuda" if parallel.use_gpu else "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        # Ray Train would change into its own folder, where the spec's relative paths do not resolve.
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        # Ray Train's `print` also logs each line, and both appear in the driver's log.
        ENABLE_PRINT_PATCH_ENV_VAR: "0",
        # These timeouts must be longer than the watchdog's, or the worker ends before the watchdog saves its stacks.
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": _longer_than_hang(parallel),
    }
    if parallel.use_gpu:  # Ray Train may use CUDA before the worker's own code runs
        environment |= allocator_environment()
    return environment


def _longer_than_hang(parallel: ParallelSpec) -> str:
    return str(parallel.hang_timeout_seconds + _AFTER_HANG_TIMEOUT_SECONDS)


def _trainer(plan: RunPlan, run: RunFolder, config: _CONFIG) -> _Trainer:
    parallel = plan.spec.parallel
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = _longer_than_hang(parallel)
    # The driver watches for preemption itself, and Ray's watcher logs an error at every start.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # How often Ray Train looks whether its workers live: the seconds from a death to its notice, at most.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    return _Trainer(
        _work,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=parallel.max_workers,
            use_gpu=parallel.use_gpu,
            resources_per_worker=resources_per_worker(parallel),
            accelerator_type=ray_accelerator_type(parallel.accelerator_type),
        ),
        torch_config=TorchConfig(backend="nccl" if parallel.use_gpu else "gloo"),
        run_config=RunConfig(
            # A new name, because Ray Train would continue an earlier attempt of the same name.
            name=f"{run.run_id}-{secrets.token_hex(4)}",
            storage_path=run.storage.uri("ray") if run.storage.is_local else f"{run.storage.root}/ray",
            worker_runtime_env={"env_vars": worker_environment(parallel)},  # type: ignore[call-arg]
            # The driver decides how to continue; Ray would restart the same number of workers without asking it.
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _work(config: _CONFIG) -> None:
    from ft_service.cluster.ray_cluster import this_node_id
    from ft_service.model.light_imports import light_imports

    with light_imports(four_bit=config["method"] == "qlora"):
        from ft_service.train.parallel import import_deepspeed
        from ft_service.train.worker import run_worker

        import_deepspeed(os.environ["DS_ACCELERATOR"] == "cuda")

    # Metrics go to storage, not to ray.train.report, which would log those of every worker and keep none.
    run_worker(config["storage"], config["run_id"], config["driver"], this_node_id())


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


def ray_accelerator_type(name: str | None) -> str | None:
    """Ray's exact name: the spec may say rtx-4090 for GeForce-RTX-4090, and Ray would wait forever for such a node."""
    gpu = find_gpu(name)
    return gpu.name if gpu else name
