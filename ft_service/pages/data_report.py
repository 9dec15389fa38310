"""report.html of the data gate: what it found, on one page that needs no network."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ft_service.data.gate import Finding, Judgement
from ft_service.pages.page import OTHER, TICK_STEPS, TRAIN, VALIDATION, WARNING, Chart, Tile, render, svg
from ft_service.text import counted, format_count

_DUPLICATES = ("quality.exact-duplicate", "quality.near-duplicate", "quality.contradiction")


def render_data_report(name: str, judgement: Judgement, waive: dict[str, str] | None = None) -> str:
    """The page; `waive` are the codes that the spec accepts, with its reasons. Private data stays masked."""
    return render(
        "data_report.html.jinja",
        name=name,
        judgement=judgement,
        tiles=_tiles(judgement),
        charts=_charts(judgement),
        waive=waive or {},
        groups=_groups(judgement.findings),
    )


def _groups(findings: Sequence[Finding]) -> list[tuple[str, list[Finding]]]:
    """Findings by gravity, none of them empty."""
    titles = {"fail": "These stop a run", "warn": "Warnings", "info": "Worth knowing"}
    groups = [(title, [f for f in findings if f.severity == severity]) for severity, title in titles.items()]
    return [(title, some) for title, some in groups if some]


def _tiles(judgement: Judgement) -> list[Tile]:
    signal, left_out = judgement.signal, sum(judgement.left_out.values())
    tiles = [
        Tile(
            "Records",
            f"{judgement.read:,}",
            f"of {counted(len(judgement.sources), 'source')}",
        ),
        Tile("Usable", f"{judgement.usable:,}", f"{left_out:,} left out"),
        Tile("Enough for", judgement.size.level, f"begin with {judgement.size.epochs:g} epochs"),
    ]
    if signal.records:
        lost = signal.lost_tokens / (signal.tokens + signal.lost_tokens)
        tiles += [
            Tile("Tokens", format_count(signal.tokens), f"{signal.tokens / signal.records:,.0f} a record"),
            Tile("Trained on", f"{signal.loss_share:.0%}", "of the tokens"),
            Tile("Cut off", f"{lost:.1%}", "of the tokens, by max_seq_len"),
        ]
    return tiles


# -- charts ----------------------------------------------------------------------------------------------------------


def _charts(judgement: Judgement) -> list[Chart]:
    charts = [_lengths(judgement)] if any(judgement.lengths.counts) else []
    if judgement.signal.records:
        charts.append(_signal(judgement))
    if len(judgement.sources) > 1:
        charts.append(_sources(judgement))
    return [*charts, _duplicates(judgement)]


def _lengths(judgement: Judgement) -> Chart:
    lengths = judgement.lengths
    edges, counts = lengths.edges, lengths.counts

    def draw(axes: Axes) -> None:
        axes.bar(range(len(counts)), counts, width=0.92, color=TRAIN, linewidth=0)
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=TICK_STEPS, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: _edge(edges, at)))
        axes.set_xlabel(f"{lengths.unit} of a record, from")

    return Chart(f"Lengths, in {lengths.unit}", svg(draw, width=10.8, height=2.6), is_wide=True)


def _edge(edges: Sequence[int], at: float) -> str:
    return format_count(edges[int(at)]) if at == int(at) and 0 <= at < len(edges) else ""


def _signal(judgement: Judgement) -> Chart:
    signal = judgement.signal
    parts = [
        (signal.loss_tokens, TRAIN, "train", "trained on"),
        (signal.tokens - signal.loss_tokens, OTHER, "accent", "only read"),
        (signal.lost_tokens, WARNING, "limit", "cut off"),
    ]
    return _stacked("What the tokens are for", [("tokens", parts)])


def _duplicates(judgement: Judgement) -> Chart:
    exact, near, contradicting = (found.count if (found := judgement.finding(code)) else 0 for code in _DUPLICATES)
    rest = max(0, judgement.read - exact - near - contradicting)
    parts = [
        (rest, TRAIN, "train", f"{rest:,} once"),
        (near, OTHER, "accent", f"{near:,} nearly repeated"),
        (exact, WARNING, "limit", f"{exact:,} repeated"),
        (contradicting, VALIDATION, "validation", f"{contradicting:,} contradicting"),
    ]
    return _stacked("Repeats, in records", [("records", parts)])


def _sources(judgement: Judgement) -> Chart:
    rows = [
        (
            source.path.rpartition("/")[2],
            [(source.usable, TRAIN, "train", "usable"), (source.read - source.usable, WARNING, "limit", "left out")],
        )
        for source in judgement.sources
    ]
    return _stacked("Sources, in records", rows)


_Parts = Sequence[tuple[float, str, str, str]]


def _stacked(title: str, rows: Sequence[tuple[str, _Parts]]) -> Chart:
    """Horizontal bars of parts: (size, colour, its class in the legend, its name)."""

    def draw(axes: Axes) -> None:
        for at, (_, parts) in enumerate(rows):
            left = 0.0
            for size, color, _, _ in parts:
                axes.barh(at, size, left=left, height=0.6, color=color, linewidth=0)
                left += size
        axes.set_yticks(range(len(rows)), [name for name, _ in rows], parse_math=False)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.grid(axis="x", visible=True)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))

    legend = [(swatch, name) for _, _, swatch, name in rows[0][1]]
    return Chart(title, svg(draw, width=5.2, height=0.9 + 0.35 * len(rows)), legend=legend)
