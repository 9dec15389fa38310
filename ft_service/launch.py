"""From a run spec to a published adapter on a Ray cluster. Runs in the job's driver.

    check -> connect -> prepare data -> plan and train, in one or more attempts -> publish -> samples -> report

Invalid specs, data and plans fail before any worker is requested.
"""

import dataclasses
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import ray

from ft_service.catalog.gpus import GPUS
from ft_service.catalog.models import ModelShape
from ft_service.cluster.queue.capacity import RayNodes, autoscales
from ft_service.cluster.queue.turn import Turn
from ft_service.cluster.ray_cluster import connect, is_submitted_job, map_on_cluster
from ft_service.cluster.room import room_per_worker
from ft_service.cluster.run_metrics import RunMetrics
from ft_service.cluster.signals import StopSignals
from ft_service.cluster.storage_metrics import export_storage_metrics
from ft_service.data.dataset import JUDGEMENT_FILE, PreparedDataset
from ft_service.data.gate import Judgement
from ft_service.data.gate.waivers import check_waivers, enforce, waivers
from ft_service.data.prepare import prepare_dataset
from ft_service.errors import FtError, Problem, RunStopped, SpecError
from ft_service.model.base import resolve_base
from ft_service.pages.live_report import LiveReport
from ft_service.plan.facts import BaseFacts, Resources
from ft_service.plan.make import make_plan
from ft_service.plan.plan import RunPlan
from ft_service.preflight import examine_base
from ft_service.publish import publish, publish_epochs
from ft_service.registry.registry import AdapterRecord, Registry
from ft_service.runs.events import EventLog, Notice, Published
from ft_service.runs.folder import RunFolder, RunStatus, new_run_id
from ft_service.runs.lease import Lease
from ft_service.runs.progress import Log
from ft_service.runs.recent import begin
from ft_service.runs.trackers import tracker_problems
from ft_service.spec.schema import RunSpec
from ft_service.storage.retry import RUN_RETRY_SECONDS
from ft_service.storage.storage import Storage
from ft_service.text import counted, error_line
from ft_service.train.attempts import Attempts
from ft_service.train.checkpoints.manifest import Checkpoints
from ft_service.train.continuation import check_data, check_settings, continued_plan
from ft_service.train.worker_group import Controller

DATA_REPORT_FILE = "data.html"
_SAMPLE_SECONDS = 1200.0
"""Includes loading the base, and waiting until Ray has freed the resources of the workers."""


def run(spec: RunSpec, run_id: str | None = None, log: Log = print) -> AdapterRecord:
    """Train and publish; returns the published record. A run that is complete does not run again.

    An incomplete run resumes from its newest checkpoint. In the main thread, SIGINT and SIGTERM stop the run with a
    checkpoint, and `RunStopped` is raised. A run that fails raises another `FtError`, and records the reason on
    storage.
    """
    storage = Storage(spec.storage)
    if is_submitted_job() and storage.is_local and not Path(spec.storage).expanduser().is_absolute():
        problem = "is relative, and a submitted job runs in a copy of the working directory that Ray deletes"
        raise SpecError(
            [Problem("storage", spec.storage, problem, "Use an absolute folder that all machines can reach.")]
        )
    if problems := tracker_problems(spec.report, storage):
        raise SpecError(problems)
    storage.check_writable()  # a wrong root fails at once; from here on, storage that does not answer is retried
    storage = Storage(spec.storage, retry_seconds=RUN_RETRY_SECONDS)
    folder = RunFolder(storage, run_id or new_run_id(spec.name))
    check_settings(spec, folder)
    events = EventLog(storage, folder.run_id)
    log(f"Run {folder.run_id}: {storage.uri(folder.path)}")
    with Lease(folder, log, confirms=False) as lease, StopSignals() as signals:
        folder.delete_requests("stop", "move")
        if (done := _published(folder)) is not None:
            log(f"The run is complete; it published {done.id}. To train again, use another --run-id.")
            return done
        earlier = folder.recorded_status()
        try:
            connect()
            signals.install()  # ray.init has installed its own handler for SIGTERM
            lease.confirm()  # only here, because joining the cluster takes longer than finding out
            folder.set_state("preparing")
            begin(folder, spec)
            events.emit(Notice(type="preparing", message=f"Preparing data and plan of {spec.name}."))
            export_storage_metrics()
            controller = Controller(spec.parallel)
            controller.start()  # it imports Ray Train while the data are prepared
            with RunMetrics(folder, spec, lease, log) as metrics:
                prepared = prepare(spec, folder, log)
                metrics.shape = prepared.shape
                room = room_per_worker(spec.parallel)
                with Turn(folder, spec, room, lease.token, RayNodes(), log, prepared.expected_seconds) as turn:
                    with LiveReport(storage, folder.run_id, log):
                        plan = Attempts(spec, folder, prepared.plan_for, lease, signals, log, controller, turn).train()
                    folder.set_state("publishing")
                    record = publish(folder)
                    publish_epochs(folder)
                    events.emit(Published(message=f"Published {record.id}.", digest=record.digest))
                    _sample(plan, folder, record, events, log)
            storage.delete(f"{folder.path}/checkpoints")
            folder.set_state("succeeded", published=record.id)
            events.emit(Notice(type="succeeded", message=f"Run {folder.run_id} is complete."))
        except BaseException as raised:
            error = _as_stop(raised, signals.received)
            if lease.is_held():  # otherwise another driver records the state of the run
                _record_end(folder, events, error, earlier)
            if error is raised:
                raise
            raise error from raised
    _write_report(folder)
    log(f"Published {record.id}")
    log(f"Report    {storage.uri(folder.path)}/report.html")
    return record


