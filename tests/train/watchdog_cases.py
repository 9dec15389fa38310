"""Processes that hang, or do not, each under a watchdog."""

import ctypes
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from ft_service.runs.folder import RunFolder
from ft_service.storage.storage import Storage
from ft_service.train.objectives.sft import LossModel
from ft_service.train.parallel import Parallel, init_process_group
from ft_service.train.watchdog import Watchdog
from tests.train.training_cases import model_of, plan_of, write_base

NEVER = threading.Event()


def is_slow(watchdog: Watchdog, timeout: float) -> None:
    for number in range(8):
        watchdog.beat(f"micro-batch {number}", 1)
        time.sleep(0.5 * timeout)


def is_suspended(watchdog: Watchdog, timeout: float) -> None:
    """Says when it may be stopped: the watchdog has seen its last beat by then. What follows takes time of its own."""
    watchdog.beat("micro-batch 1", 1)
    time.sleep(0.3 * timeout)
    print("now", flush=True)
    until = time.process_time() + 0.3 * timeout
    while time.process_time() < until:
        pass


def waits_for_ever(watchdog: Watchdog, timeout: float) -> None:
    watchdog.beat("micro-batch 3 of 4", 12)
    NEVER.wait()


def storage_hangs(watchdog: Watchdog, timeout: float) -> None:
    Storage.exists = lambda *_: NEVER.wait()  # type: ignore[method-assign, assignment, return-value]
    NEVER.wait()


def keeps_the_interpreter(watchdog: Watchdog, timeout: float) -> None:
    ctypes.PyDLL(None).sleep(600)


def skips_a_collective(watchdog: Watchdog, timeout: float) -> None:
    """Worker 1 leaves one out, and waits elsewhere for worker 0, which waits in it: a second apart."""
    store = dist.distributed_c10d._get_default_store()
    for step in range(1, 6):
        watchdog.beat("micro-batch 1 of 1", step)
        if step == 3 and dist.get_rank() == 1:
            time.sleep(1)
            watchdog.beat("validating", step)
            store.wait(["never"])
        dist.all_reduce(torch.ones(1))


def prints_group_timeouts(watchdog: Watchdog, timeout: float) -> None:
    """Of all process groups that there are once an engine is made, in seconds."""
    base = Path(watchdog._run.storage.root, "base")
    write_base(base)
    case = {"base": str(base), "method": {"type": "full"}, "stage": 2, "micro": 1}
    init_process_group(use_gpu=False)
    spec = plan_of(case, 1).spec
    parallel_spec = spec.parallel.model_copy(update={"hang_timeout_seconds": int(timeout)})
    plan = plan_of(case, 1).model_copy(update={"spec": spec.model_copy(update={"parallel": parallel_spec})})
    parallel = Parallel(plan)
    model = model_of(plan, parallel)
    parallel.wrap(LossModel(model.module, model.causal_lm))
    backends = [group._get_backend(torch.device("cpu")) for group in dist.distributed_c10d._world.pg_map]
    print("timeouts", *(backend.options._timeout.total_seconds() for backend in backends))


def run_watched(case: str, storage: str, timeout: float) -> None:
    rank, world_size = 0, 1
    if case == "skips_a_collective":
        dist.init_process_group("gloo")
        rank, world_size = dist.get_rank(), dist.get_world_size()
    watchdog = Watchdog(RunFolder(Storage(storage), "r"), "first", rank, world_size, timeout)
    watchdog.start()
    globals()[case](watchdog, timeout)
    watchdog.stop()
