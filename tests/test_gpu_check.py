"""benchmarks/gpu_check.py on a CPU: what a machine without Ray needs, and the verdict on a piece."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import PIECES, TRAININGS, Clock, check_piece, judged, summary_row

ROOT = Path(__file__).resolve().parents[1]
NOT_THERE = ("ray", "hypothesis", "fastapi", "trl", "typer")
"""Packages of this project that `--packages` does not list."""


def figures(**changed: Any) -> dict[str, Any]:
    planned = {"gpu_gib": 60.0, "tokens_per_second": 9000.0}
    base = {"tokens_per_second": 9000.0, "losses": [2.0, 1.5], "reserved_gib": 57.0, "device_gib": 58.0}
    return {**base, "planned": planned, **changed}


def verdict(ours: dict[str, Any], stock: dict[str, Any]) -> dict[str, Any]:
    return {"model": "8B", "stock": stock, **judged(TRAININGS["lora-8b"], "llama-3.1-8b", ours, stock, dry=True)}


def test_a_piece_holds_near_the_plan_and_no_slower_than_stock() -> None:
    result = verdict(figures(), figures(tokens_per_second=6000.0))
    assert result["holds"] and result["ratio_to_stock"] == 1.5 and result["error"] is None
    assert "holds" in summary_row("lora-8b", result)


@pytest.mark.parametrize(
    "changed",
    [
        {"device_gib": 62.0},
        {"device_gib": 50.0},
        {"tokens_per_second": 5000.0},
        {"losses": [2.0, float("nan")]},
        {"losses": [float("inf")]},
    ],
)
def test_a_piece_fails_far_from_the_plan_slower_than_stock_or_without_a_loss(changed: dict[str, Any]) -> None:
    assert verdict(figures(**changed), figures(tokens_per_second=6000.0))["holds"] is False


def test_stock_without_enough_memory_has_lost_and_stock_that_failed_has_not() -> None:
    assert verdict(figures(), {"error": "out of memory", "out_of_memory": True})["holds"] is True
    failed = verdict(figures(), {"error": "exit code 1"})
    assert failed["holds"] is False and failed["error"] == "stock: exit code 1"


def test_our_own_failure_is_in_the_table() -> None:
    result = verdict({"error": "not finished after 480 s"}, {})
    assert result["holds"] is False
    assert "not finished after 480 s" in summary_row("lora-8b", result)


def test_every_piece_is_documented() -> None:
    docs = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert all(f"| `{piece}` |" in docs for piece in PIECES)


def test_training_and_tests_of_the_check_need_no_other_package(tmp_path: Path) -> None:
    for name in NOT_THERE:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('there is no {name} here')\n")
    imports = (
        "import ft_service.model.trainable, ft_service.plan.make, ft_service.train.loop, ft_service.train.parallel, "
        "ft_service.train.objectives.sft, tests.model.test_load, tests.model.test_attention, "
        "tests.train.test_host_reads, tests.train.waiting_cases"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", imports], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_piece_that_raises_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown_gpu() -> dict[str, Any]:
        return {"name": "Some GPU", "memory_gib": 40.0}

    monkeypatch.setattr(gpu_check, "device_facts", unknown_gpu)
    monkeypatch.setattr(gpu_check, "num_gpus", lambda: 1)
    result = check_piece("lora-8b", False, Clock(float("inf")))
    assert result["holds"] is False and "'Some GPU' is not in the catalogue" in result["error"]
    assert "FAILS" in summary_row("lora-8b", result)
    assert "skipped" in check_piece("zero3-qlora", False, Clock(float("inf")))


@pytest.mark.parametrize(
    ("name", "memory_gib", "known"),
    [
        ("NVIDIA H200", 139.8, "H200"),
        ("NVIDIA H100 80GB HBM3", 79.1, "H100"),
        ("NVIDIA A100-SXM4-80GB", 79.3, "A100-80G"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100-40G"),
        ("NVIDIA A10G", 22.1, "A10G"),
        ("NVIDIA GeForce RTX 4090", 23.5, "GeForce-RTX-4090"),
        ("NVIDIA L40S", 44.4, "L40S"),
        ("NVIDIA B200", 178.4, "B200"),
    ],
)
def test_gpus_are_known_by_the_names_of_their_driver(
    monkeypatch: pytest.MonkeyPatch, name: str, memory_gib: float, known: str
) -> None:
    monkeypatch.setattr(gpu_check, "device_facts", lambda: {"name": name, "memory_gib": memory_gib})
    gpu = gpu_check.this_gpu(dry=False)
    assert (gpu.name, gpu.memory_gib) == (known, memory_gib)


@pytest.mark.multiprocess
def test_workers_that_hang_end_with_their_piece(tmp_path: Path) -> None:
    """As torchrun's: in a session of their own, they hold the pipe that is read, and end when their parent is asked."""
    launcher = tmp_path / "launcher.py"
    launcher.write_text(f"""
import pathlib, signal, subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(900)"], start_new_session=True)
signal.signal(signal.SIGTERM, lambda *_: (worker.kill(), worker.wait(), sys.exit(1)))
pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(worker.pid))
signal.pause()
""")
    problem, _ = gpu_check.run_within([sys.executable, str(launcher)], dict(os.environ), 5.0)
    assert problem == "not finished after 5 s"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.multiprocess
def test_the_environment_of_the_check_has_the_torch_of_another_virtual_environment(tmp_path: Path) -> None:
    """`--system-site-packages` alone shows the packages of the Python that a virtual environment was made with."""
    assert sys.prefix != sys.base_prefix
    command = ["make", "gpu-check", f"PYTHON={sys.executable}", f"GPU_VENV={tmp_path}/venv", f"WHEELS={tmp_path}"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert "torch sees no GPU" in done.stderr, done.stdout[-2000:] + done.stderr[-2000:]
