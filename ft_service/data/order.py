"""Which rows a step trains on: a function of seed and step alone, the same for every number of workers."""

from functools import lru_cache

import numpy as np


def step_rows(seed: int, step: int, global_batch_size: int, num_rows: int) -> np.ndarray:
    """Row numbers [global_batch_size], int64, of the update after `step` completed ones.

    The run reads an endless stream of epochs, each a permutation of all rows drawn from (seed, epoch); a batch may
    straddle two epochs, and no row is left out.
    """
    positions = step * global_batch_size + np.arange(global_batch_size, dtype=np.int64)
    epochs, places = np.divmod(positions, num_rows)
    return np.array(
        [_epoch_order(seed, int(epoch), num_rows)[place] for epoch, place in zip(epochs, places, strict=True)]
    )


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_rows)
