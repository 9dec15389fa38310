"""`ft plan`: the plan of a run not begun. Writes nothing; needs the base's config and tokenizer, not its weights.

Where the hub cannot be asked, the catalogue tells the shape and tokens are guessed from bytes, and the plan says so.
"""

from ft_service import catalog
from ft_service.catalog import ModelShape
from ft_service.data.estimate import BYTES_PER_TOKEN, estimate_dataset
from ft_service.data.prepare import measure_dataset
from ft_service.data.read import files_of
from ft_service.errors import ModelError
from ft_service.model.base import load_tokenizer, looks_like_folder, read_config, resolve_base
from ft_service.plan import DatasetFacts, Resources, RunPlan, make_plan
from ft_service.spec import RunSpec


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
    validation = spec.data.validation
    for source in [*spec.data.train, *(validation if isinstance(validation, list) else [])]:
        files_of(source)  # a missing file is told at once, not after the hub's time-outs
    try:
        base = resolve_base(spec.model.base, spec.model.revision, weights=False)
        shape = catalog.shape_from_config(read_config(base))
        return measure_dataset(spec, load_tokenizer(base)), shape, []
    except ModelError as error:
        known = catalog.find(spec.model.base)
        if known is None or looks_like_folder(spec.model.base):
            raise
        reason = str(error).partition(" (")[0]
    remark = (
        f"{reason}. Its shape is that of the catalogue, and tokens are guessed as one per {BYTES_PER_TOKEN} bytes of "
        "UTF-8, Llama 3's figure for English: expect other languages and program text to be longer."
    )
    return estimate_dataset(spec), known.shape, [remark]
