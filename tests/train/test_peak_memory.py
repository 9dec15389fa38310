"""The peak memory in the metrics is that of the worker with most, not that of rank 0."""

from typing import Any

import pytest
import torch

from ft_service.train import parallel as module
from ft_service.train.parallel import Parallel


def a_rank(peaks: tuple[float, float]) -> Parallel:
    parallel: Any = object.__new__(Parallel)
    parallel.world_size = 3
    parallel.device = torch.device("cpu")
    parallel.peak_memory_gib = lambda: peaks
    return parallel


def test_every_rank_learns_the_most_in_the_collective_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [a_rank((10.0, 12.0)), a_rank((30.0, 31.0)), a_rank((20.0, 40.0))]
    contributed: list[torch.Tensor] = []
    monkeypatch.setattr(module.dist, "all_gather_into_tensor", lambda out, own: contributed.append(own.clone()))
    for rank in ranks:
        rank._step_values = rank._gathered(torch.tensor(1.5), torch.tensor(2.0), 1.0, *rank.peak_memory_gib())
    monkeypatch.setattr(module.dist, "all_gather_into_tensor", lambda out, own: out.copy_(torch.cat(contributed)))
    for rank in ranks:
        rank._step_values = rank._gathered(torch.tensor(1.5), torch.tensor(2.0), 1.0, *rank.peak_memory_gib())
        rank._read_update(torch.tensor(0.5))
        update = rank._update
        assert (update.loss_sum, update.correct, update.num_leaving, update.grad_norm) == (4.5, 6.0, 3.0, 0.5)
        assert (update.peak_memory_gib, update.peak_reserved_gib) == (30.0, 40.0)
