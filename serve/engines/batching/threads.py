"""How many threads an operation of the model takes on a CPU: small ones take one.

A parallel operation waits for the slowest of its threads, which takes longer than a small operation itself. torch has
one number of threads for all operations of a thread; changing it twice costs about half a microsecond.

The threads are OpenMP's, and each Python thread with parallel operations keeps a team of its own. Between two
operations a team spins, so that the next one begins at once, but only while the process has no more such threads than
CPUs. Otherwise (libgomp's throttled spin count) they sleep, and waking them takes more than a small model gains by a
second thread (docs/benchmarks.md). So the model's thread alone has a team: loading a model happens in a thread that
ends, and the threads that load adapters take one each.
"""

from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import torch

_WORTH_THREADS = 250_000
"""Multiplications of a matrix product. One thread takes about 10 microseconds for so many."""


def use_threads(count: int) -> None:
    """Operations of the calling thread take so many from now on."""
    torch.get_num_threads()  # a thread's first question takes over what any thread has set last
    torch.set_num_threads(count)


def threads_for(multiplications: int, device: torch.device) -> AbstractContextManager[None]:
    """Products of about so many multiplications within it take one thread, or all that this thread has."""
    return _OneThread() if device.type == "cpu" and multiplications < _WORTH_THREADS else nullcontext()


class _OneThread:
    def __enter__(self) -> None:
        self._all = torch.get_num_threads()
        if self._all > 1:
            torch.set_num_threads(1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._all > 1:
            torch.set_num_threads(self._all)
