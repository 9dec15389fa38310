"""The time model: FLOPs from first principles, speeds near published ones, traffic that follows the settings."""

from dataclasses import replace

import pytest

from ft_service.catalog import models
from ft_service.catalog.gpus import GPUS, Gpu, find_gpu
from ft_service.catalog.models import ModelShape
from ft_service.plan.memory import Layout
from ft_service.plan.speed import StepTime, flops_per_token, host_seconds, matmul_parameters, step_time

H100 = GPUS["H100"]
FULL_NODE = Layout("full", num_workers=8, workers_per_node=8, zero_stage=3, max_seq_len=8192)
TWO_NODES = replace(FULL_NODE, num_workers=16)


def shape_of(base: str) -> ModelShape:
    facts = models.find(base)
    assert facts is not None
    return facts.shape


def speed(base: str, layout: Layout, gpu: Gpu = H100) -> float:
    """Tokens per second and GPU, with 4 micro-steps a step."""
    seconds = step_time(shape_of(base), layout, 4, gpu).seconds
    return 4 * layout.micro_batch_size * layout.max_seq_len / seconds


def time_of(layout: Layout, base: str = "Llama-3.1-8B", gpu: Gpu = H100, accumulation: int = 4) -> StepTime:
    return step_time(shape_of(base), layout, accumulation, gpu)


# NVIDIA NeMo AutoModel docs/performance-summary.mdx, and torchtitan benchmarks/llama3_h100_202412_torchtitan.md (bf16,
# FSDP2, no compile): tokens per second and GPU. Whether they recompute follows from what fits.
LORA_70B = Layout("lora", 8, 8, zero_stage=3, micro_batch_size=2, max_seq_len=4096)
PUBLISHED = [
    ("Llama-3.1-8B", Layout("lora", micro_batch_size=2, max_seq_len=4096, activation_checkpointing=False), 12_473),
    ("Llama-3.1-70B", LORA_70B, 1_092),
    ("Llama-3.1-70B", replace(LORA_70B, num_workers=16), 985),
    ("Llama-3.1-8B", replace(FULL_NODE, micro_batch_size=2), 5_762),
    ("Llama-3.1-70B", replace(FULL_NODE, num_workers=64), 867),
]


@pytest.mark.parametrize(("base", "layout", "published"), PUBLISHED)
def test_estimates_are_within_a_factor_of_1_5_of_published_speeds(base: str, layout: Layout, published: float) -> None:
    assert 1 / 1.5 < speed(base, layout) / published < 1.5


def test_matmul_parameters_are_all_but_embedding_and_norms() -> None:
    shape = shape_of("Llama-3.1-8B")
    norms = (2 * shape.num_layers + 1) * shape.hidden_size
    assert matmul_parameters(shape) == shape.num_parameters - shape.vocab_size * shape.hidden_size - norms


def test_flops_are_6_per_trained_and_4_per_frozen_weight() -> None:
    shape = shape_of("Llama-3.1-8B")
    weights = matmul_parameters(shape)

    def per_weight(method: str, checkpointing: bool) -> float:
        layout = Layout(method, max_seq_len=1, lora_rank=1, activation_checkpointing=checkpointing)  # type: ignore[arg-type]
        return flops_per_token(shape, layout) / weights

    assert per_weight("full", False) == pytest.approx(6, rel=1e-3)
    assert per_weight("lora", False) == pytest.approx(4, rel=2e-3)
    head = shape.vocab_size * shape.hidden_size / weights
    assert per_weight("full", True) == pytest.approx(8 - 2 * head, rel=1e-3)
    assert per_weight("lora", True) == pytest.approx(6 - 2 * head, rel=2e-3)


def test_attention_flops_grow_with_the_row_length() -> None:
    shape = shape_of("Llama-3.1-8B")
    layout = Layout("full", activation_checkpointing=False)
    longer = flops_per_token(shape, replace(layout, max_seq_len=16_384)) - flops_per_token(shape, layout)
    # PaLM, appendix B: 12 x layers x heads x head_dim x T a token, forward and backward; half of it is masked
    assert longer == pytest.approx(6 * 32 * 32 * 128 * (16_384 - layout.max_seq_len))


def test_one_gpu_needs_no_communication() -> None:
    time = time_of(Layout("full"))
    assert time.communication == time.offload == 0.0 and time.compute == time.seconds


def test_short_micro_batches_take_as_long_as_python_needs_to_launch_them() -> None:
    short = Layout("lora", 8, 8, zero_stage=3, max_seq_len=256)
    host = 4 * host_seconds(shape_of("Llama-3.1-8B"), short)
    assert time_of(short).compute == host
    assert time_of(short, gpu=replace(H100, bf16_tflops=2 * H100.bf16_tflops)).compute == host
    assert time_of(replace(short, max_seq_len=8192)).compute > 1.5 * host


def test_python_needs_longer_for_recomputed_layers_and_under_zero_3() -> None:
    shape = shape_of("Llama-3.1-8B")
    for method in ("full", "lora", "qlora"):
        whole = Layout(method, activation_checkpointing=False)
        half = replace(whole, activation_checkpointing=True, kept_layers=shape.num_layers // 2)
        every = replace(whole, activation_checkpointing=True)
        once, some, twice = (host_seconds(shape, layout) for layout in (whole, half, every))
        assert some == pytest.approx((once + twice) / 2)
        assert once < twice < host_seconds(shape, replace(every, zero_stage=3))


def test_zero_3_communicates_more_than_zero_2() -> None:
    sharded = time_of(FULL_NODE)
    whole = time_of(replace(FULL_NODE, zero_stage=2))
    assert sharded.compute == whole.compute
    assert sharded.communication > whole.communication > 0
    assert time_of(FULL_NODE, accumulation=8).communication == pytest.approx(2 * sharded.communication)


def test_hpz_saves_most_of_the_cost_of_a_slow_network() -> None:
    slow = replace(H100, network=1.0)
    base = "Llama-3.1-70B"
    within_a_node = time_of(FULL_NODE, base, slow)
    assert time_of(TWO_NODES, base, slow).communication > 10 * within_a_node.communication
    lora = replace(TWO_NODES, method="lora")
    without = time_of(lora, base, slow)
    with_copy = time_of(replace(lora, hpz=True), base, slow)
    # of 8 gathers across the nodes one is left
    assert with_copy.communication < without.communication / 4


def test_offloading_costs_time_and_nvme_costs_more() -> None:
    none, cpu, nvme = (time_of(replace(FULL_NODE, offload=where)).seconds for where in ("none", "cpu", "nvme"))  # type: ignore[arg-type]
    assert none < cpu < nvme
    # Adam's state, 12 bytes a parameter, is read from and written to the node's drives once a step, at 6 GB/s
    assert time_of(replace(FULL_NODE, offload="nvme"), accumulation=1).offload > 2 * 12 * 8.03e9 / 6e9


def test_gpu_types_are_found_by_every_name() -> None:
    assert find_gpu("H100-80G") is find_gpu("h100") is GPUS["H100"]
    assert find_gpu("H1000") is None and find_gpu(None) is None
    assert all(gpu.name == name for name, gpu in GPUS.items())
