"""`ft doctor` looks and creates nothing; addresses and Pythons that cannot work are named with what to do."""

import subprocess
import sys
from pathlib import Path

import pytest

from ft_service.cluster import doctor
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


def test_doctor_says_what_nvme_offloading_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them, DeepSpeed fails to compile its async_io op only once the workers are up."""
    for aio, on_cuda, toolkit, level, named in (
        (True, False, False, "ok", "libaio"),
        (True, True, True, "ok", "CUDA toolkit"),
        (False, False, False, "warn", "install libaio-dev"),
        (True, True, False, "warn", "install nvcc"),
        (False, True, False, "warn", "libaio and its header and the CUDA toolkit"),
    ):
        monkeypatch.setattr(doctor, "_has_libaio", lambda aio=aio: aio)
        monkeypatch.setattr(doctor, "_needs_cuda_toolkit", lambda on_cuda=on_cuda: on_cuda)
        monkeypatch.setattr(doctor, "_has_cuda_toolkit", lambda toolkit=toolkit: toolkit)
        check = doctor._nvme_offloading()
        assert check.level == level and named in f"{check.detail}: {check.cure}"


def test_doctor_tries_libaio_with_the_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    for exit_code in (0, 1):
        compiler.write_text(f'#!/bin/sh\ncase "$*" in *-laio*) exit {exit_code};; esac\nexit 2\n')
        compiler.chmod(0o700)
        monkeypatch.setenv("CXX", str(compiler))
        assert doctor._has_libaio() == (exit_code == 0)
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    assert not doctor._has_libaio()


def test_a_single_machine_needs_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert doctor._auth().level == "ok"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert doctor._auth().level == "warn" and "set it to token" in doctor._auth().cure


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
