"""The plan decides what the spec leaves open, says its arithmetic, and refuses what cannot be run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_service import catalog
from ft_service.errors import SpecError
from ft_service.memory import GIB, Layout, estimate_memory
from ft_service.plan import DatasetFacts, Resources, RunPlan, make_plan
from ft_service.spec import parse_run_spec

FACTS = DatasetFacts(
    digest="d", conversations=900, rows=100, tokens=80_000, loss_tokens=30_000, truncated=0, validation_loss_tokens=9
)
SPEC = """
name: bot
model: {base: meta-llama/Llama-3.1-8B-Instruct}
data: {train: [{path: a.jsonl}], validation: {fraction: 0.1}, max_seq_len: 2048}
storage: there
"""


def shape_of(base: str) -> catalog.ModelShape:
    facts = catalog.find(base)
    assert facts is not None
    return facts.shape


def plan(*overrides: str, facts: DatasetFacts = FACTS, resources: Resources | None = None) -> RunPlan:
    spec = parse_run_spec(SPEC, overrides)
    return make_plan(spec, facts, shape_of(spec.model.base), resources or Resources())


def refused(*overrides: str, **rest: object) -> str:
    with pytest.raises(SpecError) as error:
        plan(*overrides, **rest)  # type: ignore[arg-type]
    return str(error.value)


@given(st.integers(1, 16), st.integers(1, 8), st.integers(1, 8), st.booleans())
def test_the_batch_arithmetic_holds_and_is_said(workers: int, micro: int, accumulation: int, auto: bool) -> None:
    batch = workers * micro * accumulation
    decided = plan(
        f"parallel.num_workers={workers}",
        f"train.global_batch_size={batch}",
        f"train.micro_batch_size={'auto' if auto else micro}",
        resources=Resources(gpu_memory_gib=80),
    )
    assert decided.micro_batch_size * workers * decided.gradient_accumulation_steps == batch
    said = (
        f"{decided.micro_batch_size} rows x {workers} workers x {decided.gradient_accumulation_steps} accumulation = "
        f"{batch} rows a step"
    )
    assert any(said in sentence for sentence in decided.said)


def test_steps_cover_the_epochs_asked_for_and_max_steps_wins() -> None:
    assert plan("train.epochs=3", "train.global_batch_size=64").num_steps == 5  # ceil(3 x 100 / 64)
    decided = plan("train.max_steps=7", "train.global_batch_size=50")
    assert (decided.num_steps, decided.epochs) == (7, 3.5)
    assert decided.tokens == 280_000


@pytest.mark.parametrize(
    ("overrides", "memory_gib", "stage"),
    [
        ([], 80, 1),
        (["parallel.num_workers=8"], 80, 2),
        # 8 B parameters: 16 GB of bf16 weights on each, and (4 + 12) bytes x 8 B / 8 of gradients and Adam
        (["parallel.num_workers=8", "method.type=full"], 40, 2),
        (["parallel.num_workers=8", "method.type=full"], 30, 3),
        (["parallel.num_workers=4", "parallel.use_gpu=false"], None, 2),
        (["parallel.offload=nvme", "parallel.nvme_path=/n"], 80, 3),
        (["parallel.num_workers=8", "parallel.zero_stage=1"], 80, 1),
    ],
)
def test_auto_takes_the_lowest_stage_that_fits(overrides: list[str], memory_gib: float | None, stage: int) -> None:
    assert plan(*overrides, resources=Resources(gpu_memory_gib=memory_gib)).zero_stage == stage


def test_the_cluster_and_the_data_are_held_against_the_spec_together() -> None:
    nothing = FACTS.model_copy(update={"rows": 0, "loss_tokens": 0})
    message = refused("method.target_modules=[lm_head]", facts=nothing, resources=Resources(num_gpus=0))
    assert "3 problems" in message
    assert "parallel.use_gpu = True" in message and "use_gpu: false" in message
    assert "data.train" in message
    assert "method.target_modules = ['lm_head']" in message


def test_workers_beyond_the_gpus_or_cpus_there_are_refused() -> None:
    assert "Use at most 4" in refused("parallel.num_workers=8", resources=Resources(num_gpus=4))
    assert "has 2 in all" in refused(
        "parallel.use_gpu=false", "parallel.num_workers=4", resources=Resources(num_gpus=0, num_cpus=2)
    )


def test_a_base_model_on_instruction_data_gets_a_remark() -> None:
    assert any("nstruct" in remark for remark in plan("model.base=meta-llama/Llama-3.1-8B").remarks)
    assert plan().remarks == []


def test_the_digest_is_of_every_decision() -> None:
    assert plan().digest == plan().digest
    assert plan().digest != plan("train.seed=1").digest


# -- memory, against known facts -------------------------------------------------------------------------------------


def gib(base: str, method: str, workers: int = 1, stage: int = 0, tokens: int = 2048) -> float:
    layout = Layout(method=method, zero_stage=stage, num_workers=workers, max_seq_len=tokens)  # type: ignore[arg-type]
    return estimate_memory(shape_of(f"meta-llama/{base}"), layout).gpu_bytes / GIB


def test_memory_agrees_with_what_the_field_knows() -> None:
    assert gib("Llama-3.1-8B", "qlora") < gib("Llama-3.1-8B", "lora") < 22.5  # a 24 GB card reports 22.5 GiB
    assert gib("Llama-3.1-8B", "full") > 80
    assert gib("Llama-3.3-70B-Instruct", "qlora") < 79.6
    assert gib("Llama-3.3-70B-Instruct", "lora") > 79.6
    assert min(gib("Llama-3.1-405B", method) for method in ("full", "lora", "qlora")) > 140.4
    assert gib("Llama-3.1-405B", "lora", workers=32, stage=3) < 79.6
