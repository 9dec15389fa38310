"""ZeRO-3 really frees the weights that it gathers: counted in bytes alive, on two workers."""

from typing import Any

import pytest

from tests.forked import run_cases
from tests.train.gathered_cases import run_case
from tests.train.training_cases import write_base

pytestmark = pytest.mark.multiprocess

METHODS: dict[str, dict[str, Any]] = {
    "full": {"type": "full"},
    "lora": {"type": "lora", "lora_rank": 4},
    "lora on two": {"type": "lora", "lora_rank": 4, "target_modules": ["q_proj", "v_proj"]},
    "qlora": {"type": "qlora", "lora_rank": 4},
    "dora with dropout": {"type": "lora", "lora_rank": 4, "use_dora": True, "lora_dropout": 0.5},
}


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[int]]]:
    folder = tmp_path_factory.mktemp("base")
    write_base(folder, intermediate_size=78, tied=False)
    cases = {
        f"{method} {precision} {'recomputed' if checkpointing else 'kept'}": {
            "base": str(folder),
            "method": METHODS[method],
            "stage": 3,
            "micro": 1,
            "precision": precision,
            "checkpointing": checkpointing,
        }
        for method, precision, checkpointing in (
            ("full", "bf16", False),
            ("full", "bf16", True),
            ("lora", "bf16", False),
            ("lora", "bf16", True),
            ("lora", "fp32", False),
            ("lora on two", "bf16", False),
            ("qlora", "bf16", False),
            ("qlora", "bf16", True),
            ("dora with dropout", "bf16", False),
            ("dora with dropout", "bf16", True),
        )
    }
    return run_cases(run_case, cases, 2)


def test_no_gathered_weight_is_alive_after_forward(counts: dict[str, dict[str, list[int]]]) -> None:
    assert len(counts) == 10
    for name, found in counts.items():
        for worker in range(2):
            assert found["gathered"][worker] >= found["whole"][worker] > 0, name  # all of it was counted
            assert found["alive"][worker] == 0, (name, found)


def test_no_gathered_weight_is_alive_after_backward(counts: dict[str, dict[str, list[int]]]) -> None:
    for name, found in counts.items():
        assert found["alive_after_backward"] == [0, 0], (name, found)
