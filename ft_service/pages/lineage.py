"""Where an adapter comes from and what became of it, as a picture: columns of boxes, and arrows between them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

BOX_WIDTH = 152
BOX_HEIGHT = 62
_GAP_X = 36
_GAP_Y = 14
_MOST_BOXES = 4
"""Of a column; the others are counted."""
_MOST_CHARACTERS = 17


@dataclass(frozen=True)
class Box:
    """What it is, its name, and a figure. A missing one is drawn with dashes."""

    kind: str
    name: str
    note: str = ""
    is_missing: bool = False
    is_origin: bool = False
    """Whether nothing of the column before leads to it."""

    @property
    def short_name(self) -> str:
        """At most seventeen characters: the start and the end, because ids differ in both."""
        if len(self.name) <= _MOST_CHARACTERS:
            return self.name
        return f"{self.name[:8]}…{self.name[-8:]}"


@dataclass(frozen=True)
class PlacedBox:
    box: Box
    x: float
    y: float


@dataclass(frozen=True)
class Lineage:
    """Boxes and arrows in the units of the drawing."""

    boxes: Sequence[PlacedBox]
    arrows: Sequence[str]
    """Paths of SVG."""
    width: float
    height: float
    box_width: float = BOX_WIDTH
    box_height: float = BOX_HEIGHT


def draw_lineage(columns: Sequence[Sequence[Box]]) -> Lineage:
    """Place the columns from left to right, each centred. Every box of a column leads to every box of the next one,
    except to an origin."""
    shown = [_shown(column) for column in columns]
    height = max(len(column) for column in shown) * (BOX_HEIGHT + _GAP_Y) - _GAP_Y
    placed = [
        [
            PlacedBox(
                box, x=1 + number * (BOX_WIDTH + _GAP_X), y=_top(len(column), height) + row * (BOX_HEIGHT + _GAP_Y)
            )
            for row, box in enumerate(column)
        ]
        for number, column in enumerate(shown)
    ]
    arrows = [
        _arrow(start, end)
        for before, after in itertools.pairwise(placed)
        for start in before
        for end in after
        if not end.box.is_origin
    ]
    return Lineage(
        boxes=[box for column in placed for box in column],
        arrows=arrows,
        width=2 + len(columns) * (BOX_WIDTH + _GAP_X) - _GAP_X,
        height=height + 2,
    )


def _shown(column: Sequence[Box]) -> Sequence[Box]:
    if len(column) <= _MOST_BOXES:
        return column
    more = len(column) - _MOST_BOXES + 1
    return [*column[: _MOST_BOXES - 2], Box(column[0].kind, f"{more} more"), column[-1]]


def _top(boxes: int, height: float) -> float:
    return 1 + (height - boxes * (BOX_HEIGHT + _GAP_Y) + _GAP_Y) / 2


def _arrow(start: PlacedBox, end: PlacedBox) -> str:
    x1 = start.x + BOX_WIDTH
    y1 = start.y + BOX_HEIGHT / 2
    x2 = end.x - 3
    y2 = end.y + BOX_HEIGHT / 2
    middle = (x1 + x2) / 2
    return f"M{x1:.0f} {y1:.0f} C{middle:.0f} {y1:.0f} {middle:.0f} {y2:.0f} {x2:.0f} {y2:.0f}"
