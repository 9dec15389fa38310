"""Pages that people look at: one HTML file, with its styles and charts inside, that needs no network and no script."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


@dataclass(frozen=True)
class Tile:
    """A figure to be seen at first sight."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """A drawing with its title and legend."""

    title: str
    svg: Markup
    is_wide: bool = False
    legend: Sequence[tuple[str, str]] = field(default=())
    """CSS class of the swatch, text."""


# Matplotlib draws with stand-ins; in the page they become CSS variables, so a chart follows the light or dark theme.
TRAIN, VALIDATION, OTHER, WARNING, INK, GRID = (f"#00fa0{digit}" for digit in range(1, 7))
_VARIABLES = {
    TRAIN: "var(--train)",
    VALIDATION: "var(--validation)",
    OTHER: "var(--accent)",
    WARNING: "var(--warning)",
    INK: "var(--muted)",
    GRID: "var(--line)",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}


TICK_STEPS = (1, 2, 2.5, 5, 10)


def svg(draw: Callable[[Axes], None], width: float, height: float) -> Markup:
    """A chart of that many inches as inline SVG, without anything that names an address or clashes in a page."""
    file = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": "report"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.margins(x=0.01)
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=TICK_STEPS, integer=True))
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    drawn = file.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<style[^>]*>.*?</style>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'<g id="[^"]*"', "<g", drawn)
    drawn = re.sub(r"<svg [^>]*(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 aria-hidden="true">', drawn, count=1)
    for stand_in, variable in _VARIABLES.items():
        drawn = drawn.replace(stand_in, variable)
    return Markup(drawn)


def render(template: str, **values: Any) -> str:
    """A page of `templates/`; what comes from outside is escaped."""
    return _TEMPLATES.get_template(template).render(**values)


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
