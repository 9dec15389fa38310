"""ZeRO-3 gathers the base twice a micro-step, and never while a module waits for it."""

from typing import Any

import pytest

from tests.forked import run_cases
from tests.train.gather_cases import run_case
from tests.train.training_cases import write_base

pytestmark = pytest.mark.multiprocess

MAX_GATHERS = 2.05
# The adapter is gathered once a step. Rank 1 keeps its share of this small base small.
LORA = {"type": "lora", "lora_rank": 1}
CASES: dict[str, dict[str, Any]] = {
    "lora-recomputed": {"method": LORA, "checkpointing": True},
    "lora": {"method": LORA},
    "full-recomputed": {"method": {"type": "full"}, "checkpointing": True},
}


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("base")
    write_base(folder, hidden_size=96, intermediate_size=256, num_layers=6)
    cases = {name: case | {"stage": 3, "micro": 1, "base": str(folder)} for name, case in CASES.items()}
    return run_cases(run_case, cases, 2)


@pytest.mark.parametrize("name", CASES)
def test_the_base_is_gathered_at_most_twice_a_micro_step(gathered: dict[str, Any], name: str) -> None:
    assert 1 < gathered[name]["gathers"] <= MAX_GATHERS


@pytest.mark.parametrize("name", CASES)
def test_no_module_waits_for_weights_that_were_not_prefetched(gathered: dict[str, Any], name: str) -> None:
    assert gathered[name]["on_demand"] == 0
