"""The plan against the peak bytes of a real step, over methods, ZeRO stages and recomputation."""

from pathlib import Path

import pytest
import torch

from ft_service.model.cpu_products import WIDENED_ON_CPU
from ft_service.train.objectives.sft import _CHUNK_BYTES
from tests.plan.peak_cases import LAYOUTS, SIZES, TOKENS, peaks, planned_bytes, write_peak_base
from tests.plan.test_memory import EMULATED

MOST_BELOW = 0.02
MOST_ABOVE = 0.10


@pytest.mark.multiprocess
def test_the_plan_is_the_peak_of_a_real_step(tmp_path: Path) -> None:
    if torch.bfloat16 in WIDENED_ON_CPU:
        pytest.skip(EMULATED)
    base = tmp_path / "base"
    write_peak_base(base)
    # A GPU's chunk of logits is larger. With a single chunk, the plan for a GPU holds on a CPU.
    assert TOKENS * SIZES["vocab_size"] * 4 <= _CHUNK_BYTES["cpu"]
    counted = peaks(base, tmp_path / "results.json")
    planned = {name: planned_bytes(base, name) for name in LAYOUTS}
    assert counted.keys() == planned.keys() and len(planned) == 37
    wrong = {
        name: (planned[name], size)
        for name, size in counted.items()
        if not (1 - MOST_BELOW) * size <= planned[name] <= (1 + MOST_ABOVE) * size
    }
    assert not wrong, wrong
