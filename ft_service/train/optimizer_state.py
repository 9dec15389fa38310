"""Master weights and Adam's moments by parameter name, independent of how the ZeRO stage partitions them.

Each ZeRO stage keeps them in flat tensors with a layout of its own. `OptimizerState` shows them as shards: some
elements of a named parameter, in fp32, as views of the optimizer's own tensors. A state that is saved shard by shard
can be restored under any stage, any number of ranks and any offload.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ft_service.model.shards import Partitioning, Span, partition

KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""fp32 master weight, first and second moment (Kingma & Ba 2015, arXiv:1412.6980)."""

ReadShard = Callable[[str, str, Span, torch.Tensor], None]
"""Called with a parameter's name, a kind, a span of the flattened parameter, and the tensor to fill with it."""


@dataclass(frozen=True)
class ParameterShard:
    """The part of one trained parameter that this rank holds."""

    name: str
    numel: int
    """Of the whole parameter."""
    held: Span
    """Which elements of the flattened parameter this rank holds."""
    written: Span
    """Which of them this rank saves; every element is saved by exactly one rank."""
    tensors: dict[str, torch.Tensor]
    """Kind -> the elements `held`: a view of the optimizer's own tensor."""


@dataclass(frozen=True)
class _FlatSlice:
    """Where a flat tensor has a parameter: elements [start, start + length) of it, from `offset` on."""

    name: str
    numel: int
    start: int
    offset: int
    length: int


