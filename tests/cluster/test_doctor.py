"""`ft doctor` looks and creates nothing; addresses and Pythons that cannot work are named with what to do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from ft_service.cluster import doctor
from ft_service.cluster.doctor import Check, _storage
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
        monkeypatch.setattr(doctor, "_built_ops", list)
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


def test_token_mode_without_a_token_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert doctor._auth().level == "fail" and "ray get-auth-token --generate" in doctor._auth().cure
    (tmp_path / "token").write_text("c4nary")
    assert doctor._auth() == Check("Ray authentication", "ok", "token")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert doctor._auth().level == "warn" and "can run code on every node" in doctor._auth().detail


def test_versions_are_compared_with_the_tested_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    versions = doctor.tested_versions()
    assert all(check.level == "ok" for check in doctor._packages(versions))
    other = {check.name: check for check in doctor._packages({**versions, "peft": "0.1.0"})}
    assert other["peft"].level == "warn" and "tested with 0.1.0" in other["peft"].detail
    assert "--constraint constraints.txt" in other["peft"].cure
    (changed,) = doctor._other_packages({**versions, "pyyaml": "1.0", "rich": "2.0"})
    assert changed.level == "warn" and "pyyaml" in changed.detail and "(1.0)" in changed.detail
    monkeypatch.setattr(doctor, "PROJECT", tmp_path)
    assert doctor.tested_versions() == {}
    (unknown,) = doctor._other_packages({})
    assert unknown.level == "warn" and "FT_CONSTRAINTS" in unknown.cure
    (tmp_path / "pins").write_text("Ray==2.60.0\n# a comment\nhf_xet==1.0\n")
    monkeypatch.setenv("FT_CONSTRAINTS", str(tmp_path / "pins"))
    assert doctor.tested_versions() == {"ray": "2.60.0", "hf-xet": "1.0"}


def gpus(monkeypatch: pytest.MonkeyPatch, *names: str, used_gib: float = 0.5) -> dict[str, Check]:
    """The checks of a machine with these GPUs, of 80 GiB each; copies between them are not tried."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(names))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=80 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (int((80 - used_gib) * 2**30), 80 * 2**30))
    monkeypatch.setattr(doctor, "_copy_rate", lambda: 300.0)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: "PCIe" not in names[a])
    return {check.name: check for check in doctor._accelerator()}


def test_gpus_are_judged_by_type_memory_and_links(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = gpus(monkeypatch, *["NVIDIA H100 80GB HBM3"] * 2)
    assert sound["GPUs"].level == "ok" and "2 x NVIDIA H100 80GB HBM3, 80 GiB" in sound["GPUs"].detail
    assert sound["GPU links"] == Check("GPU links", "ok", "300 GB/s from GPU 0 to 1; direct access between all pairs")
    assert "GPU memory" not in sound
    assert gpus(monkeypatch, "Tesla T4")["GPUs"].level == "fail"
    assert "without bf16" in gpus(monkeypatch, "Tesla T4")["GPUs"].detail
    assert "not in the catalogue" in gpus(monkeypatch, "NVIDIA Z900")["GPUs"].detail
    assert "several types" in gpus(monkeypatch, "NVIDIA L4", "NVIDIA A10G")["GPUs"].detail
    assert "30 GiB in use" in gpus(monkeypatch, "NVIDIA L4", used_gib=30)["GPU memory"].detail
    blind = gpus(monkeypatch, *["NVIDIA A100-PCIe"] * 3)["GPU links"]
    assert blind.level == "warn" and "6 of 6 pairs without direct access" in blind.detail


def test_the_compiler_and_what_was_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    monkeypatch.setattr(doctor, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    assert doctor._built_ops() == []
    recorded = tmp_path / "git_version_info_installed.py"
    # As DeepSpeed's setup.py writes it: 1 for DS_BUILD_CPU_ADAM=1, True for DS_BUILD_OPS=1.
    ops = "installed_ops={'deepspeed_not_implemented': False, 'async_io': 1, 'cpu_lion': False, 'cpu_adam': True}\n"
    recorded.write_text(f"{ops}accelerator_name='cuda'\n")
    assert doctor._built_ops() == []  # DeepSpeed compiles them again for another accelerator
    recorded.write_text(f"{ops}accelerator_name='cpu'\n")
    assert doctor._built_ops() == ["async_io", "cpu_adam"]
    assert doctor._nvme_offloading() == Check("NVMe offloading", "ok", "async_io, compiled at installation")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    nvcc.chmod(0o700)
    monkeypatch.setattr(doctor.shutil, "which", lambda tool: str(tmp_path / tool) if tool != "g++" else "/usr/bin/g++")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    check = doctor._compiler()
    assert check.level == "warn" and "nvcc has CUDA 12.8, PyTorch 13.0" in check.detail
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert doctor._compiler().level == "ok"
    monkeypatch.setattr(doctor.shutil, "which", lambda tool: None)
    assert doctor._compiler().level == "warn"  # what was compiled at installation still works
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert doctor._compiler().level == "fail" and doctor._compiler().cure == "install g++"


def test_small_limits_shared_memory_and_disks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (1024, 1024))
    files = next(check for check in doctor._limits() if check.name == "open files")
    assert files.level == "warn" and "ulimit -n 65536" in files.cure
    assert doctor._locked_memory(8, has_cuda=True).level == "warn"
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda which: (doctor.resource.RLIM_INFINITY,) * 2)
    assert {check.level for check in doctor._limits()} == {"ok"}
    usage = SimpleNamespace(total=64 * 2**20, used=63 * 2**20, free=2**20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage)
    assert doctor._shared_memory().level == "warn" and "--shm-size" in doctor._shared_memory().cure
    assert doctor._disk().level == "fail"


def test_slow_storage_is_a_warning_and_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    slow = doctor.speed_check(doctor.StorageRates(write=200e6, read=4e6, ranged=90e6))
    assert slow.level == "warn" and "read 4 MB/s" in slow.detail
    assert doctor._speed(str(tmp_path / "storage")).detail.startswith("not measured")
    assert "MB/s" in doctor._speed(str(tmp_path)).detail
    assert list(tmp_path.iterdir()) == []


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


@pytest.mark.parametrize("joins", [False, True])
def test_jobs_of_a_ray_that_is_started_here_run_this_python(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, joins: bool
) -> None:
    other = tmp_path / "python"
    other.touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{Path(sys.executable).parent}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ft_service.cluster.ray_cluster._check_reachable", lambda address: None)
    monkeypatch.setattr("ft_service.cluster.ray_cluster._runtime_env", lambda address: {})
    found: list[str | None] = []
    monkeypatch.setattr(ray, "init", lambda **settings: found.append(shutil.which("python")))
    connect("10.0.0.1:6379" if joins else None)
    assert found == [str(other if joins else Path(sys.executable).parent / "python")]
