"""The plan resolves what the spec leaves open, states its arithmetic and reasons, and rejects what cannot run."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ft_service.catalog import models
from ft_service.catalog.gpus import GPUS
from ft_service.errors import ModelError, SpecError
from ft_service.plan.facts import DatasetFacts, Resources
from ft_service.plan.make import make_plan
from ft_service.plan.memory import GIB, Layout, estimate_memory
from ft_service.plan.plan import RunPlan
from ft_service.plan.table import METHODS, plan_table
from ft_service.spec.load import parse_run_spec

FACTS = DatasetFacts(
    digest="d", conversations=900, rows=100, tokens=80_000, loss_tokens=30_000, truncated=0, validation_loss_tokens=9
)
SPEC = """
name: bot
model: {base: meta-llama/Llama-3.1-8B-Instruct}
data: {train: [{path: a.jsonl}], validation: {fraction: 0.1}, max_seq_len: 2048}
storage: there
"""


def shape_of(base: str) -> models.ModelShape:
    facts = models.find(base)
    assert facts is not None
    return facts.shape


def plan(*overrides: str, facts: DatasetFacts = FACTS, **resources: object) -> RunPlan:
    spec = parse_run_spec(SPEC, overrides)
    return make_plan(spec, facts, shape_of(spec.model.base), Resources(**resources))  # type: ignore[arg-type]


def error_of(*overrides: str, facts: DatasetFacts = FACTS, **resources: object) -> str:
    with pytest.raises(SpecError) as error:
        plan(*overrides, facts=facts, **resources)
    return str(error.value)


def on(gpu: str, workers: int, *overrides: str, **resources: object) -> RunPlan:
    return plan(f"parallel.accelerator_type={gpu}", f"parallel.num_workers={workers}", *overrides, **resources)


@given(st.integers(1, 16), st.integers(1, 8), st.integers(1, 8), st.booleans())
def test_the_batch_arithmetic_holds_and_is_printed(workers: int, micro: int, accumulation: int, auto: bool) -> None:
    batch = workers * micro * accumulation
    decided = plan(
        f"parallel.num_workers={workers}",
        f"train.global_batch_size={batch}",
        f"train.micro_batch_size={'auto' if auto else micro}",
        gpu_memory_gib=80,
    )
    assert decided.micro_batch_size * workers * decided.gradient_accumulation_steps == batch
    sentence = (
        f"{decided.micro_batch_size} rows x {workers} workers x {decided.gradient_accumulation_steps} accumulation = "
        f"{batch} rows per step"
    )
    lines = [re.sub(r"\b1 (row|worker)\b", r"1 \1s", line.replace(",", "")) for line in decided.summary]
    assert any(sentence in line for line in lines)


def test_steps_cover_the_epochs_or_equal_max_steps() -> None:
    assert plan("train.epochs=3", "train.global_batch_size=64").num_steps == 5  # ceil(3 x 100 / 64)
    decided = plan("train.max_steps=7", "train.global_batch_size=50")
    assert (decided.num_steps, decided.epochs) == (7, 3.5)
    assert decided.tokens == 280_000


def test_the_plan_reports_the_true_number_of_passes_over_the_data() -> None:
    few = FACTS.model_copy(update={"rows": 26})
    decided = plan("train.epochs=1", "train.global_batch_size=512", facts=few)
    assert decided.num_steps == 1 and decided.epochs == pytest.approx(512 / 26)
    assert any("1 step, 19.69 passes over the data" in sentence for sentence in decided.summary)


# -- what is left open -----------------------------------------------------------------------------------------------

RECOMPUTED = "train.activation_checkpointing=true"


@pytest.mark.parametrize(
    ("overrides", "memory_gib", "stage"),
    [
        ([], 80, 1),
        (["parallel.num_workers=8"], 80, 2),
        # 8 B parameters: 16 GB of bf16 weights on each, and (4 + 12) bytes x 8 B / 8 of gradients and Adam
        (["parallel.num_workers=8", "method.type=full", RECOMPUTED], 44, 2),
        (["parallel.num_workers=8", "method.type=full", RECOMPUTED], 30, 3),
        (["parallel.num_workers=4", "parallel.use_gpu=false"], None, 2),
        (["parallel.offload=nvme", "parallel.nvme_path=/n"], 80, 3),
        (["parallel.num_workers=8", "parallel.zero_stage=1"], 80, 1),
    ],
)
def test_auto_shards_no_more_than_needed_to_fit(overrides: list[str], memory_gib: float | None, stage: int) -> None:
    assert plan(*overrides, gpu_memory_gib=memory_gib).zero_stage == stage


def test_activations_are_recomputed_only_if_memory_is_short() -> None:
    roomy = on("H200", 1)
    tight = on("L4", 1)
    assert not roomy.activation_checkpointing and tight.activation_checkpointing
    assert roomy.fits and tight.fits
    assert roomy.memory_gib["total"] == roomy.gpu_gib_without_checkpointing
    assert (
        tight.gpu_gib_without_checkpointing is not None and tight.gpu_gib_without_checkpointing > GPUS["L4"].memory_gib
    )


def test_auto_offloads_only_what_does_not_fit_otherwise() -> None:
    large = ["model.base=meta-llama/Llama-3.3-70B-Instruct", "method.type=full"]
    assert on("H200", 32, *large).offload == "none"
    offloaded = on("H200", 4, *large)
    assert (offloaded.offload, offloaded.fits) == ("cpu", True)
    # fp32 master weights and two moments are 12 bytes a parameter, all of them in this one node
    assert offloaded.host_memory_gib["total"] > 70e9 * 12 / GIB
    assert on("H200", 4, *large, host_memory_gib_per_node=256).fits is False
    assert on("H200", 4, *large, "parallel.nvme_path=/n").offload == "cpu"  # a drive is slower than main memory
    assert on("H200", 4, *large, "parallel.nvme_path=/n", "parallel.offload=nvme").offload == "nvme"
    assert plan("parallel.nvme_path=/n", gpu_memory_gib=80).offload == "none"


def test_auto_uses_hpz_only_across_a_slow_network() -> None:
    large = ["model.base=meta-llama/Llama-3.3-70B-Instruct", "train.global_batch_size=256"]
    required = on("H100", 16, *large, "parallel.hpz=true", gpus_per_node=8)
    assert (required.zero_stage, required.hpz_partition_size, required.workers_per_node) == (3, 8, 8)
    assert on("H100", 8, *large, gpus_per_node=8).hpz_partition_size == 1
    large += ["train.global_batch_size=32", "data.max_seq_len=1024", RECOMPUTED]  # little to hide a gather behind
    assert GPUS["A100-80G"].network * 8 == GPUS["H100"].network
    assert on("A100-80G", 32, *large, gpus_per_node=8).hpz_partition_size == 8
    assert on("H100", 32, *large, gpus_per_node=8).hpz_partition_size == 1
    assert on("A100-80G", 32, *large, "parallel.hpz=false").hpz_partition_size == 1
    assert "8 workers run 8 per node" in error_of("parallel.hpz=true", "parallel.num_workers=8", gpus_per_node=8)


def test_fixed_settings_stay_fixed() -> None:
    decided = on(
        "H100",
        8,
        "parallel.zero_stage=3",
        "train.micro_batch_size=2",
        RECOMPUTED,
        "parallel.offload=cpu",
    )
    settings = decided.zero_stage, decided.micro_batch_size, decided.activation_checkpointing, decided.offload
    assert settings == (3, 2, True, "cpu")
    assert len(decided.reasons) == 0  # only hpZ is open, and it cannot be used on one node


def test_every_open_setting_gets_a_reason() -> None:
    reasons = on("H100", 16, "model.base=meta-llama/Llama-3.3-70B-Instruct", gpus_per_node=8).reasons
    starts = ["ZeRO-3", "Activation checkpointing", "Micro-batch", "No offloading", "No hpZ"]
    assert [next(start for start in starts if reason.startswith(start)) for reason in reasons] == starts
    # 70 B bf16 weights are 131 GiB, which ZeRO-2 would leave whole on every GPU
    needed = re.search(r"ZeRO-2 would need at least (\d+) GiB", reasons[0])
    assert needed and int(needed[1]) > 131


def test_unknown_memory_gets_the_layout_that_needs_least() -> None:
    decided = plan("parallel.num_workers=8")
    assert (decided.zero_stage, decided.micro_batch_size, decided.activation_checkpointing) == (3, 1, True)
    assert decided.fits is None and decided.estimate is None
    assert "GPU memory is unknown" in decided.reasons[0]


def test_the_requested_gpu_type_counts_before_a_node_is_up() -> None:
    """A cold cluster reports no GPU, and a warm one may report only other types."""
    cold = on("H100", 8)
    warm = on("H100", 8, gpu_type="H100", gpu_memory_gib=GPUS["H100"].memory_gib)
    other = on("H100", 8, gpu_type="L4", gpu_memory_gib=GPUS["L4"].memory_gib)
    assert cold == warm == other


# -- time and cost ---------------------------------------------------------------------------------------------------


def test_time_follows_from_speed_and_cost_from_price() -> None:
    decided = on("H100", 8, price_per_gpu_hour=3.0)
    estimate = decided.estimate
    assert estimate and estimate.cost_usd is not None
    assert estimate.tokens_per_second == pytest.approx(8 * estimate.tokens_per_second_per_gpu)
    assert estimate.seconds_per_epoch == pytest.approx(FACTS.tokens / estimate.tokens_per_second)
    assert estimate.seconds == pytest.approx(decided.num_steps * estimate.seconds_per_step, rel=1e-6)
    assert estimate.cost_usd == pytest.approx(8 * estimate.seconds / 3600 * 3.0)
    assert f"{estimate.mfu:.0%} of the peak rate of H100" in " ".join(decided.summary)
    unpriced = on("H100", 8).estimate
    assert unpriced and unpriced.cost_usd is None


def test_validations_add_time() -> None:
    held_out = FACTS.model_copy(update={"validation_tokens": 80_000})
    with_validations = on("H100", 1, facts=held_out).estimate
    without = on("H100", 1).estimate
    assert with_validations and without
    # 5 validations; a validation token costs a third to a half of a training token
    share = (with_validations.seconds - without.seconds) / (15 * 80_000 / without.tokens_per_second)
    assert on("H100", 1).num_steps == 5
    assert 1 / 9 < share < 1 / 5


# -- what does not fit -----------------------------------------------------------------------------------------------


def applied(advice: str) -> list[str]:
    """The overrides of a suggestion such as "Fits with data.max_seq_len: 1024: ..."."""
    return [f"{name}={value}" for name, value in re.findall(r"([a-z]+\.[a-z_]+): (\w+)", advice)]


@pytest.mark.parametrize(
    ("gpu_type", "workers", "overrides"),
    [
        ("H100", 1, ["model.base=meta-llama/Llama-3.3-70B-Instruct", "parallel.offload=none"]),
        ("H100", 8, ["model.base=meta-llama/Llama-3.1-405B", "parallel.offload=none"]),
        ("L4", 1, ["method.type=full", "parallel.offload=none"]),
        ("L4", 1, ["train.activation_checkpointing=false", "data.max_seq_len=8192"]),
        ("L4", 2, ["data.max_seq_len=65536", "parallel.offload=none"]),
        ("H100", 8, ["method.type=full", "parallel.zero_stage=0"]),
        ("H200", 1, ["model.base=meta-llama/Llama-3.1-405B", "method.type=qlora"]),
    ],
)
def test_a_misfit_gets_at_most_three_suggestions_that_fit(gpu_type: str, workers: int, overrides: list[str]) -> None:
    decided = on(gpu_type, workers, *overrides)
    assert decided.fits is False
    assert any(warning.startswith("Does not fit: needs about ") for warning in decided.warnings)
    assert 1 <= len(decided.advice) <= 3
    for advice in decided.advice:
        if hardware := re.match(r"Fits on (\d+) x ([A-Z0-9-]+): ", advice):
            assert on(hardware[2], int(hardware[1]), *overrides).fits, advice
        else:
            assert applied(advice)
            assert on(gpu_type, workers, *overrides, *applied(advice)).fits, advice


def test_a_run_that_fits_gets_no_advice() -> None:
    assert on("H100", 8).fits and on("H100", 8).advice == []


@pytest.mark.parametrize("gpu", ["T4", "V100"])
def test_a_gpu_without_bf16_is_refused(gpu: str) -> None:
    requested = error_of(f"parallel.accelerator_type={gpu}", "method.type=qlora")
    of_the_cluster = error_of("method.type=qlora", gpu_type=gpu)
    for error in (requested, of_the_cluster):
        assert f"train.precision = 'bf16': {gpu} cannot compute in bf16. Use an Ampere GPU or newer" in error
    assert plan("parallel.use_gpu=false", gpu_type=gpu)
    assert on(gpu, 1, "method.type=lora", "train.precision=fp32", "model.base=meta-llama/Llama-3.2-1B")
    with pytest.raises(ModelError, match=f"{gpu}: cannot compute in bf16"):
        plan_table("llama-3.1-8b", [GPUS["L4"], GPUS[gpu]], 2048)
    assert on("L4", 1, "method.type=qlora").fits


@pytest.mark.parametrize(("gib", "fits"), [(1 / 0.96, True), (1 / 0.97 + 0.001, True), (1 / 0.98, False), (1.0, False)])
def test_a_layout_fits_if_it_needs_at_most_97_percent(gib: float, fits: bool) -> None:
    settings = ("train.micro_batch_size=1", "parallel.offload=none", RECOMPUTED)
    needed = plan(*settings, gpu_memory_gib=80).memory_gib["total"]
    decided = plan(*settings, gpu_memory_gib=needed * gib)
    assert decided.fits is fits
    assert fits or "(97% of " in decided.warnings[0]


# -- checks ----------------------------------------------------------------------------------------------------------


def test_problems_of_cluster_data_and_spec_are_reported_together() -> None:
    nothing = FACTS.model_copy(update={"rows": 0, "loss_tokens": 0})
    message = error_of("method.target_modules=[lm_head]", facts=nothing, num_gpus=0)
    assert "3 problems" in message
    assert "parallel.use_gpu = True" in message and "use_gpu: false" in message
    assert "data.train" in message
    assert "method.target_modules = ['lm_head']" in message


def test_more_workers_than_gpus_or_cpus_is_an_error() -> None:
    assert "Use at most 4" in error_of("parallel.num_workers=8", num_gpus=4)
    assert "has 2 in total" in error_of("parallel.use_gpu=false", "parallel.num_workers=4", num_gpus=0, num_cpus=2)


def test_a_base_model_on_instruction_data_gets_a_remark() -> None:
    assert any("nstruct" in remark for remark in plan("model.base=meta-llama/Llama-3.1-8B").remarks)
    assert plan().remarks == []


def test_the_digest_covers_every_decision() -> None:
    assert plan().digest == plan().digest
    assert plan().digest != plan("train.seed=1").digest
    assert on("H100", 8).digest != on("H100", 8, price_per_gpu_hour=1.0).digest


def test_a_plan_survives_json() -> None:
    decided = on("H100", 16, price_per_gpu_hour=2.0, host_memory_gib_per_node=2000)
    assert RunPlan.model_validate_json(decided.model_dump_json()) == decided


def test_main_memory_counts_the_copies_of_a_checkpoint() -> None:
    full = ("method.type=full", "parallel.offload=none")
    state = 12 * 8_030_261_248 / GIB  # fp32 weight and two moments of each parameter, over all workers
    unknown = on("H200", 8, *full)
    assert unknown.checkpoint_staging_bytes == GIB and unknown.host_memory_gib["checkpoint"] == 8
    roomy = on("H200", 8, *full, host_memory_gib_per_node=2048)
    assert roomy.host_memory_gib["checkpoint"] == pytest.approx(state, rel=1e-3)
    tight = on("H200", 8, *full, host_memory_gib_per_node=90)
    assert 8 <= tight.host_memory_gib["checkpoint"] < state
    assert tight.host_memory_gib["total"] <= 90
    assert 8 * tight.checkpoint_staging_bytes == pytest.approx(tight.host_memory_gib["checkpoint"] * GIB)
    lora = on("H100", 8, "method.type=lora")
    assert lora.checkpoint_staging_bytes == pytest.approx(12 * 41_943_040 / 8, rel=1e-3)


# -- memory, against known facts -------------------------------------------------------------------------------------


def gib(base: str, method: str, workers: int = 1, stage: int = 0, tokens: int = 2048) -> float:
    layout = Layout(method=method, zero_stage=stage, num_workers=workers, max_seq_len=tokens)  # type: ignore[arg-type]
    return estimate_memory(shape_of(f"meta-llama/{base}"), layout).gpu_bytes / GIB


def test_memory_agrees_with_known_facts() -> None:
    assert gib("Llama-3.1-8B", "qlora") < gib("Llama-3.1-8B", "lora") < 22.5  # a 24 GB card reports 22.5 GiB
    assert gib("Llama-3.1-8B", "full") > 80
    assert gib("Llama-3.3-70B-Instruct", "qlora") < 79.1
    assert gib("Llama-3.3-70B-Instruct", "lora") > 79.1
    assert min(gib("Llama-3.1-405B", method) for method in ("full", "lora", "qlora")) > 140.4
    assert gib("Llama-3.1-405B", "lora", workers=32, stage=3) < 79.1


# -- a range of workers ----------------------------------------------------------------------------------------------


def test_a_range_uses_the_most_workers_available() -> None:
    range_of_workers = "parallel.num_workers={min: 2, max: 8}"
    assert plan(range_of_workers).spec.parallel.num_workers == 8
    assert plan(range_of_workers, num_gpus=7).spec.parallel.num_workers == 4  # 7, 6 and 5 do not divide 64 rows
    assert plan(range_of_workers, num_gpus=2).spec.parallel.num_workers == 2
    assert "Use at most 1" in error_of(range_of_workers, num_gpus=1)


def test_a_range_whose_fewest_workers_do_not_fit_gets_a_warning() -> None:
    settings = ("method.type=full", "parallel.accelerator_type=H100", "parallel.offload=none")
    full = plan(*settings, "parallel.num_workers={min: 1, max: 8}")  # 8B: 16 bytes a parameter, on one or on eight
    assert full.fits and any("parallel.num_workers.min = 1: Does not fit" in warning for warning in full.warnings)
    lora = plan("parallel.accelerator_type=H100", "parallel.num_workers={min: 1, max: 8}")
    assert lora.fits and not any("num_workers.min" in warning for warning in lora.warnings)


def test_required_hpz_on_too_few_nodes_gets_a_warning() -> None:
    decided = on("H100", 16, "parallel.hpz=true", "parallel.num_workers={min: 8, max: 16}", gpus_per_node=8)
    assert decided.hpz_partition_size == 8
    (warning,) = (warning for warning in decided.warnings if "num_workers.min = 8" in warning)
    assert "parallel.hpz = True" in warning and "Use hpz: auto" in warning


def test_every_worker_count_of_a_range_has_the_same_global_batch() -> None:
    for count in (8, 4, 2):
        decided = plan("parallel.num_workers={min: 2, max: 8}", num_gpus=count)
        rows = decided.micro_batch_size * decided.gradient_accumulation_steps * count
        assert rows == decided.global_batch_size == 64
        assert decided.training_digest == plan("parallel.num_workers=8").training_digest


def test_advice_may_lower_the_rank() -> None:
    settings = ("method.lora_rank=1024", "data.max_seq_len=512", "parallel.offload=auto")
    decided = on("A100-40G", 1, *settings, host_memory_gib_per_node=20)
    assert decided.fits is False
    rank = next(line for line in decided.advice if "method.lora_rank" in line)
    assert re.search(r"Fits with method.lora_rank: (512|256|128|64|32|16|8):", rank)


def test_the_table_names_the_smallest_entry_that_fits_whatever_it_offloads() -> None:
    table = plan_table("llama-3.1-405b", [GPUS["H100"]], 4096)
    for method in METHODS:
        fitting = [entry.num_gpus for entry in table.entries if entry.method == method and entry.fits]
        assert table.smallest(method)["H100"].num_gpus == min(fitting)


def test_a_vision_model_has_no_table() -> None:
    with pytest.raises(ModelError, match=r"meta-llama/Llama-3\.1-8B-Instruct"):
        plan_table("llama-3.2-11b-vision-instruct", [GPUS["H100"]], 4096)
