"""The adapters of a run's last epochs, which are published beside the best one (`checkpoint.publish_epochs`)."""

import math
import sys

from ft_service.errors import StorageError
from ft_service.model.trainable import TrainableModel
from ft_service.plan.plan import RunPlan
from ft_service.runs.folder import RunFolder
from ft_service.train.parallel import Parallel
from ft_service.train.weights import run_on_rank_zero, write_adapter


def published_epoch_steps(plan: RunPlan) -> frozenset[int]:
    """The steps after which the last `checkpoint.publish_epochs` whole epochs of a plan are complete."""
    count = plan.spec.checkpoint.publish_epochs
    steps_per_epoch = plan.dataset.rows / plan.global_batch_size
    ends = [min(plan.num_steps, math.ceil(epoch * steps_per_epoch)) for epoch in range(1, int(plan.epochs + 1e-9) + 1)]
    return frozenset(sorted(set(ends))[-count:]) if count else frozenset()


class EpochAdapters:
    """Writes the adapter at the end of each of these epochs. Every rank calls it at every step."""

    def __init__(self, run: RunFolder, plan: RunPlan, model: TrainableModel, parallel: Parallel) -> None:
        self._run = run
        self._model = model
        self._parallel = parallel
        self._steps = published_epoch_steps(plan) if model.is_adapter else frozenset()

    def __call__(self, step: int) -> None:
        """An adapter that cannot be written is left out; training goes on."""
        if step not in self._steps:
            return
        path = f"{self._run.path}/{self._run.epoch_folder(step)}"
        try:
            # Files that an earlier attempt wrote at the same step must not be mixed with these.
            run_on_rank_zero(self._parallel, lambda: self._run.storage.delete(path))
            write_adapter(self._model, self._parallel, self._run.storage, path)
        except StorageError as error:  # the same on all ranks
            if self._parallel.is_rank_zero:
                print(f"The adapter of step {step} is not kept: {error}", file=sys.stderr, flush=True)
