"""Compiling DeepSpeed's operators, once on each node: a worker that dies of it leaves nothing for the next to wait on.

torch compiles an operator under a lock that is a file's existence. Whoever dies while it compiles leaves the file, and
every later process of that user waits for it without end and without a word. Here the file only carries a lock of the
kernel's, which goes with the process that held it.
"""

import fcntl
import os

import torch.utils.cpp_extension


class KernelBaton:
    """torch's `FileBaton` (one process builds, the others wait for it), held by `flock` on the same file.

    As with torch's, whoever holds it removes the file in the end: a program without this class waits for that.
    """

    def __init__(self, lock_file_path: str, **_: object) -> None:
        self.lock_file_path = lock_file_path
        self._fd: int | None = None

    def try_acquire(self) -> bool:
        """Become the one that builds, unless a living process is."""
        while True:
            fd = os.open(self.lock_file_path, os.O_CREAT | os.O_RDWR, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                return False
            if _is_still(fd, self.lock_file_path):
                self._fd = fd
                return True
            os.close(fd)  # its holder removed it between opening and locking

    def wait(self) -> None:
        """Return when nobody builds any more, also where the one that did has died."""
        try:
            fd = os.open(self.lock_file_path, os.O_RDWR)
        except FileNotFoundError:
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
        finally:
            os.close(fd)

    def release(self) -> None:
        """Remove the file and let those that wait go on."""
        if self._fd is not None:
            os.remove(self.lock_file_path)
            os.close(self._fd)
            self._fd = None


def lock_builds_by_kernel() -> None:
    """From now on, torch in this process compiles extensions under a `KernelBaton`."""
    setattr(torch.utils.cpp_extension, "FileBaton", KernelBaton)  # noqa: B010 - to mypy, the name is a type's


def _is_still(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
