"""`ft doctor`: check what this machine has and what a run would miss."""

import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from ft_service.errors import FtError
from ft_service.storage.storage import Storage

_PACKAGES = ("ray", "torch", "transformers", "peft", "deepspeed", "bitsandbytes", "datasets")


@dataclass(frozen=True)
class Check:
    """One check and its result. `fail` prevents any run; `warn` may matter."""

    name: str
    level: Literal["ok", "warn", "fail"]
    detail: str


def run_checks(storage_root: str) -> list[Check]:
    """Check packages, accelerators, build tools, Ray and the storage root.

    Creates nothing in folders. On object storage it writes and deletes one probe: only that shows the right to write.
    """
    return [*_packages(), _accelerator(), _compiler(), _nvme_offloading(), _ray(), _auth(), _storage(storage_root)]


def _packages() -> Iterator[Check]:
    for package in _PACKAGES:
        try:
            yield Check(package, "ok", version(package))
        except PackageNotFoundError:
            yield Check(package, "fail", "not installed: run make setup")


def _accelerator() -> Check:
    import torch

    if not torch.cuda.is_available():
        return Check("GPUs", "warn", "none: set parallel.use_gpu: false")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return Check(
        "GPUs", "ok", f"{len(names)} x {names[0]}, {memory:.0f} GiB, compute {torch.cuda.get_device_capability()}"
    )


def _compiler() -> Check:
    """DeepSpeed compiles its communication and CPU-Adam ops at first use."""
    found = [tool for tool in ("g++", "ninja") if shutil.which(tool)]
    if shutil.which("g++") is None:
        return Check("DeepSpeed ops", "fail", "no C++ compiler: install g++")
    return Check("DeepSpeed ops", "ok", f"{' and '.join(found)} to build them at first use")


def _nvme_offloading() -> Check:
    """`offload: nvme` compiles DeepSpeed's async_io op: with libaio and, where torch uses CUDA, its toolkit."""
    missing = [] if _has_libaio() else ["libaio and its header (install libaio-dev or libaio-devel)"]
    if _needs_cuda_toolkit() and not _has_cuda_toolkit():
        missing.append("the CUDA toolkit (install nvcc, or set CUDA_HOME)")
    if missing:
        return Check("NVMe offloading", "warn", f"parallel.offload: nvme would need {' and '.join(missing)}")
    return Check("NVMe offloading", "ok", "libaio and CUDA toolkit" if _needs_cuda_toolkit() else "libaio")


def _has_libaio() -> bool:
    compiler = os.environ.get("CXX") or "g++"
    program = "#include <libaio.h>\nint main() { return io_setup(0, nullptr); }\n"
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, "-x", "c++", "-", "-laio", "-o", f"{folder}/program"]
        try:
            return subprocess.run(command, input=program, text=True, capture_output=True).returncode == 0
        except OSError:
            return False


def _needs_cuda_toolkit() -> bool:
    import torch

    return torch.version.cuda is not None


def _has_cuda_toolkit() -> bool:
    from torch.utils.cpp_extension import CUDA_HOME

    return CUDA_HOME is not None and (Path(CUDA_HOME) / "bin" / "nvcc").exists()


def _ray() -> Check:
    import ray

    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        return Check("Ray cluster", "ok", "RAY_ADDRESS is not set: ft train starts a local Ray")
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        total = ray.cluster_resources()
        ray.shutdown()
    except Exception as error:  # Ray raises many kinds, see `connect`
        return Check("Ray cluster", "fail", f"{address}: {type(error).__name__}: {error}")
    return Check("Ray cluster", "ok", f"{address}: {total.get('CPU', 0):.0f} CPUs, {total.get('GPU', 0):.0f} GPUs")


def _auth() -> Check:
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is None and "RAY_ADDRESS" not in os.environ:
        return Check(
            "Ray authentication", "ok", "Ray sets it up for one machine; on a cluster, set RAY_AUTH_MODE=token"
        )
    if mode is None:
        return Check("Ray authentication", "warn", "RAY_AUTH_MODE is not set: set it to token here and on the head")
    return Check("Ray authentication", "ok" if mode == "token" else "warn", mode)


def _storage(root: str) -> Check:
    try:
        storage = Storage(root)
        if storage.is_local:
            return _folder(Path(root.removeprefix("file://")).expanduser().absolute())
        storage.check_writable()
    except FtError as error:
        return Check("storage", "fail", str(error))
    return Check("storage", "ok", f"{root} is writable")


def _folder(root: Path) -> Check:
    """Whether a run could write to `root`, or create it."""
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    if not existing.is_dir():
        return Check("storage", "fail", f"{root}: {existing} is a file. Use another --storage.")
    if not os.access(existing, os.W_OK | os.X_OK):
        return Check("storage", "fail", f"{root}: no right to write to {existing}. Use another --storage.")
    return Check("storage", "ok", f"{root} is writable" if existing == root else f"{root}: the first run creates it")
