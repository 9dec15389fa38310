"""`ft plan`: the plan of a run not begun. Writes nothing; needs the base's config and tokenizer, not its weights.

Where the hub cannot be asked, the catalogue tells the shape and tokens are guessed from bytes, and the plan says so.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ft_service.catalog import models
from ft_service.catalog.models import ModelShape
from ft_service.data.estimate import BYTES_PER_TOKEN, estimate_dataset
from ft_service.data.prepare import all_sources, measure_dataset
from ft_service.data.read import check_sources
from ft_service.errors import ModelError, UsageError
from ft_service.model.base import load_tokenizer, looks_like_folder, read_config, resolve_base
from ft_service.model.weight_files import WeightFiles
from ft_service.plan.facts import DatasetFacts, Resources
from ft_service.plan.plan import RunPlan, make_plan
from ft_service.plan.table import shape_of
from ft_service.spec.schema import RunSpec

if TYPE_CHECKING:
    from ft_service.model.dry_run import DryRun


def plan_without_writing(spec: RunSpec, resources: Resources) -> RunPlan:
    """The plan on the resources named; what is not named is not judged. Raises `FtError`."""
    if resources.gpu_type and spec.parallel.accelerator_type:
        # Asked what another type would do, the spec's own wish for a type stands aside.
        parallel = spec.parallel.model_copy(update={"accelerator_type": resources.gpu_type})
        spec = spec.model_copy(update={"parallel": parallel})
    dataset, shape, remarks = _facts(spec)
    decided = make_plan(spec, dataset, shape, resources)
    return decided.model_copy(update={"remarks": [*remarks, *decided.remarks]})


def _facts(spec: RunSpec) -> tuple[DatasetFacts, ModelShape, list[str]]:
    """Data, shape, and what is to be known about where they come from."""
    check_sources(all_sources(spec))  # a missing file is told at once, not after the hub's time-outs
    try:
        base = resolve_base(spec.model.base, spec.model.revision, weights=False)
        shape = models.shape_from_config(read_config(base))
        return measure_dataset(spec, load_tokenizer(base)), shape, []
    except ModelError as error:
        known = models.find(spec.model.base)
        if known is None or looks_like_folder(spec.model.base):
            raise
        reason = str(error).partition(" (")[0]
    remark = (
        f"{reason}. Its shape is that of the catalogue, and tokens are guessed as one per {BYTES_PER_TOKEN} bytes of "
        "UTF-8, Llama 3's figure for English: expect other languages and program text to be longer."
    )
    return estimate_dataset(spec), known.shape, [remark]


DRY_RUN_WORLDS = (8, 16, 64)


def dry_runs(model: str, worlds: Sequence[int] = DRY_RUN_WORLDS) -> "list[DryRun]":
    """Loading a model of the catalogue or a checkpoint folder, bf16 and 4-bit, on worlds of these sizes."""
    return [_dry_run(model, four_bit, world, 1, "cuda") for four_bit in (False, True) for world in worlds]


def dry_run_of(plan: RunPlan) -> "list[DryRun]":
    """Loading as the workers of this plan will; raises `UsageError` where nothing is sharded."""
    if plan.zero_stage < 3:
        raise UsageError(
            f"--dry-run: under ZeRO-{plan.zero_stage} each worker reads the whole base. Use parallel.zero_stage=3."
        )
    spec = plan.spec
    device = "cuda" if spec.parallel.use_gpu else "cpu"
    four_bit = spec.method.type == "qlora"
    return [_dry_run(spec.model.base, four_bit, spec.parallel.most_workers, plan.hpz_partition_size, device)]


def _dry_run(model: str, four_bit: bool, world_size: int, node_size: int, device: str) -> "DryRun":
    # Only a dry run builds the model, without its weights; a plan needs no torch, whose import takes seconds.
    from transformers import LlamaConfig

    from ft_service.model.dry_run import dry_run, tensors_from_shape

    if looks_like_folder(model) and any(Path(model).expanduser().glob("*.safetensors")):
        weight_files = WeightFiles(Path(model).expanduser())
        weight_files.check()
        config = LlamaConfig.from_dict(dict(weight_files.config))
        tensors = weight_files.tensors
    else:
        config, tensors = tensors_from_shape(shape_of(model))
    return dry_run(config, tensors, four_bit=four_bit, world_size=world_size, node_size=node_size, device=device)