def _published(folder: RunFolder) -> AdapterRecord | None:
    status = folder.status()
    if status is None or status.published is None:
        return None
    return Registry(folder.storage).resolve(status.published)


def _as_stop(error: BaseException, signal: str) -> BaseException:
    """The error that ends a run. A signal raises wherever the driver is; a library may turn it into another error."""
    if not signal or isinstance(error, FtError | KeyboardInterrupt):
        return error
    return RunStopped(f"{signal} received ({error_line(error)}).")


def _record_end(folder: RunFolder, events: EventLog, error: BaseException, earlier: RunStatus | None) -> None:
    """Record on storage why the run ended. A storage error here must not hide the reason.

    A run that was not resumed after all keeps its `earlier` status.
    """
    reason = str(error) if isinstance(error, FtError) else error_line(error)
    try:
        if not isinstance(error, FtError | KeyboardInterrupt):
            details = "".join(traceback.format_exception(error))
            reason = f"{reason}. Traceback: {folder.write_traceback(details)}"
        if earlier is not None and _is_refused(folder, error, earlier):
            folder.write_status(earlier)
            events.emit(Notice(type="refused", message=f"Not resumed: {reason}"))
            return
        state: Literal["stopped", "failed"] = "stopped" if isinstance(error, RunStopped) else "failed"
        folder.set_state(state, message=reason)
        events.emit(Notice(type=state, message=reason))
        _write_report(folder)
    except FtError:
        pass


def _is_refused(folder: RunFolder, error: BaseException, earlier: RunStatus) -> bool:
    """Whether a run that can be continued was left as it was: the error came before any worker was requested."""
    can_continue = earlier.state == "stopped" or Checkpoints(folder).newest_step() > 0
    before_workers = folder.recorded_state() == "preparing" and not isinstance(error, RunStopped)
    return can_continue and before_workers and isinstance(error, FtError)


def _write_report(folder: RunFolder) -> None:
    # Only here: it draws with matplotlib, and workers should not wait until the driver has imported that.
    from ft_service.pages.run_report import write_report

    write_report(folder.storage, folder.run_id)


# -- before training -------------------------------------------------------------------------------------------------


def cluster_resources() -> Resources:
    """What the cluster has now. With an autoscaler the counts are None, because nodes may join."""
    total = ray.cluster_resources()
    may_grow = autoscales()
    gpu_types = [name.removeprefix("accelerator_type:") for name in total if name.startswith("accelerator_type:")]
    gpu_type = gpu_types[0] if len(gpu_types) == 1 else None
    return Resources(
        num_gpus=None if may_grow else int(total.get("GPU", 0)),
        num_cpus=None if may_grow else int(total.get("CPU", 0)),
        gpu_memory_gib=GPUS[gpu_type].memory_gib if gpu_type in GPUS else None,
        gpu_type=gpu_type,
        gpus_per_node=_gpus_per_node(),
    )


