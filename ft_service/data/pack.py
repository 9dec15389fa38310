"""Packing: which examples share a row. Best-fit decreasing wastes little and takes milliseconds."""

from bisect import bisect_left, insort

import numpy as np


def pack_lengths(lengths: np.ndarray, row_length: int) -> list[list[int]]:
    """Rows of example numbers, with at most `row_length` tokens each. Every example is in exactly one row.

    From the longest example on, each goes into the fullest row with room for it (Johnson 1973, best-fit decreasing).
    `lengths` [examples] must each be at most `row_length`. The same lengths always give the same rows.
    """
    if len(lengths) and int(lengths.max()) > row_length:
        raise ValueError(f"an example of {int(lengths.max())} tokens does not fit into a row of {row_length}")
    rows: list[list[int]] = []
    rows_with_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of rows_with_room, sorted
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                del rows_with_room[room], rooms[at]
        else:
            room = row_length
            row = len(rows)
            rows.append([])
        rows[row].append(example)
        left = room - length
        if left not in rows_with_room:
            rows_with_room[left] = []
            insort(rooms, left)
        rows_with_room[left].append(row)
    return rows
