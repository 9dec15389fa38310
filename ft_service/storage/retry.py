"""Retrying a storage that does not answer: how long to wait, and one notice for all threads.

Errors that waiting cannot fix (`ft_service.storage.failures`) are raised at once.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from ft_service.errors import UnreachableError

RUN_RETRY_SECONDS = 300.0
"""For a run's driver and workers: a storage that is away for a few minutes does not end a run."""

_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 15.0

T = TypeVar("T")


class Retries:
    """Retries calls to one storage, from all threads of the process."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._notices = _WaitNotices()
        self._thread = threading.local()

    def call(self, function: Callable[[], T], seconds: float, clock: Callable[[], float] | None = None) -> T:
        """Call `function`, again while it raises `UnreachableError`, until `seconds` after its first failure.

        A call within another one, in the same thread, is not retried, because the outer one is.
        """
        if seconds <= 0 or getattr(self._thread, "is_retrying", False):
            return function()
        with self._retrying():
            return self._call(function, seconds, clock or time.monotonic)

    def _call(self, function: Callable[[], T], seconds: float, clock: Callable[[], float]) -> T:
        failed_at: float | None = None
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                result = function()
            except UnreachableError as error:
                now = clock()
                if failed_at is None:
                    failed_at = now
                    self._notices.begin(f"{error} Retrying for up to {seconds:.0f} s.")
                remaining = failed_at + seconds - now
                if remaining <= 0:
                    self._notices.end("")
                    raise UnreachableError(f"{error} Gave up after {now - failed_at:.0f} s.") from None
                time.sleep(min(pause, remaining))
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            except BaseException:
                if failed_at is not None:
                    self._notices.end("")
                raise
            else:
                if failed_at is not None:
                    self._notices.end(f"{self._name}: answers again after {clock() - failed_at:.0f} s.")
                return result

    @contextmanager
    def _retrying(self) -> Iterator[None]:
        self._thread.is_retrying = True
        try:
            yield
        finally:
            self._thread.is_retrying = False


class _WaitNotices:
    """Prints when the first thread of the process begins to wait, and when the last one has an answer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_waiting = 0

    def begin(self, message: str) -> None:
        with self._lock:
            self._num_waiting += 1
            if self._num_waiting == 1:
                print(message, file=sys.stderr, flush=True)

    def end(self, message: str) -> None:
        with self._lock:
            self._num_waiting -= 1
            if message and self._num_waiting == 0:
                print(message, file=sys.stderr, flush=True)
