"""`ft plan`: the plan of a run not begun. Writes nothing; needs the base's config and tokenizer, not its weights."""

from ft_service import catalog
from ft_service.data.prepare import measure_dataset
from ft_service.errors import UsageError
from ft_service.gpus import GPUS
from ft_service.model.base import load_tokenizer, read_config, resolve_base
from ft_service.plan import Resources, RunPlan, make_plan
from ft_service.spec import RunSpec


def plan_without_writing(
    spec: RunSpec, gpus: int | None, gpu_memory_gib: float | None, gpu_type: str | None
) -> RunPlan:
    """The plan on the resources named; what is not named is not judged. Raises `FtError`."""
    if gpu_type is not None and gpu_type not in GPUS:
        raise UsageError(f"--gpu-type = {gpu_type!r}: not known. Use one of {', '.join(GPUS)}, or --gpu-memory-gib.")
    gpu_type = gpu_type or spec.parallel.accelerator_type
    if gpu_memory_gib is None and gpu_type in GPUS:
        gpu_memory_gib = GPUS[gpu_type].memory_gib
    base = resolve_base(spec.model.base, spec.model.revision, weights=False)
    facts = measure_dataset(spec, load_tokenizer(base))
    shape = catalog.shape_from_config(read_config(base))
    return make_plan(spec, facts, shape, Resources(num_gpus=gpus, gpu_memory_gib=gpu_memory_gib, gpu_type=gpu_type))
