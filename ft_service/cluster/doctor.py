"""`ft doctor`: check what this machine has and what a run would miss. `doctor_nodes` checks all nodes of a cluster."""

import logging
import os
import random
import re
import resource
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from ft_service.catalog.gpus import find_gpu
from ft_service.cluster.ray_cluster import PROJECT
from ft_service.errors import FtError, StorageError
from ft_service.runs.code import code_version
from ft_service.storage.storage import Storage

_PACKAGES = ("ray", "torch", "transformers", "peft", "deepspeed", "bitsandbytes", "datasets")
_INSTALL = "pip install --constraint constraints.txt . (make setup, in a checkout)"
_GIB = 2**30
OPEN_FILES = 65536
SHARED_MEMORY_GIB = 1.0
DISK_FULL = 0.95
"""Ray starts no task on a node whose disk is fuller than this."""

PROBE_BYTES = 64 * 2**20
_RANGE_BYTES = 2**20
_NUM_RANGES = 16
SLOW_STORAGE = 50e6
"""Bytes a second below which a checkpoint of a few GiB takes minutes."""


@dataclass(frozen=True)
class Check:
    """One check and its result. `fail` prevents any run; `warn` may matter. `cure` says what to do about either."""

    name: str
    level: Literal["ok", "warn", "fail"]
    detail: str
    cure: str = ""


def run_checks(storage_root: str, with_speed: bool = False) -> list[Check]:
    """Check packages, accelerators, build tools, limits, Ray and the storage root of this machine.

    Creates nothing in folders, except with `with_speed`, which writes, reads and deletes a file of 64 MiB. On object
    storage it writes and deletes one probe: only that shows the right to write.
    """
    checks = [*machine_checks(tested_versions()), _ray(), _auth(), _storage(storage_root)]
    if with_speed and checks[-1].level != "fail":
        checks.append(_speed(storage_root))
    return checks


def machine_checks(tested: Mapping[str, str]) -> list[Check]:
    """What can be checked of a machine alone. `tested` has the versions of the tested set, see `tested_versions`."""
    packages = [*_packages(tested), *_other_packages(tested)]
    return [
        Check("ft-service", "ok", code_version()),
        *packages,
        *_accelerator(),
        _compiler(),
        _nvme_offloading(),
        *_limits(),
        _shared_memory(),
        _disk(),
    ]


# -- packages --------------------------------------------------------------------------------------------------------


def tested_versions() -> dict[str, str]:
    """Versions of the tested set by normalised name: of the checkout, or of the file FT_CONSTRAINTS; else empty."""
    for path in (PROJECT / "constraints.txt", Path(os.environ.get("FT_CONSTRAINTS", ""))):
        if path.is_file():
            pins = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
            return {_normalised(name): pinned for name, pinned in pins}
    return {}


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_tested(installed: str, tested: str) -> bool:
    """2.13.0+cpu counts as 2.13.0: the same code, built for another device."""
    return installed == tested or installed.partition("+")[0] == tested


def _packages(tested: Mapping[str, str]) -> Iterator[Check]:
    for package in _PACKAGES:
        try:
            installed = version(package)
        except PackageNotFoundError:
            yield Check(package, "fail", "not installed", _INSTALL)
            continue
        pinned = tested.get(package)
        if pinned is None or _is_tested(installed, pinned):
            yield Check(package, "ok", installed if pinned is None else f"{installed}, as tested")
        else:
            yield Check(package, "warn", f"{installed}; tested with {pinned}", _INSTALL)


def _other_packages(tested: Mapping[str, str]) -> Iterator[Check]:
    if not tested:
        yield Check("tested versions", "warn", "unknown: constraints.txt is not here", "set FT_CONSTRAINTS to its path")
        return
    installed = {_normalised(found.metadata["Name"]): found.version for found in distributions()}
    others = {name: found for name, found in installed.items() if name in tested and name not in _PACKAGES}
    different = sorted(name for name, found in others.items() if not _is_tested(found, tested[name]))
    if different:
        shown = ", ".join(f"{name} {others[name]} ({tested[name]})" for name in different[:4])
        more = f" and {len(different) - 4} more" if len(different) > 4 else ""
        yield Check("tested versions", "warn", f"others installed than tested (in brackets): {shown}{more}", _INSTALL)
    else:
        yield Check("tested versions", "ok", f"{len(others)} other packages, as tested")


