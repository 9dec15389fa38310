"""The serving plan against arithmetic on paper."""

import pytest

from ft_service.catalog.models import find
from ft_service.plan.serving import GIB, plan_serving

SHAPE_8B = find("meta-llama/Llama-3.1-8B-Instruct").shape
SHAPE_70B = find("meta-llama/Llama-3.3-70B-Instruct").shape


def test_8b_on_an_h100_by_hand():
    plan = plan_serving(SHAPE_8B, 79.1)
    assert plan.weights == 8_030_261_248 * 2  # the parameters of Llama 3.1 8B, two bytes each
    assert plan.cache_bytes_per_token == 2 * 32 * 8 * 128 * 2  # 128 KiB
    # Rank 16 on all seven linear layers: 41,943,040 parameters, as peft counts them for r=16.
    assert plan.adapter_bytes == 41_943_040 * 2
    assert plan.num_adapters == 4 * GIB // (41_943_040 * 2)
    # 76.7 GiB usable, 15.0 of weights, 4 of adapters, about 1 of reserve: 57 GiB of cache.
    assert 56 <= plan.cache / GIB <= 58
    assert plan.fits(131_072)


def test_vllm_reserves_slots_of_the_largest_rank_for_every_layer():
    plan = plan_serving(SHAPE_8B, 79.1, lora_rank=64, max_slots=64)
    # Four times the linear layers of rank 16, and 64 x (128,256 + 4,096) elements for embedding and head each.
    slot = (4 * 41_943_040 + 2 * 64 * (128_256 + 4_096)) * 2
    assert plan.adapter_bytes == slot
    assert plan.num_adapters == 4 * GIB // slot
    assert plan.adapters == plan.num_adapters * slot
    assert plan_serving(SHAPE_8B, 79.1, lora_rank=64, max_slots=4).adapters == 4 * slot
    one = plan_serving(
        SHAPE_8B, 79.1, adapter_gib=0.1, lora_rank=64, max_slots=64
    )  # vLLM needs one, whatever the bound
    assert (one.num_adapters, one.adapters) == (1, slot)


def test_70b_needs_two_cards_in_bf16_and_one_in_nf4():
    assert not plan_serving(SHAPE_70B, 79.1).fits(8192)
    assert plan_serving(SHAPE_70B, 79.1, gpus=2).fits(8192)
    assert plan_serving(SHAPE_70B, 79.1, precision="nf4").fits(8192)


def test_a_base_larger_than_the_card_has_no_room_at_all():
    plan = plan_serving(SHAPE_8B, 15.0)
    assert plan.cache < 0 and plan.cache_tokens == 0


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_parts_add_up_to_what_is_usable(precision):
    plan = plan_serving(SHAPE_8B, 24, precision=precision)
    assert plan.weights + plan.reserve + plan.adapters + plan.cache == int(plan.gpu_bytes * 0.97)
