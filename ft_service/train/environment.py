"""Environment of a worker that torch and OpenMP read once: the settings of the GPU allocator, and the threads."""

import os
from importlib.metadata import version

from ft_service.plan.memory import PINNED_CACHE_MIB
from ft_service.plan.plan import RunPlan

ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Where a user configures torch's GPU allocator; torch reads both."""
EXPANDABLE_SEGMENTS = "expandable_segments:True"
"""On the GPU, segments grow instead of fragmenting: packed rows, and so most blocks, have another size in every
micro-step."""
EXACT_PINNED_BLOCKS = f"pinned_max_cached_size_mb:{PINNED_CACHE_MIB}"
"""In main memory, larger pinned blocks have the size that is asked for, not the next power of two.

Trap: `pinned_max_round_threshold_mb` alone would also end the rounding, but torch then hands out a cached block that
may be smaller than the one asked for.
"""
_HAS_EXACT_PINNED_BLOCKS = (2, 13)
"""Version of torch. Earlier ones refuse a setting that they do not know, at the first allocation on the GPU."""


def allocator_environment() -> dict[str, str]:
    """The allocator settings to add to the environment of a GPU worker; {} if the user has set their own.

    torch reads them when it first allocates on the GPU.
    """
    if any(name in os.environ for name in ALLOCATOR_VARIABLES):
        return {}
    settings = [EXPANDABLE_SEGMENTS]
    major, minor, *_ = version("torch").split(".")  # the driver imports no torch
    if (int(major), int(minor)) >= _HAS_EXACT_PINNED_BLOCKS:
        settings.append(EXACT_PINNED_BLOCKS)
    return {"PYTORCH_ALLOC_CONF": ",".join(settings)}


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
