"""Parallelism: the process group and the DeepSpeed engine. The only user of deepspeed."""

import math
import os
import resource
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from ft_service.model.load import WeightPlacement, WholeWeights
from ft_service.model.shards import Partitioning, partition_numel
from ft_service.model.writer import DTYPE_NAMES, TensorFormat
from ft_service.plan.memory import MOST_BUCKET_ELEMENTS
from ft_service.plan.plan import RunPlan
from ft_service.train.batches import MicroBatch
from ft_service.train.compiling import lock_builds_by_kernel
from ft_service.train.optimizer_state import OptimizerState

# Otherwise DeepSpeed would guess an accelerator from what is installed.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, ZeroParamStatus
from deepspeed.utils import groups

lock_builds_by_kernel()

_GIB = 2**30
_BEYOND_HANG_SECONDS = 3600
"""Collectives wait so much longer than the watchdog, which says more about a hang, and for nodes that fetch slowly."""


def init_process_group(use_gpu: bool) -> None:
    """Join the process group that the environment describes (torchrun, Ray), or one of this process alone."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        alone = {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ.update(alone)
    if use_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if use_gpu else "gloo")
    deepspeed.init_distributed("nccl" if use_gpu else "gloo", verbose=False)


def end_process() -> NoReturn:
    """End a process that joined a group under torchrun, successfully, without the interpreter's own end.

    Trap: gloo's threads drop a finished collective's tensors a moment after it has returned, and need the interpreter
    to do so; while that one ends they abort the process ("terminate called without an active exception").
    Destroying the group does not join them, since DeepSpeed refers to it still. Ray ends its workers this way anyway.
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class Parallel:
    """One worker's view of all workers: rank, device, collectives, and the engine that shards model and optimizer."""

    def __init__(self, plan: RunPlan) -> None:
        """The process group must exist (`init_process_group`)."""
        self.plan = plan
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.on_progress: Callable[[], None] = lambda: None
        """Told of each parameter that a walk over the trained ones has come to."""
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if plan.spec.parallel.use_gpu else torch.device("cpu")
        )
        self.dtype = torch.bfloat16 if plan.spec.train.precision == "bf16" else torch.float32
        self._engine: Any = None
        self._grad_norm: torch.Tensor | float = math.nan
        self._leave_hangs_to_watchdog()

    @property
    def hpz_partition_size(self) -> int:
        """Workers of a node that share a second copy of the weights; 1 without one."""
        return self.plan.hpz_partition_size

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    def _leave_hangs_to_watchdog(self) -> None:
        """No process group that there is now ends a collective before the watchdog has ended the process."""
        timeout = timedelta(seconds=self.plan.spec.parallel.hang_timeout_seconds + _BEYOND_HANG_SECONDS)
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timeout, group)

    # -- building --------------------------------------------------------------------------------------------------

    def placement(self) -> WeightPlacement:
        """Where the base's weights rest: partitioned among all workers under ZeRO-3, otherwise whole on each."""
        return Zero3Weights(self) if self.plan.zero_stage == 3 else WholeWeights(self.device)

    @contextmanager
    def hf_deepspeed_config(self) -> Iterator[None]:
        """Inside, transformers and peft know whether weights are partitioned, and gather those that they look at."""
        if self.plan.zero_stage < 3:
            yield
            return
        from transformers.integrations import HfDeepSpeedConfig

        alive = HfDeepSpeedConfig(self._config())  # transformers keeps a weak reference: it must outlive the block
        try:
            yield
        finally:
            del alive

    def wrap(self, model: nn.Module) -> None:
        """Hand `model`, whose forward gives a loss sum, to DeepSpeed; parameters that require gradients are trained."""
        for_cpu = self.plan.offload != "none"
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=self._optimizer(model, for_cpu), config=self._config(), dist_init_required=False
        )
        self._leave_hangs_to_watchdog()  # DeepSpeed has made groups of its own, which NCCL would end after ten minutes

    def _optimizer(self, model: nn.Module, for_cpu: bool) -> torch.optim.Optimizer:
        train = self.plan.spec.train
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # ZeRO-3 shows the shape of a partitioned parameter as [0]; ds_shape is the true one.
        matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) >= 2]
        vectors = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) < 2]
        groups = [
            {"params": matrices, "weight_decay": train.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        settings: dict[str, Any] = {
            "lr": self.plan.learning_rate,
            "betas": (train.adam_beta1, train.adam_beta2),
            "eps": train.adam_epsilon,
        }
        groups = [group for group in groups if group["params"]]
        if for_cpu:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
        return torch.optim.AdamW(groups, fused=True, **settings)

    def _config(self) -> dict[str, Any]:
        plan, parallel = self.plan, self.plan.spec.parallel
        # DeepSpeed allocates the whole bucket at once and for good: a GiB by default, where an adapter needs little.
        bucket = min(MOST_BUCKET_ELEMENTS, plan.trainable_parameters)
        zero: dict[str, Any] = {"stage": plan.zero_stage, "reduce_bucket_size": bucket}
        if plan.offload != "none":
            place: dict[str, Any] = {"device": plan.offload, "pin_memory": parallel.use_gpu}
            if plan.offload == "nvme":
                place["nvme_path"] = parallel.nvme_path
            zero["offload_optimizer"] = place
            if plan.zero_stage == 3:
                zero["offload_param"] = place
        if plan.zero_stage == 3:
            # DeepSpeed would otherwise replace torch.nn.functional.linear for the whole process, for good.
            zero["memory_efficient_linear"] = False
            zero["zero_hpz_partition_size"] = self.hpz_partition_size
        return {
            "train_batch_size": plan.global_batch_size,
            "train_micro_batch_size_per_gpu": plan.micro_batch_size,
            "gradient_accumulation_steps": plan.gradient_accumulation_steps,
            "gradient_clipping": plan.spec.train.max_grad_norm,
            "bf16": {"enabled": self.dtype == torch.bfloat16},
            # Micro-steps are summed in fp32: the sum then hardly depends on how a batch is split. ZeRO-0 cannot.
            "data_types": {"grad_accum_dtype": "fp32" if plan.zero_stage or self.dtype == torch.float32 else None},
            "zero_optimization": zero,
            "steps_per_print": 10**9,
        }

    # -- training --------------------------------------------------------------------------------------------------

    def loss(self, batch: MicroBatch) -> torch.Tensor:
        """Loss sum of a micro-batch, with a graph behind it unless gradients are off."""
        result: torch.Tensor = self._engine(batch.to(self.device))
        return result

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients; at the end of a step they are the *mean* over workers, as ZeRO and DDP reduce them."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def micro_step(self, learning_rate: float) -> None:
        """End a micro-step; the last one of a step updates the weights at `learning_rate`.

        A gradient that is not finite never reaches the weights nor the optimizer: there is no update then.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.plan.zero_stage == 0 and self._engine.is_gradient_accumulation_boundary():
            # Without ZeRO the engine forgets the norm, and every worker holds the whole, reduced gradient.
            self._grad_norm = nn.utils.get_total_norm(p.grad for _, p in self._trained() if p.grad is not None)
            if not math.isfinite(self._grad_norm):
                return  # as ZeRO does by itself
        self._engine.step()
        if self.plan.zero_stage > 0:
            self._grad_norm = self._engine.get_global_grad_norm()

    def grad_norm(self) -> float:
        """Global gradient norm of the last update, before clipping; infinite or NaN if there was none for it."""
        return float(self._grad_norm)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No dropout and no gradients inside."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    # -- between workers -------------------------------------------------------------------------------------------

    def sum_over_ranks(self, *values: torch.Tensor | float) -> list[float]:
        """For each number its sum over all workers; every worker must call it."""
        dtype = torch.float64 if self.device.type == "cpu" else torch.float32
        totals = torch.stack([torch.as_tensor(value).detach().to(self.device, dtype) for value in values])
        if self.world_size > 1:
            dist.all_reduce(totals)
        sums: list[float] = totals.tolist()
        return sums

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def gather_trained(self) -> dict[str, torch.Tensor]:
        """The trained parameters, whole, on the CPU of the first worker (others get {}), by name in the wrapped model.

        Every worker must call it. Parameters are gathered one at a time, and frozen ones never.
        """
        whole: dict[str, torch.Tensor] = {}
        for name, parameter in self._trained():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.plan.zero_stage == 3):
                if self.is_rank_zero:
                    whole[name] = parameter.detach().cpu().clone()
        return whole

    def trained_formats(self) -> dict[str, TensorFormat]:
        """Type and whole shape of each trained parameter, by name in the wrapped model, in its order."""
        return {
            name: TensorFormat(DTYPE_NAMES[parameter.dtype], tuple(getattr(parameter, "ds_shape", parameter.shape)))
            for name, parameter in self._trained()
        }

    def gather_to_owners(self, owners: Mapping[str, int]) -> Iterator[tuple[str, torch.Tensor]]:
        """The trained parameters, each whole on its owner and on no other worker.

        `owners` maps every name to a rank. Yields, in the model's order, what this worker owns. Every worker must
        exhaust it.
        """
        for name, parameter in self._trained():
            owner = owners[name]
            if self.plan.zero_stage == 3:
                whole = self._bring_together(parameter, owner)
            else:
                whole = parameter if owner == self.rank else None
            if whole is not None:
                yield name, whole.detach().cpu()

    def _bring_together(self, parameter: Any, owner: int) -> torch.Tensor | None:
        """A partitioned parameter, from the partitions of all workers, on its owner."""
        with self._partition_at_hand(parameter) as partition:
            mine = partition.to(self.device)
            if owner != self.rank:
                dist.gather(mine, dst=owner)
                return None
            padded = mine.new_empty(self.world_size * len(mine))
            dist.gather(mine, list(padded.chunk(self.world_size)), dst=owner)
        return padded[: parameter.ds_numel].view(parameter.ds_shape)

    @contextmanager
    def _partition_at_hand(self, parameter: Any) -> Iterator[torch.Tensor]:
        """This worker's partition; read for the time of the block if it rests on NVMe."""
        partition: Any = parameter.ds_tensor
        is_away = partition.status == PartitionedParamStatus.NOT_AVAILABLE
        if is_away:
            parameter.nvme_swapper.swap_in([parameter], async_op=False)
        elif partition.status == PartitionedParamStatus.INFLIGHT:
            parameter.nvme_swapper.synchronize_reads()
        try:
            yield partition
        finally:
            if is_away:
                parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])

    def union(self, part: dict[str, str]) -> dict[str, str]:
        """All workers' entries together, on every worker; every worker must call it."""
        return {name: value for part in self.all_gather_object(part) for name, value in part.items()}

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self._engine.module.model.named_parameters():
            if parameter.requires_grad:
                self.on_progress()
                yield name, parameter

    # -- resuming --------------------------------------------------------------------------------------------------

    def optimizer_state(self) -> OptimizerState:
        """Master weights and moments of what is trained, by parameter name."""
        names = {id(parameter): name for name, parameter in self._trained()}
        sharing = Partitioning(self.rank, self.world_size)
        return OptimizerState(self._engine, names, self.plan.zero_stage, sharing)

    def random_state(self) -> dict[str, torch.Tensor]:
        """The generators that dropout draws from, as bytes."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def restore_random_state(self, states: Mapping[str, torch.Tensor]) -> None:
        if "cpu" in states:
            torch.set_rng_state(states["cpu"])
        if "cuda" in states and self.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.device)

    def broadcast_from_rank_zero(self, value: Any) -> Any:
        """The first worker's value, on every worker; every worker must call it."""
        return self.all_gather_object(value)[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every worker's value, on every worker; every worker must call it."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def peak_memory_gib(self) -> float:
        """Peak memory of this worker so far: allocated on the GPU, or resident on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / _GIB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB

    def close(self) -> None:
        """Leave the engine; DeepSpeed keeps hooks on the model until then."""
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None


class Zero3Weights:
    """ZeRO-3's placement, without `deepspeed.zero.Init` around it, which allocates and broadcasts each weight whole.

    What Init would make of a parameter is made here from its parts: the marks and methods of a partitioned parameter
    (Init's own), and the tensor of this worker's partition, on the device, in pinned memory or in an NVMe swap buffer.
    """

    def __init__(self, parallel: Parallel) -> None:
        self.device = parallel.device
        node_size = parallel.hpz_partition_size
        self.sharing = Partitioning(parallel.rank, parallel.world_size, node_size)
        # DeepSpeed makes the groups of hpZ once in a process, and refuses to make them again.
        node_group = groups._get_zero_param_intra_parallel_group() if node_size > 1 else None
        self._init = deepspeed.zero.Init(config_dict_or_path=parallel._config(), zero_param_parallel_group=node_group)

    def place(self, parameter: Any) -> list[torch.Tensor]:
        self._init._convert_to_deepspeed_param(parameter)
        numel = partition_numel(parameter.numel(), self.sharing.world_size)
        parameter.ds_numel_aligned = numel * self.sharing.world_size
        parameter.ds_tensor = self._rest(parameter, numel)
        targets = [parameter.ds_tensor]
        if self.sharing.node_size > 1:
            numel = parameter.ds_numel_aligned // self.sharing.node_size
            parameter.ds_secondary_tensor = self._mark(self._allocate(parameter, numel), numel, None)
            targets.append(parameter.ds_secondary_tensor)
        # As after a forward pass: no more than a name for what is gathered next time.
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=self.device)
        parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
        return targets

    def settle(self, parameter: Any) -> None:
        if parameter.ds_tensor.final_location == OffloadDeviceEnum.nvme:
            self._init.param_swapper.swap_out_and_release([parameter])

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        gathered = tensor.new_empty(self.sharing.world_size * len(tensor))
        dist.all_gather_into_tensor(gathered, tensor)
        return gathered.view(self.sharing.world_size, len(tensor))

    def _rest(self, parameter: Any, numel: int) -> torch.Tensor:
        swapper = self._init.param_swapper
        if swapper is not None and swapper.swappable_tensor(numel=numel):
            return self._mark(swapper.get_buffer(parameter, numel), numel, OffloadDeviceEnum.nvme)
        return self._mark(self._allocate(parameter, numel), numel, None)

    def _allocate(self, parameter: Any, numel: int) -> torch.Tensor:
        offloaded = self._init.remote_device in (OffloadDeviceEnum.cpu, OffloadDeviceEnum.nvme)
        tensor = torch.empty(numel, dtype=parameter.dtype, device="cpu" if offloaded else self.device)
        return tensor.pin_memory() if offloaded and self._init.pin_memory else tensor

    @staticmethod
    def _mark(tensor: torch.Tensor, numel: int, location: OffloadDeviceEnum | None) -> torch.Tensor:
        tensor.ds_numel = numel  # type: ignore[attr-defined]
        tensor.status = PartitionedParamStatus.AVAILABLE  # type: ignore[attr-defined]
        tensor.final_location = location  # type: ignore[attr-defined]
        return tensor
