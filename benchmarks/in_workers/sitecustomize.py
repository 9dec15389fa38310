"""Python imports this at the start of every process that has this folder on its path: here, those that Ray starts.

In a Ray worker it waits for a file named after the process in $FT_RAISE_FOLDER, and then raises an exception in the
thread that trains, wherever that stands: as an error of a library would, and without the product's help.
"""

import os
import sys
import threading
import time

_POLL_SECONDS = 0.02


class InjectedFault(RuntimeError):
    """Raised by the benchmark."""


def _wait_and_raise(folder: str) -> None:
    import ctypes

    file = os.path.join(folder, str(os.getpid()))
    while not os.path.exists(file):
        time.sleep(_POLL_SECONDS)
    while True:  # it may still be on its way there
        for thread, frame in list(sys._current_frames().items()):
            if any(code == "run_worker" for code in _stack(frame)):
                # Takes effect when the thread next runs Python; a collective that it waits in returns first.
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(InjectedFault))
                return
        time.sleep(_POLL_SECONDS)


def _stack(frame: object) -> list[str]:
    names = []
    while frame is not None:
        names.append(frame.f_code.co_name)  # type: ignore[attr-defined]
        frame = frame.f_back  # type: ignore[attr-defined]
    return names


if "FT_RAISE_FOLDER" in os.environ and any("default_worker" in part for part in sys.orig_argv):
    threading.Thread(target=_wait_and_raise, args=(os.environ["FT_RAISE_FOLDER"],), daemon=True).start()
