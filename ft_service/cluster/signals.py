"""SIGINT (Ctrl-C) and SIGTERM ask a run to stop; a second signal ends it at once."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from ft_service.errors import RunStopped

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Handles both signals while the block lasts, in the main thread. Python allows no handlers in other threads."""

    def __init__(self) -> None:
        self.received = ""
        """Name of the first signal."""
        self.may_wait = False
        """Whether the driver checks `received`. If not, the first signal already raises."""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.getsignal(number) for number in _SIGNALS}
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Install the handlers. Call it again after `ray.init`, which installs its own."""
        for number in self._previous:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_second = bool(self.received)
        self.received = self.received or signal.Signals(number).name
        if is_second:
            raise RunStopped(f"{signal.Signals(number).name} received a second time. The run ended at once.")
        if not self.may_wait:
            raise RunStopped(f"{self.received} received. There was nothing to save.")
