"""Compiling DeepSpeed's operators once per node, under a lock that a dead process cannot leave behind.

torch uses the existence of a file as its lock. If a process dies while it compiles, the file stays, and every later
process of that user waits forever without a message. Here the file is locked with `flock`: the operating system
releases that lock when the process ends.
"""

import fcntl
import os

import ninja
import torch.utils.cpp_extension


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
