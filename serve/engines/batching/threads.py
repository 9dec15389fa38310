"""How many threads an operation of the model takes: small ones take one.

A parallel operation waits for the slowest of its threads, which takes longer than a small operation itself. torch has
one number of threads for all operations of a thread; changing it twice costs about half a microsecond.
"""

from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

import torch

_WORTH_THREADS = 4_000_000
"""Multiplications of a matrix product. One thread takes about 0.1 ms for so many."""


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
