"""Self-contained HTML pages: styles and charts are inline, and no network or script is needed."""

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
    """A headline figure."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart with its title and legend."""

    title: str
    svg: Markup
    is_wide: bool = False
    legend: Sequence[tuple[str, str]] = field(default=())
    """CSS class of the swatch, text."""


# Matplotlib draws with placeholder colors. The page replaces them with CSS variables, for the light and dark theme.
TRAIN = "#00fa01"
VALIDATION = "#00fa02"
OTHER = "#00fa03"
WARNING = "#00fa04"
INK = "#00fa05"
GRID = "#00fa06"
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
    """A chart as inline SVG, sizes in inches. It contains no URLs, and no ids or styles that could clash in a page."""
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
    for placeholder, variable in _VARIABLES.items():
        drawn = drawn.replace(placeholder, variable)
    return Markup(drawn)


def render(template: str, **values: Any) -> str:
    """Render a page of `templates/`. All values are escaped."""
    return _TEMPLATES.get_template(template).render(**values)


_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
