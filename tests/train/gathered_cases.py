"""Counts the bytes of gathered weights that are alive during a training step (for `tests.forked.run_cases`)."""

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from ft_service.train.batches import Batches
from ft_service.train.objectives.sft import LossModel
from ft_service.train.protocol import BatchLoss
from tests.train.training_cases import TrulyPartitioned, model_of, packed_rows, plan_of

_GLOO_SECONDS = 5.0


class GatheredWeights:
    """Every storage that a weight was gathered into, as weak references: nothing is kept alive here.

    Without those of an adapter, which stays gathered.
    """

    def __init__(self, model: nn.Module) -> None:
        """Call it after ZeRO-3 has registered its own hooks, which gather and free."""
        self._sizes: dict[StorageWeakRef, int] = {}
        for module in model.modules():
            module.register_forward_pre_hook(self._record)

    def _record(self, module: nn.Module, args: Any) -> None:
        parameters: list[Any] = list(module.parameters(recurse=False))
        for parameter in parameters:
            if parameter.ds_persist:
                continue
            storage = parameter.data.untyped_storage()
            self._sizes[StorageWeakRef(storage)] = storage.nbytes()

    def bytes_gathered(self) -> int:
        return sum(self._sizes.values())

    def bytes_alive(self) -> int:
        """Those that stay: gloo's threads release the tensors of a collective shortly after it has returned."""
        deadline = time.monotonic() + _GLOO_SECONDS
        while (alive := self._alive()) and time.monotonic() < deadline:
            time.sleep(0.01)
        return alive

    def _alive(self) -> int:
        return sum(size for storage, size in self._sizes.items() if not storage.expired())


def run_case(case: dict[str, Any], world_size: int) -> dict[str, Any]:
    """Bytes on each worker: of all weights, of those that a forward pass gathered, and of these the bytes alive after
    it and after the backward pass. An adapter's weights are left out. Of the second micro-step: in the first, ZeRO-3
    records the order of the modules.
    """
    plan = plan_of(case, world_size)
    parallel = TrulyPartitioned(plan)
    torch.manual_seed(0)
    model = model_of(plan, parallel)
    parallel.wrap(LossModel(model.module, model.causal_lm))
    batches = Batches(
        packed_rows(), plan.spec.train.seed, plan.global_batch_size, plan.micro_batch_size, parallel.rank, world_size
    )
    first, second, *_ = batches.step(0).micro_batches
    parallel.backward(parallel.loss(first).loss_sum)
    parallel.micro_step()
    gathered = GatheredWeights(model.module)
    loss = parallel.loss(second)
    weights: list[Any] = list(model.module.parameters())
    result = {
        "whole": sum(weight.ds_numel * weight.element_size() for weight in weights if not weight.ds_persist),
        "gathered": gathered.bytes_gathered(),
        "alive": gathered.bytes_alive(),
    }
    parallel.backward(loss.loss_sum)
    sums = BatchLoss(loss.loss_sum.detach(), loss.correct)
    del loss
    result["alive_after_backward"] = gathered.bytes_alive()
    parallel.update(1e-3, sums, leaving=False)
    parallel.close()
    everyones: list[Any] = [None] * world_size
    dist.all_gather_object(everyones, result)
    return {name: [worker[name] for worker in everyones] for name in result}
