"""One worker of a run, from plan to weights on storage. Needs neither Ray nor a cluster.

``torchrun --nproc-per-node 2 -m ft_service.train.worker STORAGE RUN_ID`` trains a prepared run without Ray.
"""

import os
import socket
import sys
import threading
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_module_registration_hook

from ft_service.data.prepare import open_dataset
from ft_service.errors import FtError, StorageError, TrainingError
from ft_service.model.base import load_tokenizer, open_checkpoint, resolve_base
from ft_service.model.trainable import TrainableModel
from ft_service.model.weight_files import Checkpoint
from ft_service.plan.plan import RunPlan
from ft_service.runs.events import BestWeightsFailed, EventLog, TrainingStarted, WorkerPlace
from ft_service.runs.folder import Outcome, RunFolder
from ft_service.runs.lease import holds_lease
from ft_service.runs.metrics import JsonlSink, Sink, StepMetrics, TensorBoardSink
from ft_service.runs.progress import LoadingLine, ProgressLine
from ft_service.storage.retry import RUN_RETRY_SECONDS
from ft_service.storage.storage import Storage
from ft_service.train.batches import Batches
from ft_service.train.checkpoints import Checkpointer, Checkpoints, TakenOverError, resume
from ft_service.train.loop import is_complete, train
from ft_service.train.objectives.sft import LossModel
from ft_service.train.parallel import Parallel, init_process_group
from ft_service.train.protocol import Hooks, TrainingState
from ft_service.train.watchdog import Watchdog, new_attempt
from ft_service.train.weights import WeightsOnStorage

_LOOK_SECONDS = 0.5
_LOOK_REMOTE_SECONDS = 3.0
TOKENS_SHOWN = 40
"""Of a row that a message names."""


def run_worker(storage_root: str, run_id: str, driver: str = "", node: str = "") -> None:
    """Train the run whose plan and dataset lie on storage, and write its outcome there.

    Every worker of the process group calls this. Told to leave (`RunFolder.ask`), they save a checkpoint and return;
    then there is no outcome. `driver` is the token of the driver's lease, where there is one: the first worker then
    says too where the run stands. `node` is the cluster's name of this worker's machine.
    """
    run = RunFolder(Storage(storage_root, retry_seconds=RUN_RETRY_SECONDS), run_id)
    plan = run.plan()
    init_process_group(plan.spec.parallel.use_gpu)
    torch.set_num_threads(plan.spec.parallel.cpus_per_worker)
    parallel = Parallel(plan)
    dataset = open_dataset(run.storage, plan.dataset.digest)
    base, revision = plan.spec.model.base, plan.spec.model.revision
    base_folder = resolve_base(base, revision, weights=False)
    checkpoint = open_checkpoint(base, revision)
    # What is fetched until here takes as long as it takes, on each node: watched is what workers do together.
    timeout = plan.spec.parallel.hang_timeout_seconds
    watchdog = Watchdog(run, parallel.from_first(new_attempt()), parallel.rank, parallel.world_size, timeout)
    watchdog.start()
    parallel.on_progress = watchdog.beat

    model = _build(plan, base_folder, checkpoint, parallel, watchdog)
    events = EventLog(run.storage, run_id)
    watchdog.beat("looking for a checkpoint to resume from")
    resumed = resume(run, parallel, plan.training_digest, events)
    start = resumed.training_state() if resumed else TrainingState()
    weights = WeightsOnStorage(run, model, parallel, resumed.weights if resumed else "", start)
    places = parallel.from_all(WorkerPlace(host=socket.gethostname(), pid=os.getpid(), node=node))
    log, sinks, leaving = JsonlSink(run.storage, run_id), list[Sink](), threading.Event()
    checkpointer = Checkpointer(
        run,
        parallel,
        plan.training_digest,
        plan.spec.checkpoint,
        log.flush,
        lambda: not driver or holds_lease(run, driver),
    )
    if parallel.is_first:
        repeated = log.rewind(start.step)  # an earlier attempt of this run may have left lines
        sinks += [log, *_other_sinks(run, plan, start.step)]
        message = f"Training from step {start.step} on {len(places)} workers."
        events.emit(TrainingStarted(message=message, step=start.step, repeated=repeated, workers=places))
        if driver:
            run.set_state("running")
        else:
            run.delete_requests("stop", "move")  # of an earlier attempt; a driver has done so
        leaving = _watch_for_requests(run)

    def on_step(metrics: StepMetrics) -> None:
        for sink in sinks:
            sink(metrics)

    def on_best(state: TrainingState) -> None:
        if failure := weights.keep_if_possible(state):
            _tell_of_lost_weights(plan, state, failure, events if parallel.is_first else None)

    def on_checkpoint(state: TrainingState) -> None:
        checkpointer.save(state, weights.place, weights.forget_all_but)

    def text_of_row(row: int) -> str:
        try:
            return str(load_tokenizer(base_folder).decode(dataset.train[row].input_ids[:TOKENS_SHOWN]))
        except FtError:
            return ""

    state = train(
        plan,
        parallel,
        _batches(plan, parallel, dataset.train),
        _batches(plan, parallel, dataset.validation) if dataset.validation is not None else None,
        Hooks(
            on_step=on_step,
            on_best=on_best,
            on_checkpoint=on_checkpoint,
            is_leaving=leaving.is_set,
            on_progress=watchdog.beat,
            text_of_row=text_of_row,
        ),
        start,
    )
    is_done = is_complete(state, plan)
    if parallel.is_first and driver and not is_done:
        run.set_state("checkpointing", message=f"Saving step {state.step} before the workers leave.")
    watchdog.beat("writing the last checkpoint")
    checkpointer.wait()
    if is_done and state.best_step is None:
        watchdog.beat("writing the weights")
        weights.keep(state)
    if parallel.is_first and is_done:
        if driver and not holds_lease(run, driver):
            raise TakenOverError("another driver has taken over this run. Leave it to that one.")
        run.write_outcome(
            Outcome(
                weights=weights.place,
                steps=state.best_step or state.step,
                steps_run=state.step,
                final_loss=state.loss,
                validation_loss=state.best_validation_loss if state.best_step else None,
                stopped_early=state.stopped_early,
                base_fingerprint=checkpoint.fingerprint(),
                training_digest=plan.training_digest,
            )
        )
        weights.forget_all_but({entry.weights for entry in Checkpoints(run).entries()})
    for sink in sinks:
        sink.close()
    parallel.barrier()
    watchdog.stop()
    parallel.close()


