"""From a run spec to a published adapter on a Ray cluster; runs in the job's driver.

    check -> connect -> prepare data -> plan and train, in as many attempts as it takes -> publish -> samples -> report

Everything that can be refused is refused before a worker is asked for.
"""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ray

from ft_service.catalog import models
from ft_service.catalog.gpus import GPUS
from ft_service.catalog.models import ModelShape
from ft_service.cluster.ray_cluster import connect, is_submitted_job, spread
from ft_service.cluster.signals import StopSignals
from ft_service.data.check import JUDGEMENT_FILE
from ft_service.data.gate import Judgement
from ft_service.data.gate.waivers import check_waivers, enforce, waivers
from ft_service.data.prepare import PreparedDataset, prepare_dataset
from ft_service.errors import FtError, Problem, RunStopped, SpecError
from ft_service.model.base import load_tokenizer, read_config, resolve_base
from ft_service.plan.facts import Resources
from ft_service.plan.plan import RunPlan, make_plan
from ft_service.publish import publish
from ft_service.registry.registry import AdapterRecord, Registry
from ft_service.runs.folder import RunFolder, State, new_run_id
from ft_service.runs.lease import Lease
from ft_service.runs.metrics import EventLog
from ft_service.spec.schema import RunSpec
from ft_service.storage.storage import RUN_PATIENCE_SECONDS, Storage
from ft_service.train.attempts import Attempts

Say = Callable[[str], None]

DATA_REPORT_FILE = "data.html"
_SAMPLE_SECONDS = 1200.0
"""Loading the base counts too, and waiting for room that the workers have just left."""
_AUTOSCALER_CONFIG = Path("~/ray_bootstrap_config.yaml")
"""`ray up` leaves it on the head node, where drivers of submitted jobs run."""


def run(spec: RunSpec, run_id: str | None = None, say: Say = print) -> AdapterRecord:
    """Train and publish; returns the published record. A run id that is complete is not run again.

    One that is not, goes on from its newest checkpoint. SIGINT and SIGTERM stop it, with a checkpoint, when this is the
    main thread. Raises `RunStopped` then, and another `FtError` when it failed; storage has the reason.
    """
    storage = Storage(spec.storage)
    if is_submitted_job() and storage.is_local and not Path(spec.storage).expanduser().is_absolute():
        problem = "is relative, and a submitted job runs in a copy of the working directory that Ray deletes"
        raise SpecError([Problem("storage", spec.storage, problem, "Use an absolute folder that all machines see.")])
    storage.check_writable()  # a root that was mistyped is told at once; later on, one that is away is waited for
    storage = Storage(spec.storage, patience=RUN_PATIENCE_SECONDS)
    folder = RunFolder(storage, run_id or new_run_id(spec.name))
    events = EventLog(storage, folder.run_id)
    say(f"Run {folder.run_id}: {storage.uri(folder.path)}")
    with Lease(folder, say) as lease, StopSignals() as signals:
        folder.forget_requests("stop", "move")
        if (done := _published(folder)) is not None:
            say(f"It is complete: it published {done.id}. Nothing to do; give another --run-id to run again.")
            return done
        try:
            connect()
            signals.install()  # ray.init has put a handler of its own for SIGTERM
            folder.enter("preparing")
            folder.write_first_spec(spec)
            events.emit("preparing", f"Preparing data and plan of {spec.name}.")
            prepared = prepare(spec, folder, say)
            plan = Attempts(spec, folder, prepared.plan_for, lease, signals, say).train()
            folder.enter("publishing")
            record = publish(folder)
            events.emit("published", f"Published {record.id}.", digest=record.digest)
            _sample(plan, folder, record, events, say)
            storage.delete(f"{folder.path}/checkpoints")
            folder.enter("succeeded", published=record.id)
            events.emit("succeeded", f"Run {folder.run_id} is complete.")
        except BaseException as error:
            if lease.is_held():  # otherwise what is said of the run is another driver's to say
                _record_end(folder, events, error)
            raise
    _write_report(folder)
    say(f"Published {record.id}")
    say(f"Report    {storage.uri(folder.path)}/report.html")
    return record


def _published(folder: RunFolder) -> AdapterRecord | None:
    status = folder.status()
    if status is None or status.published is None:
        return None
    return Registry(folder.storage).resolve(status.published)


def _record_end(folder: RunFolder, events: EventLog, error: BaseException) -> None:
    """Say on storage why the run ended; a storage that is itself the reason must not hide it."""
    reason = str(error) if isinstance(error, FtError) else f"{type(error).__name__}: {error}"
    try:
        state: State = "stopped" if isinstance(error, RunStopped) else "failed"
        folder.enter(state, message=reason)
        events.emit(state, reason)
        _write_report(folder)
    except FtError:
        pass


