"""Trains with weights and optimizer on NVMe, saves a checkpoint or resumes from it (for `tests.forked.run_cases`)."""

from typing import Any

import pytest
import torch

from ft_service.runs.events import EventLog
from ft_service.runs.folder import RunFolder
from ft_service.runs.metrics import StepMetrics
from ft_service.spec.schema import CheckpointSpec
from ft_service.storage.storage import Storage
from ft_service.train.batches import Batches
from ft_service.train.checkpoints.manifest import Checkpoints
from ft_service.train.checkpoints.resume import resume
from ft_service.train.checkpoints.save import Checkpointer
from ft_service.train.loop import train
from ft_service.train.objectives.sft import LossModel
from ft_service.train.parallel import Parallel
from ft_service.train.protocol import Hooks, TrainingState
from tests.train.staged import Staged
from tests.train.training_cases import TrulyPartitioned, model_of, packed_rows, plan_of

CHECKPOINT = CheckpointSpec(every_steps=2)


def run_case(case: dict[str, Any], world_size: int) -> dict[str, Any]:
    """Losses of all steps, and what rank 0 counted of the checkpoint.

    The training begins at the newest checkpoint on the case's storage, if it has one.
    """
    plan = plan_of(case, world_size)
    plan = plan.model_copy(update={"spec": plan.spec.model_copy(update={"checkpoint": CHECKPOINT})})
    parallel = TrulyPartitioned(plan)
    torch.manual_seed(0)
    model = model_of(plan, parallel)
    parallel.wrap(LossModel(model.module, model.causal_lm))
    run = RunFolder(Storage(case["storage"]), "bot")
    manifest = resume(run, parallel, plan, EventLog(run.storage, run.run_id))
    start = manifest.training_state() if manifest else TrainingState()
    first_step = start.step
    with pytest.MonkeyPatch.context() as patches:
        staged = Staged(patches)
        losses = train_and_save(run, parallel, case["staging_bytes"], start)
    files = [part.file for entry in Checkpoints(run).entries() for part in Checkpoints(run).manifest(entry).parts]
    num_swapped = sum(map(parallel._engine.optimizer._swappable_optimizer_subgroup, range(num_groups(parallel))))
    parallel.close()
    return {
        "first_step": first_step,
        "losses": losses,
        "staged_peak": staged.peak,
        "staged_after": staged.now,
        "files": files,
        "num_swapped": num_swapped,
    }


def train_and_save(run: RunFolder, parallel: Parallel, staging_bytes: int, start: TrainingState) -> list[float]:
    plan = parallel.plan
    saver = Checkpointer(run, parallel, plan.training_digest, CHECKPOINT, staging_bytes=staging_bytes)
    rows = packed_rows()
    batches = Batches(rows, 0, plan.global_batch_size, plan.micro_batch_size, parallel.rank, parallel.world_size)
    metrics: list[StepMetrics] = []
    hooks = Hooks(
        on_step=metrics.append,
        on_best=lambda state: None,
        on_checkpoint=lambda state: saver.save(state, "", lambda kept: None),
    )
    train(plan, parallel, batches, None, hooks, start)
    saver.wait()
    return [step.loss for step in metrics]


def num_groups(parallel: Parallel) -> int:
    """Groups of parameters that the optimizer updates at a time, and that NVMe holds as one."""
    return len(parallel._engine.optimizer.fp16_groups)
