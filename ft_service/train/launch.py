"""From a run spec to a published adapter on a Ray cluster. The only user of ray.train; runs in the job's driver.

    check -> connect -> prepare data -> plan -> train on the workers -> publish -> sample answers -> report

Everything that can be refused is refused before a worker is asked for.
"""

import itertools
import os
import secrets
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import ray
from ray.train import LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from ft_service import catalog
from ft_service.cluster import connect, is_submitted_job
from ft_service.data.prepare import prepare_dataset
from ft_service.errors import FtError, Problem, SpecError, StorageError, TrainingError
from ft_service.evaluate.samples import write_samples
from ft_service.gpus import GPUS
from ft_service.metrics import EventLog
from ft_service.model.base import load_tokenizer, read_config, resolve_base
from ft_service.plan import Resources, RunPlan, make_plan
from ft_service.publish import publish
from ft_service.registry import AdapterRecord, Registry
from ft_service.report import write_report
from ft_service.runs import RunFolder, new_run_id
from ft_service.spec import RunSpec
from ft_service.storage import Storage
from ft_service.train.checkpoint import Checkpoints

Say = Callable[[str], None]

_AUTOSCALER_CONFIG = Path("~/ray_bootstrap_config.yaml")
"""`ray up` leaves it on the head node, where drivers of submitted jobs run."""


def run(spec: RunSpec, run_id: str | None = None, say: Say = print) -> AdapterRecord:
    """Train and publish; returns the published record. A run id that is complete is not run again.

    Raises `FtError`; whatever was begun is then marked failed on storage, with the reason.
    """
    storage = Storage(spec.storage)
    if is_submitted_job() and storage.is_local and not Path(spec.storage).expanduser().is_absolute():
        problem = "is relative, and a submitted job runs in a copy of the working directory that Ray deletes"
        raise SpecError([Problem("storage", spec.storage, problem, "Use an absolute folder that all machines see.")])
    storage.check_writable()
    folder = RunFolder(storage, run_id or new_run_id(spec.name))
    if (done := _published(folder)) is not None:
        say(
            f"Run {folder.run_id} is complete: it published {done.id}. Nothing to do; "
            "give another --run-id to run again."
        )
        return done
    events = EventLog(storage, folder.run_id)
    say(f"Run {folder.run_id}: {storage.uri(folder.path)}")
    try:
        connect()
        folder.enter("preparing")
        events.emit("preparing", f"Preparing data and plan of {spec.name}.")
        plan = prepare(spec, folder, say)
        folder.enter("running")
        events.emit("running", f"{spec.parallel.num_workers} workers, {plan.num_steps} steps.")
        _train_and_recover(plan, folder, events, say)
        folder.enter("publishing")
        record = publish(folder)
        events.emit("published", f"Published {record.id}.", digest=record.digest)
        _sample(plan, folder, record, events, say)
        storage.delete(f"{folder.path}/checkpoints")
        folder.enter("succeeded", published=record.id)
        events.emit("succeeded", f"Run {folder.run_id} is complete.")
    except BaseException as error:
        reason = str(error) if isinstance(error, FtError) else f"{type(error).__name__}: {error}"
        _record_failure(folder, events, reason or type(error).__name__)
        raise
    write_report(storage, folder.run_id)
    say(f"Published {record.id}")
    say(f"Report    {storage.uri(folder.path)}/report.html")
    return record


def _published(folder: RunFolder) -> AdapterRecord | None:
    status = folder.status()
    if status is None or status.published is None:
        return None
    return Registry(folder.storage).resolve(status.published)


def _record_failure(folder: RunFolder, events: EventLog, reason: str) -> None:
    """Say on storage why the run ended; a storage that is itself the reason must not hide it."""
    try:
        folder.enter("failed", message=reason)
        events.emit("failed", reason)
        write_report(folder.storage, folder.run_id)
    except FtError:
        pass


# -- before training -------------------------------------------------------------------------------------------------


def cluster_resources() -> Resources:
    """What the cluster has now. GPUs that an autoscaler could still add are not known, and so not judged."""
    total = ray.cluster_resources()
    autoscales = _AUTOSCALER_CONFIG.expanduser().exists() or "KUBERNETES_SERVICE_HOST" in os.environ
    gpu_types = [name.removeprefix("accelerator_type:") for name in total if name.startswith("accelerator_type:")]
    gpu_type = gpu_types[0] if len(gpu_types) == 1 else None
    return Resources(
        num_gpus=None if autoscales else int(total.get("GPU", 0)),
        num_cpus=None if autoscales else int(total.get("CPU", 0)),
        gpu_memory_gib=GPUS[gpu_type].memory_gib if gpu_type in GPUS else None,
        gpu_type=gpu_type,
        gpus_per_node=_gpus_per_node(),
    )