# -- accelerators and build tools ------------------------------------------------------------------------------------


def _accelerator() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        driver = shutil.which("nvidia-smi")
        if driver and torch.version.cuda is None:
            yield Check("GPUs", "warn", "there is a driver, but PyTorch is built without CUDA", _INSTALL)
        else:
            yield Check("GPUs", "warn", "none", "for training on CPU, set parallel.use_gpu: false")
        return
    count = torch.cuda.device_count()
    names = [torch.cuda.get_device_name(index) for index in range(count)]
    memory = torch.cuda.get_device_properties(0).total_memory / _GIB
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    detail = f"{count} x {names[0]}, {memory:.0f} GiB, compute capability {capability}, CUDA {torch.version.cuda}"
    if len(set(names)) > 1:
        yield Check("GPUs", "warn", f"of several types: {', '.join(sorted(set(names)))}", "train on one type at a time")
    elif (gpu := find_gpu(names[0])) is None:
        yield Check("GPUs", "warn", f"{detail}; not in the catalogue", "give ft plan --gpu-memory-gib")
    elif not gpu.has_bf16:
        yield Check("GPUs", "fail", f"{detail}; without bf16", "use GPUs from Ampere on (A10, A100, L4, ...)")
    else:
        yield Check("GPUs", "ok", detail)
    used = [(torch.cuda.mem_get_info(index)[1] - torch.cuda.mem_get_info(index)[0]) / _GIB for index in range(count)]
    if max(used) > 2:
        yield Check("GPU memory", "warn", f"{max(used):.0f} GiB in use on one GPU", "nvidia-smi shows by which process")
    if count > 1:
        yield _links(count)


def _links(count: int) -> Check:
    import torch

    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    blind = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    detail = f"{_copy_rate():.0f} GB/s from GPU 0 to 1"
    if blind:
        cure = "expect slow gathers; NCCL_DEBUG=INFO shows the transport, nvidia-smi topo --matrix the links"
        return Check("GPU links", "warn", f"{detail}; {len(blind)} of {len(pairs)} pairs without direct access", cure)
    return Check("GPU links", "ok", f"{detail}; direct access between all pairs")


def _copy_rate() -> float:
    """GB/s (10^9) of copies of 64 MiB from GPU 0 to GPU 1."""
    import torch

    source = torch.ones(64 * 2**20, dtype=torch.uint8, device="cuda:0")
    target = torch.empty_like(source, device="cuda:1")
    target.copy_(source)
    torch.cuda.synchronize(1)
    began = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(1)
    return 10 * source.numel() / (time.perf_counter() - began) / 1e9


def _compiler() -> Check:
    """DeepSpeed compiles its communication and CPU-Adam ops at first use, unless they were compiled at installation."""
    built = _built_ops()
    with_ops = f"compiled at installation: {', '.join(built)}; " if built else ""
    found = [tool for tool in ("g++", "ninja") if shutil.which(tool)]
    if shutil.which("g++") is None:
        return Check("DeepSpeed ops", "warn" if built else "fail", f"{with_ops}no C++ compiler", "install g++")
    cuda = _cuda_mismatch()
    if cuda:
        return Check("DeepSpeed ops", "warn", with_ops + cuda, "install the CUDA toolkit of PyTorch's version")
    return Check("DeepSpeed ops", "ok", f"{with_ops}{' and '.join(found)} to build them at first use")


def _built_ops() -> list[str]:
    """Names of the ops that DeepSpeed does not compile on this machine."""
    spec = find_spec("deepspeed")
    if spec is None or spec.origin is None:
        return []
    recorded = Path(spec.origin).with_name("git_version_info_installed.py")  # importing deepspeed takes seconds
    if not recorded.exists():
        return []
    text = recorded.read_text(encoding="utf-8")
    # DeepSpeed ignores ops that were compiled for another accelerator, and compiles them again.
    if f"accelerator_name='{_accelerator_name()}'" not in text:
        return []
    ops = re.search(r"installed_ops=(\{.*?\})", text)
    return re.findall(r"'(\w+)': (?:True|1)", ops[1]) if ops else []


