"""Where ZeRO-3 keeps the weights of a model that is being loaded.

Import this module only after `prepare_process`: it imports deepspeed.
"""

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, ZeroParamStatus
from deepspeed.utils import groups

from ft_service.model.shards import Partitioning, partition_numel


class Zero3Weights:
    """Partitions weights as ZeRO-3 does, without ever holding a whole one.

    `deepspeed.zero.Init` allocates and broadcasts each weight whole. This class uses only parts of it: Init's own marks
    and methods of a partitioned parameter, and a tensor for this rank's partition: on the device, in pinned memory, or
    in an NVMe swap buffer.
    """

    def __init__(self, device: torch.device, partitioning: Partitioning, deepspeed_config: dict[str, Any]) -> None:
        self.device = device
        self.partitioning = partitioning
        # DeepSpeed creates hpZ's process groups once in a process, and refuses to create them again.
        node_group = groups._get_zero_param_intra_parallel_group() if partitioning.node_size > 1 else None
        self._init = deepspeed.zero.Init(config_dict_or_path=deepspeed_config, zero_param_parallel_group=node_group)
        # Each weight is gathered into its own memory. Otherwise DeepSpeed gathers several into one buffer and copies
        # each out of it, so that all exist twice. The engine's setting of this name would also turn off prefetching.
        # A single worker's partitions are whole: it gathers nothing, unless this makes it copy them.
        self._init.allgather_sequential = partitioning.world_size > 1

    def allocate(self, parameter: Any) -> list[torch.Tensor]:
        self._init._convert_to_deepspeed_param(parameter)
        numel = partition_numel(parameter.numel(), self.partitioning.world_size)
        parameter.ds_numel_aligned = numel * self.partitioning.world_size
        parameter.ds_tensor = self._allocate_partition(parameter, numel)
        targets = [parameter.ds_tensor]
        if self.partitioning.node_size > 1:
            numel = parameter.ds_numel_aligned // self.partitioning.node_size
            parameter.ds_secondary_tensor = self._mark(self._empty(parameter, numel), numel, None)
            targets.append(parameter.ds_secondary_tensor)
        # As after a forward pass: empty until ZeRO-3 gathers it.
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=self.device)
        parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
        return targets

    def finish(self, parameter: Any) -> None:
        if parameter.ds_tensor.final_location == OffloadDeviceEnum.nvme:
            self._init.param_swapper.swap_out_and_release([parameter])

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        gathered = tensor.new_empty(self.partitioning.world_size * len(tensor))
        dist.all_gather_into_tensor(gathered, tensor)
        return gathered.view(self.partitioning.world_size, len(tensor))

    def _allocate_partition(self, parameter: Any, numel: int) -> torch.Tensor:
        swapper = self._init.param_swapper
        if swapper is not None and swapper.swappable_tensor(numel=numel):
            return self._mark(swapper.get_buffer(parameter, numel), numel, OffloadDeviceEnum.nvme)
        return self._mark(self._empty(parameter, numel), numel, None)

    def _empty(self, parameter: Any, numel: int) -> torch.Tensor:
        offloaded = self._init.remote_device in (OffloadDeviceEnum.cpu, OffloadDeviceEnum.nvme)
        tensor = torch.empty(numel, dtype=parameter.dtype, device="cpu" if offloaded else self.device)
        return tensor.pin_memory() if offloaded and self._init.pin_memory else tensor

    @staticmethod
    def _mark(tensor: torch.Tensor, numel: int, location: OffloadDeviceEnum | None) -> torch.Tensor:
        tensor.ds_numel = numel  # type: ignore[attr-defined]
        tensor.status = PartitionedParamStatus.AVAILABLE  # type: ignore[attr-defined]
        tensor.final_location = location  # type: ignore[attr-defined]
        return tensor
