"""The rows of each training step: a function of seed and step alone, the same for any number of workers."""

from functools import lru_cache

import numpy as np


def step_rows(seed: int, step: int, global_batch_size: int, num_rows: int) -> np.ndarray:
    """Row numbers, int64 [global_batch_size], of the step that follows `step` completed steps.

    A run reads an endless stream of epochs. Each epoch is a permutation of all rows, drawn from (seed, epoch). A batch
    may span two epochs; no row is skipped.
    """
    positions = step * global_batch_size + np.arange(global_batch_size, dtype=np.int64)
    epochs, places = np.divmod(positions, num_rows)
    return np.array(
        [_epoch_order(seed, int(epoch), num_rows)[place] for epoch, place in zip(epochs, places, strict=True)]
    )


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_rows)
