"""Trains with ZeRO-1 and ZeRO-3 on a device, where torch raises if the host waits for it within a micro-step.

    python -m tests.train.waiting_cases cuda

In processes of its own: a GPU needs another accelerator of DeepSpeed than `tests.forked` imports. On a CPU nothing is
raised; `tests.train.test_host_reads` counts there.
"""

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ft_service.train.batches import Batches
from ft_service.train.objectives.sft import LossModel
from ft_service.train.parallel import Parallel, end_process, init_process_group
from tests.train.training_cases import model_of, plan_of, rows_of, write_base

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "lora_rank": 4},
    "qlora": {"type": "qlora", "lora_rank": 4},
}
STEPS = 4
"""In the first ones ZeRO-3 records the order of its gathers."""


@contextlib.contextmanager
def no_waiting(device: str) -> Iterator[None]:
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def train(case: dict[str, Any], device: str) -> list[float]:
    plan = plan_of(case, 1)
    parallel = Parallel(plan)
    model = model_of(plan, parallel)
    parallel.wrap(LossModel(model.module, model.causal_lm))
    batches = Batches(rows_of(case), 0, plan.global_batch_size, plan.micro_batch_size, 0, 1)
    losses = []
    for number in range(STEPS):
        step = batches.step(number)
        with no_waiting(device) if number == STEPS - 1 else contextlib.nullcontext():
            for micro_batch in step.micro_batches:
                loss = parallel.loss(micro_batch)
                parallel.backward(loss.loss_sum * (1 / step.global_loss_tokens))
                if micro_batch is not step.micro_batches[-1]:
                    parallel.micro_step()
        losses.append(parallel.update(1e-3, loss, leaving=False).loss_sum)
    parallel.close()
    return losses


def main(device: str) -> None:
    init_process_group(use_gpu=device == "cuda")
    with tempfile.TemporaryDirectory() as folder:
        write_base(Path(folder), hidden_size=384, intermediate_size=768)  # kernels of attention need heads of 64
        for stage in (1, 3):
            for name, method in METHODS.items():
                case = {"base": folder, "method": method, "stage": stage, "micro": 1, "precision": "bf16"}
                losses = train(case | {"use_gpu": device == "cuda", "checkpointing": stage == 3}, device)
                print(f"{name} ZeRO-{stage}: {losses}", flush=True)
                assert all(0 < loss < 1e6 for loss in losses)
    end_process()


if __name__ == "__main__":
    main(sys.argv[1])
