"""One worker of a run, from plan to weights on storage. Needs neither Ray nor a cluster.

``torchrun --nproc-per-node 2 -m ft_service.train.worker STORAGE RUN_ID`` trains a prepared run without Ray.
"""

import os
import socket
import sys

import torch

from ft_service.data.prepare import open_dataset
from ft_service.errors import FtError, TrainingError
from ft_service.metrics import EventLog, JsonlSink, LoadingLine, ProgressLine, Sink, StepMetrics, TensorBoardSink
from ft_service.model.base import open_checkpoint, resolve_base
from ft_service.model.trainable import TrainableModel
from ft_service.plan import RunPlan
from ft_service.runs import Outcome, RunFolder
from ft_service.storage import RUN_PATIENCE_SECONDS, Storage
from ft_service.train.batches import Batches
from ft_service.train.checkpoint import Checkpointer, Checkpoints, resume
from ft_service.train.loop import Hooks, TrainingState, train
from ft_service.train.loss import LossModel
from ft_service.train.parallel import Parallel, init_process_group
from ft_service.train.weights import WeightsOnStorage


def run_worker(storage_root: str, run_id: str) -> None:
    """Train the run whose plan and dataset lie on storage, and write its outcome there.

    Every worker of the process group calls this.
    """
    run = RunFolder(Storage(storage_root, patience=RUN_PATIENCE_SECONDS), run_id)
    plan = run.plan()
    init_process_group(plan.spec.parallel.use_gpu)
    torch.set_num_threads(plan.spec.parallel.cpus_per_worker)
    parallel = Parallel(plan)
    dataset = open_dataset(run.storage, plan.dataset.digest)
    base, revision = plan.spec.model.base, plan.spec.model.revision
    base_folder = resolve_base(base, revision, weights=False)
    checkpoint = open_checkpoint(base, revision)

    torch.manual_seed(plan.spec.train.seed)
    with parallel.aware_of_partitions():
        said = LoadingLine() if parallel.is_first else None
        model = TrainableModel(plan, base_folder, checkpoint, parallel.placement(), said)
    parallel.wrap(LossModel(model.module, model.causal_lm))
    torch.manual_seed(plan.spec.train.seed + parallel.rank)  # adapters start alike on all workers; dropout differs
    events = EventLog(run.storage, run_id)
    resumed = resume(run, parallel, plan.course, events)
    start = resumed.training_state() if resumed else TrainingState()
    weights = WeightsOnStorage(run, model, parallel, resumed.weights if resumed else "", start)
    sinks = _sinks(run, plan, start.step) if parallel.is_first else []
    flush = sinks[0].flush if sinks else lambda: None
    checkpointer = Checkpointer(run, parallel, plan.course, plan.spec.checkpoint, flush)
    places = parallel.from_all({"host": socket.gethostname(), "pid": os.getpid()})
    if parallel.is_first:
        events.emit("training", f"Training from step {start.step}.", step=start.step, workers=places)

    def on_step(metrics: StepMetrics) -> None:
        for sink in sinks:
            sink(metrics)

    def on_best(state: TrainingState) -> None:
        if not (failure := weights.keep_if_possible(state)):
            return
        told = f"The best weights so far, of step {state.step}, could not be written: {failure}"
        if plan.spec.checkpoint.on_failure == "stop":
            raise TrainingError(f"{told} The run ends here, since checkpoint.on_failure = 'stop'.")
        if parallel.is_first:
            best = f"the best is again that of step {state.best_step}" if state.best_step else "there are none yet"
            print(told := f"{told} Training goes on; {best}.", file=sys.stderr, flush=True)
            events.emit("weights_failed", told, step=state.step)

    def on_checkpoint(state: TrainingState) -> None:
        checkpointer.save(state, weights.place, weights.forget_all_but)

    state = train(
        plan,
        parallel,
        _batches(plan, parallel, dataset.train),
        _batches(plan, parallel, dataset.validation) if dataset.validation is not None else None,
        Hooks(on_step=on_step, on_best=on_best, on_checkpoint=on_checkpoint),
        start,
    )
    checkpointer.wait()
    if state.best_step is None:
        weights.keep(state)
    if parallel.is_first:
        run.write_outcome(
            Outcome(
                weights=weights.place,
                steps=state.best_step or state.step,
                steps_run=state.step,
                final_loss=state.loss,
                validation_loss=state.best_validation_loss if state.best_step else None,
                stopped_early=state.stopped_early,
                base_fingerprint=checkpoint.fingerprint(),
            )
        )
        weights.forget_all_but({entry.weights for entry in Checkpoints(run).entries()})
        for sink in sinks:
            sink.close()
    parallel.barrier()
    parallel.close()


def _batches(plan: RunPlan, parallel: Parallel, rows: object) -> Batches:
    return Batches(
        rows=rows,  # type: ignore[arg-type]
        seed=plan.spec.train.seed,
        global_batch_size=plan.global_batch_size,
        micro_batch_size=plan.micro_batch_size,
        rank=parallel.rank,
        world_size=parallel.world_size,
    )


def _sinks(run: RunFolder, plan: RunPlan, step: int) -> list[Sink]:
    log = JsonlSink(run.storage, run.run_id)
    log.rewind(step)  # an earlier attempt of this run may have left lines
    sinks: list[Sink] = [log, ProgressLine(plan.num_steps)]
    if plan.spec.report.tensorboard:
        sinks.append(TensorBoardSink(run.storage.uri(f"{run.path}/tensorboard"), step))
    return sinks


if __name__ == "__main__":
    try:
        run_worker(sys.argv[1], sys.argv[2])
    except FtError as error:
        print(f"worker {os.environ.get('RANK', '0')}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
