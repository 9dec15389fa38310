"""Waiting for the background threads of all ranks."""

import threading
import time
from collections.abc import Callable

from ft_service.storage.retry import RUN_RETRY_SECONDS
from ft_service.train.parallel import Parallel

PART_TIMEOUT_SECONDS = 1800.0
"""How long rank 0 waits for the parts of the other ranks."""
_STUCK_SECONDS = RUN_RETRY_SECONDS + PART_TIMEOUT_SECONDS
"""A thread that waits for storage, or for another rank's part, makes progress within this time or fails."""
_POLL_SECONDS = 0.2


def wait_for_threads(
    parallel: Parallel,
    thread: threading.Thread,
    progress: Callable[[], int],
    on_poll: Callable[[], None] = lambda: None,
) -> None:
    """Wait until `thread` has ended on every rank. Every rank must call it. Arguments as of `wait_on_all_ranks`."""

    def wait(seconds: float) -> bool:
        thread.join(seconds)
        return not thread.is_alive()

    wait_on_all_ranks(parallel, wait, progress, on_poll)


def wait_on_all_ranks(
    parallel: Parallel,
    wait: Callable[[float], bool],
    progress: Callable[[], int],
    on_poll: Callable[[], None] = lambda: None,
) -> None:
    """Wait until every rank is done. Every rank must call it.

    `wait` waits for at most so many seconds and returns whether this rank is done. `progress` counts what its thread
    has done so far; `on_poll` is called at every poll. The watchdog gets a beat as long as any rank makes progress: a
    storage that is slow or briefly unreachable is no hang, one that never answers is.
    """
    running = 1.0
    last_total = -1.0
    last_progress = time.monotonic()
    while running:
        is_done = wait(_POLL_SECONDS)
        running, total = parallel.sum_over_ranks(float(not is_done), float(progress()))
        on_poll()
        now = time.monotonic()
        if total != last_total:
            last_total = total
            last_progress = now
        if now - last_progress < _STUCK_SECONDS:
            parallel.on_progress()
