"""Takes steps on the real engine, poisons the gradient of one, and says what that step changed."""

import math
from typing import Any

import torch

from ft_service.train.batches import Batches
from ft_service.train.objectives.sft import LossModel
from ft_service.train.optimizer_state import KINDS
from ft_service.train.parallel import Parallel
from ft_service.train.protocol import Update
from tests.train.training_cases import TrulyPartitioned, model_of, plan_of, rows_of


def everything(parallel: Parallel) -> list[torch.Tensor]:
    """Copies of this worker's weights in training, master weights and moments."""
    import deepspeed  # a process must be prepared before

    # ZeRO-3 may have freed a weight since it was last used. One that is still whole is read as it is.
    trained = [parameter for _, parameter in parallel._trained()]
    with deepspeed.zero.GatheredParameters(trained, enabled=parallel.plan.zero_stage == 3):
        weights = [parameter.detach().clone() for parameter in trained]
    partitions = [parameter.ds_tensor.detach() for _, parameter in parallel._trained() if parallel.plan.zero_stage == 3]
    states = [shard.tensors[kind] for shard in parallel.optimizer_state().shards() for kind in KINDS]
    return [tensor.clone() for tensor in weights + partitions + states]


def same(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def run_case(case: dict[str, Any], world_size: int) -> dict[str, Any]:
    plan = plan_of(case, world_size)
    parallel = TrulyPartitioned(plan)
    torch.manual_seed(0)
    model = model_of(plan, parallel)
    parallel.wrap(LossModel(model.module, model.causal_lm))
    size = (plan.global_batch_size, plan.micro_batch_size)
    batches = Batches(rows_of(case), plan.spec.train.seed, *size, parallel.rank, world_size)

    def take(number: int) -> Update:
        step = batches.step(number)
        for micro_batch in step.micro_batches[:-1]:
            parallel.backward(parallel.loss(micro_batch).loss_sum * (world_size / step.global_loss_tokens))
            parallel.micro_step()
        loss = parallel.loss(step.micro_batches[-1])
        parallel.backward(loss.loss_sum * (world_size / step.global_loss_tokens))
        return parallel.update(1e-2, loss, leaving=False)

    take(0)
    start = everything(parallel)
    norm = take(1).grad_norm
    healthy = everything(parallel)

    # The last worker's gradient of one element of one parameter, in its second micro-batch only.
    passes = []

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        passes.append(None)
        if parallel.rank == world_size - 1 and len(passes) == 2:
            gradient = gradient.clone()
            gradient.view(-1)[0] = float(case["poison"])
        return gradient

    name, parameter = list(parallel._trained())[-1]
    parameter.register_hook(poison)
    poisoned = take(2)
    result = {
        "norm": norm,
        "poisoned_norm": poisoned.grad_norm,
        "poisoned": name,
        "passes": len(passes),
        "moved_when_healthy": not same(start, healthy),
        "moved_when_poisoned": not same(healthy, everything(parallel)),
    }
    parallel.close()
    workers: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(workers, result)
    return {
        **result,
        "moved_when_poisoned": any(worker["moved_when_poisoned"] for worker in workers),
        "all_know": not any(math.isfinite(worker["poisoned_norm"]) for worker in workers),
    }
