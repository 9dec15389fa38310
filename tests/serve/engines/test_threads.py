"""CPU threads: only the model's thread keeps a team of OpenMP threads. With more of them than CPUs, libgomp lets all
sleep between two operations, and an engine with two threads is slower than with one."""

import asyncio
import os
import threading
from pathlib import Path

import pytest
import torch

from ft_service.registry.registry import Registry
from ft_service.storage.storage import Storage
from serve.engines.engine import GenerationRequest, Sampling
from serve.engines.transformers_engine import TransformersEngine
from serve.settings import BaseSettings
from tests.forked import Workers
from tests.serve.serving_world import publish_adapter
from tests.worlds import SMALL, write_base

NUM_THREADS = 2
WIDE = {**SMALL, "intermediate_size": 16_384}
"""An adapter of rank 4 has tensors of 65,536 elements. torch takes several threads from 32,768 on."""


@pytest.mark.multiprocess
def test_only_the_models_thread_keeps_a_team_of_openmp_threads(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_base(base, ["the quick brown fox"], 280, WIDE)
    adapter = publish_adapter(Registry(Storage(str(tmp_path / "storage"))), base, tmp_path / "adapter", seed=1)
    workers = Workers(answer_and_count, str(base), str(tmp_path / "storage"), adapter.id, world_size=None)
    printed = workers.wait(timeout=120)
    assert workers.returncode == 0, printed


def answer_and_count(base: str, storage: str, adapter_id: str) -> None:
    """In a process of its own, where no thread has had parallel operations before."""
    torch.get_num_threads()
    torch.set_num_threads(NUM_THREADS)
    others = native_threads()
    registry = Registry(Storage(storage))
    engine = TransformersEngine(Path(base), registry, BaseSettings(base=base, dtype="float32", cache_gib=0.1))
    adapter = registry.resolve(adapter_id)
    greedy = Sampling(temperature=0.0)
    request = GenerationRequest("a", tuple(range(3, 67)), adapter, 4, frozenset(), greedy)

    async def answer() -> int:
        return sum([len(chunk.token_ids) async for chunk in engine.generate(request)])

    assert asyncio.run(answer()) == 4
    assert engine.stats().loaded_adapters == (adapter.digest,)
    # With fewer, the model has taken over the one thread that each thread with adapters takes.
    assert native_threads() - others == NUM_THREADS - 1
    asyncio.run(engine.close())


def native_threads() -> int:
    """Of this process, those that are not Python's."""
    return len(os.listdir("/proc/self/task")) - len(threading.enumerate())
