"""Parallelism: the process group, the collectives, and the DeepSpeed engine.

This module and `parallel_placement` are the only users of deepspeed. They import it inside functions: DeepSpeed chooses
its accelerator when it is imported, so `prepare_process` must run first.
"""

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
from ft_service.model.shards import Partitioning
from ft_service.model.writer import DTYPE_NAMES, TensorFormat
from ft_service.plan.memory import MAX_BUCKET_ELEMENTS, PERSISTENCE_THRESHOLD
from ft_service.plan.plan import RunPlan
from ft_service.train.batches import MicroBatch
from ft_service.train.compiling import compile_under_flock, compile_with_installed_ninja, end_compilers_with_process
from ft_service.train.environment import allocator_environment
from ft_service.train.gathers import (
    count_devices_once,
    gather_whole_layers,
    keep_gathered,
    mark_backward_directly,
    release_by_current_prefetches,
    release_weights,
    trace_nothing,
)
from ft_service.train.optimizer_state import OptimizerState
from ft_service.train.protocol import BatchLoss, Update

_GIB = 2**30
_JOIN_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others to join the process group: nodes may start at different times."""
_COLLECTIVE_GRACE_SECONDS = 3600
"""Collectives time out this long after the watchdog: it reports more about a hang, and some nodes fetch slowly."""


def prepare_process(use_gpu: bool) -> None:
    """Settings of this process that must be made before DeepSpeed is imported; `init_process_group` calls this.

    - ``DS_ACCELERATOR``, unless it is set: otherwise DeepSpeed guesses an accelerator from the installed packages.
    - ``PYTORCH_ALLOC_CONF``, unless the user configures torch's GPU allocator: see
      `ft_service.train.environment`.
    - Operators compile with this environment's ninja, under `flock` instead of torch's lock file, and the compilers end
      with this process: see `ft_service.train.compiling`.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if use_gpu else "cpu")
    if use_gpu:
        os.environ.update(allocator_environment())
    compile_under_flock()
    compile_with_installed_ninja()
    end_compilers_with_process()


def import_deepspeed(use_gpu: bool) -> None:
    """Import DeepSpeed, and what it imports with its first engine: inside `ft_service.model.light_imports`.

    Trap: DeepSpeed's Muon is imported with every engine, and asks for torch's compiler when it is imported.
    """
    prepare_process(use_gpu)
    import deepspeed  # noqa: F401
    from deepspeed.runtime.zero.muon import original_muon  # noqa: F401


def init_process_group(use_gpu: bool) -> None:
    """Join the process group described by the environment (torchrun, Ray), or create one of this process alone.

    Prepares the process first, see `prepare_process`.
    """
    prepare_process(use_gpu)
    import deepspeed

    if "RANK" not in os.environ:
        os.environ.update(_single_process_environment())
    if use_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if use_gpu else "gloo", timeout=_JOIN_TIMEOUT)
    deepspeed.init_distributed("nccl" if use_gpu else "gloo", verbose=False)


def leave_process_group() -> None:
    """Tell the other ranks' libraries that this process ends on purpose."""
    dist.destroy_process_group()


