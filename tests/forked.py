"""Groups of worker processes without the eight seconds that each would spend on imports.

A fork server imports torch, transformers, DeepSpeed and this project once in a test session, and forks the workers.
They see what torchrun's workers see: the same variables, and a store for the rendezvous in the process that started
them. What such workers cannot show are promises about memory (they inherit the server's) and about the start and the
end of a Python process: tests of those start real ones.
"""

import gc
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
TERMINATE_SECONDS = 10.0
"""From SIGTERM to SIGKILL, for the workers that are left when one has failed."""
_LIBRARIES_READ_AT_IMPORT = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}


@cache
def _context() -> ForkServerContext:
    """The fork server; it ends with the process that calls this first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    with mock.patch.dict(os.environ, _LIBRARIES_READ_AT_IMPORT):
        forkserver.ensure_running()
    return context


class Workers:
    """Forked processes, one for each rank, that call `target(*args)`; used like a `subprocess.Popen`.

    As under torchrun, the others are ended when one fails. Each is the leader of a session of its own.
    """

    def __init__(self, target: Callable[..., None], *args: Any, world_size: int | None) -> None:
        """`world_size` None: one process that is in no group, as without a launcher."""
        self.exit_codes: dict[int, int] = {}
        self._first_failure = 0
        self._printed = bytearray()
        self._ended = threading.Event()
        environment, self._store = _environment(world_size)
        self._reader, writer = _context().Pipe(duplex=False)
        self._processes = [
            _context().Process(
                target=_work, args=(writer, environment | _rank_variables(rank, world_size), target, args), daemon=True
            )
            for rank in range(world_size or 1)
        ]
        for process in self._processes:
            process.start()
        writer.close()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()
        threading.Thread(target=self._wait, daemon=True).start()

    @property
    def pids(self) -> list[int]:
        """By rank."""
        return [process.pid or 0 for process in self._processes]

    @property
    def printed(self) -> str:
        """What all of them have written to stdout and stderr so far."""
        return self._printed.decode(errors="replace")

    @property
    def returncode(self) -> int | None:
        """None while one is alive; then 0, or the exit code of the one that failed first."""
        return self._first_failure if self._ended.is_set() else None

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float) -> str:
        """Returns what they printed.

        Raises:
            subprocess.TimeoutExpired: They did not end in time, and are killed.
        """
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired("forked workers", timeout, output=self.kill())
        return self.printed

    def kill(self) -> str:
        """End them all without a warning; returns what they printed."""
        self._signal(signal.SIGKILL)
        self._ended.wait()
        return self.printed

    def _signal(self, number: signal.Signals) -> None:
        for rank, pid in enumerate(self.pids):
            if rank not in self.exit_codes:
                for send in (os.kill, os.killpg):  # it may not lead its group yet
                    with suppress(ProcessLookupError):
                        send(pid, number)

    def _read(self) -> None:
        while content := os.read(self._reader.fileno(), 65536):
            self._printed += content

    def _wait(self) -> None:
        alive = {process.sentinel: rank for rank, process in enumerate(self._processes)}
        kill_at = float("inf")
        while alive:
            timeout = None if kill_at == float("inf") else max(0.0, kill_at - time.monotonic())
            ended = connection.wait(list(alive), timeout)
            for sentinel in ended:
                rank = alive.pop(sentinel)  # type: ignore[arg-type]
                self._processes[rank].join()
                self.exit_codes[rank] = self._processes[rank].exitcode or 0
                self._first_failure = self._first_failure or self.exit_codes[rank]
            if self._first_failure and kill_at == float("inf"):
                kill_at = time.monotonic() + TERMINATE_SECONDS
                self._signal(signal.SIGTERM)
            elif not ended:
                self._signal(signal.SIGKILL)
                kill_at = time.monotonic() + TERMINATE_SECONDS
        self._reading.join()
        self._reader.close()
        self._store = None
        self._ended.set()


def _environment(world_size: int | None) -> tuple[dict[str, str], Any]:
    """What every worker sees, as torchrun sets it, and the store that they meet at."""
    environment = {**os.environ, **_LIBRARIES_READ_AT_IMPORT}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    if world_size is None:
        return environment, None
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
    environment |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "none",
    }
    return environment, store


def _rank_variables(rank: int, world_size: int | None) -> dict[str, str]:
    if world_size is None:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }


def _work(
    output: "connection.Connection", environment: dict[str, str], target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    """In the worker."""
    assert "tests.preloaded" in sys.modules, "the fork server could not import tests.preloaded"
    os.setsid()
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    target(*args)


# -- what workers do -------------------------------------------------------------------------------------------------


def run_module(module: str, *arguments: str) -> None:
    """As ``python -m module arguments``."""
    sys.argv = [module, *arguments]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'.*' found in sys.modules")
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_cases(run_case: Callable[[Any, int], Any], cases: dict[str, Any], world_size: int) -> dict[str, Any]:
    """The first worker's results of `run_case(case, world_size)`, as JSON keeps them, by the name of the case.

    All workers of one process group run all cases, one after the other. Each worker computes in one thread.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.json")
        workers = Workers(_run_cases, run_case, cases, results, world_size=world_size)
        printed = workers.wait(timeout=900)
        assert workers.returncode == 0, printed[-8000:]
        found: dict[str, Any] = json.loads(results.read_text())
        return found


def _run_cases(run_case: Callable[[Any, int], Any], cases: dict[str, Any], file: Path) -> None:
    import torch

    from ft_service.train.parallel import end_process, init_process_group

    torch.set_num_threads(1)
    init_process_group(use_gpu=False)
    results = {}
    for name, case in cases.items():
        began = time.monotonic()
        results[name] = run_case(case, torch.distributed.get_world_size())
        gc.collect()
        print(f"case {name}: {time.monotonic() - began:.1f} s")
    if torch.distributed.get_rank() == 0:
        file.write_text(json.dumps(results))
    end_process()