def _write_report(folder: RunFolder) -> None:
    # Only here: it draws with matplotlib, and workers should not wait until the driver has imported that.
    from ft_service.pages.run_report import write_report

    write_report(folder.storage, folder.run_id)


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


@dataclass
class Prepared:
    """A run whose data lie on storage, and whose plan depends on nothing any more but the workers there are."""

    spec: RunSpec
    folder: RunFolder
    dataset: PreparedDataset
    shape: ModelShape
    resources: Resources
    say: Say
    _is_told: bool = False

    def plan_for(self, num_workers: int) -> RunPlan:
        """The plan for so many workers, written into the run's folder; the first one is said aloud, with its reasons.

        Raises `SpecError`.
        """
        plan = make_plan(self.spec.with_workers(num_workers), self.dataset.facts, self.shape, self.resources)
        self.folder.write_plan(self.spec, plan, self.dataset.sources)
        self.say(f"  {plan.summary[0]}" if self._is_told else _as_told(plan))
        self._is_told = True
        return plan


def prepare(spec: RunSpec, folder: RunFolder, say: Say) -> Prepared:
    """Prepare the dataset. Raises `SpecError` when not even the fewest workers find room on the cluster as it is."""
    base = resolve_base(spec.model.base, spec.model.revision, weights=False)
    shape = models.shape_from_config(read_config(base))
    check_waivers(spec.data.waive)

    def gate(judgement: Judgement, findings: Path) -> None:
        folder.write_gate(judgement.verdict, waivers(judgement, spec.data.waive))
        from ft_service.pages.data_report import render_data_report  # imports matplotlib

        page = render_data_report(spec.name, judgement, spec.data.waive)
        folder.storage.write_bytes(f"{folder.path}/{DATA_REPORT_FILE}", page.encode())
        data = f"{folder.path}/data"
        folder.storage.delete(data)  # of an earlier attempt, before the data were mended
        folder.storage.put_folder(findings, data, marker=JUDGEMENT_FILE)
        # Again, with the duties of this run's base, which the dataset's own judgement has not.
        folder.storage.write_bytes(f"{data}/{JUDGEMENT_FILE}", judgement.model_dump_json(indent=2).encode())
        say(f"Data gate: {judgement.verdict}, {folder.storage.uri(folder.path)}/{DATA_REPORT_FILE}")
        enforce(judgement, spec.data.waive, f"{folder.storage.uri(folder.path)}/{DATA_REPORT_FILE}")

    dataset = prepare_dataset(spec, load_tokenizer(base), folder.storage, say, spread, gate)
    resources = cluster_resources()
    if len(spec.worker_counts()) > 1:
        make_plan(spec, dataset.facts, shape, resources)
        # From now on what there is changes, and workers are counted before each attempt.
        resources = dataclasses.replace(resources, num_gpus=None, num_cpus=None)
    return Prepared(spec, folder, dataset, shape, resources, say)


def _as_told(plan: RunPlan) -> str:
    kinds = {"Why": plan.reasons, "Remark": plan.remarks, "Warning": plan.warnings, "Advice": plan.advice}
    lines = [*plan.summary, *(f"{kind}: {sentence}" for kind, sentences in kinds.items() for sentence in sentences)]
    return "\n".join(f"  {line}" for line in lines)


# -- after training --------------------------------------------------------------------------------------------------


def _sample(plan: RunPlan, folder: RunFolder, record: AdapterRecord, events: EventLog, say: Say) -> None:
    """Let base and adapter answer a few prompts, on one worker's resources. A failure here costs no run."""
    parallel = plan.spec.parallel
    if plan.spec.report.samples == 0:
        return
    if plan.zero_stage == 3 and parallel.use_gpu:
        events.emit("samples", "No samples: the base is sharded over several GPUs. Ask the served adapter instead.")
        return
    task = ray.remote(num_cpus=parallel.cpus_per_worker, num_gpus=int(parallel.use_gpu), max_retries=0)(_write_samples)
    four_bit = plan.spec.method.type == "qlora"
    try:
        asked = task.remote(folder.storage.root, folder.run_id, record.id, four_bit)
        try:
            ray.get(asked, timeout=_SAMPLE_SECONDS)
        except BaseException:
            ray.cancel(asked, force=True)
            raise
    except ray.exceptions.RayError as error:
        message = f"No samples: {getattr(error, 'cause', None) or type(error).__name__}."
        events.emit("samples", message)
        say(message)


def _write_samples(storage_root: str, run_id: str, adapter_id: str, four_bit: bool) -> None:
    """`ft_service.evaluate.samples.write_samples`, as a task: the driver imports no model code for it."""
    from ft_service.model.light_imports import light_imports

    with light_imports(four_bit=four_bit):
        from ft_service.evaluate.samples import write_samples

    write_samples(storage_root, run_id, adapter_id)
