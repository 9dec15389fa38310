"""What a worker of a run needs of a node, in Ray's resources."""

from collections.abc import Mapping

from ft_service.catalog.gpus import find_gpu
from ft_service.spec.schema import ParallelSpec
from ft_service.text import counted

_ACCELERATOR = "accelerator_type:"


def resources_per_worker(parallel: ParallelSpec) -> dict[str, float]:
    """What Ray reserves for each worker."""
    return {"CPU": parallel.reserved_cpus, **({"GPU": 1} if parallel.use_gpu else {})}


def room_per_worker(parallel: ParallelSpec) -> dict[str, float]:
    """What a node must have free for each worker: `resources_per_worker`, and the type of its GPU."""
    resources = resources_per_worker(parallel)
    if parallel.accelerator_type:  # the amount is the one that Ray Train requests
        resources[f"{_ACCELERATOR}{ray_accelerator_type(parallel.accelerator_type)}"] = 0.001
    return resources


def format_workers(count: int, resources: Mapping[str, float]) -> str:
    """``16 workers with 1 CPU, 1 GPU (H100) each``, ``1 worker with 1 CPU``."""
    types = [name.removeprefix(_ACCELERATOR) for name in resources if name.startswith(_ACCELERATOR)]
    of_type = {"GPU": f" ({', '.join(types)})"} if types else {}
    needs = [
        f"{amount:g} {name}{of_type.get(name, '')}"
        for name, amount in resources.items()
        if amount and not name.startswith(_ACCELERATOR)
    ]
    return f"{counted(count, 'worker')} with {', '.join(needs)}{' each' if count != 1 else ''}"


def ray_accelerator_type(name: str | None) -> str | None:
    """Ray's exact name: the spec may say rtx-4090 for GeForce-RTX-4090, and Ray would wait forever for such a node."""
    gpu = find_gpu(name)
    return gpu.name if gpu else name
