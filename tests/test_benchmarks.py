"""Every benchmark works: each runs once at its smallest size. What they measure is for docs/benchmarks.md."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[1]
SHARED = {"result"}
BENCHMARKS = sorted(file.stem for file in (ROOT / "benchmarks").glob("*.py") if file.stem not in SHARED)
SECONDS = 1200


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_works_at_its_smallest_size(name: str) -> None:
    command = [sys.executable, f"benchmarks/{name}.py", "--smoke"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["benchmark"] == name and result["figures"]
    assert result["smoke"] is True and result["goal"] is None and result["holds"] is None
