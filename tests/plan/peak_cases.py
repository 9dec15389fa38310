"""Trains cases on the real engine and counts the most bytes that are allocated in a step.

The engine is that of one worker of two. The other one is pretended: its collectives return at once and write nothing,
which changes no size. Among real workers, gloo's threads would allocate buffers of their own, and hold weights for some
time after they are released, so that counts would depend on the load of the machine. NCCL does neither.
"""

import gc
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from ft_service.catalog.models import shape_from_config
from ft_service.model.attention import MULTIPLIED_ON_CPU
from ft_service.model.base import read_config
from ft_service.model.cpu_products import WIDENED_ON_CPU
from ft_service.plan.memory import Layout, Method, estimate_memory
from ft_service.train.batches import MicroBatch
from ft_service.train.objectives.sft import LossModel
from ft_service.train.parallel import Parallel, end_process, prepare_process
from ft_service.train.protocol import BatchLoss
from tests.forked import Workers
from tests.model.layer_cases import dropout_as_on_a_gpu
from tests.plan.memory_cases import write_llama
from tests.train.training_cases import model_of, plan_of

WORKERS = 2
TOKENS = 512
# Weights of the MLP, embedding and head are above ZeRO-3's persistence threshold, unless they are packed.
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
RANK = 8
RECOMPUTED = {"no layer": (False, 0), "two layers": (True, 1), "all layers": (True, 0)}
"""Whether layers are recomputed, and how many of them keep their activations all the same."""
METHODS: tuple[Method, ...] = ("full", "lora", "qlora")
LAYOUTS = {
    f"{method} ZeRO-{stage}, {recomputed} recomputed": Layout(
        method=method,
        num_workers=WORKERS,
        zero_stage=stage,
        max_seq_len=TOKENS,
        activation_checkpointing=checkpointing,
        kept_layers=kept_layers,
        lora_rank=RANK,
    )
    for method in METHODS
    for stage in (1, 2, 3)
    for recomputed, (checkpointing, kept_layers) in RECOMPUTED.items()
}
LAYOUTS |= {
    f"lora with dropout, {name.removeprefix('lora ')}": replace(layout, has_dropout=True)
    for name, layout in LAYOUTS.items()
    if layout.method == "lora" and layout.kept_layers == 0
}
LAYOUTS |= {
    f"do{name.removeprefix('lo')}": replace(layout, use_dora=True)
    for name, layout in LAYOUTS.items()
    if layout.method == "lora" and layout.zero_stage == 3 and layout.kept_layers == 0
}
STEPS = 3
"""The last one is counted. ZeRO-3 learns the order of its gathers in the others."""
MICRO_STEPS = 2
_COUNTED = "counted step"


def write_peak_base(folder: Path) -> None:
    write_llama(folder, **SIZES)


def planned_bytes(base: Path, name: str) -> int:
    """Without the reserve, which torch's allocator never hands out."""
    components = estimate_memory(shape_from_config(read_config(base)), LAYOUTS[name]).gpu
    return sum(components.values()) - components["reserve"]


def peaks(base: Path, results: Path) -> dict[str, int]:
    """Peak bytes of a step by layout, counted in a process of its own; `results` is a file to write."""
    cases = {
        name: {
            "base": str(base),
            "method": method_of(layout),
            "stage": layout.zero_stage,
            "micro": 1,
            "precision": layout.precision,
            "checkpointing": layout.activation_checkpointing,
            "kept_layers": layout.kept_layers,
        }
        for name, layout in LAYOUTS.items()
    }
    worker = Workers(run_cases_of_one_worker, cases, results, world_size=None)
    printed = worker.wait(timeout=900)
    assert worker.returncode == 0, printed[-8000:]
    counted: dict[str, int] = json.loads(results.read_text())
    return counted


def method_of(layout: Layout) -> dict[str, Any]:
    if layout.method == "full":
        return {"type": "full"}
    dropout = 0.1 if layout.has_dropout else 0.0
    return {"type": layout.method, "lora_rank": RANK, "lora_dropout": dropout, "use_dora": layout.use_dora}


class AlwaysUpdates(Parallel):
    """Weights that nobody sent may be anything, and so may the gradient norm."""

    def _read_update(self, norm: torch.Tensor) -> torch.Tensor:
        super()._read_update(norm)
        return torch.tensor(1.0)


def run_cases_of_one_worker(cases: dict[str, dict[str, Any]], results: Path) -> None:
    """In a process of its own: write the peak bytes of each case to `results`, as JSON."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(WORKERS)}
    torch.set_num_threads(1)
    WIDENED_ON_CPU.clear()  # a GPU makes no fp32 copies for matrix products
    MULTIPLIED_ON_CPU.clear()  # the kernel of a GPU keeps no scores, nor does torch's own for a CPU
    prepare_process(use_gpu=False)
    import deepspeed

    dist.init_process_group("fake", rank=0, world_size=WORKERS, store=FakeStore())
    deepspeed.init_distributed("fake", verbose=False)
    results.write_text(json.dumps({name: peak_bytes(case) for name, case in cases.items()}))
    end_process()


def peak_bytes(case: dict[str, Any]) -> int:
    """The most that torch's allocator has handed out in a step, from the construction of the engine on."""
    gc.collect()
    dropout = mock.patch("torch.nn.functional.dropout", dropout_as_on_a_gpu)
    with dropout, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        plan = plan_of(case, WORKERS).model_copy(update={"kept_layers": case["kept_layers"]})
        parallel = AlwaysUpdates(plan)
        model = model_of(plan, parallel)
        parallel.wrap(LossModel(model.module, model.causal_lm))
        batch = one_document(TOKENS, model.causal_lm.config.vocab_size)
        for step in range(1, STEPS + 1):
            with record_function(_COUNTED if step == STEPS else "step"):
                for micro_step in range(1, MICRO_STEPS + 1):
                    loss = parallel.loss(batch)
                    parallel.backward(loss.loss_sum)
                    loss = BatchLoss(loss.loss_sum.detach(), loss.correct)
                    if micro_step < MICRO_STEPS:
                        parallel.micro_step()
                parallel.update(1e-3, loss, leaving=False)
    parallel.close()
    return _peak(profiler)


def one_document(tokens: int, vocab_size: int) -> MicroBatch:
    """Every token is a loss token."""
    ids = torch.arange(tokens) % vocab_size
    return MicroBatch(
        input_ids=ids[None],
        position_ids=torch.arange(tokens)[None],
        document_lengths=[tokens],
        document_offsets=torch.tensor([0, tokens], dtype=torch.int32),
        target_positions=torch.arange(tokens),
        targets=ids,
    )


def _peak(profiler: profile) -> int:
    """Trap: the garbage of an earlier case may be freed in between. Only what was allocated here counts."""
    results: Any = profiler.profiler
    events = list(_all_events(results.kineto_results.experimental_event_tree()))
    (counted,) = (event for event in events if event.name == _COUNTED)
    alive: dict[int, int] = {}
    allocated = 0
    peak = 0
    for event in sorted(events, key=lambda event: event.start_time_ns):
        if event.tag != _EventType.Allocation:
            continue
        fields = event.typed[1]
        if fields.alloc_size > 0:
            alive[fields.ptr] = fields.alloc_size
            allocated += fields.alloc_size
        else:
            allocated -= alive.pop(fields.ptr, 0)
        if counted.start_time_ns <= event.start_time_ns <= counted.end_time_ns:
            peak = max(peak, allocated)
    return peak


def _all_events(events: list[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _all_events(event.children)
