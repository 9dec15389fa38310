"""`ft doctor` looks and creates nothing; addresses and Pythons that cannot work are named with what to do."""

import subprocess
import sys
from pathlib import Path

import pytest

from ft_service.cluster.doctor import _storage
from ft_service.cluster.ray_cluster import connect
from ft_service.errors import ClusterError

PROJECT = Path(__file__).resolve().parents[2]


def test_doctor_creates_no_folder_and_leaves_no_file(tmp_path: Path) -> None:
    check = _storage(str(tmp_path / "a" / "storage"))
    assert check.level == "ok" and "first run creates it" in check.detail
    assert list(tmp_path.iterdir()) == []
    before = tmp_path.stat().st_mtime_ns
    assert _storage(str(tmp_path)).detail == f"{tmp_path} is writable"
    assert tmp_path.stat().st_mtime_ns == before  # no probe was written and deleted


def test_doctor_names_what_stands_in_the_way_of_the_storage(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    check = _storage(str(tmp_path / "file" / "storage"))
    assert check.level == "fail" and f"{tmp_path}/file is a file" in check.detail


@pytest.mark.parametrize("address", ["http://10.0.0.1:8265", "https://ray.example.org"])
def test_a_jobs_address_is_recognised_and_the_right_command_named(address: str) -> None:
    with pytest.raises(ClusterError, match=f"Jobs API .*ft submit SPEC --address {address}"):
        connect(address)


@pytest.mark.multiprocess
def test_a_driver_without_the_packages_names_its_python() -> None:
    # -S leaves site-packages out, as another Python would.
    command = [sys.executable, "-S", "jobs/train.py", "spec.yaml"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith(f"jobs/train.py: {sys.executable} runs this driver, and lacks ray, torch")
    assert "/path/to/.venv/bin/python jobs/train.py" in done.stderr