class OptimizerState:
    """The optimizer state of one rank, as shards."""

    def __init__(self, engine: Any, names: dict[int, str], zero_stage: int, partitioning: Partitioning) -> None:
        """`names` maps the id of each trained parameter to its name in the model."""
        self._zero = engine.optimizer
        self._adam = engine.basic_optimizer
        self._names = names
        self._stage = zero_stage
        self._partitioning = partitioning

    @property
    def step(self) -> int:
        """Number of updates that Adam has made; its bias correction depends on it."""
        states = [state for state in self._adam.state.values() if "step" in state]
        return int(states[0]["step"]) if states else 0

    def shards(self) -> Iterator[ParameterShard]:
        """All shards of this rank. If the state is on NVMe, a shard is valid only until the next one is yielded."""
        for index, (master, slices) in enumerate(self._flat_tensors()):
            swapped_in = self._swap_in(index)
            try:
                yield from self._shards_of(master, slices)
            finally:
                if swapped_in:
                    self._zero._release_swap_buffers(index)

    def restore(self, read: ReadShard, step: int) -> None:
        """Fill every shard with `read`, then copy the master weights to the model. Every rank must call it."""
        if self._stage == 3:
            self._zero._partition_all_parameters()
        for index, (master, slices) in enumerate(self._flat_tensors()):
            swapped_in = self._swap_in(index)
            for shard in self._shards_of(master, slices):
                for kind, tensor in shard.tensors.items():
                    read(shard.name, kind, shard.held, tensor)
            state = self._adam.state[master]
            state["step"] = torch.full_like(state["step"], step) if torch.is_tensor(state["step"]) else step
            if self._stage == 3:
                self._zero._reassign_or_swap_out_partitioned_parameters(index)
            if swapped_in:
                self._zero._optimizer_states_and_gradient_swap_out(index)
        self._copy_masters_to_model()

    # -- layouts of the ZeRO stages ---------------------------------------------------------------------------------

    def _flat_tensors(self) -> Iterator[tuple[torch.Tensor, list[_FlatSlice]]]:
        """Each fp32 tensor that the optimizer updates, and the parameters in it."""
        zero = self._zero
        rank = self._partitioning.rank
        if self._stage == 3:
            for index, group in enumerate(zero.fp16_groups):
                yield zero.fp32_partitioned_groups_flat[index], [self._partition(parameter) for parameter in group]
        elif hasattr(zero, "single_partition_of_fp32_groups"):  # ZeRO-2; ZeRO-1 in fp32
            for index, master in enumerate(zero.single_partition_of_fp32_groups):
                offsets = zero.round_robin_bit16_offsets[index]
                yield (
                    master,
                    self._overlaps(zero.round_robin_bit16_groups[index], offsets, rank * len(master), len(master)),
                )
        elif hasattr(zero, "fp32_groups_flat_partition"):  # ZeRO-1 in bf16
            for index, master in enumerate(zero.fp32_groups_flat_partition):
                group = zero.bf16_groups[index]
                offsets = []
                end = 0
                for parameter in group:
                    offsets.append(end)
                    end += parameter.numel()
                yield master, self._overlaps(group, offsets, rank * len(master), len(master))
        elif hasattr(zero, "fp32_groups"):  # ZeRO-0 in bf16
            for masters, group in zip(zero.fp32_groups, zero.fp16_groups, strict=True):
                for master, parameter in zip(masters, group, strict=True):
                    yield master, [_FlatSlice(self._name(parameter), master.numel(), 0, 0, master.numel())]
        else:  # ZeRO-0 in fp32: the parameters themselves
            for group in zero.param_groups:
                for parameter in group["params"]:
                    yield parameter, [_FlatSlice(self._name(parameter), parameter.numel(), 0, 0, parameter.numel())]

    def _partition(self, parameter: Any) -> _FlatSlice:
        _, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
        span = partition(parameter.ds_numel, self._partitioning.world_size, self._partitioning.rank)
        return _FlatSlice(self._name(parameter), parameter.ds_numel, span.start, offset, len(span))

    def _overlaps(self, group: list[Any], offsets: list[int], first: int, length: int) -> list[_FlatSlice]:
        """The parameters of `group`, laid end to end at `offsets`, that overlap elements [first, first + length)."""
        slices = []
        for parameter, offset in zip(group, offsets, strict=True):
            start = max(first, offset)
            stop = min(first + length, offset + parameter.numel())
            if start < stop:
                name = self._name(parameter)
                slices.append(_FlatSlice(name, parameter.numel(), start - offset, start - first, stop - start))
        return slices

    def _name(self, parameter: Any) -> str:
        return self._names[id(parameter)]

    def _shards_of(self, master: torch.Tensor, slices: list[_FlatSlice]) -> Iterator[ParameterShard]:
        flat = {kind: tensor.detach().view(-1) for kind, tensor in self._tensors(master).items()}
        for part in slices:
            held = Span(part.start, part.start + part.length)
            # Under ZeRO-0 every rank holds everything, and saves its share.
            own_share = partition(part.numel, self._partitioning.world_size, self._partitioning.rank)
            written = own_share if self._stage == 0 else held
            tensors = {kind: tensor[part.offset : part.offset + part.length] for kind, tensor in flat.items()}
            yield ParameterShard(part.name, part.numel, held, written, tensors)

    def _tensors(self, master: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self._adam.state[master]
        if "exp_avg" not in state:  # torch creates the moments at the first update
            fused = isinstance(self._adam, torch.optim.Optimizer) and self._adam.defaults.get("fused")
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device) if fused else 0
            state["exp_avg"] = torch.zeros_like(master.data)
            state["exp_avg_sq"] = torch.zeros_like(master.data)
        return {"weight": master.data, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}

    def _swap_in(self, index: int) -> bool:
        if self._stage != 3 or not self._zero._swappable_optimizer_subgroup(index):
            return False
        self._zero._optimizer_states_and_gradient_swap_in(index)
        return True

    def _copy_masters_to_model(self) -> None:
        zero = self._zero
        if self._stage == 3:
            if zero.persistent_parameters:  # small ones, which stay whole on every rank between steps
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
            zero.invalidate_secondary_tensor()
        elif hasattr(zero, "update_lp_params"):
            zero.update_lp_params()
        elif hasattr(zero, "fp32_groups"):
            for masters, group in zip(zero.fp32_groups, zero.fp16_groups, strict=True):
                for master, parameter in zip(masters, group, strict=True):
                    parameter.data.copy_(master.data)
