"""Ids that sort by the time of their creation, and pages of rows by these ids.

So a page needs only the id before it: a client that deletes each item while it pages through a list still sees all.
"""

import re
import secrets
import threading
import time
from typing import Any, Literal, TypeVar

from sqlalchemy import Select
from sqlalchemy.orm import InstrumentedAttribute, Session

from serve.http.errors import ApiError

Order = Literal["asc", "desc"]
Row = TypeVar("Row")
_TIME_DIGITS = 13
"""Hex digits of microseconds since 1970: enough until 2112."""
_RANDOM_DIGITS = 11
_last = 0
_lock = threading.Lock()


def new_id(prefix: str) -> str:
    """`prefix` and 24 hex digits: the time, which never repeats within a process, and 44 random bits."""
    global _last
    with _lock:
        _last = max(time.time_ns() // 1000, _last + 1)
        now = _last
    return f"{prefix}{now:0{_TIME_DIGITS}x}{secrets.randbelow(16**_RANDOM_DIGITS):0{_RANDOM_DIGITS}x}"


def is_id(text: str, prefix: str) -> bool:
    return re.fullmatch(rf"{re.escape(prefix)}[0-9a-f]{{24}}", text) is not None


def page_of(
    opened: Session,
    query: Select[Row],
    id_column: InstrumentedAttribute[str],
    prefix: str,
    *,
    after: str | None,
    limit: int,
    order: Order,
) -> tuple[list[Row], bool]:
    """At most `limit` rows after the id `after`, which need not exist any more, and whether more follow.

    Raises `ApiError` 400 for a text that is no such id.
    """
    if after:
        check_after(after, prefix)
        query = query.where(id_column > after if order == "asc" else id_column < after)
    column: Any = id_column.asc() if order == "asc" else id_column.desc()
    rows = list(opened.scalars(query.order_by(column).limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def check_after(after: str, prefix: str) -> None:
    """Raises `ApiError` 400."""
    if not is_id(after, prefix):
        message = f"after = {after[:100]!r}: is no id of this list. Send the `last_id` of a page."
        raise ApiError(400, message, "invalid_value", "after")


def time_of(digits: str) -> float | None:
    """When an id was made, in seconds since 1970, from its hex digits; None if they are none."""
    try:
        return int(digits[:_TIME_DIGITS], 16) / 1e6
    except ValueError:
        return None
