"""The peak memory in the metrics is that of the worker with most, not that of rank 0."""

from typing import Any

import pytest
import torch

from ft_service.train import parallel as module
from ft_service.train.parallel import Parallel


def a_rank(rank: int, peaks: tuple[float, float]) -> Parallel:
    parallel: Any = object.__new__(Parallel)
    parallel.rank = rank
    parallel.world_size = 3
    parallel.device = torch.device("cpu")
    parallel._peak_memory_gib = None
    parallel._own_peak_memory_gib = lambda: peaks
    return parallel


def test_every_rank_learns_the_most_in_the_collective_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [a_rank(0, (10.0, 12.0)), a_rank(1, (30.0, 31.0)), a_rank(2, (20.0, 40.0))]
    assert ranks[0].peak_memory_gib() == (10.0, 12.0)  # before the first collective
    contributed: list[torch.Tensor] = []
    monkeypatch.setattr(module.dist, "all_reduce", lambda totals: contributed.append(totals.clone()))
    for rank in ranks:
        rank.sum_over_ranks(torch.tensor(1.5), 2.0)
    total = torch.stack(contributed).sum(0)
    collectives: list[None] = []

    def all_reduce(totals: torch.Tensor) -> None:
        collectives.append(None)
        totals.copy_(total)

    monkeypatch.setattr(module.dist, "all_reduce", all_reduce)
    for rank in ranks:
        assert rank.sum_over_ranks(torch.tensor(1.5), 2.0) == [4.5, 6.0]
        assert rank.peak_memory_gib() == (30.0, 40.0)
    assert len(collectives) == len(ranks)
