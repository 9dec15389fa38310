"""A driver's claim on a run: one works on it at a time, and says every few seconds that it still does.

Storage has no locks that all of its kinds share, so this is a file that is rewritten. Two drivers that begin within the
same moment are told apart by reading it back; one that was cut off finds, once it is back, that another has taken over.
"""

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from ft_service.errors import StorageError, UsageError
from ft_service.runs.folder import LEASE_SECONDS, Holder, RunFolder

BEAT_SECONDS = 10.0
_POLL_SECONDS = 1.0
_SETTLE_SECONDS = 0.5
"""Of two drivers that begin at once, the one that wrote first finds within this time that it is not the last."""
_LONG_SILENT = 10
"""Times `LEASE_SECONDS`. Clocks differ by seconds or minutes, so a shorter silence is watched for by one's own."""


class Lease:
    """Held while the block lasts.

    Entering raises `UsageError` when another driver is alive; whether it is, can take `LEASE_SECONDS` to find out.
    """

    def __init__(self, run: RunFolder, say: Callable[[str], None]) -> None:
        self._run, self._say = run, say
        self.token = secrets.token_hex(8)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        self._wait_for_the_one_before()
        self._write(self._run)
        time.sleep(_SETTLE_SECONDS)
        if not holds(self._run, self.token):
            raise UsageError(f"--run-id = {self._run.run_id!r}: another driver began with it at this moment.")
        self._thread.start()
        return self

    def is_held(self) -> bool:
        """Whether no other driver has taken over, as far as can be known."""
        try:
            holder = self._run.holder()
        except StorageError:
            return True
        return holder is None or holder.token == self.token

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        try:
            if holds(self._run, self.token):
                self._run.storage.delete(f"{self._run.path}/lease.json")
        except StorageError:
            pass  # it will run out

    def _wait_for_the_one_before(self) -> None:
        first = self._run.holder()
        if first is None or first.is_silent(_LONG_SILENT * LEASE_SECONDS) or _has_ended(first):
            return
        who = f"driver {first.pid} on {first.host}"
        self._say(f"Run {self._run.run_id} belongs to {who}; waiting to see whether it lives.")
        deadline = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            now = self._run.holder()
            if now is None or _has_ended(now):
                return
            if now != first:
                raise UsageError(
                    f"--run-id = {self._run.run_id!r}: {who} is at work on it. Stop that one first (ft stop "
                    f"{self._run.run_id}), or give another --run-id."
                )

    def _beat(self) -> None:
        # Without patience: a write that waits for the storage would take the run back from who took it over meanwhile.
        run = RunFolder(self._run.storage.without_patience(), self._run.run_id)
        while not self._ended.wait(BEAT_SECONDS):
            try:
                if not holds(run, self.token):
                    return
                self._write(run)
            except StorageError:
                continue  # heard of again when storage is back

    def _write(self, run: RunFolder) -> None:
        holder = Holder(
            token=self.token, host=socket.gethostname(), machine=_machine(), pid=os.getpid(), time=datetime.now(UTC)
        )
        run.storage.write_json(f"{run.path}/lease.json", holder.model_dump(mode="json"))


def holds(run: RunFolder, token: str) -> bool:
    """Whether the driver of that token still has the run."""
    holder = run.holder()
    return holder is not None and holder.token == token


def _has_ended(holder: Holder) -> bool:
    """Whether it is known that its process has ended, being one of this machine."""
    if holder.machine != _machine():
        return False
    if holder.pid == os.getpid():  # a container that was started again gives its first process the same number
        return True
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _machine() -> str:
    """The boot and the process namespace: hosts and containers may share a name, and process ids mean nothing then."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()
