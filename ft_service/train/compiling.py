"""Compiling DeepSpeed's operators once per node: under a lock that a dead process cannot leave behind, and no longer
than the process lives that asked for it.

torch uses the existence of a file as its lock. If a process dies while it compiles, the file stays, and every later
process of that user waits forever without a message. Here the file is locked with `flock`: the operating system
releases that lock when the process ends.

A worker may be killed while it compiles. So the kernel sends ninja a SIGTERM when the worker ends, and ninja ends its
compilers.
"""

import fcntl
import os
import subprocess
from pathlib import Path

import ninja
import torch.utils.cpp_extension

from ft_service.cluster.processes import end_with_parent


class FlockBaton:
    """A replacement for torch's `FileBaton`: one process builds, the others wait. It locks the same file with `flock`.

    Like torch's, it removes the file on release: programs that use torch's own class wait for that.
    """

    def __init__(self, lock_file_path: str, **_: object) -> None:
        self.lock_file_path = lock_file_path
        self._fd: int | None = None

    def try_acquire(self) -> bool:
        """Take the lock; False if another living process holds it."""
        while True:
            fd = os.open(self.lock_file_path, os.O_CREAT | os.O_RDWR, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                return False
            if _is_same_file(fd, self.lock_file_path):
                self._fd = fd
                return True
            os.close(fd)  # the previous holder removed the file after we opened it

    def wait(self) -> None:
        """Wait until no living process holds the lock."""
        try:
            fd = os.open(self.lock_file_path, os.O_RDWR)
        except FileNotFoundError:
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
        finally:
            os.close(fd)

    def release(self) -> None:
        """Remove the file and release the lock."""
        if self._fd is not None:
            os.remove(self.lock_file_path)
            os.close(self._fd)
            self._fd = None


def compile_under_flock() -> None:
    """Make torch compile extensions under a `FlockBaton`, from now on, in this process."""
    setattr(torch.utils.cpp_extension, "FileBaton", FlockBaton)  # noqa: B010 - to mypy, the name is a type's


def end_compilers_with_process() -> None:
    """Make torch's compilers end when this process does, from now on, however it ends. Each build is announced."""
    torch.utils.cpp_extension._run_ninja_build = _run_ninja


def _run_ninja(build_directory: str, verbose: bool, error_prefix: str) -> None:
    """A replacement for torch's function of the same parameters."""
    num_jobs = torch.utils.cpp_extension._get_num_workers(verbose)
    command = ["ninja", "-v", *([] if num_jobs is None else ["-j", str(num_jobs)])]
    dry_run = subprocess.run(["ninja", "-n"], cwd=build_directory, capture_output=True, text=True)
    if "no work to do" not in dry_run.stdout:
        operator = Path(build_directory).name
        print(f"Compiling {operator}, once on this machine; this takes a minute or more.", flush=True)
    built = subprocess.run(
        command,
        cwd=build_directory,
        stdout=None if verbose else subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=end_with_parent(),
    )
    if built.returncode != 0:
        raise RuntimeError(f"{error_prefix}: {built.stdout}")


def compile_with_installed_ninja() -> None:
    """Make torch compile with this environment's ninja, from now on, in this process and those that it starts.

    Trap: torch runs the first `ninja` on PATH. Another version, say the system's if the environment is not activated,
    takes the build of this one for outdated, and the other way round: each start would compile for minutes.
    """
    folders = [folder for folder in os.environ.get("PATH", "").split(os.pathsep) if folder != ninja.BIN_DIR]
    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, *folders])


def _is_same_file(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
