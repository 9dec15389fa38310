"""`ft plan`: the plan of a run before it starts. Writes nothing; needs the base's config and tokenizer, but no weights.

Without a connection to the hub, the shape comes from the catalogue and tokens are estimated from bytes; a remark in the
plan says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ft_service.catalog import models
from ft_service.catalog.models import ModelFacts, ModelShape
from ft_service.data.estimate import BYTES_PER_TOKEN, estimate_dataset
from ft_service.data.gate import Judgement
from ft_service.data.gate.waivers import check_waivers
from ft_service.data.prepare import all_sources, measure_dataset
from ft_service.data.read import check_sources
from ft_service.errors import ModelError, Problem, SpecError, UsageError
from ft_service.model.base import load_tokenizer, looks_like_folder, read_config, resolve_base
from ft_service.model.base_facts import read_base_facts, with_own_turns
from ft_service.model.weight_files import WeightFiles
from ft_service.plan.base_checks import base_problems, vision_problems
from ft_service.plan.facts import BaseFacts, DatasetFacts, Resources
from ft_service.plan.make import make_plan
from ft_service.plan.plan import RunPlan
from ft_service.plan.table import shape_of
from ft_service.spec.schema import RunSpec
from ft_service.text import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ft_service.model.dry_run import DryRun


def plan_without_writing(spec: RunSpec, resources: Resources) -> RunPlan:
    """The plan for these resources; unknown resources are not checked. Raises `FtError`."""
    if resources.gpu_type and spec.parallel.accelerator_type:
        # --gpu-type asks "what if": it overrides the type in the spec.
        parallel = spec.parallel.model_copy(update={"accelerator_type": resources.gpu_type})
        spec = spec.model_copy(update={"parallel": parallel})
    measured = _measure(spec)
    decided = make_plan(spec, measured.dataset, measured.shape, resources, measured.base_facts)
    summary = [*decided.summary, _data_check(spec, measured)]
    return decided.model_copy(update={"summary": summary, "remarks": [*measured.remarks, *decided.remarks]})


def problems_with_base(spec: RunSpec) -> list[Problem]:
    """What the base cannot do of a spec, if it is a folder: without waiting for a hub. Empty if it cannot be read."""
    problems = list(vision_problems(spec))
    if not problems and looks_like_folder(spec.model.base):
        try:
            examine_base(spec, resolve_base(spec.model.base, weights=False))
        except SpecError as error:
            problems += error.problems
        except ModelError:
            pass
    return problems


@dataclass(frozen=True)
class _Measured:
    dataset: DatasetFacts
    shape: ModelShape
    base_facts: BaseFacts
    remarks: list[str]
    """On how the facts were obtained."""
    judgement: Judgement | None
    """Of the data that were measured; None without a tokenizer."""


def _measure(spec: RunSpec) -> _Measured:
    """The facts that a plan is made from. Raises `SpecError`."""
    check_waivers(spec.data.waive)
    if problems := vision_problems(spec):
        raise SpecError(problems)
    check_sources(all_sources(spec))  # report a missing file before waiting for the hub
    try:
        base = resolve_base(spec.model.base, spec.model.revision, weights=False)
        shape, tokenizer, base_facts = examine_base(spec, base)
        judgements: list[Judgement] = []
        dataset = measure_dataset(spec, tokenizer, lambda judgement, folder: judgements.append(judgement))
        return _Measured(dataset, shape, base_facts, [], judgements[0])
    except ModelError as error:
        known = models.find(spec.model.base)
        if known is None or looks_like_folder(spec.model.base):
            raise
        reason = str(error).partition(" (")[0]
    remark = (
        f"{reason}. The shape comes from the catalogue, and one token is assumed per {BYTES_PER_TOKEN} bytes of UTF-8, "
        "Llama 3's average for English: other languages and code need more tokens."
    )
    return _Measured(estimate_dataset(spec), known.shape, _facts_from_catalogue(known), [remark], None)


def _data_check(spec: RunSpec, measured: _Measured) -> str:
    """The sentence of the plan about the data check. The run judges all data again before it requests a worker."""
    judgement = measured.judgement
    if judgement is None:
        return (
            "Data check: not done here, without the base's tokenizer. The run checks the data before it requests a "
            "worker; `ft data check SPEC` does it now."
        )
    failing = [finding for finding in judgement.findings if finding.severity == "fail"]
    stopping = [finding.code for finding in failing if finding.code not in spec.data.waive]
    warned = [finding.code for finding in judgement.findings if finding.severity == "warn"]
    verdict = "fails, so the run would stop" if stopping else "passes"
    facts = (
        (
            ""
            if measured.dataset.exact
            else f"only {counted(judgement.read, 'record')} checked here, the run checks all"
        ),
        f"fails on {', '.join(stopping)}" if stopping else "",
        f"{len(failing) - len(stopping)} waived" if len(failing) > len(stopping) else "",
        f"warns of {', '.join(warned)}" if warned else "",
    )
    details = "; ".join(fact for fact in facts if fact)
    return f"Data check: {verdict}{f' ({details})' if details else ''}. `ft data check SPEC` shows each finding."


def examine_base(spec: RunSpec, folder: Path) -> tuple[ModelShape, "PreTrainedTokenizerBase", BaseFacts]:
    """Shape, tokenizer and facts of the base whose config and tokenizer lie in `folder`.

    Raises `SpecError` with everything in the spec that this base cannot do.
    """
    base_facts = read_base_facts(spec.model.base, folder)
    shape = models.shape_from_config(read_config(folder))
    if problems := base_problems(spec, shape, base_facts):
        raise SpecError(problems)  # before the tokenizer is loaded: it may be what is wrong
    tokenizer = load_tokenizer(folder)
    return shape, tokenizer, with_own_turns(base_facts, tokenizer)


def _facts_from_catalogue(known: ModelFacts) -> BaseFacts:
    return BaseFacts(
        max_positions=known.context_length,
        unchecked=("tokenizer, chat template and weights (the base's files are not available)",),
    )


DRY_RUN_WORLDS = (8, 16, 64)


def dry_runs(model: str, worlds: Sequence[int] = DRY_RUN_WORLDS) -> "list[DryRun]":
    """Simulate loading a catalogue model or a checkpoint folder, in bf16 and 4-bit, for these world sizes."""
    return [_dry_run(model, four_bit, world, 1, "cuda") for four_bit in (False, True) for world in worlds]


def dry_run_of(plan: RunPlan) -> "list[DryRun]":
    """Simulate loading as the workers of this plan will. Raises `UsageError` if the weights are not sharded."""
    if plan.zero_stage < 3:
        raise UsageError(
            f"--dry-run: with ZeRO-{plan.zero_stage} each worker reads the whole base. Use parallel.zero_stage=3."
        )
    spec = plan.spec
    device = "cuda" if spec.parallel.use_gpu else "cpu"
    four_bit = spec.method.type == "qlora"
    return [_dry_run(spec.model.base, four_bit, spec.parallel.max_workers, plan.hpz_partition_size, device)]


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