def _accelerator_name() -> str:
    """As DeepSpeed chooses it."""
    import torch

    return os.environ.get("DS_ACCELERATOR") or ("cuda" if torch.cuda.is_available() else "cpu")


def _cuda_mismatch() -> str:
    """DeepSpeed refuses to compile where nvcc has another major version of CUDA than torch. Empty: nothing is wrong."""
    import torch

    nvcc = shutil.which("nvcc")
    if torch.version.cuda is None or nvcc is None:
        return ""
    reported = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", reported)
    if release is None or release[1] == torch.version.cuda.partition(".")[0]:
        return ""
    return f"nvcc has CUDA {release[1]}.{release[2]}, PyTorch {torch.version.cuda}"


def _nvme_offloading() -> Check:
    """`offload: nvme` compiles DeepSpeed's async_io op: with libaio and, where torch uses CUDA, its toolkit."""
    if "async_io" in _built_ops():
        return Check("NVMe offloading", "ok", "async_io, compiled at installation")
    missing: list[str] = []
    cures: list[str] = []
    if not _has_libaio():
        missing.append("libaio and its header")
        cures.append("install libaio-dev (Debian) or libaio-devel")
    if _needs_cuda_toolkit() and not _has_cuda_toolkit():
        missing.append("the CUDA toolkit")
        cures.append("install nvcc, or set CUDA_HOME")
    if missing:
        needed = f"parallel.offload: nvme would need {' and '.join(missing)}"
        return Check("NVMe offloading", "warn", needed, "; ".join(cures))
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


# -- the operating system --------------------------------------------------------------------------------------------


def _limits() -> Iterator[Check]:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files != resource.RLIM_INFINITY and files < OPEN_FILES:
        cure = f"ulimit -n {OPEN_FILES} before ray start (Docker: --ulimit nofile={OPEN_FILES})"
        yield Check("open files", "warn", f"at most {files}: a large cluster needs more", cure)
    else:
        yield Check("open files", "ok", f"at least {OPEN_FILES}")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if locked == resource.RLIM_INFINITY:
        yield Check("locked memory", "ok", "unlimited")
    else:
        yield _locked_memory(locked / 2**20, _needs_cuda_toolkit())


def _locked_memory(limit_mib: float, has_cuda: bool) -> Check:
    if not has_cuda:
        return Check("locked memory", "ok", f"at most {limit_mib:.0f} MiB")
    detail = f"at most {limit_mib:.0f} MiB: too little for offload: cpu, InfiniBand and EFA"
    cure = "ulimit -l unlimited before ray start (Docker: --ulimit memlock=-1)"
    return Check("locked memory", "warn", detail, cure)


def _shared_memory() -> Check:
    try:
        size = shutil.disk_usage("/dev/shm").total / _GIB
    except OSError:
        return Check("shared memory", "warn", "there is no /dev/shm", "mount one")
    if size < SHARED_MEMORY_GIB:
        detail = f"{size:.2f} GiB in /dev/shm: too little for Ray's objects, NCCL and data loaders"
        return Check(
            "shared memory", "warn", detail, "Docker: --shm-size=64g; Kubernetes: an emptyDir of medium Memory"
        )
    return Check("shared memory", "ok", f"{size:.0f} GiB in /dev/shm")


def _disk() -> Check:
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    usage = shutil.disk_usage(folder)
    free = f"{usage.free / _GIB:.0f} GiB free in {folder}"
    if usage.used / usage.total > DISK_FULL:
        return Check("disk", "fail", f"{free}: Ray starts nothing on a disk over 95 % full", "delete something there")
    return Check("disk", "ok", free)


# -- Ray -------------------------------------------------------------------------------------------------------------


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
        cure = "check that the cluster is up, and that RAY_AUTH_MODE and the token are those of its head"
        return Check("Ray cluster", "fail", f"{address}: {type(error).__name__}: {error}", cure)
    return Check("Ray cluster", "ok", f"{address}: {total.get('CPU', 0):.0f} CPUs, {total.get('GPU', 0):.0f} GPUs")


