"""One worker of a run: open, build, resume, train, finish. Needs neither Ray nor a cluster.

``torchrun --nproc-per-node 2 -m ft_service.train.worker STORAGE RUN_ID`` trains a prepared run without Ray.
"""

import os
import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_module_registration_hook

from ft_service.data.dataset import PreparedDataset, open_dataset
from ft_service.errors import FtError, StorageError, TrainingError
from ft_service.model.base import load_tokenizer, open_weight_files, resolve_base
from ft_service.model.trainable import TrainableModel
from ft_service.model.weight_files import WeightFiles
from ft_service.plan.plan import RunPlan
from ft_service.runs.events import BestWeightsFailed, EventLog, TrainingStarted, WorkerPlace
from ft_service.runs.folder import Outcome, RunFolder
from ft_service.runs.lease import holds_lease
from ft_service.runs.metrics import JsonlSink, Sink, StepMetrics, read_metrics
from ft_service.runs.progress import LoadingLine, ProgressLine
from ft_service.runs.trackers import BackgroundTracker, new_tracker, tracked_run
from ft_service.storage.retry import RUN_RETRY_SECONDS
from ft_service.storage.storage import Storage
from ft_service.text import counted
from ft_service.train.batches import Batches, PackedRows
from ft_service.train.checkpoints.manifest import Checkpoints, Manifest
from ft_service.train.checkpoints.resume import resume
from ft_service.train.checkpoints.save import Checkpointer, TakenOverError
from ft_service.train.environment import threads_per_worker
from ft_service.train.epochs import EpochAdapters
from ft_service.train.loop import is_complete, train
from ft_service.train.objectives.sft import LossModel
from ft_service.train.parallel import Parallel, init_process_group
from ft_service.train.protocol import Hooks, TrainingState
from ft_service.train.watchdog import Watchdog, new_attempt
from ft_service.train.weights import WeightsOnStorage

_REQUEST_POLL_SECONDS = 0.5
_REMOTE_REQUEST_POLL_SECONDS = 3.0
_COMPILING = "it compiles its operators at first use on a machine, which takes minutes"
TOKENS_SHOWN = 40
"""How much of a row an error message shows."""


def run_worker(storage_root: str, run_id: str, lease_token: str | None = None, node: str = "") -> None:
    """Train a run whose plan and dataset are on storage, and write its outcome there.

    Every rank of the process group calls this. If the run is asked to stop or move (`RunFolder.ask`), the ranks save a
    checkpoint and return without an outcome.

    `lease_token` is that of the lease of the driver that started this worker; rank 0 then also records the run's state,
    and writes nothing more once another driver has the lease. None: there is no driver. `node` is the name that the
    cluster has for this machine.
    """
    worker = _open(storage_root, run_id, lease_token)
    model = _build(worker)
    worker.begin("looking for a checkpoint to resume from")
    resumed = resume(worker.run, worker.parallel, worker.plan, worker.events)
    outputs = _Outputs(worker, model, resumed)
    state = _train(worker, outputs, _announce(worker, outputs, node))
    _finish(worker, outputs, state)


# -- open ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Worker:
    """What this rank trains with."""

    run: RunFolder
    plan: RunPlan
    parallel: Parallel
    dataset: PreparedDataset
    base_folder: Path
    """Config and tokenizer of the base."""
    weight_files: WeightFiles
    """Weights of the base."""
    watchdog: Watchdog
    events: EventLog
    lease_token: str | None

    def is_leased(self) -> bool:
        """Whether the driver that started this worker still leads the run; always true without a driver."""
        return self.lease_token is None or holds_lease(self.run, self.lease_token)

    def begin(self, doing: str) -> None:
        """Tell the watchdog, and on rank 0 whoever looks at the queued run, what this worker does from now on."""
        self.watchdog.beat(doing)
        if self.parallel.is_rank_zero and self.lease_token is not None:
            self.run.set_state("queued", f"{counted(self.parallel.world_size, 'worker')} started; {doing}.")

    def batches_of(self, rows: PackedRows) -> Batches:
        return Batches(
            rows=rows,
            seed=self.plan.spec.train.seed,
            global_batch_size=self.plan.global_batch_size,
            micro_batch_size=self.plan.micro_batch_size,
            rank=self.parallel.rank,
            world_size=self.parallel.world_size,
        )

    def text_of_row(self, row: int) -> str:
        """The first words of a row of the training data; '' if the base has no usable tokenizer."""
        try:
            return str(load_tokenizer(self.base_folder).decode(self.dataset.train[row].input_ids[:TOKENS_SHOWN]))
        except FtError:
            return ""


