"""`ft doctor`: what this machine has, and what is missing for a run."""

import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from ft_service.errors import FtError
from ft_service.storage.storage import Storage

_PACKAGES = ("ray", "torch", "transformers", "peft", "deepspeed", "bitsandbytes", "datasets")


@dataclass(frozen=True)
class Finding:
    """One thing looked at: ok, worth a look (warn), or in the way of any run (fail)."""

    what: str
    level: Literal["ok", "warn", "fail"]
    found: str


def examine(storage_root: str) -> list[Finding]:
    """Look at packages, accelerators, build tools, Ray and the storage root. Changes nothing but a probe file there."""
    return [*_packages(), _accelerator(), _compiler(), _ray(), _auth(), _storage(storage_root)]


def _packages() -> Iterator[Finding]:
    for package in _PACKAGES:
        try:
            yield Finding(package, "ok", version(package))
        except PackageNotFoundError:
            yield Finding(package, "fail", "not installed: run make setup")


def _accelerator() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPUs", "warn", "none: use parallel.use_gpu: false here")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return Finding(
        "GPUs", "ok", f"{len(names)} x {names[0]}, {memory:.0f} GiB, compute {torch.cuda.get_device_capability()}"
    )


def _compiler() -> Finding:
    """DeepSpeed compiles its communication and CPU-Adam ops at first use."""
    found = [tool for tool in ("g++", "ninja") if shutil.which(tool)]
    if shutil.which("g++") is None:
        return Finding("DeepSpeed ops", "fail", "no C++ compiler: install g++")
    return Finding("DeepSpeed ops", "ok", f"{' and '.join(found)} to build them at first use")


def _ray() -> Finding:
    import ray

    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        return Finding("Ray cluster", "ok", "RAY_ADDRESS not set: ft train starts a local Ray")
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        total = ray.cluster_resources()
        ray.shutdown()
    except Exception as error:  # see launch.connect: Ray raises many kinds here
        return Finding("Ray cluster", "fail", f"{address}: {type(error).__name__}: {error}")
    return Finding("Ray cluster", "ok", f"{address}: {total.get('CPU', 0):.0f} CPUs, {total.get('GPU', 0):.0f} GPUs")


def _auth() -> Finding:
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is None:
        return Finding("Ray authentication", "warn", "RAY_AUTH_MODE not set: set it to token here and on the head")
    return Finding("Ray authentication", "ok" if mode == "token" else "warn", mode)


def _storage(root: str) -> Finding:
    try:
        Storage(root).check_writable()
    except FtError as error:
        return Finding("storage", "fail", str(error))
    return Finding("storage", "ok", f"{root} is writable")