def _single_process_environment() -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def end_process() -> NoReturn:
    """End this process with exit code 0, skipping Python's own shutdown. For processes that torchrun started.

    Trap: gloo's threads release the tensors of a finished collective shortly after it returns, and need the interpreter
    for that. During Python's shutdown they abort the process ("terminate called without an active exception").
    Destroying the process group does not join these threads, because DeepSpeed still refers to it. Ray ends its workers
    the same way.
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class Parallel:
    """A rank, its device, its collectives, and the DeepSpeed engine that shards model and optimizer."""

    def __init__(self, plan: RunPlan) -> None:
        """Call `init_process_group` first."""
        self.plan = plan
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.on_progress: Callable[[], None] = lambda: None
        """Called at each parameter while the trained parameters are gathered or written."""
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if plan.spec.parallel.use_gpu else torch.device("cpu")
        )
        self.dtype = torch.bfloat16 if plan.spec.train.precision == "bf16" else torch.float32
        self._engine: Any = None
        self._step_values = torch.empty(0)
        self._update = Update(math.nan, 0, 0, math.nan, math.nan, math.nan)
        self._extend_group_timeouts()

    @property
    def hpz_partition_size(self) -> int:
        """Ranks of a node that share a second copy of the weights (hpZ); 1 without hpZ."""
        return self.plan.hpz_partition_size

    @property
    def gathers_whole_layers(self) -> bool:
        """Whether ZeRO-3 gathers and releases a decoder layer as one; see `ft_service.train.gathers`.

        Not with weights on NVMe: DeepSpeed reads a layer's weights at once, and has five buffers for them.
        """
        return self.plan.zero_stage == 3 and self.plan.offload != "nvme"

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    def _extend_group_timeouts(self) -> None:
        """Let the watchdog end a hanging process before any existing process group ends its collective."""
        timeout = timedelta(seconds=self.plan.spec.parallel.hang_timeout_seconds + _COLLECTIVE_GRACE_SECONDS)
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timeout, group)

    # -- building --------------------------------------------------------------------------------------------------

    def placement(self) -> WeightPlacement:
        """Where the base's weights are kept: partitioned among all ranks under ZeRO-3, otherwise whole on each."""
        if self.plan.zero_stage < 3:
            return WholeWeights(self.device)
        from ft_service.train.parallel_placement import Zero3Weights

        partitioning = Partitioning(self.rank, self.world_size, self.hpz_partition_size)
        return Zero3Weights(self.device, partitioning, self._config())

    @contextmanager
    def hf_deepspeed_config(self) -> Iterator[None]:
        """Inside, transformers and peft know that weights are partitioned under ZeRO-3, and gather those they read."""
        if self.plan.zero_stage < 3:
            yield
            return
        from transformers.integrations import HfDeepSpeedConfig

        config = HfDeepSpeedConfig(self._config())  # transformers keeps only a weak reference to it
        try:
            yield
        finally:
            del config

    def wrap(self, model: nn.Module) -> None:
        """Give `model` to DeepSpeed. Its forward returns a loss sum; parameters that require gradients are trained."""
        import deepspeed

        for_cpu = self.plan.offload != "none"
        config = self._config()
        if self.gathers_whole_layers:
            zero = config["zero_optimization"]
            threshold = zero.setdefault("stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD)
            config["zero_optimization"] = gather_whole_layers(model, threshold) | zero
            trace_nothing()
            count_devices_once()
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=self._optimizer(model, for_cpu), config=config, dist_init_required=False
        )
        if self.gathers_whole_layers:
            release_by_current_prefetches(self._engine.optimizer)
            mark_backward_directly(model)
            if self.plan.spec.method.type != "full":
                keep_gathered(self._engine.optimizer, model, [parameter for _, parameter in self._trained()])
        if self.plan.zero_stage > 0:
            self._read_norm_once()
        self._extend_group_timeouts()  # of the groups that DeepSpeed has just created: NCCL's default is ten minutes

    def _optimizer(self, model: nn.Module, for_cpu: bool) -> torch.optim.Optimizer:
        train = self.plan.spec.train
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # Under ZeRO-3 a partitioned parameter has the shape [0]; its real shape is ds_shape.
        matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) >= 2]
        vectors = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) < 2]
        # Weight decay applies to matrices only, not to norms and biases.
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
        plan = self.plan
        parallel = plan.spec.parallel
        # DeepSpeed allocates the whole bucket once and keeps it: 1 GiB by default, far more than an adapter needs.
        bucket = min(MAX_BUCKET_ELEMENTS, plan.trainable_parameters)
        zero: dict[str, Any] = {"stage": plan.zero_stage, "reduce_bucket_size": bucket}
        if plan.offload != "none":
            place: dict[str, Any] = {"device": plan.offload, "pin_memory": parallel.use_gpu}
            if plan.offload == "nvme":
                place["nvme_path"] = parallel.nvme_path
            zero["offload_optimizer"] = place
            if plan.zero_stage == 3:
                zero["offload_param"] = place
        if plan.zero_stage == 3:
            # Otherwise DeepSpeed replaces torch.nn.functional.linear in the whole process, permanently.
            zero["memory_efficient_linear"] = False
            zero["zero_hpz_partition_size"] = self.hpz_partition_size
        return {
            "train_batch_size": plan.global_batch_size,
            "train_micro_batch_size_per_gpu": plan.micro_batch_size,
            "gradient_accumulation_steps": plan.gradient_accumulation_steps,
            "gradient_clipping": plan.spec.train.max_grad_norm,
            "bf16": {"enabled": self.dtype == torch.bfloat16},
            # Gradients accumulate in fp32, so that they hardly depend on the number of micro-steps. ZeRO-0 cannot.
            "data_types": {"grad_accum_dtype": "fp32" if plan.zero_stage or self.dtype == torch.float32 else None},
            "zero_optimization": zero,
            "steps_per_print": 10**9,
            # It would wait for the device twice in every micro-step.
            "timers": {"throughput": {"enabled": False}},
        }

    # -- training --------------------------------------------------------------------------------------------------

    def loss(self, batch: MicroBatch) -> BatchLoss:
        """Loss sum of a micro-batch, and how many of its loss tokens are predicted."""
        loss_sum, correct = self._engine(batch.to(self.device)).unbind()
        return BatchLoss(loss_sum, correct.detach())

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients. At the end of a step they are the *mean* over ranks, as ZeRO and DDP reduce them."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def micro_step(self) -> None:
        """End a micro-step that is not the last one of its step."""
        self._engine.step()

    def update(self, learning_rate: float, sums: BatchLoss, leaving: bool) -> Update:
        """End a step's last micro-step: update the weights, unless the loss or the gradient is not finite.

        Every rank must call it, with the sums over its micro-batches. Adds these and `leaving` up over the ranks, finds
        the highest memory of any, and waits for the device once. DeepSpeed itself waits more often under offloading,
        and under ZeRO-0 in bf16.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._step_values = self._gathered(sums.loss_sum, sums.correct, float(leaving), *self.peak_memory_gib())
        if self.plan.zero_stage > 0:
            self._engine.step()  # calls _read_update, see wrap
        else:
            # Without ZeRO the engine does not keep the norm, but every rank has the whole, reduced gradient.
            norm = nn.utils.get_total_norm(p.grad for _, p in self._trained() if p.grad is not None)
            if self._read_update(norm).isfinite():
                self._engine.step()
        return self._update

    def _read_update(self, norm: torch.Tensor) -> torch.Tensor:
        """Read the step's figures together with its gradient norm; the norm on the host, infinite if not to be used.

        ZeRO skips an update whose norm is not finite.
        """
        sums = self._step_values[:, :3].sum(0)
        peaks = self._step_values[:, 3:].amax(0)
        values = torch.cat([sums, peaks, norm.to(sums).view(1)]).tolist()
        loss_sum, correct, num_leaving, allocated, reserved, grad_norm = values
        if grad_norm < 0:  # what DeepSpeed reports for a norm that is not finite
            grad_norm = math.inf
        self._update = Update(loss_sum, correct, num_leaving, allocated, reserved, grad_norm)
        usable = math.isfinite(loss_sum) and math.isfinite(grad_norm)
        return torch.tensor(grad_norm if usable else math.inf)

    def _read_norm_once(self) -> None:
        """Let ZeRO take its gradient norm from `_read_update`, instead of waiting for the device up to four times."""
        from deepspeed.runtime import bf16_optimizer
        from deepspeed.runtime.utils import combine_grad_norm_groups

        zero = self._engine.optimizer
        if self.plan.zero_stage == 3:
            norm_groups = zero._get_norm_groups
            zero._get_norm_groups = lambda: [self._read_update(combine_grad_norm_groups(norm_groups()))]
        elif isinstance(zero, bf16_optimizer.BF16_Optimizer):  # DeepSpeed's choice for ZeRO-1 in bf16
            stock_step = zero.step
            stock_norm = bf16_optimizer.get_global_norm_of_tensors

            def step() -> None:
                bf16_optimizer.get_global_norm_of_tensors = lambda **given: self._read_update(stock_norm(**given))
                try:
                    stock_step()
                finally:
                    bf16_optimizer.get_global_norm_of_tensors = stock_norm

            zero.step = step
        else:
            global_norm = zero.scaled_global_norm
            zero.scaled_global_norm = lambda: self._read_update(global_norm())
            if self.plan.offload == "none":
                zero.has_overflow = lambda partition_gradients: False  # the norm is not finite then

    @contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Inside, dropout and gradients are off."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()
            if self.gathers_whole_layers:
                release_weights(self._engine.optimizer, self._engine.module)

    # -- collectives -----------------------------------------------------------------------------------------------

    def sum_over_ranks(self, *values: torch.Tensor | float) -> list[float]:
        """The sum of each number over all ranks. Every rank must call it."""
        sums: list[float] = self._gathered(*values).sum(0).tolist()
        return sums

    def _gathered(self, *values: torch.Tensor | float) -> torch.Tensor:
        """The values of every rank, [ranks, values], still on the device."""
        dtype = torch.float64 if self.device.type == "cpu" else torch.float32
        own = torch.stack([torch.as_tensor(value).detach().to(self.device, dtype) for value in values])
        if self.world_size == 1:
            return own.view(1, -1)
        gathered = own.new_empty(self.world_size * len(own))
        dist.all_gather_into_tensor(gathered, own)
        return gathered.view(self.world_size, -1)

    def all_gather_object(self, value: Any) -> list[Any]:
        """The value of every rank, by rank. Every rank must call it."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast_from_rank_zero(self, value: Any) -> Any:
        """The value of rank 0. Every rank must call it."""
        return self.all_gather_object(value)[0]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    # -- trained parameters ----------------------------------------------------------------------------------------

    def gather_trained(self) -> dict[str, torch.Tensor]:
        """Name in the wrapped model -> whole tensor on the CPU, of all trained parameters; {} on all ranks but 0.

        Every rank must call it. It gathers one parameter at a time, and no frozen one.
        """
        import deepspeed

        whole: dict[str, torch.Tensor] = {}
        for name, parameter in self._trained():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.plan.zero_stage == 3):
                if self.is_rank_zero:
                    whole[name] = parameter.detach().cpu().clone()
        return whole

    def trained_formats(self) -> dict[str, TensorFormat]:
        """Name in the wrapped model -> dtype and whole shape, of all trained parameters, in the model's order."""
        return {
            name: TensorFormat(DTYPE_NAMES[parameter.dtype], tuple(getattr(parameter, "ds_shape", parameter.shape)))
            for name, parameter in self._trained()
        }

    def gather_to_owners(self, owners: Mapping[str, int]) -> Iterator[tuple[str, torch.Tensor]]:
        """Gather each trained parameter on its owner, and on no other rank.

        `owners` maps every name to a rank. Yields name and whole tensor of those that this rank owns, on the CPU, in
        the model's order. Every rank must exhaust the iterator.
        """
        for name, parameter in self._trained():
            owner = owners[name]
            if self.plan.zero_stage == 3:
                whole = self._gather_partitions(parameter, owner)
            else:
                whole = parameter if owner == self.rank else None
            if whole is not None:
                yield name, whole.detach().cpu()

    def _gather_partitions(self, parameter: Any, owner: int) -> torch.Tensor | None:
        """The whole tensor of a partitioned parameter, on its owner; None on the other ranks."""
        with self._loaded_partition(parameter) as partition:
            own = partition.to(self.device)
            if owner != self.rank:
                dist.gather(own, dst=owner)
                return None
            padded = own.new_empty(self.world_size * len(own))
            dist.gather(own, list(padded.chunk(self.world_size)), dst=owner)
        return padded[: parameter.ds_numel].view(parameter.ds_shape)

    @contextmanager
    def _loaded_partition(self, parameter: Any) -> Iterator[torch.Tensor]:
        """This rank's partition. If it is on NVMe, it is in memory only inside the block."""
        from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus

        partition: Any = parameter.ds_tensor
        is_on_nvme = partition.status == PartitionedParamStatus.NOT_AVAILABLE
        if is_on_nvme:
            parameter.nvme_swapper.swap_in([parameter], async_op=False)
        elif partition.status == PartitionedParamStatus.INFLIGHT:
            parameter.nvme_swapper.synchronize_reads()
        try:
            yield partition
        finally:
            if is_on_nvme:
                parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self._engine.module.model.named_parameters():
            if parameter.requires_grad:
                self.on_progress()
                yield name, parameter

    # -- resuming --------------------------------------------------------------------------------------------------

    def optimizer_state(self) -> OptimizerState:
        """Master weights and Adam's moments of this rank, by parameter name."""
        names = {id(parameter): name for name, parameter in self._trained()}
        partitioning = Partitioning(self.rank, self.world_size)
        return OptimizerState(self._engine, names, self.plan.zero_stage, partitioning)

    def random_state(self) -> dict[str, torch.Tensor]:
        """The states of the generators that dropout draws from, as bytes: ``cpu``, and ``cuda`` on a GPU."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def restore_random_state(self, states: Mapping[str, torch.Tensor]) -> None:
        """Set the generators to states that `random_state` returned."""
        if "cpu" in states:
            torch.set_rng_state(states["cpu"])
        if "cuda" in states and self.device.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.device)

    def peak_memory_gib(self) -> tuple[float, float]:
        """Peak memory of this rank so far: allocated on the GPU, and reserved there by torch's allocator.

        On a CPU, both are the resident memory of the process.
        """
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / _GIB, torch.cuda.max_memory_reserved() / _GIB
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB
        return resident, resident

    def close(self) -> None:
        """Destroy the engine, and with it DeepSpeed's hooks on the model."""
        if self._engine is not None:
            self._engine.destroy()
            self._engine = None
