"""A lease: a driver's claim on a run, which it renews every few seconds. One driver works on a run at a time.

The lease is a file that the driver rewrites. An object store writes it only if nobody else has since it was read, so
of two drivers that start at the same moment one fails at once, however slow the store is. A file system has no such
condition: there each driver reads the file back after a moment to see which of them wrote last. A driver that lost its
connection sees afterwards that another one has taken over.
"""

import math
import os
import secrets
import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from ft_service.errors import StorageError, UsageError
from ft_service.runs.folder import LEASE_SECONDS, LeaseHolder, RunFolder
from ft_service.runs.progress import Log
from ft_service.storage.object_store import Version

RENEW_SECONDS = 10.0
_POLL_SECONDS = 1.0
_SETTLE_SECONDS = 0.5
"""Of two drivers that start at once, the one that wrote first sees within this time that the other wrote last."""
_SURELY_EXPIRED = 10
"""Times `LEASE_SECONDS`. Clocks of machines may differ by minutes, so a younger lease is watched by our own clock."""


class Lease:
    """A driver's lease on a run, held while the block lasts.

    Entering raises `UsageError` when another driver is alive. It can take `LEASE_SECONDS` to find out. With `confirms`
    False the block itself calls `confirm`, before it changes anything.
    """

    def __init__(self, run: RunFolder, log: Log, *, confirms: bool = True) -> None:
        self._run = run
        self._confirms = confirms
        self._settled_at = math.inf
        self._log = log
        self.token = secrets.token_hex(8)
        self.renewed_at = 0.0
        """When it was written last, in seconds since the epoch; 0 before it is entered."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        version = self._wait_for_previous_driver()
        while not self._write(self._run, version):
            holder, version = self._run.lease()
            if holder is not None:  # otherwise the previous driver has given its lease back meanwhile
                raise self._simultaneous_error()
        self._settled_at = time.monotonic() + _SETTLE_SECONDS
        if self._confirms:
            self.confirm()
        self._thread.start()
        return self

    def confirm(self) -> None:
        """Raise `UsageError` if another driver started at the same moment and wrote last. Waits until that is known."""
        time.sleep(max(0.0, self._settled_at - time.monotonic()))
        if not holds_lease(self._run, self.token):
            raise self._simultaneous_error()

    def is_held(self) -> bool:
        """Whether no other driver has taken over; True as well when storage does not answer."""
        try:
            holder = self._run.lease_holder()
        except StorageError:
            return True
        return holder is None or holder.token == self.token

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        try:
            if holds_lease(self._run, self.token):
                self._run.delete_lease()
        except StorageError:
            pass  # it expires

    def _wait_for_previous_driver(self) -> Version | None:
        """The version of the lease that may be replaced."""
        first, version = self._run.lease()
        if first is None or not may_be_alive(first):
            return version
        who = f"driver {first.pid} on {first.host}"
        self._log(f"Run {self._run.run_id} belongs to {who}. Waiting to see whether that driver is alive.")
        deadline = time.monotonic() + LEASE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
            now, version = self._run.lease()
            if now is None or _has_ended(now):
                return version
            if now != first:
                raise UsageError(
                    f"--run-id = {self._run.run_id!r}: {who} is working on it. Stop that run first (ft stop "
                    f"{self._run.run_id}), or use another --run-id."
                )
        return version

    def _renew(self) -> None:
        # Without retries: a write that waits for storage could overwrite the lease of a driver that has taken over.
        run = RunFolder(self._run.storage.without_retries(), self._run.run_id)
        while not self._ended.wait(RENEW_SECONDS):
            try:
                holder, version = run.lease()
                if holder is None or holder.token != self.token:
                    return
                self._write(run, version)
            except StorageError:
                continue  # renewed when storage is back

    def _write(self, run: RunFolder, version: Version | None) -> bool:
        holder = LeaseHolder(
            token=self.token, host=socket.gethostname(), machine=machine_name(), pid=os.getpid(), time=datetime.now(UTC)
        )
        is_written = run.write_lease(holder, version)
        if is_written:
            self.renewed_at = holder.time.timestamp()
        return is_written

    def _simultaneous_error(self) -> UsageError:
        return UsageError(f"--run-id = {self._run.run_id!r}: another driver started this run at the same moment.")


def holds_lease(run: RunFolder, token: str) -> bool:
    """Whether the driver with that token holds the lease."""
    holder = run.lease_holder()
    return holder is not None and holder.token == token


def may_be_alive(holder: LeaseHolder | None) -> bool:
    """Whether the holder of a lease may be at work. Errs on the side of yes, as clocks of machines may differ."""
    return holder is not None and not holder.is_expired(_SURELY_EXPIRED * LEASE_SECONDS) and not _has_ended(holder)


def _has_ended(holder: LeaseHolder) -> bool:
    """Whether the holder is a process of this machine that has ended."""
    if holder.machine != machine_name():
        return False
    if holder.pid == os.getpid():  # a restarted container gives its first process the same id
        return True
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def machine_name() -> str:
    """Boot id and process namespace: containers may share a host name, but not their process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()
