"""Counts what ZeRO-3 gathers in a micro-step (for `tests.forked.run_cases`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import deepspeed
import torch
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator, iter_params
from deepspeed.utils import z3_leaf_module
from torch import nn

from ft_service.plan.plan import RunPlan
from ft_service.train.batches import Batches
from ft_service.train.objectives.sft import LossModel
from ft_service.train.parallel import Parallel
from tests.train.training_cases import model_of, plan_of, rows_of

WARM_UP_STEPS = 3
MEASURED_STEPS = 2
LAYER_ELEMENTS = 98_304
"""Of a base of width 96 and 256 in the MLP, without its norms."""


class NothingReused(Parallel):
    """ZeRO-3 that releases every weight after each use, as it does with large ones, and prefetches as in a run."""

    def __init__(self, plan: RunPlan, node_size: int = 1) -> None:
        self._node_size = node_size
        super().__init__(plan)

    @property
    def hpz_partition_size(self) -> int:
        return self._node_size

    def _config(self) -> dict[str, Any]:
        config = super()._config()
        if not getattr(self, "gathers_whole_layers", False):
            # DeepSpeed's defaults, as small for this base as 50M and 1e9 elements are for the layers of an 8B model.
            config["zero_optimization"]["stage3_prefetch_bucket_size"] = LAYER_ELEMENTS // 4
            config["zero_optimization"]["stage3_max_live_parameters"] = LAYER_ELEMENTS * 9 // 2
        nothing_stays = ("param_persistence_threshold", "max_reuse_distance")
        config["zero_optimization"] |= {f"stage3_{name}": 0 for name in nothing_stays}
        return config


@dataclass
class Gathers:
    """What DeepSpeed's collectives gathered."""

    bytes: int = 0
    on_demand: int = 0
    """Weights that a module waited for because nothing had asked for them before."""
    concatenated: int = 0
    """Weights gathered into one buffer with others, and copied out of it."""
    adapters: int = 0
    """Adapter tensors that were not there when a module needed them."""
    peak_elements: int = 0
    """Most elements of the base that were gathered at the same time."""


@contextmanager
def counted(base: list[Any]) -> Iterator[Gathers]:
    """`base` are the weights that are gathered."""
    counts = Gathers()
    gathered = set(base)
    gather = deepspeed.comm.allgather_fn
    coalesced = partition_parameters.AllGatherCoalescedHandle.__init__
    fetch = PartitionedParameterCoordinator._fetch_sub_module_impl

    def counting_gather(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counts.bytes += output.numel() * output.element_size()
        return gather(output, *args, **kwargs)

    def counting_fetch(coordinator: Any, module: Any, forward: bool, is_leaf: bool) -> Any:
        parameters = set(iter_params(module, recurse=z3_leaf_module(module)))
        counts.on_demand += sum(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in parameters)
        # DeepSpeed's hooks of a layer do not see adapters.
        used: set[Any] = {p for _, p in nn.Module.named_parameters(module, recurse=z3_leaf_module(module))}
        counts.adapters += sum(p.ds_status != ZeroParamStatus.AVAILABLE for p in used - gathered)
        fetch(coordinator, module, forward, is_leaf)
        alive = sum(p.ds_numel for p in base if p.ds_status != ZeroParamStatus.NOT_AVAILABLE)
        counts.peak_elements = max(counts.peak_elements, alive)

    def counting_handle(handle: Any, *args: Any, **kwargs: Any) -> None:
        coalesced(handle, *args, **kwargs)
        counts.concatenated += len(handle.params)

    with (
        mock.patch.object(partition_parameters.AllGatherCoalescedHandle, "__init__", counting_handle),
        mock.patch.object(deepspeed.comm, "allgather_fn", counting_gather),
        mock.patch.object(PartitionedParameterCoordinator, "_fetch_sub_module_impl", counting_fetch),
    ):
        yield counts


def run_case(case: dict[str, Any], world_size: int) -> dict[str, Any]:
    """Gathers of a micro-step once DeepSpeed knows the order of the modules, and losses."""
    plan = plan_of(case, world_size)
    parallel = NothingReused(plan, case.get("node_size", 1))
    torch.manual_seed(0)
    model = model_of(plan, parallel)
    base = model.causal_lm
    parallel.wrap(LossModel(model.module, base))
    batches = Batches(
        rows_of(case), plan.spec.train.seed, plan.global_batch_size, plan.micro_batch_size, parallel.rank, world_size
    )
    losses = []
    micro_steps = 0

    def step(number: int) -> None:
        nonlocal micro_steps
        batch = batches.step(number)
        for position, micro_batch in enumerate(batch.micro_batches, start=1):
            loss = parallel.loss(micro_batch)
            parallel.backward(loss.loss_sum * (world_size / batch.global_loss_tokens))
            losses.append(float(loss.loss_sum.detach()))
            if position < len(batch.micro_batches):
                parallel.micro_step()
            else:
                parallel.update(1e-3, loss, leaving=False)
            micro_steps += 1

    for number in range(WARM_UP_STEPS):
        step(number)
    with parallel.evaluation_mode():
        parallel.loss(batches.step(0).micro_batches[0])
    full = plan.spec.method.type == "full"
    weights: list[Any] = [parameter for parameter in base.parameters() if full or not parameter.requires_grad]
    micro_steps = 0
    with counted(weights) as counts:
        for number in range(WARM_UP_STEPS, WARM_UP_STEPS + MEASURED_STEPS):
            step(number)
    base_bytes = sum(weight.ds_numel * weight.element_size() for weight in weights)
    result = {
        "gathers": counts.bytes / base_bytes / micro_steps,
        "on_demand": counts.on_demand / micro_steps,
        "concatenated": counts.concatenated / micro_steps,
        "adapters": counts.adapters / micro_steps,
        "peak_elements": counts.peak_elements,
        "base_bytes": base_bytes,
        "micro_steps": micro_steps,
        "losses": losses,
    }
    parallel.close()
    return result
