"""Work that takes long, beside the controller's steps."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

T = TypeVar("T")


class Work(Protocol):
    """Starts a piece of work once, and gives its outcome to a later step."""

    def poll(self, name: str, work: Callable[[], T]) -> Future[T] | None:
        """The finished work of that name, which is then forgotten; None while it runs."""
        ...


class Threads:
    """Work in threads of this process. What a killed process has not finished starts again."""

    def __init__(self, threads: int = 4) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fine-tuning")
        self._running: dict[str, Future[object]] = {}

    def poll(self, name: str, work: Callable[[], T]) -> Future[T] | None:
        future = self._running.get(name)
        if future is None:
            self._running[name] = self._pool.submit(work)
            return None
        if not future.done():
            return None
        del self._running[name]
        return future  # type: ignore[return-value]  # a name always stands for the same kind of work

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