def _auth() -> Check:
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is None and "RAY_ADDRESS" not in os.environ:
        return Check(
            "Ray authentication", "ok", "Ray sets it up for one machine", "on a cluster, set RAY_AUTH_MODE=token"
        )
    if mode is None:
        return Check("Ray authentication", "warn", "RAY_AUTH_MODE is not set", "set it to token here and on the head")
    if mode != "token":
        detail = f"{mode}: whoever reaches a port of Ray can run code on every node"
        return Check("Ray authentication", "warn", detail, "set RAY_AUTH_MODE to token here and on the head")
    if not _has_token():
        cure = "ray get-auth-token --generate on one machine, and copy ~/.ray/auth_token to the others"
        return Check("Ray authentication", "fail", "token, but this machine has none", cure)
    return Check("Ray authentication", "ok", "token")


def _has_token() -> bool:
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or Path(path or "~/.ray/auth_token").expanduser().is_file()


# -- storage ---------------------------------------------------------------------------------------------------------


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
        return Check("storage", "fail", f"{root}: {existing} is a file.", "Use another --storage.")
    if not os.access(existing, os.W_OK | os.X_OK):
        return Check("storage", "fail", f"{root}: no right to write to {existing}.", "Use another --storage.")
    return Check("storage", "ok", f"{root} is writable" if existing == root else f"{root}: the first run creates it")


@dataclass(frozen=True)
class StorageRates:
    """Bytes a second."""

    write: float
    read: float
    ranged: float
    """Of reads of 1 MiB each, as the weights of a shard are read."""


def write_probe(storage: Storage, path: str, seed: int) -> float:
    """Write a file of `PROBE_BYTES` that depends on `seed`; bytes a second."""
    content = _probe(seed)
    began = time.perf_counter()
    storage.write_bytes(path, content)
    return len(content) / (time.perf_counter() - began)


def read_probe(storage: Storage, path: str, seed: int) -> tuple[float, float]:
    """Read it whole and in ranges; bytes a second of both. Raises `StorageError` if it is missing or different."""
    began = time.perf_counter()
    content = storage.read_bytes(path)
    whole = len(content) / (time.perf_counter() - began)
    if content != _probe(seed):
        raise StorageError(f"{storage.uri(path)}: is not what was written.")
    began = time.perf_counter()
    for index in range(_NUM_RANGES):
        storage.read_range(path, index * (PROBE_BYTES // _NUM_RANGES), _RANGE_BYTES)
    return whole, _NUM_RANGES * _RANGE_BYTES / (time.perf_counter() - began)


def _probe(seed: int) -> bytes:
    """Different in every MiB, so that storage that compresses or deduplicates shows its real rate."""
    block = random.Random(seed).randbytes(_RANGE_BYTES)
    return b"".join(index.to_bytes(8, "little") + block[8:] for index in range(PROBE_BYTES // _RANGE_BYTES))


def speed_check(rates: StorageRates) -> Check:
    """The check of measured rates."""
    shown = ", ".join(f"{name} {rate / 1e6:.0f} MB/s" for name, rate in vars(rates).items())
    slowest = min(rates.write, rates.read, rates.ranged)
    if slowest < SLOW_STORAGE:
        cure = "checkpoints and loading take long: use faster storage, or checkpoint less often"
        return Check("storage speed", "warn", shown, cure)
    return Check("storage speed", "ok", shown)


def _speed(root: str) -> Check:
    path = f".doctor-{uuid.uuid4().hex}"
    try:
        storage = Storage(root)
        if storage.is_local and not Path(storage.uri("")).exists():
            return Check("storage speed", "ok", "not measured: the first run creates the folder")
        try:
            write = write_probe(storage, path, seed=0)
            check = speed_check(StorageRates(write, *read_probe(storage, path, seed=0)))
            # What a machine has just written, it reads from memory; ft doctor --cluster reads what another one wrote.
            return replace(check, detail=f"{check.detail} (reads from memory)") if storage.is_local else check
        finally:
            storage.delete(path)
    except FtError as error:
        return Check("storage speed", "fail", str(error))
