"""How long calls to storage take, for whoever exports it: this package knows no metrics library."""

import time
from collections.abc import Callable
from typing import TypeVar

from ft_service.errors import UnreachableError

T = TypeVar("T")

OnCall = Callable[[str, float, bool], None]
"""Takes the name of a method of `Storage`, the seconds of one call, and whether the storage did not answer."""

_on_call: OnCall | None = None


def observe_calls(on_call: OnCall | None) -> None:
    """From now on each call of this process to any storage is reported; None ends it. Calls come from all threads."""
    global _on_call
    _on_call = on_call


def timed(operation: str, function: Callable[[], T]) -> T:
    """Call `function` and report how long it took. Of a call that is repeated, each try counts."""
    on_call = _on_call
    if on_call is None:
        return function()
    began = time.perf_counter()
    is_unreachable = False
    try:
        return function()
    except UnreachableError:
        is_unreachable = True
        raise
    finally:
        on_call(operation, time.perf_counter() - began, is_unreachable)
