"""Environment of a worker that torch and OpenMP read once: the settings of the GPU allocator, and the threads."""

import os

from ft_service.plan.memory import PINNED_CACHE_MIB
from ft_service.plan.plan import RunPlan

ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Where a user configures torch's GPU allocator; torch reads both."""
ALLOCATOR_SETTINGS = f"expandable_segments:True,pinned_max_cached_size_mb:{PINNED_CACHE_MIB}"
"""On the GPU, segments grow instead of fragmenting: packed rows, and so most blocks, have another size in every
micro-step. In main memory, larger pinned blocks have the size that is asked for, not the next power of two.

Trap: `pinned_max_round_threshold_mb` alone would also end the rounding, but torch then hands out a cached block that
may be smaller than the one asked for.
"""


def allocator_environment() -> dict[str, str]:
    """The allocator settings to add to the environment of a GPU worker; {} if the user has set their own.

    torch reads them when it first allocates on the GPU.
    """
    if any(name in os.environ for name in ALLOCATOR_VARIABLES):
        return {}
    return {"PYTORCH_ALLOC_CONF": ALLOCATOR_SETTINGS}


def threads_per_worker(plan: RunPlan) -> int:
    """CPU threads of this worker: `parallel.cpus_per_worker`, or this node's cores divided by its workers.

    If it is auto, only offloading gets more than one thread: its AdamW runs on the CPU.
    """
    setting = plan.spec.parallel.cpus_per_worker
    if setting != "auto":
        return setting
    if plan.offload == "none":
        return 1
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
