"""SIGINT (Ctrl-C) and SIGTERM ask a run to stop; a second one ends it at once."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from ft_service.errors import RunStopped

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Takes both signals while the block lasts, in the main thread; elsewhere Python allows no handlers."""

    def __init__(self) -> None:
        self.received = ""
        """Name of the first signal."""
        self.may_wait = False
        """Whether somebody looks at `received`; else already the first signal raises."""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Take the signals, again after `ray.init`, which has put a handler of its own."""
        for number in self._before:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_second = bool(self.received)
        self.received = self.received or signal.Signals(number).name
        if is_second:
            raise RunStopped(f"{signal.Signals(number).name} came a second time: ended at once.")
        if not self.may_wait:
            raise RunStopped(f"{self.received} received while there was nothing to save.")