def _build(
    plan: RunPlan, base_folder: Path, checkpoint: Checkpoint, parallel: Parallel, watchdog: Watchdog
) -> TrainableModel:
    """The model, loaded and in DeepSpeed's hands."""
    torch.manual_seed(plan.spec.train.seed)
    said = LoadingLine() if parallel.is_first else None

    def on_load(bytes_read: int, total_bytes: int) -> None:
        watchdog.beat("loading the base")
        if said is not None:
            said(bytes_read, total_bytes)

    # An adapter that decomposes the base takes long to make: each of its layers counts.
    on_layer = register_module_module_registration_hook(lambda *_: watchdog.beat())
    with parallel.aware_of_partitions():
        model = TrainableModel(plan, base_folder, checkpoint, parallel.placement(), on_load)
    on_layer.remove()
    watchdog.beat("setting up DeepSpeed")
    parallel.wrap(LossModel(model.module, model.causal_lm))
    torch.manual_seed(plan.spec.train.seed + parallel.rank)  # adapters start alike on all workers; dropout differs
    return model


def _batches(plan: RunPlan, parallel: Parallel, rows: object) -> Batches:
    return Batches(
        rows=rows,  # type: ignore[arg-type]
        seed=plan.spec.train.seed,
        global_batch_size=plan.global_batch_size,
        micro_batch_size=plan.micro_batch_size,
        rank=parallel.rank,
        world_size=parallel.world_size,
    )


def _tell_of_lost_weights(plan: RunPlan, state: TrainingState, failure: str, events: EventLog | None) -> None:
    """Raises `TrainingError` on all workers where the spec wants that."""
    told = f"The best weights so far, of step {state.step}, could not be written: {failure}"
    if plan.spec.checkpoint.on_failure == "stop":
        raise TrainingError(f"{told} The run ends here, since checkpoint.on_failure = 'stop'.")
    if events is not None:
        best = f"the best is again that of step {state.best_step}" if state.best_step else "there are none yet"
        told = f"{told} Training goes on; {best}."
        print(told, file=sys.stderr, flush=True)
        events.emit(BestWeightsFailed(message=told, step=state.step))


def _watch_for_requests(run: RunFolder) -> threading.Event:
    """Set once the workers are asked to leave."""
    asked = threading.Event()
    run = RunFolder(run.storage.without_retries(), run.run_id)

    def look() -> None:
        while not asked.wait(_LOOK_SECONDS if run.storage.is_local else _LOOK_REMOTE_SECONDS):
            try:
                if run.request() is not None:
                    asked.set()
            except StorageError:
                continue

    threading.Thread(target=look, name="requests", daemon=True).start()
    return asked


def _other_sinks(run: RunFolder, plan: RunPlan, step: int) -> list[Sink]:
    sinks: list[Sink] = [ProgressLine(plan.num_steps)]
    if plan.spec.report.tensorboard:
        sinks.append(TensorBoardSink(run.storage.uri(f"{run.path}/tensorboard"), step))
    return sinks


if __name__ == "__main__":
    try:
        run_worker(sys.argv[1], sys.argv[2])
    except FtError as error:
        print(f"worker {os.environ.get('RANK', '0')}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
