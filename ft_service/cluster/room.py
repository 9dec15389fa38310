"""What a worker of a run needs of a node, in Ray's resources."""

from ft_service.catalog.gpus import find_gpu
from ft_service.spec.schema import ParallelSpec


def resources_per_worker(parallel: ParallelSpec) -> dict[str, float]:
    """What Ray reserves for each worker."""
    return {"CPU": parallel.reserved_cpus, **({"GPU": 1} if parallel.use_gpu else {})}


def room_per_worker(parallel: ParallelSpec) -> dict[str, float]:
    """What a node must have free for each worker: `resources_per_worker`, and the type of its GPU."""
    resources = resources_per_worker(parallel)
    if parallel.accelerator_type:  # the amount is the one that Ray Train requests
        resources[f"accelerator_type:{ray_accelerator_type(parallel.accelerator_type)}"] = 0.001
    return resources


def ray_accelerator_type(name: str | None) -> str | None:
    """Ray's exact name: the spec may say rtx-4090 for GeForce-RTX-4090, and Ray would wait forever for such a node."""
    gpu = find_gpu(name)
    return gpu.name if gpu else name
