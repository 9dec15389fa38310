"""The plan against the peak bytes of a real step, over methods, ZeRO stages and recomputation."""

import json
from pathlib import Path
from typing import Any

import pytest

from ft_service.catalog.models import shape_from_config
from ft_service.model.base import read_config
from ft_service.plan.memory import Layout, estimate_memory
from ft_service.train.objectives.sft import _CHUNK_BYTES
from tests.forked import Workers
from tests.plan.memory_cases import write_llama
from tests.plan.peak_cases import WORKERS, run_cases_of_one_worker

TOKENS = 512
# Weights of the MLP, embedding and head are above ZeRO-3's persistence threshold, unless they are packed.
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
RANK = 8
RECOMPUTED = {"none": (False, 0), "some": (True, 1), "all": (True, 0)}
"""Whether layers are recomputed, and how many of them keep their activations all the same."""
MOST_BELOW = 0.02
MOST_ABOVE = 0.10


@pytest.mark.multiprocess
def test_the_plan_is_the_peak_of_a_real_step(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_llama(base, **SIZES)
    # A GPU's chunk of logits is larger. With a single chunk, the plan for a GPU holds on a CPU.
    assert TOKENS * SIZES["vocab_size"] * 4 <= _CHUNK_BYTES["cpu"]
    cases: dict[str, dict[str, Any]] = {}
    layouts: dict[str, Layout] = {}
    for method in ("full", "lora", "qlora"):
        for stage in (1, 2, 3):
            for recomputed, (checkpointing, kept_layers) in RECOMPUTED.items():
                name = f"{method} ZeRO-{stage} recomputed: {recomputed}"
                cases[name] = {
                    "base": str(base),
                    "method": {"type": method} if method == "full" else {"type": method, "lora_rank": RANK},
                    "stage": stage,
                    "micro": 1,
                    "precision": "bf16",
                    "checkpointing": checkpointing,
                    "kept_layers": kept_layers,
                    "tokens": TOKENS,
                }
                layouts[name] = Layout(
                    method=method,  # type: ignore[arg-type]
                    num_workers=WORKERS,
                    zero_stage=stage,
                    max_seq_len=TOKENS,
                    activation_checkpointing=checkpointing,
                    kept_layers=kept_layers,
                    lora_rank=RANK,
                )
    results = tmp_path / "results.json"
    worker = Workers(run_cases_of_one_worker, cases, results, world_size=None)
    printed = worker.wait(timeout=600)
    assert worker.returncode == 0, printed[-8000:]
    counted: dict[str, int] = json.loads(results.read_text())
    shape = shape_from_config(read_config(base))
    wrong = {}
    for name, layout in layouts.items():
        components = estimate_memory(shape, layout).gpu
        planned = sum(components.values()) - components["reserve"]  # what torch's allocator never hands out
        print(
            f"{name}: planned {planned / 1e6:.2f} MB, counted {counted[name] / 1e6:.2f}, {planned / counted[name]:.3f}"
        )
        if not (1 - MOST_BELOW) * counted[name] <= planned <= (1 + MOST_ABOVE) * counted[name]:
            wrong[name] = (planned, counted[name], components)
    assert counted.keys() == cases.keys()
    assert not wrong, wrong
