"""Trains cases on the real engine and counts where the host waits for the device."""

from typing import Any

import torch

from ft_service.train.batches import Batches
from ft_service.train.loop import validate
from ft_service.train.objectives.sft import LossModel
from tests.counts import HostReads
from tests.train.training_cases import TrulyPartitioned, model_of, plan_of, rows_of


def run_case(case: dict[str, Any], world_size: int) -> dict[str, list[str]]:
    """Lines of code that read from the device: in micro-steps, in the update of a step, and in a validation."""
    plan = plan_of(case, world_size)
    parallel = TrulyPartitioned(plan)
    model = model_of(plan, parallel)
    parallel.wrap(LossModel(model.module, model.causal_lm))
    size = (plan.global_batch_size, plan.micro_batch_size)
    batches = Batches(rows_of(case), plan.spec.train.seed, *size, parallel.rank, world_size)
    within: list[str] = []
    at_update: list[str] = []
    for number in range(4):  # the first steps record the order of ZeRO-3's gathers and start DeepSpeed's timer
        step = batches.step(number)
        assert len(step.micro_batches) > 1
        with HostReads() as reads:
            for micro_batch in step.micro_batches:
                loss = parallel.loss(micro_batch)
                parallel.backward(loss.loss_sum * (world_size / step.global_loss_tokens))
                if micro_batch is not step.micro_batches[-1]:
                    parallel.micro_step()
        within = reads.places
        with HostReads() as reads:
            parallel.update(1e-3, loss, leaving=False)
        at_update = reads.places
    with HostReads() as reads, torch.no_grad():
        validate(parallel, batches)
    parallel.close()
    return {"micro-steps": within, "update": at_update, "validation": reads.places}