def _open(storage_root: str, run_id: str, lease_token: str | None) -> _Worker:
    """Join the process group, fetch what the run needs, and start the watchdog."""
    run = RunFolder(Storage(storage_root, retry_seconds=RUN_RETRY_SECONDS), run_id)
    plan = run.plan()
    if lease_token is not None and os.environ.get("RANK") == "0":
        workers = counted(plan.spec.parallel.max_workers, "worker")
        run.set_state("queued", f"{workers} started; joining each other with DeepSpeed: {_COMPILING}.")
    init_process_group(plan.spec.parallel.use_gpu)
    threads = threads_per_worker(plan)
    torch.set_num_threads(threads)
    # DeepSpeed's CPU optimizer may load an OpenMP of its own, which reads this when it is loaded.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    parallel = Parallel(plan)
    dataset = open_dataset(run.storage, plan.dataset.digest)
    model = plan.spec.model
    base_folder = resolve_base(model.base, model.revision, weights=False)
    weight_files = open_weight_files(model.base, model.revision)
    # The watchdog starts only now: fetching may take any time, and each node fetches on its own.
    attempt = parallel.broadcast_from_rank_zero(new_attempt())
    timeout = plan.spec.parallel.hang_timeout_seconds
    watchdog = Watchdog(run, attempt, parallel.rank, parallel.world_size, timeout)
    watchdog.start()
    parallel.on_progress = watchdog.beat
    events = EventLog(run.storage, run_id)
    return _Worker(run, plan, parallel, dataset, base_folder, weight_files, watchdog, events, lease_token)


# -- build -----------------------------------------------------------------------------------------------------------


def _build(worker: _Worker) -> TrainableModel:
    """Load the model and give it to DeepSpeed."""
    parallel = worker.parallel
    seed = worker.plan.spec.train.seed
    torch.manual_seed(seed)
    loading_line = LoadingLine() if parallel.is_rank_zero else None

    def on_load(bytes_read: int, bytes_total: int) -> None:
        worker.watchdog.beat("loading the base")
        if loading_line is not None:
            loading_line(bytes_read, bytes_total)

    # An adapter initialised from the base's singular values takes long to create: every new layer is progress.
    on_layer = register_module_module_registration_hook(lambda *_: worker.watchdog.beat())
    worker.begin("loading the base")
    with parallel.hf_deepspeed_config():
        model = TrainableModel(worker.plan, worker.base_folder, worker.weight_files, parallel.placement(), on_load)
    on_layer.remove()
    worker.begin(f"setting up DeepSpeed; {_COMPILING}")
    parallel.wrap(LossModel(model.module, model.causal_lm))
    torch.manual_seed(seed + parallel.rank)  # the adapter starts the same on all ranks, their dropout differs
    return model


# -- outputs ---------------------------------------------------------------------------------------------------------


class _Outputs:
    """What training writes to storage: metrics, the best weights, and checkpoints."""

    def __init__(self, worker: _Worker, model: TrainableModel, resumed: Manifest | None) -> None:
        run = worker.run
        plan = worker.plan
        parallel = worker.parallel
        self._worker = worker
        self.start = resumed.training_state() if resumed else TrainingState()
        self.weights = WeightsOnStorage(run, model, parallel, resumed.weights if resumed else "", self.start)
        log = JsonlSink(run.storage, run.run_id)
        self.checkpointer = Checkpointer(
            run,
            parallel,
            plan.training_digest,
            plan.spec.checkpoint,
            log.flush,
            worker.is_leased,
            plan.checkpoint_staging_bytes,
        )
        self._epochs = EpochAdapters(run, plan, model, parallel)
        self.sinks: list[Sink] = []
        self.repeated_steps = 0
        """Steps that an earlier attempt has logged and this one trains again."""
        if parallel.is_rank_zero:
            self.repeated_steps = log.rewind(self.start.step)
            self.sinks = [log, ProgressLine(plan.num_steps), *_trackers(run, plan.spec.report.trackers)]

    def on_step(self, metrics: StepMetrics) -> None:
        for sink in self.sinks:
            sink(metrics)
        self._epochs(metrics.step)

    def on_best(self, state: TrainingState) -> None:
        """Save the best weights. Raises `TrainingError` on all ranks if that fails and the spec says to stop then."""
        failure = self.weights.keep_if_possible(state)
        if not failure:
            return
        problem = f"The best weights so far, of step {state.step}, could not be written: {failure}"
        if self._worker.plan.spec.checkpoint.on_failure == "stop":
            raise TrainingError(f"{problem} The run stops because checkpoint.on_failure = 'stop'.")
        if self._worker.parallel.is_rank_zero:
            best = (
                f"the best weights are still those of step {state.best_step}" if state.best_step else "there are none"
            )
            message = f"{problem} Training continues; {best}."
            print(message, file=sys.stderr, flush=True)
            self._worker.events.emit(BestWeightsFailed(message=message, step=state.step))

    def on_checkpoint(self, state: TrainingState) -> None:
        self.checkpointer.save(state, self.weights.path, self.weights.delete_all_but)