def _gpus_per_node() -> int | None:
    """Of the nodes that are up, the most that one has; None where none has any."""
    counts = (int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"])
    return max(counts, default=0) or None


def prepare(spec: RunSpec, folder: RunFolder, say: Say) -> RunPlan:
    """Prepare the dataset, decide the plan, write both into the run's folder, and say the plan aloud."""
    base = resolve_base(spec.model.base, spec.model.revision, weights=False)
    shape = catalog.shape_from_config(read_config(base))
    dataset = prepare_dataset(spec, load_tokenizer(base), folder.storage, progress=say)
    plan = make_plan(spec, dataset.facts, shape, cluster_resources())
    folder.write_plan(spec, plan, dataset.sources)
    for sentence in plan.said:
        say(f"  {sentence}")
    for reason in plan.reasons:
        say(f"  Why: {reason}")
    for remark in plan.remarks:
        say(f"  Remark: {remark}")
    for warning in plan.warnings:
        say(f"  Warning: {warning}")
    for advice in plan.advice:
        say(f"  Advice: {advice}")
    return plan


# -- training --------------------------------------------------------------------------------------------------------


def _train_and_recover(plan: RunPlan, folder: RunFolder, events: EventLog, say: Say) -> None:
    """Train; when workers die, start them again from the newest checkpoint, within the spec's budget.

    What would only happen again is not retried: an error of ours (a loss that is not finite, unusable data), or a
    second death without a new checkpoint in between.
    """
    reached = _newest_step(folder)
    for failures in itertools.count():
        try:
            _train(plan, folder)
            return
        except TrainingDied as death:
            before, reached = reached, _newest_step(folder)
            budget = plan.spec.parallel.max_failures
            if failures >= budget:
                cure = f" Its {budget} restarts (parallel.max_failures) are used up." if budget else ""
                raise TrainingError(f"{death}{cure}") from death
            if failures and reached == before:
                cure = "Look at the log of that worker; a smaller train.micro_batch_size if it ran out of memory."
                raise TrainingError(f"{death} It died twice after step {reached} without getting on. {cure}") from death
            folder.enter("recovering", message=str(death))
            message = f"{death} Starting again from step {reached}."
            events.emit("recovering", message, step=reached, failures=failures + 1)
            say(message)
            folder.enter("running")


def _newest_step(folder: RunFolder) -> int:
    entries = Checkpoints(folder).entries()
    return entries[-1].step if entries else 0


class TrainingDied(TrainingError):
    """Workers ended without an error of ours: killed, out of memory, a lost node, a fault in a library."""


def _train(plan: RunPlan, folder: RunFolder) -> None:
    parallel = plan.spec.parallel
    environment = {
        "OMP_NUM_THREADS": str(parallel.cpus_per_worker),
        "DS_ACCELERATOR": "cuda" if parallel.use_gpu else "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        # Ray Train would change into its own folder, where the spec's relative paths mean nothing.
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
    }
    # Nothing reads its notices yet, and it logs an error of its own at every start.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"storage": folder.storage.root, "run_id": folder.run_id},
        scaling_config=ScalingConfig(
            num_workers=parallel.num_workers,
            use_gpu=parallel.use_gpu,
            resources_per_worker={"CPU": parallel.cpus_per_worker, **({"GPU": 1} if parallel.use_gpu else {})},
            accelerator_type=parallel.accelerator_type,
        ),
        torch_config=TorchConfig(backend="nccl" if parallel.use_gpu else "gloo"),
        run_config=RunConfig(
            # Ray Train would go on from what it remembers of an earlier attempt of the same name.
            name=f"{folder.run_id}-{secrets.token_hex(4)}",
            storage_path=folder.storage.uri("ray") if folder.storage.is_local else f"{folder.storage.root}/ray",
            worker_runtime_env={"env_vars": environment},  # type: ignore[call-arg]
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _cause(error) from error


def _worker(config: dict[str, str]) -> None:
    from ft_service.train.worker import run_worker

    # Measurements go to storage, not to ray.train.report: it would log each of every worker, and keep none of them.
    run_worker(config["storage"], config["run_id"])


def _cause(error: Exception) -> FtError:
    """The first worker's own error, as one of ours."""
    failures = getattr(error, "worker_failures", {})
    causes = [getattr(failure, "cause", None) or failure for failure in failures.values()]
    ours = [cause for cause in causes if isinstance(cause, FtError) and not isinstance(cause, StorageError)]
    if ours:
        return ours[0]
    if not failures:
        return TrainingDied(f"Ray could not run the workers: {error}")
    rank, failure = next(iter(failures.items()))
    print("".join(traceback.format_exception(failure)), file=sys.stderr)
    return TrainingDied(f"worker {rank} failed: {failure}.")


# -- after training --------------------------------------------------------------------------------------------------


def _sample(plan: RunPlan, folder: RunFolder, record: AdapterRecord, events: EventLog, say: Say) -> None:
    """Let base and adapter answer a few prompts, on one worker's resources. A failure here costs no run."""
    parallel = plan.spec.parallel
    if plan.spec.report.samples == 0:
        return
    if plan.zero_stage == 3 and parallel.use_gpu:
        events.emit("samples", "No samples: the base is sharded over several GPUs. Ask the served adapter instead.")
        return
    task = ray.remote(num_cpus=parallel.cpus_per_worker, num_gpus=int(parallel.use_gpu), max_retries=0)(write_samples)
    try:
        ray.get(task.remote(folder.storage.root, folder.run_id, record.id))
    except ray.exceptions.RayError as error:
        message = f"No samples: {getattr(error, 'cause', None) or type(error).__name__}."
        events.emit("samples", message)
        say(message)
