"""report.html while a run is on: a thread of the driver writes it again when there is something new."""

import threading
import time
from types import TracebackType

from ft_service.errors import StorageError
from ft_service.runs.folder import REPORT_FILE
from ft_service.runs.metrics import METRICS_FILE
from ft_service.runs.progress import Log
from ft_service.storage.storage import Storage

LOCAL_SECONDS = 5.0
REMOTE_SECONDS = 30.0
_MAX_SHARE = 0.05
"""Of the time that may go into writing the page: that of a long run takes seconds."""


class LiveReport:
    """Keeps a run's report.html up to date while the block lasts, from the first step on.

    A page of an earlier attempt is replaced at once: it says how that attempt ended. A page that cannot be written is
    logged once and does not disturb the run.
    """

    def __init__(self, storage: Storage, run_id: str, log: Log, seconds: float | None = None) -> None:
        self._storage = storage.without_retries()
        self._run_id = run_id
        self._log = log
        self._seconds = seconds or (LOCAL_SECONDS if storage.is_local else REMOTE_SECONDS)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._update_often, name="report", daemon=True)
        self._has_logged = False
        self._shown: tuple[object, ...] | None = None

    def __enter__(self) -> "LiveReport":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def update(self) -> bool:
        """Write the page if there is something new to show; returns whether it did."""
        folder = f"runs/{self._run_id}"
        metrics = f"{folder}/{METRICS_FILE}"
        size = self._storage.size(metrics) if self._storage.exists(metrics) else 0
        if size == 0 and not self._storage.exists(f"{folder}/{REPORT_FILE}"):
            return False
        # Only here: it draws with matplotlib, and workers should not wait until the driver has imported that.
        from ft_service.pages.run_report import read_run, render_report

        run = read_run(self._storage, self._run_id)
        state = (size, len(run.events), run.status and run.status.state)
        if state == self._shown:
            return False
        self._storage.write_bytes(f"{folder}/{REPORT_FILE}", render_report(run).encode())
        self._shown = state
        return True

    def _update_often(self) -> None:
        pause = 0.0
        while not self._ended.wait(pause):
            started = time.monotonic()
            try:
                self.update()
            except (StorageError, OSError, ValueError) as error:
                if not self._has_logged:
                    self._log(f"report.html is not up to date: {error}")
                self._has_logged = True
            pause = max(self._seconds, (time.monotonic() - started) / _MAX_SHARE)