def _trackers(run: RunFolder, names: Sequence[str]) -> list[Sink]:
    if not names:
        return []
    tracked = tracked_run(run)
    earlier = read_metrics(run.storage, run.run_id)
    return [BackgroundTracker(name, new_tracker(name, tracked), earlier) for name in names]


# -- train -----------------------------------------------------------------------------------------------------------


def _announce(worker: _Worker, outputs: _Outputs, node: str) -> threading.Event:
    """Record that training starts. Returns an event that is set, on rank 0, once the run is asked to stop or move."""
    places = worker.parallel.all_gather_object(WorkerPlace(host=socket.gethostname(), pid=os.getpid(), node=node))
    if not worker.parallel.is_rank_zero:
        return threading.Event()
    step = outputs.start.step
    message = f"Training from step {step} on {len(places)} workers."
    worker.events.emit(TrainingStarted(message=message, step=step, repeated=outputs.repeated_steps, workers=places))
    if worker.lease_token is not None:
        worker.run.set_state("running")
    else:
        worker.run.delete_requests("stop", "move")  # of an earlier attempt; a driver does this itself
    return _watch_for_requests(worker.run)


def _train(worker: _Worker, outputs: _Outputs, leave_requested: threading.Event) -> TrainingState:
    validation = worker.dataset.validation
    return train(
        worker.plan,
        worker.parallel,
        worker.batches_of(worker.dataset.train),
        worker.batches_of(validation) if validation is not None else None,
        Hooks(
            on_step=outputs.on_step,
            on_best=outputs.on_best,
            on_checkpoint=outputs.on_checkpoint,
            leave_requested=leave_requested.is_set,
            on_progress=worker.watchdog.beat,
            text_of_row=worker.text_of_row,
        ),
        outputs.start,
    )


def _watch_for_requests(run: RunFolder) -> threading.Event:
    """An event that a thread sets once the run is asked to stop or move."""
    requested = threading.Event()
    run = RunFolder(run.storage.without_retries(), run.run_id)
    poll_seconds = _REQUEST_POLL_SECONDS if run.storage.is_local else _REMOTE_REQUEST_POLL_SECONDS

    def poll() -> None:
        while not requested.wait(poll_seconds):
            try:
                if run.request() is not None:
                    requested.set()
            except StorageError:
                continue

    threading.Thread(target=poll, name="requests", daemon=True).start()
    return requested


# -- finish ----------------------------------------------------------------------------------------------------------


def _finish(worker: _Worker, outputs: _Outputs, state: TrainingState) -> None:
    """Wait for the last checkpoint, and write weights and outcome if the training is complete."""
    has_finished = is_complete(state, worker.plan)
    if worker.parallel.is_rank_zero and worker.lease_token is not None and not has_finished:
        worker.run.set_state("checkpointing", message=f"Saving the checkpoint of step {state.step}, then leaving.")
    worker.watchdog.beat("writing the last checkpoint")
    outputs.checkpointer.wait()
    if has_finished and state.best_step is None:
        worker.watchdog.beat("writing the weights")
        outputs.weights.keep(state)
    if has_finished and worker.parallel.is_rank_zero:
        _write_outcome(worker, outputs.weights, state)
    for sink in outputs.sinks:
        sink.close(complete=has_finished)
    worker.parallel.barrier()
    worker.watchdog.stop()
    worker.parallel.close()


def _write_outcome(worker: _Worker, weights: WeightsOnStorage, state: TrainingState) -> None:
    if not worker.is_leased():
        raise TakenOverError("another driver has taken over this run. This one stops.")
    worker.run.write_outcome(
        Outcome(
            weights=weights.path,
            steps=state.best_step or state.step,
            steps_run=state.step,
            final_loss=state.loss,
            validation_loss=state.best_validation_loss if state.best_step else None,
            stopped_early=state.stopped_early,
            base_fingerprint=worker.weight_files.fingerprint(),
            training_digest=worker.plan.training_digest,
        )
    )
    weights.delete_all_but({entry.weights for entry in Checkpoints(worker.run).entries()})


if __name__ == "__main__":
    try:
        run_worker(sys.argv[1], sys.argv[2])
    except FtError as error:
        print(f"worker {os.environ.get('RANK', '0')}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
