"""ZeRO-3 gathers the base twice a micro-step, never while a module waits for it, and keeps no more than planned."""

from typing import Any

import pytest

from ft_service.catalog.models import shape_from_config
from ft_service.model.base import read_config
from ft_service.plan import memory
from tests.forked import run_cases
from tests.train.gather_cases import run_case
from tests.train.training_cases import write_base

pytestmark = pytest.mark.multiprocess

MAX_GATHERS = 2.05
# The adapter is gathered once a step. Rank 1 keeps its share of this small base small.
LORA = {"type": "lora", "lora_rank": 1}
QLORA = {"type": "qlora", "lora_rank": 1}
CASES: dict[str, dict[str, Any]] = {
    "lora-recomputed": {"method": LORA, "checkpointing": True},
    "lora": {"method": LORA},
    "qlora-recomputed": {"method": QLORA, "checkpointing": True, "precision": "bf16"},
    "full-recomputed": {"method": {"type": "full"}, "checkpointing": True},
}


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("base")
    write_base(folder, hidden_size=96, intermediate_size=256, num_layers=6)
    cases = {name: case | {"stage": 3, "micro": 1, "base": str(folder)} for name, case in CASES.items()}
    return run_cases(run_case, cases, 2) | {"shape": shape_from_config(read_config(folder))}


@pytest.mark.parametrize("name", CASES)
def test_the_base_is_gathered_at_most_twice_a_micro_step(gathered: dict[str, Any], name: str) -> None:
    assert 1 < gathered[name]["gathers"] <= MAX_GATHERS


@pytest.mark.parametrize("name", CASES)
def test_no_module_waits_for_weights_that_were_not_prefetched(gathered: dict[str, Any], name: str) -> None:
    assert gathered[name]["on_demand"] == 0


@pytest.mark.parametrize("name", CASES)
def test_a_weight_is_gathered_without_a_copy(gathered: dict[str, Any], name: str) -> None:
    assert gathered[name]["concatenated"] == 0


@pytest.mark.parametrize("name", CASES)
def test_adapters_stay_gathered(gathered: dict[str, Any], name: str) -> None:
    assert gathered[name]["adapters"] == 0


@pytest.mark.parametrize("name", CASES)
def test_no_more_is_gathered_at_once_than_planned(
    gathered: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the step after a validation."""
    monkeypatch.setattr(memory, "PERSISTENCE_THRESHOLD", 0)  # as in the case
    case = CASES[name]
    layout = memory.Layout(
        method=case["method"]["type"],
        num_workers=2,
        zero_stage=3,
        precision=case.get("precision", "fp32"),
        lora_rank=1,
        activation_checkpointing=case.get("checkpointing", False),
    )
    planned = memory._live_numel(memory._parameters(gathered["shape"], layout), layout)
    assert 0.85 * planned <= gathered[name]["peak_elements"] <= planned
