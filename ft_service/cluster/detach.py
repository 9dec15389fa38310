"""A driver that outlives `ray job stop` for as long as its last checkpoint takes.

Trap: `ray job stop` sends SIGTERM to the job's process and its descendants, and SIGKILL three seconds later; a job
cannot change that by itself, since the wait is read from the environment of Ray's supervisor. So the process that Ray
knows stays behind as a shell, which passes on signals and the exit code; the driver is no descendant of it (its parent
has ended), and goes on in a session of its own. When the shell is killed, the driver takes that as a signal to stop.

Call `detach` before anything starts a thread: it forks.
"""

import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType

_FORWARDED = b"s"
"""The shell writes it for each signal that it passes on: Ray's SIGKILL of the shell must not count as a second one."""


def detach() -> "ExitCode":
    """Returns in the driver; the process that called it ends with the exit code that the driver tells.

    Raises nothing: the shell ends with 1 if the driver dies without a word.
    """
    told, tell = os.pipe()
    alive, hold = os.pipe()
    child = os.fork()
    if child:
        os.close(tell)
        os.close(alive)
        os.waitpid(child, 0)
        _be_the_shell(told, hold)
    os.setsid()
    if os.fork():
        os._exit(0)
    os.close(told)
    os.close(hold)
    os.write(tell, f"{os.getpid()}\n".encode())
    threading.Thread(target=_stop_when_the_shell_is_gone, args=(alive,), name="shell", daemon=True).start()
    return ExitCode(tell)


class ExitCode:
    """Tells the shell the exit code of the block; a `SystemExit` carries it."""

    def __init__(self, tell: int) -> None:
        self._tell = tell

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        code = 0
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        elif error is not None:
            code = 1
        sys.stdout.flush()
        with suppress(BrokenPipeError):  # the shell was killed; nobody asks any more
            os.write(self._tell, f"{code}\n".encode())


def _be_the_shell(told: int, hold: int) -> None:
    with os.fdopen(told) as driver:
        pid = int(driver.readline())

        def forward(number: int, frame: FrameType | None) -> None:
            os.write(hold, _FORWARDED)
            with suppress(ProcessLookupError):
                os.kill(pid, number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, forward)
        line = driver.readline()  # a signal interrupts it, and Python takes it up again
    if not line:
        print("error: the driver was killed.", file=sys.stderr, flush=True)
    os._exit(int(line) if line else 1)


def _stop_when_the_shell_is_gone(alive: int) -> None:
    forwarded = False
    while received := os.read(alive, 1):
        forwarded = forwarded or received == _FORWARDED
    if not forwarded:
        os.kill(os.getpid(), signal.SIGTERM)
