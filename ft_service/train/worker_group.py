"""The workers of one attempt, as Ray Train runs them. The only user of ray.train; runs in the job's driver."""

import os
import secrets
import sys
import threading
import time
import traceback

import ray
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from ft_service.cluster.ray_cluster import kill_actors
from ft_service.errors import FtError, ModelUnreachableError, StorageError, TrainingError
from ft_service.plan.plan import RunPlan
from ft_service.runs.folder import RunFolder
from ft_service.spec.schema import ParallelSpec

_BEYOND_HANG_SECONDS = 120
_END_SECONDS = 30.0
_END_POLL_SECONDS = 0.5
_CONTROLLER = "TrainController"
"""Ray Train's actor that makes the workers; the only one that the driver makes."""
_CONFIG = dict[str, str]
_NO_ROOM = ("WorkerGroupStartupTimeoutError", "InsufficientClusterResourcesError")
_PASSING = (StorageError, ModelUnreachableError)
"""What one worker could not reach may answer the next one."""


class TrainingDied(TrainingError):
    """Workers ended without an error of ours: killed, out of memory, a lost node, a fault in a library."""

    def __init__(self, message: str, cause: str = "") -> None:
        super().__init__(message, cause)
        self.cause = cause
        """What kind of end it was: the same for deaths that are alike."""

    def __str__(self) -> str:
        return str(self.args[0])


class NoRoom(TrainingError):
    """There was no room for all workers, or no longer; they have not begun."""


class WorkerGroup:
    """Workers that train a run, started when this is made. They end with this process, if not before."""

    def __init__(self, plan: RunPlan, run: RunFolder, driver: str) -> None:
        """`driver` is the token of the driver's lease."""
        config = {"storage": run.storage.root, "run_id": run.run_id, "driver": driver}
        config["method"] = plan.spec.method.type
        self._trainer = _trainer(plan, run, config)
        self._error: BaseException | None = None
        self._ended = threading.Event()
        # In a thread, so that the driver can look after its run meanwhile. (Ray Train would also take SIGINT.)
        threading.Thread(target=self._fit, name="workers", daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Wait at most so long; returns whether the workers have ended.

        Raises `NoRoom` if they could not begin, `TrainingDied` if they died, and an error of ours as the first worker
        raised it.
        """
        if not self._ended.wait(seconds):
            return False
        if type(getattr(self._error, "controller_failure", None)).__name__ in _NO_ROOM:
            raise NoRoom(str(self._error)) from self._error
        if isinstance(self._error, ray.train.TrainingFailedError):
            raise _cause(self._error) from self._error
        if self._error is not None:
            raise TrainingDied(f"Ray could not run the workers: {self._error}") from self._error
        return True

    def end(self) -> None:
        """Kill the workers, if they have not ended by themselves, and see to it that nothing waits for them any more.

        Ray must not be left before: its process dies of a memory fault when it shuts down while a thread waits for it.
        """
        deadline = time.monotonic() + _END_SECONDS
        while not self._ended.is_set() and time.monotonic() < deadline:
            try:
                kill_actors(_CONTROLLER)  # not there yet if the thread has only begun; its workers end with it
            except Exception as error:  # Ray raises many kinds; why the run ends must not be lost for it
                print(f"The workers could not be ended yet: {error}", file=sys.stderr, flush=True)
            self._ended.wait(_END_POLL_SECONDS)

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except BaseException as error:  # told by `wait`
            self._error = error
        finally:
            self._ended.set()


def resources_per_worker(parallel: ParallelSpec) -> dict[str, float]:
    """What Ray reserves for each."""
    return {"CPU": parallel.cpus_per_worker, **({"GPU": 1} if parallel.use_gpu else {})}


def _trainer(plan: RunPlan, run: RunFolder, config: _CONFIG) -> TorchTrainer:
    parallel = plan.spec.parallel
    environment = {
        "OMP_NUM_THREADS": str(parallel.cpus_per_worker),
        "DS_ACCELERATOR": "cuda" if parallel.use_gpu else "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        # Ray Train would change into its own folder, where the spec's relative paths mean nothing.
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        # Each of these would end a worker that hangs before its watchdog has said where.
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(parallel.hang_timeout_seconds + _BEYOND_HANG_SECONDS),
    }
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(parallel.hang_timeout_seconds + _BEYOND_HANG_SECONDS)
    # The driver looks for them itself, and this one logs an error of its own at every start.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    return TorchTrainer(
        _work,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=parallel.most_workers,
            use_gpu=parallel.use_gpu,
            resources_per_worker=resources_per_worker(parallel),
            accelerator_type=parallel.accelerator_type,
        ),
        torch_config=TorchConfig(backend="nccl" if parallel.use_gpu else "gloo"),
        run_config=RunConfig(
            # Ray Train would go on from what it remembers of an earlier attempt of the same name.
            name=f"{run.run_id}-{secrets.token_hex(4)}",
            storage_path=run.storage.uri("ray") if run.storage.is_local else f"{run.storage.root}/ray",
            worker_runtime_env={"env_vars": environment},  # type: ignore[call-arg]
            # It is for the driver to decide how it goes on: Ray would start as many workers again, behind its back.
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),  # type: ignore[call-arg]
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _work(config: _CONFIG) -> None:
    from ft_service.cluster.ray_cluster import this_node
    from ft_service.model.light_imports import light_imports

    with light_imports(four_bit=config["method"] == "qlora"):
        from ft_service.train.parallel import import_deepspeed
        from ft_service.train.worker import run_worker

        import_deepspeed(os.environ["DS_ACCELERATOR"] == "cuda")

    # Measurements go to storage, not to ray.train.report: it would log each of every worker, and keep none of them.
    run_worker(config["storage"], config["run_id"], config["driver"], this_node())


def _cause(error: ray.train.TrainingFailedError) -> FtError:
    """The first worker's own error, as one of ours."""
    failures = getattr(error, "worker_failures", {})
    causes = [getattr(failure, "cause", None) or failure for failure in failures.values()]
    ours = [cause for cause in causes if isinstance(cause, FtError) and not isinstance(cause, _PASSING)]
    if ours:
        return ours[0]
    if not failures:
        return TrainingDied(f"Ray could not run the workers: {error}")
    rank, failure = next(iter(failures.items()))
    print("".join(traceback.format_exception(failure)), file=sys.stderr)
    return TrainingDied(f"worker {rank} failed: {_short(failure)}", type(causes[0]).__name__)


def _short(failure: BaseException) -> str:
    """What a person needs of Ray's error, which may fill a screen; all of it stands in the log."""
    cause = getattr(failure, "cause", None) or failure
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else 'no reason given'}"
