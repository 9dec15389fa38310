"""Watchdog: a worker that hangs saves its stacks and ends itself, so that the run can start again.

    runs/<run id>/stacks/<attempt>/rank-00001.txt   what a worker was doing, and the Python stacks of its threads

A worker that waits for another one in a collective waits forever; only the end of the process gets it out. So each
worker watches itself: its work calls `beat` whenever it makes progress, and a thread counts the seconds without a beat.
After too many, the worker saves its stacks and exits. The driver then ends the other workers and starts all of them
again. A process that is itself stopped cannot save anything: when workers hang together, suspect those without a file.
"""

import faulthandler
import os
import sys
import threading
import time
import traceback
from datetime import UTC, datetime
from typing import NoReturn

from ft_service.runs.events import EventLog, Hang
from ft_service.runs.folder import RunFolder

HANG_EXIT_CODE = 75
"""Exit code of a worker that ended itself (EX_TEMPFAIL: try again)."""
SAVE_STACKS_SECONDS = 30.0
"""Most time a worker spends to save its stacks and to wait for those of the others, before it exits."""
_TICK_SECONDS = 1.0
_BACKSTOP_TIMEOUTS = 3
"""After this many timeouts without a tick of the watching thread, C code ends the process."""
_STDERR = 2


def new_attempt() -> str:
    """A name for the attempt that begins now. Later names sort after earlier ones."""
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S")


def stacks_folder(run: RunFolder, attempt: str) -> str:
    return f"{run.path}/stacks/{attempt}"


def ranks_without_stacks(run: RunFolder, attempt: str, world_size: int) -> list[int]:
    """Ranks that saved no stacks while others did; empty if the attempt did not hang, or every rank saved them."""
    missing = [rank for rank in range(world_size) if not run.storage.exists(_file(run, attempt, rank))]
    return missing if len(missing) < world_size else []


class Watchdog:
    """Ends this process, with `HANG_EXIT_CODE`, after `timeout_seconds` without a `beat`.

    Time in which the process does not run (stopped, or suspended with its machine) does not count: a gap between two
    ticks of the watching thread counts at most twice its normal length. When native code holds the GIL, so that the
    watching thread cannot run, the process ends after `_BACKSTOP_TIMEOUTS` timeouts.
    """

    def __init__(self, run: RunFolder, attempt: str, rank: int, world_size: int, timeout_seconds: float) -> None:
        self._run = run
        self._attempt = attempt
        self._rank = rank
        self._world_size = world_size
        self._timeout = timeout_seconds
        self._tick = min(_TICK_SECONDS, timeout_seconds / 10)
        self._beats = 0
        self._doing = "setting up"
        self._step = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def beat(self, doing: str = "", step: int | None = None) -> None:
        """Report progress. `doing` names what comes next, and `step` the step it is in; both stay until changed."""
        self._beats += 1
        if doing:
            self._doing = doing
        if step is not None:
            self._step = step

    def stop(self) -> None:
        """Stop watching: the work is done."""
        self._stopped.set()
        self._thread.join()

    # -- the watching thread ---------------------------------------------------------------------------------------

    def _watch(self) -> None:
        counter = SecondsWithoutBeat(self._tick)
        while counter.update(time.monotonic(), self._beats) < self._timeout:
            # To stderr, which is a file under Ray: writing there is quick and does not need the interpreter.
            faulthandler.dump_traceback_later(_BACKSTOP_TIMEOUTS * self._timeout, exit=True, file=_STDERR)
            if self._stopped.wait(self._tick):
                faulthandler.cancel_dump_traceback_later()
                return
        self._end()

    def _end(self) -> NoReturn:
        # Storage may be what hangs, and even stderr: another thread writes, and this one waits a limited time.
        saving = threading.Thread(target=self._save_stacks, name="save stacks", daemon=True)
        saving.start()
        saving.join(min(SAVE_STACKS_SECONDS, self._timeout))
        os._exit(HANG_EXIT_CODE)

    def _save_stacks(self) -> None:
        storage = self._run.storage
        where = f"in step {self._step}, {self._doing}" if self._step else self._doing
        hang = f"Worker {self._rank} of {self._world_size} made no progress for {self._timeout:g} seconds ({where})."
        report = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC. {hang}\n\n{stacks()}"
        print(report, file=sys.stderr, flush=True)
        missing = self._without_file(range(self._world_size))
        is_first_to_notice = len(missing) == self._world_size
        storage.write_bytes(_file(self._run, self._attempt, self._rank), report.encode())
        if is_first_to_notice:
            folder = stacks_folder(self._run, self._attempt)
            message = f"{hang} Stacks of the workers: {storage.uri(folder)}. Suspect the workers without a file there."
            event = Hang(message=message, rank=self._rank, step=self._step, doing=self._doing, stacks=folder)
            EventLog(storage, self._run.run_id).emit(event)
        # When this worker exits, all are ended: wait for those that notice a little later.
        while missing := self._without_file(missing):
            time.sleep(self._tick)

    def _without_file(self, ranks: "range | list[int]") -> list[int]:
        return [rank for rank in ranks if not self._run.storage.exists(_file(self._run, self._attempt, rank))]


class SecondsWithoutBeat:
    """Counts seconds without a beat, updated once a tick. A gap in which the process did not run counts two ticks."""

    def __init__(self, tick_seconds: float) -> None:
        self._longest_gap = 2 * tick_seconds
        self._seconds = 0.0
        self._beats = -1
        self._updated_at = 0.0

    def update(self, now: float, beats: int) -> float:
        """Returns the seconds without a beat at the time `now`; `beats` is the number of beats so far."""
        self._seconds = self._seconds + min(now - self._updated_at, self._longest_gap) if beats == self._beats else 0.0
        self._updated_at = now
        self._beats = beats
        return self._seconds


def stacks() -> str:
    """The Python stacks of all threads of this process except the watchdog's."""
    threads = {thread.ident: thread for thread in threading.enumerate()}
    texts = []
    for ident, frame in sys._current_frames().items():
        name = threads[ident].name if ident in threads else str(ident)
        if name not in ("watchdog", "save stacks"):
            texts.append(f"Thread {name}:\n{''.join(traceback.format_stack(frame))}")
    return "\n".join(texts)


def _file(run: RunFolder, attempt: str, rank: int) -> str:
    return f"{stacks_folder(run, attempt)}/rank-{rank:05}.txt"
