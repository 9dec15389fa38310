"""Packed rows to micro-batches: flattened, without padding, with the positions whose next token is a loss token.

Legend: T tokens of all documents of a micro-batch, N positions whose next token is a loss token.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
import torch

from ft_service.data.order import step_rows


class PackedRow(Protocol):
    """One packed sequence: token ids [T], a mask of its loss tokens [T], and the lengths of its documents."""

    @property
    def input_ids(self) -> np.ndarray: ...
    @property
    def loss_mask(self) -> np.ndarray: ...
    @property
    def document_lengths(self) -> np.ndarray: ...


class PackedRows(Protocol):
    """A table of packed rows, such as `ft_service.data.prepare.RowTable`."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> PackedRow: ...


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass on one rank."""

    input_ids: torch.Tensor
    """int64 [1, T]"""
    position_ids: torch.Tensor
    """int64 [1, T]; starts at 0 in every document"""
    document_lengths: list[int]
    document_offsets: torch.Tensor
    """int32 [documents + 1]: running sum of the lengths, from 0"""
    target_positions: torch.Tensor
    """int64 [N]: positions in T whose hidden states predict a loss token"""
    targets: torch.Tensor
    """int64 [N]: those loss tokens"""

    def to(self, device: torch.device) -> "MicroBatch":
        if device.type == "cpu":
            return self
        tensors = [field.name for field in fields(self) if field.name != "document_lengths"]
        return replace(
            self, **{name: getattr(self, name).pin_memory().to(device, non_blocking=True) for name in tensors}
        )


def loss_positions(row: PackedRow) -> np.ndarray:
    """Positions [N] of the row's loss tokens. The first token of a document is never one: nothing predicts it."""
    mask = row.loss_mask.astype(bool)
    starts = np.cumsum(row.document_lengths)[:-1]
    mask[0] = False
    mask[starts] = False
    return np.flatnonzero(mask)


def collate(rows: Sequence[PackedRow]) -> MicroBatch:
    """Concatenate rows. Attention separates documents by their lengths, so no padding is needed."""
    lengths = np.concatenate([row.document_lengths for row in rows])
    ids = np.concatenate([row.input_ids for row in rows]).astype(np.int64)
    row_starts = np.cumsum([0, *(len(row.input_ids) for row in rows[:-1])])
    predicted = np.concatenate([loss_positions(row) + start for row, start in zip(rows, row_starts, strict=True)])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths)
    return MicroBatch(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(positions)[None],
        document_lengths=lengths.tolist(),
        document_offsets=torch.from_numpy(offsets.astype(np.int32)),
        target_positions=torch.from_numpy(predicted - 1),
        targets=torch.from_numpy(ids[predicted]),
    )


@dataclass(frozen=True)
class Step:
    """One rank's share of an optimizer step, and the totals of the step over all ranks."""

    micro_batches: list[MicroBatch]
    rows: list[int]
    """Indices of this rank's rows, in order."""
    all_rows: list[int]
    """Indices of the rows of all ranks."""
    global_loss_tokens: int
    global_tokens: int


@dataclass(frozen=True)
class Batches:
    """The batches of a run, as a function of the step alone: each rank computes any step without communication.

    Row k of a step belongs to micro-step k // (world size x micro-batch size). So the rows of a step, and their order
    within a micro-step, are the same for every number of ranks.
    """

    rows: PackedRows
    seed: int
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int

    def step(self, step: int) -> Step:
        """The batch of the step that follows `step` completed steps."""
        return self._split(step_rows(self.seed, step, self.global_batch_size, len(self.rows)).tolist())

    def in_order(self) -> Iterator[Step]:
        """Every row once, in order, for validation. The last step may be smaller."""
        size = self.micro_batch_size * self.world_size
        for start in range(0, len(self.rows), size):
            yield self._split(list(range(start, min(start + size, len(self.rows)))))

    def _split(self, indices: list[int]) -> Step:
        stride = self.micro_batch_size * self.world_size
        first = self.rank * self.micro_batch_size
        shares = [
            range(start + first, min(start + first + self.micro_batch_size, len(indices)))
            for start in range(0, len(indices), stride)
        ]
        chosen = [self.rows[index] for index in indices]
        return Step(
            # A rank without a row of its own runs another row without loss tokens: collectives need every rank.
            micro_batches=[
                collate([chosen[i] for i in share]) if share else _without_loss(collate(chosen[:1])) for share in shares
            ],
            rows=[indices[i] for share in shares for i in share],
            all_rows=indices,
            global_loss_tokens=sum(len(loss_positions(row)) for row in chosen),
            global_tokens=sum(len(row.input_ids) for row in chosen),
        )


def _without_loss(batch: MicroBatch) -> MicroBatch:
    return replace(batch, target_positions=batch.target_positions[:0], targets=batch.targets[:0])


def prefetched(make: Callable[[int], Step], start: int, stop: int) -> Generator[Step, None, None]:
    """Yield `make(start)` ... `make(stop - 1)`; a thread prepares each while the caller uses the previous one."""
    if start >= stop:
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
        upcoming = pool.submit(make, start)
        for step in range(start, stop):
            ready = upcoming.result()
            if step + 1 < stop:
                upcoming = pool.submit(make, step + 1)
            yield ready
