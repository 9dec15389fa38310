"""The shipped run specs: each fits the hardware that it names."""

import re
from pathlib import Path

import pytest

from ft_service.catalog import models
from ft_service.catalog.gpus import GPUS
from ft_service.plan.facts import DatasetFacts, Resources
from ft_service.plan.make import make_plan
from ft_service.plan.plan import RunPlan
from ft_service.spec.load import load_run_spec
from ft_service.spec.schema import RunSpec

SPECS = sorted(Path(__file__).resolve().parents[2].glob("jobs/specs/*.yaml"))
GPU_SPECS = [path for path in SPECS if "cpu" not in path.stem]

# The GPU with the least usable memory of each advertised size.
GPU_OF = {"24": "L4", "40": "A100-40G", "80": "H100"}

# Large enough that no warning concerns the amount of data.
DATASET = DatasetFacts(
    digest="d",
    conversations=100_000,
    rows=10_000,
    tokens=30_000_000,
    loss_tokens=15_000_000,
    truncated=0,
    validation_conversations=5000,
    validation_rows=500,
    validation_tokens=1_500_000,
    validation_loss_tokens=750_000,
)


def named_hardware(path: Path) -> tuple[int, str]:
    """Number of GPUs and their gigabytes, from the comment on the second line."""
    needs = re.match(r"# Needs (\d+) GPUs? of (\d+) GB or more", path.read_text(encoding="utf-8").splitlines()[1])
    assert needs, path
    return int(needs[1]), needs[2]


def resources_named(path: Path) -> Resources:
    num_gpus, gigabytes = named_hardware(path)
    return Resources(num_gpus=num_gpus, gpu_memory_gib=GPUS[GPU_OF[gigabytes]].memory_gib)


def plan_of(path: Path, resources: Resources) -> RunPlan:
    spec = load_run_spec(path)
    facts = models.find(spec.model.base)
    assert facts
    return make_plan(spec, DATASET, facts.shape, resources)


def test_the_specs_are_found() -> None:
    assert {"lora", "tiny-cpu"} <= {path.stem for path in SPECS}


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_a_spec_parses_and_starts_with_its_launch_command(path: Path) -> None:
    assert isinstance(load_run_spec(path), RunSpec)
    first, second = path.read_text(encoding="utf-8").splitlines()[:2]
    assert first == f"# ray job submit --working-dir . -- python jobs/train.py jobs/specs/{path.name}"
    assert second.startswith("# Needs ")


@pytest.mark.parametrize("path", GPU_SPECS, ids=lambda path: path.stem)
def test_a_spec_fits_the_hardware_it_names_without_warnings(path: Path) -> None:
    plan = plan_of(path, resources_named(path))
    assert plan.spec.parallel.use_gpu and plan.spec.parallel.num_workers == named_hardware(path)[0]
    assert plan.warnings == [] and plan.remarks == []


@pytest.mark.parametrize("path", GPU_SPECS, ids=lambda path: path.stem)
def test_the_plan_is_the_same_before_a_node_is_up(path: Path) -> None:
    """Without `accelerator_type` the GPU memory of a cold cluster is unknown, and `auto` picks other values."""
    warm = plan_of(path, resources_named(path))
    cold = plan_of(path, Resources())
    assert (cold.micro_batch_size, cold.zero_stage) == (warm.micro_batch_size, warm.zero_stage)


def test_the_smoke_run_needs_no_gpu() -> None:
    (path,) = (path for path in SPECS if path not in GPU_SPECS)
    assert not load_run_spec(path).parallel.use_gpu


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_placeholders_are_marked(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    theirs = [line for line in lines if re.search(r"train\.jsonl|/path/to|example\.com", line)]
    assert theirs and all("# <-- yours" in line for line in theirs)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_every_source_names_origin_and_license(path: Path) -> None:
    assert all(data.source and data.license for data in load_run_spec(path).data.train)
