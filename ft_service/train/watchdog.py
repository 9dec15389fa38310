"""A worker that stands still says what it was doing, and ends itself, so that its run can be started again.

    runs/<run id>/stacks/<attempt>/rank-00001.txt   what a worker was doing, and the Python stacks of its threads

A worker that waits for another in a collective waits for ever, and nothing but its end can get it out. So each worker
watches itself: its work calls `beat` whenever it got on, and a thread counts the seconds without. When they are too
many, the worker saves its stacks and ends. Whoever started the workers then ends the others and starts all again. A
worker that is stopped itself can save nothing: among workers that hang together, the ones without a file are suspect.
"""

import faulthandler
import os
import sys
import threading
import time
import traceback
from datetime import UTC, datetime
from typing import NoReturn

from ft_service.runs.folder import RunFolder
from ft_service.runs.metrics import EventLog

HANG_EXIT_CODE = 75
"""Of a worker that ended itself (EX_TEMPFAIL: try again)."""
LAST_WORDS_SECONDS = 30.0
"""Most that a worker takes to save its stacks and to see those of the others saved, before it ends."""
_TICK_SECONDS = 1.0
_BACKSTOP = 3
"""After so many timeouts without a tick of the thread the process is ended from C."""
_STDERR = 2


def new_attempt() -> str:
    """A name for the attempt that begins now; later ones sort behind earlier ones."""
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S")


def stacks_folder(run: RunFolder, attempt: str) -> str:
    return f"{run.path}/stacks/{attempt}"


def suspects(run: RunFolder, attempt: str, world_size: int) -> list[int]:
    """Ranks that saved no stacks while others did; empty if the attempt did not hang, or all of them noticed."""
    silent = [rank for rank in range(world_size) if not run.storage.exists(_file(run, attempt, rank))]
    return silent if len(silent) < world_size else []


class Watchdog:
    """Ends this process, with `HANG_EXIT_CODE`, when no `beat` came for `timeout_seconds`.

    Time in which the process did not run (stopped, suspended with its machine) does not count: what is seen of a gap
    between two ticks of the watching thread is at most twice what it should have been. When foreign code keeps the
    thread itself from running, by never giving up the interpreter, the process is ended after `_BACKSTOP` timeouts.
    """

    def __init__(self, run: RunFolder, attempt: str, rank: int, world_size: int, timeout_seconds: float) -> None:
        self._run, self._attempt, self._rank, self._world_size = run, attempt, rank, world_size
        self._timeout = timeout_seconds
        self._tick = min(_TICK_SECONDS, timeout_seconds / 10)
        self._beats, self._doing, self._step = 0, "setting up", 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def beat(self, doing: str = "", step: int | None = None) -> None:
        """The work got on. `doing` says what comes next, and `step` in which step; without them, more of the same."""
        self._beats += 1
        if doing:
            self._doing = doing
        if step is not None:
            self._step = step

    def stop(self) -> None:
        """The work is done."""
        self._stopped.set()
        self._thread.join()

    # -- the watching thread ---------------------------------------------------------------------------------------

    def _watch(self) -> None:
        silence = Silence(self._tick)
        while silence.at(time.monotonic(), self._beats) < self._timeout:
            # To stderr, which under Ray is a file: nothing that is slow, and nothing that needs the interpreter.
            faulthandler.dump_traceback_later(_BACKSTOP * self._timeout, exit=True, file=_STDERR)
            if self._stopped.wait(self._tick):
                faulthandler.cancel_dump_traceback_later()
                return
        self._end()

    def _end(self) -> NoReturn:
        # Storage may be what hangs, and even stderr: another thread speaks, and this one does not wait for ever.
        speaking = threading.Thread(target=self._speak, name="last words", daemon=True)
        speaking.start()
        speaking.join(min(LAST_WORDS_SECONDS, self._timeout))
        os._exit(HANG_EXIT_CODE)

    def _speak(self) -> None:
        storage = self._run.storage
        at = f"in step {self._step}, {self._doing}" if self._step else self._doing
        what = f"Worker {self._rank} of {self._world_size} has not got on for {self._timeout:g} seconds ({at})."
        report = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC. {what}\n\n{stacks()}"
        print(report, file=sys.stderr, flush=True)
        missing = self._without_file(range(self._world_size))
        is_first_to_notice = len(missing) == self._world_size
        storage.write_bytes(_file(self._run, self._attempt, self._rank), report.encode())
        if is_first_to_notice:
            folder = stacks_folder(self._run, self._attempt)
            message = f"{what} Stacks of the workers: {storage.uri(folder)}; those without a file are stuck themselves."
            EventLog(storage, self._run.run_id).emit(
                "hang", message, rank=self._rank, step=self._step, doing=self._doing, stacks=folder
            )
        # The end of this worker is the end of all: let those that noticed a little later speak as well.
        while missing := self._without_file(missing):
            time.sleep(self._tick)

    def _without_file(self, ranks: "range | list[int]") -> list[int]:
        return [rank for rank in ranks if not self._run.storage.exists(_file(self._run, self._attempt, rank))]


class Silence:
    """Seconds without a beat, asked for once a tick. Of a longer gap, in which this process stood, two ticks count."""

    def __init__(self, tick_seconds: float) -> None:
        self._longest = 2 * tick_seconds
        self._seconds = 0.0
        self._beats = -1
        self._before = 0.0

    def at(self, now: float, beats: int) -> float:
        self._seconds = self._seconds + min(now - self._before, self._longest) if beats == self._beats else 0.0
        self._before, self._beats = now, beats
        return self._seconds


def stacks() -> str:
    """The Python stacks of all threads of this process but those of the watchdog."""
    threads = {thread.ident: thread for thread in threading.enumerate()}
    texts = []
    for ident, frame in sys._current_frames().items():
        name = threads[ident].name if ident in threads else str(ident)
        if name not in ("watchdog", "last words"):
            texts.append(f"Thread {name}:\n{''.join(traceback.format_stack(frame))}")
    return "\n".join(texts)


def _file(run: RunFolder, attempt: str, rank: int) -> str:
    return f"{stacks_folder(run, attempt)}/rank-{rank:05}.txt"
