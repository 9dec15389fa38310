"""Detach the driver, so that it can save its last checkpoint after `ray job stop`.

Trap: `ray job stop` sends SIGTERM to the job's process and its descendants, and SIGKILL three seconds later. A job
cannot change that, because Ray's supervisor reads the wait from its own environment. So the process that Ray started
stays as a proxy that forwards signals and the exit code. The driver runs in its own session; it is not a descendant of
the proxy, because its parent has exited. When the proxy is killed, the driver treats that as a signal to stop.

Call `detach` before any thread starts, because it forks.
"""

import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType

_FORWARDED = b"s"
"""The proxy writes it for each forwarded signal, so that its own SIGKILL by Ray does not count as a second signal."""


def detach() -> "ExitCode":
    """Returns in the driver. The calling process stays as the proxy, and exits with the driver's exit code.

    The proxy exits with 1 if the driver dies without reporting one.
    """
    report_read, report_write = os.pipe()
    alive_read, alive_write = os.pipe()
    child = os.fork()
    if child:
        os.close(report_write)
        os.close(alive_read)
        os.waitpid(child, 0)
        _run_proxy(report_read, alive_write)
    os.setsid()
    if os.fork():
        os._exit(0)
    os.close(report_read)
    os.close(alive_write)
    os.write(report_write, f"{os.getpid()}\n".encode())
    threading.Thread(target=_stop_when_proxy_is_gone, args=(alive_read,), name="proxy", daemon=True).start()
    return ExitCode(report_write)


class ExitCode:
    """Reports the exit code of the block, taken from its `SystemExit`, to the proxy."""

    def __init__(self, report_write: int) -> None:
        self._report_write = report_write

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        code = 0
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        elif error is not None:
            code = 1
        sys.stdout.flush()
        with suppress(BrokenPipeError):  # the proxy was killed
            os.write(self._report_write, f"{code}\n".encode())


def _run_proxy(report_read: int, alive_write: int) -> None:
    with os.fdopen(report_read) as driver:
        pid = int(driver.readline())

        def forward(number: int, frame: FrameType | None) -> None:
            os.write(alive_write, _FORWARDED)
            with suppress(ProcessLookupError):
                os.kill(pid, number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, forward)
        line = driver.readline()  # after a signal, Python resumes the read
    if not line:
        print("error: the driver was killed.", file=sys.stderr, flush=True)
    os._exit(int(line) if line else 1)


def _stop_when_proxy_is_gone(alive_read: int) -> None:
    forwarded = False
    while received := os.read(alive_read, 1):
        forwarded = forwarded or received == _FORWARDED
    if not forwarded:
        os.kill(os.getpid(), signal.SIGTERM)
