"""Formatting of numbers and messages for terminal, pages and logs."""

from collections.abc import Iterator

_LARGE = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def format_count(value: float) -> str:
    """At most one decimal and a unit: 980, 41.2k, 3.1M, 1.3G."""
    for power, unit in _LARGE:
        if abs(value) >= power:
            return f"{value / power:.1f}{unit}"
    return f"{value:.0f}"


def format_bytes(value: int) -> str:
    """In powers of 1024: 980 bytes, 41.2 KiB, 3.1 GiB, 1.3 TiB."""
    size = float(value)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def format_duration(seconds: float) -> str:
    """The two largest units: 45s, 12m03s, 3h07m, 2d04h."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02d}h"
    if hours:
        return f"{hours}h{minute:02d}m"
    return f"{minutes}m{second:02d}s" if minutes else f"{second}s"


def counted(number: int, noun: str, plural: str = "") -> str:
    """``1 record``, ``3,229 records``. `plural` defaults to the noun with an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def first_line(error: object) -> str:
    """The first non-empty line of an error's text, or the name of its type if it has no text."""
    return next(_lines(error), type(error).__name__)


def error_line(error: BaseException) -> str:
    """``ValueError: first line of its text``; of an error without text, its type alone."""
    kind = type(error).__name__
    line = first_line(error)
    return line if line == kind else f"{kind}: {line}"


def last_line(error: object) -> str:
    """The last non-empty line of a text: in a traceback, the error itself."""
    return ([*_lines(error)] or ["no reason given"])[-1]


def _lines(text: object) -> Iterator[str]:
    return (line.strip() for line in str(text).splitlines() if line.strip())
