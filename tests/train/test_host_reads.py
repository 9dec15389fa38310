"""The host never waits for the device within a micro-step, and once in a step. Counted on a CPU, see tests.counts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.counts import HostReads
from tests.forked import run_cases
from tests.train.host_reads_cases import run_case
from tests.train.training_cases import write_base

ROOT = Path(__file__).parents[2]
METHODS = {
    "full": {"type": "full"},
    "lora": {"type": "lora", "lora_rank": 4},
    "qlora": {"type": "qlora", "lora_rank": 4},
    "dora": {"type": "lora", "lora_rank": 4, "use_dora": True, "lora_dropout": 0.1},
}


@pytest.mark.multiprocess
def test_a_step_and_a_validation_read_from_the_device_once(tmp_path: Path) -> None:
    write_base(tmp_path / "base")
    cases = {
        f"{method}-zero{stage}-{precision}{'-checkpointing' * checkpointing}": {
            **{"base": str(tmp_path / "base"), "method": METHODS[method], "stage": stage, "micro": 1},
            **{"precision": precision, "checkpointing": checkpointing},
        }
        for method, stage, precision, checkpointing in (
            *(("lora", stage, "bf16", False) for stage in (1, 2, 3)),
            ("lora", 0, "fp32", False),
            ("full", 2, "bf16", False),
            ("full", 3, "fp32", False),
            ("lora", 1, "fp32", True),
            ("lora", 3, "bf16", True),
            ("qlora", 1, "bf16", True),
            ("qlora", 3, "bf16", False),
            ("dora", 3, "bf16", False),
        )
    }
    for name, found in run_cases(run_case, cases, 1).items():
        assert found["micro-steps"] == [], name
        assert len(found["update"]) == 1, (name, found["update"])
        assert len(found["validation"]) == 1, (name, found["validation"])


@pytest.mark.multiprocess
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_torch_raises_nothing_within_a_micro_step(device: str) -> None:
    """On a GPU torch itself raises where the host waits for it; on a CPU this shows that the cases run."""
    environment = {**os.environ, "DS_ACCELERATOR": device, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.train.waiting_cases", device]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count(" ZeRO-") == 4


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: float(x[0]),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: torch.equal(x, x),
    ],
)
def test_the_counter_sees_every_way_to_read(read: object) -> None:
    x = torch.arange(3)
    with HostReads() as reads:
        assert callable(read)
        read(x)
    assert len(reads.places) == 1, reads.places
    assert "test_host_reads.py" in reads.places[0]


def test_reading_a_number_that_came_from_the_host_waits_for_nothing() -> None:
    device = torch.arange(3.0)
    with HostReads() as reads:
        host = torch.tensor(2.0)
        assert not (host * 2 + 1).isinf()
        device.mul_(host)
    assert reads.places == []
