"""Trains cases on the real engine and counts the most bytes that are allocated in a step.

The engine is that of one worker of two. The other one is pretended: its collectives return at once and write nothing,
which changes no size. Among real workers, gloo's threads would allocate buffers of their own, and hold weights for some
time after they are released, so that counts would depend on the load of the machine. NCCL does neither.
"""

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from ft_service.train.batches import MicroBatch
from ft_service.train.objectives.sft import LossModel
from ft_service.train.parallel import Parallel, end_process, prepare_process
from tests.train.training_cases import model_of, plan_of

WORKERS = 2
STEPS = 3
"""The last one is counted. ZeRO-3 learns the order of its gathers in the others."""
MICRO_STEPS = 2
_COUNTED = "counted step"


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
    prepare_process(use_gpu=False)
    import deepspeed

    dist.init_process_group("fake", rank=0, world_size=WORKERS, store=FakeStore())
    deepspeed.init_distributed("fake", verbose=False)
    results.write_text(json.dumps({name: peak_bytes(case) for name, case in cases.items()}))
    end_process()


def peak_bytes(case: dict[str, Any]) -> int:
    """The most that torch's allocator has handed out in a step, from the construction of the engine on."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        plan = plan_of(case, WORKERS).model_copy(update={"kept_layers": case["kept_layers"]})
        parallel = AlwaysUpdates(plan)
        model = model_of(plan, parallel)
        parallel.wrap(LossModel(model.module, model.causal_lm))
        batch = one_document(case["tokens"], model.causal_lm.config.vocab_size)
        for step in range(1, STEPS + 1):
            with record_function(_COUNTED if step == STEPS else "step"):
                for micro_step in range(1, MICRO_STEPS + 1):
                    loss = parallel.loss(batch)
                    parallel.backward(loss)
                    loss = loss.detach()
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