def _gpus_per_node() -> int | None:
    """The largest number of GPUs on one live node; None if no node has any."""
    counts = (int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"])
    return max(counts, default=0) or None


@dataclass
class Prepared:
    """A run whose data are on storage. Its plan now depends only on the number of workers."""

    spec: RunSpec
    folder: RunFolder
    dataset: PreparedDataset
    shape: ModelShape
    base_facts: BaseFacts
    resources: Resources
    log: Log
    _has_shown_plan: bool = False

    def plan_for(self, num_workers: int) -> RunPlan:
        """The plan for this number of workers, also written to the run's folder. The first plan is logged in full.

        Raises `SpecError` before it writes anything.
        """
        spec = self.spec.with_workers(num_workers)
        plan = make_plan(spec, self.dataset.facts, self.shape, self.resources, self.base_facts)
        plan = continued_plan(plan, self.folder)
        self.folder.write_plan(self.spec, plan, self.dataset.sources)
        self.log(f"  {plan.summary[0]}" if self._has_shown_plan else _describe(plan))
        self._has_shown_plan = True
        return plan

    def expected_seconds(self, num_workers: int) -> float | None:
        """What the planner expects the training to take with so many workers; None: unknown. Writes nothing."""
        try:
            spec = self.spec.with_workers(num_workers)
            estimate = make_plan(spec, self.dataset.facts, self.shape, self.resources, self.base_facts).estimate
        except FtError:
            return None  # `plan_for` raises it when the run starts
        return estimate.seconds if estimate else None


def prepare(spec: RunSpec, folder: RunFolder, log: Log) -> Prepared:
    """Prepare the dataset. Raises `SpecError` when not even the smallest number of workers fits the cluster."""
    base = resolve_base(spec.model.base, spec.model.revision, weights=False)
    shape, tokenizer, base_facts = examine_base(spec, base)
    check_waivers(spec.data.waive)

    def publish_findings(judgement: Judgement, findings: Path) -> None:
        folder.write_data_check(judgement.verdict, waivers(judgement, spec.data.waive))
        from ft_service.pages.data_report import render_data_report  # imports matplotlib

        page = render_data_report(spec.name, judgement, spec.data.waive)
        folder.storage.write_bytes(f"{folder.path}/{DATA_REPORT_FILE}", page.encode())
        data = f"{folder.path}/data"
        folder.storage.delete(data)  # of an earlier attempt, before the data were corrected
        folder.storage.put_folder(findings, data, marker=JUDGEMENT_FILE)
        # Write it again: this judgement adds the license duties of this run's base to the one of the dataset.
        folder.storage.write_bytes(f"{data}/{JUDGEMENT_FILE}", judgement.model_dump_json(indent=2).encode())
        log(f"Data check: {judgement.verdict}, {folder.storage.uri(folder.path)}/{DATA_REPORT_FILE}")
        enforce(judgement, spec.data.waive, f"{folder.storage.uri(folder.path)}/{DATA_REPORT_FILE}")
        for waived in waivers(judgement, spec.data.waive):
            log(f"Waived: {waived.code}, {counted(waived.count, 'place')} ({waived.reason})")

    dataset = prepare_dataset(
        spec,
        tokenizer,
        folder.storage,
        log,
        map_on_cluster,
        publish_findings,
        on_digest=partial(check_data, folder),
    )
    resources = cluster_resources()
    if len(spec.worker_counts()) > 1:
        make_plan(spec, dataset.facts, shape, resources, base_facts)
        # Resources change while the run lasts, so the number of workers is chosen before each attempt.
        resources = dataclasses.replace(resources, num_gpus=None, num_cpus=None)
    return Prepared(spec, folder, dataset, shape, base_facts, resources, log)


def _describe(plan: RunPlan) -> str:
    kinds = {"Why": plan.reasons, "Remark": plan.remarks, "Warning": plan.warnings, "Advice": plan.advice}
    lines = [*plan.summary, *(f"{kind}: {sentence}" for kind, sentences in kinds.items() for sentence in sentences)]
    return "\n".join(f"  {line}" for line in lines)


# -- after training --------------------------------------------------------------------------------------------------


def _sample(plan: RunPlan, folder: RunFolder, record: AdapterRecord, events: EventLog, log: Log) -> None:
    """Generate sample answers of base and adapter, on one worker's resources. A failure here does not fail the run."""
    parallel = plan.spec.parallel
    if plan.spec.report.samples == 0:
        return
    if plan.zero_stage == 3 and parallel.use_gpu:
        message = "No samples: the base is sharded over several GPUs. Serve the adapter and ask it instead."
        events.emit(Notice(type="samples", message=message))
        return
    task = ray.remote(num_cpus=parallel.reserved_cpus, num_gpus=int(parallel.use_gpu), max_retries=0)(_write_samples)
    four_bit = plan.spec.method.type == "qlora"
    try:
        result = task.remote(folder.storage.root, folder.run_id, record.id, four_bit)
        try:
            ray.get(result, timeout=_SAMPLE_SECONDS)
        except BaseException:
            ray.cancel(result, force=True)
            raise
    except ray.exceptions.RayError as error:
        message = f"No samples: {getattr(error, 'cause', None) or type(error).__name__}."
        events.emit(Notice(type="samples", message=message))
        log(message)


def _write_samples(storage_root: str, run_id: str, adapter_id: str, four_bit: bool) -> None:
    """`ft_service.evaluate.samples.write_samples`, as a task: the driver imports no model code for it."""
    from ft_service.model.light_imports import light_imports

    with light_imports(four_bit=four_bit):
        from ft_service.evaluate.samples import write_samples

    write_samples(storage_root, run_id, adapter_id)
