"""Master weights and Adam's moments, by parameter name, whatever ZeRO stage has cut and packed them how.

Each ZeRO stage keeps them in flat tensors of its own making. Here they are seen as shards: some elements of a named
parameter, in fp32, as views of the optimizer's own tensors. Written by shards, a state can be read back under any
stage, any number of workers, and any offload.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ft_service.model.shards import Partitioning, Span, partition

KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""fp32 master weight, first and second moment (Kingma & Ba 2015, arXiv:1412.6980)."""

Read = Callable[[str, str, Span, torch.Tensor], None]
"""Fills a tensor with elements of a span of a kind of a parameter."""


@dataclass(frozen=True)
class Shard:
    """What this worker holds of one trained parameter."""

    name: str
    numel: int
    """Of the whole parameter."""
    held: Span
    """The elements held here, of the flattened parameter."""
    written: Span
    """Those of them that this worker, and no other, writes."""
    tensors: dict[str, torch.Tensor]
    """Kind -> the elements `held`: a view of the optimizer's own tensor."""


@dataclass(frozen=True)
class _Piece:
    """A parameter in a flat tensor: elements [start, start + length) of it lie at `offset`."""

    name: str
    numel: int
    start: int
    offset: int
    length: int


class OptimizerState:
    """The optimizer's state of one worker, as shards."""

    def __init__(self, engine: Any, names: dict[int, str], zero_stage: int, sharing: Partitioning) -> None:
        """`names` maps the id of each trained parameter to its name in the model."""
        self._zero, self._adam = engine.optimizer, engine.basic_optimizer
        self._names, self._stage, self._sharing = names, zero_stage, sharing

    @property
    def step(self) -> int:
        """Updates that Adam has made; its bias correction depends on it."""
        states = [state for state in self._adam.state.values() if "step" in state]
        return int(states[0]["step"]) if states else 0

    def shards(self) -> Iterator[Shard]:
        """All shards of this worker. Where the state rests on NVMe, a shard is valid until the next one."""
        for index, (master, pieces) in enumerate(self._flat_tensors()):
            with_state = self._swap_in(index)
            yield from self._shards_of(master, pieces)
            if with_state:
                self._zero._release_swap_buffers(index)

    def restore(self, read: Read, step: int) -> None:
        """Fill every shard by `read`, and the weights in training from them. All workers must call it."""
        if self._stage == 3:
            self._zero._partition_all_parameters()
        for index, (master, pieces) in enumerate(self._flat_tensors()):
            swapped = self._swap_in(index)
            for shard in self._shards_of(master, pieces):
                for kind, tensor in shard.tensors.items():
                    read(shard.name, kind, shard.held, tensor)
            state = self._adam.state[master]
            state["step"] = torch.full_like(state["step"], step) if torch.is_tensor(state["step"]) else step
            if self._stage == 3:
                self._zero._reassign_or_swap_out_partitioned_parameters(index)
            if swapped:
                self._zero._optimizer_states_and_gradient_swap_out(index)
        self._refresh_weights()

    # -- the stages ------------------------------------------------------------------------------------------------

    def _flat_tensors(self) -> Iterator[tuple[torch.Tensor, list[_Piece]]]:
        """Each fp32 tensor that the optimizer updates, and what lies where in it."""
        zero, rank = self._zero, self._sharing.rank
        if self._stage == 3:
            for index, group in enumerate(zero.fp16_groups):
                yield zero.fp32_partitioned_groups_flat[index], [self._partition(parameter) for parameter in group]
        elif hasattr(zero, "single_partition_of_fp32_groups"):  # ZeRO-2, and ZeRO-1 but in bf16
            for index, master in enumerate(zero.single_partition_of_fp32_groups):
                offsets = zero.round_robin_bit16_offsets[index]
                yield (
                    master,
                    self._overlaps(zero.round_robin_bit16_groups[index], offsets, rank * len(master), len(master)),
                )
        elif hasattr(zero, "fp32_groups_flat_partition"):  # ZeRO-1 in bf16
            for index, master in enumerate(zero.fp32_groups_flat_partition):
                group, offsets, end = zero.bf16_groups[index], [], 0
                for parameter in group:
                    offsets.append(end)
                    end += parameter.numel()
                yield master, self._overlaps(group, offsets, rank * len(master), len(master))
        elif hasattr(zero, "fp32_groups"):  # ZeRO-0 in bf16
            for masters, group in zip(zero.fp32_groups, zero.fp16_groups, strict=True):
                for master, parameter in zip(masters, group, strict=True):
                    yield master, [_Piece(self._name(parameter), master.numel(), 0, 0, master.numel())]
        else:  # ZeRO-0 in fp32: the parameters themselves
            for group in zero.param_groups:
                for parameter in group["params"]:
                    yield parameter, [_Piece(self._name(parameter), parameter.numel(), 0, 0, parameter.numel())]

    def _partition(self, parameter: Any) -> _Piece:
        _, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        span = partition(parameter.ds_numel, self._sharing.world_size, self._sharing.rank)
        return _Piece(self._name(parameter), parameter.ds_numel, span.start, offset, len(span))

    def _overlaps(self, group: list[Any], offsets: list[int], first: int, length: int) -> list[_Piece]:
        """Of parameters laid end to end, what falls into `length` elements from `first` on."""
        pieces = []
        for parameter, offset in zip(group, offsets, strict=True):
            start, stop = max(first, offset), min(first + length, offset + parameter.numel())
            if start < stop:
                name = self._name(parameter)
                pieces.append(_Piece(name, parameter.numel(), start - offset, start - first, stop - start))
        return pieces

    def _name(self, parameter: Any) -> str:
        return self._names[id(parameter)]

    def _shards_of(self, master: torch.Tensor, pieces: list[_Piece]) -> Iterator[Shard]:
        flat = {kind: tensor.detach().view(-1) for kind, tensor in self._tensors(master).items()}
        for piece in pieces:
            held = Span(piece.start, piece.start + piece.length)
            # Without ZeRO every worker holds everything, and each writes a part.
            written = partition(piece.numel, self._sharing.world_size, self._sharing.rank) if self._stage == 0 else held
            tensors = {kind: tensor[piece.offset : piece.offset + piece.length] for kind, tensor in flat.items()}
            yield Shard(piece.name, piece.numel, held, written, tensors)

    def _tensors(self, master: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self._adam.state[master]
        if "exp_avg" not in state:  # torch makes them at the first update
            fused = isinstance(self._adam, torch.optim.Optimizer) and self._adam.defaults.get("fused")
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device) if fused else 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(master.data), torch.zeros_like(master.data)
        return {"weight": master.data, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}

    def _swap_in(self, index: int) -> bool:
        if self._stage != 3 or not self._zero._swappable_optimizer_subgroup(index):
            return False
        self._zero._optimizer_states_and_gradient_swap_in(index)
        return True

    def _refresh_weights(self) -> None:
        zero = self._zero
        if self._stage == 3:
            if zero.persistent_parameters:  # small ones, which are whole on every worker between steps
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
            zero.invalidate_secondary_tensor()
        elif hasattr(zero, "update_lp_params"):
            zero.update_lp_params()
        elif hasattr(zero, "fp32_groups"):
            for masters, group in zip(zero.fp32_groups, zero.fp16_groups, strict=True):
                for master, parameter in zip(masters, group, strict=True):
                    parameter.data.copy_(master.data)
