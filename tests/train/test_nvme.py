"""With weights and optimizer on NVMe, a checkpoint is copied through a bounded buffer, and continues the training."""

from pathlib import Path
from typing import Any

import pytest

from tests.forked import run_cases
from tests.needs import LIBAIO, can_offload_to_nvme, needs
from tests.train.nvme_cases import run_case
from tests.train.training_cases import write_base

pytestmark = pytest.mark.multiprocess

STAGING_BYTES = 4 * 2**20


def test_a_checkpoint_of_a_state_on_nvme_continues_the_training(tmp_path: Path) -> None:
    needs(can_offload_to_nvme(), LIBAIO)
    # DeepSpeed leaves tensors of less than 1 MiB in memory; 768 x 1600 x 4 bytes is more.
    write_base(tmp_path / "base", hidden_size=768, intermediate_size=1600)
    case: dict[str, Any] = {
        "base": str(tmp_path / "base"),
        "method": {"type": "full"},
        "stage": 3,
        "micro": 2,
        "offload": "nvme",
        "train": {"learning_rate": 1e-3, "max_steps": 3, "validate_every_steps": 3, "weight_decay": 0.1},
        "storage": str(tmp_path / "storage"),
        "staging_bytes": STAGING_BYTES,
    }
    whole = run_cases(run_case, {"whole": case | {"nvme_path": str(tmp_path / "drive")}}, 1)["whole"]
    resumed = run_cases(run_case, {"resumed": case | {"nvme_path": str(tmp_path / "other drive")}}, 1)["resumed"]
    assert whole["num_swapped"] > 0
    assert (whole["first_step"], resumed["first_step"]) == (0, 2)
    assert resumed["losses"] == whole["losses"][2:]
    assert STAGING_BYTES / 4 < whole["staged_peak"] <= STAGING_BYTES
    assert whole["staged_after"] == 0
    assert len(whole["files"]) > 8
