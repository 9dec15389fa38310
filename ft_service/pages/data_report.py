"""The report of a data check: its findings and figures, on one page that needs no network."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ft_service.data.gate import Finding, Judgement
from ft_service.pages.page import OTHER, TICK_STEPS, TRAIN, VALIDATION, WARNING, Chart, Tile, render, svg
from ft_service.text import counted, format_count

_DUPLICATES = ("quality.exact-duplicate", "quality.near-duplicate", "quality.contradiction")


def render_data_report(name: str, judgement: Judgement, waive: dict[str, str] | None = None) -> str:
    """The page of a judgement. `waive` maps the codes that the spec waives to its reasons. Private data is masked."""
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
    """Findings by severity, without empty groups."""
    titles = {"fail": "Failures (they stop a run)", "warn": "Warnings", "info": "Information"}
    groups = [(title, [f for f in findings if f.severity == severity]) for severity, title in titles.items()]
    return [(title, findings) for title, findings in groups if findings]


def _tiles(judgement: Judgement) -> list[Tile]:
    signal = judgement.signal
    size = judgement.size
    tiles = [
        Tile("Records read", f"{judgement.read:,}", f"from {counted(len(judgement.sources), 'source')}"),
        Tile("Usable", f"{judgement.usable:,}", f"{judgement.num_left_out:,} left out"),
        Tile("For training", f"{size.training_records:,}", f"{judgement.validation_records:,} for validation"),
        Tile("Size", size.level, f"start with {counted(int(size.epochs), 'epoch')}" if size.epochs else ""),
    ]
    if signal.records:
        lost = signal.lost_tokens / (signal.tokens + signal.lost_tokens)
        tiles += [
            Tile("Training tokens", format_count(signal.tokens), f"{signal.tokens / signal.records:,.0f} per record"),
            Tile("Loss tokens", f"{signal.loss_share:.0%}", "of the training tokens"),
            Tile("Cut off", f"{lost:.1%}", "of all tokens, by max_seq_len"),
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
    edges = lengths.edges
    counts = lengths.counts

    def draw(axes: Axes) -> None:
        axes.bar(range(len(counts)), counts, width=0.92, color=TRAIN, linewidth=0)
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=TICK_STEPS, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: _edge(edges, at)))
        axes.set_xlabel(f"{lengths.unit} per record, from")

    return Chart(f"Lengths of training records, in {lengths.unit}", svg(draw, width=10.8, height=2.6), is_wide=True)


def _edge(edges: Sequence[int], at: float) -> str:
    return format_count(edges[int(at)]) if at == int(at) and 0 <= at < len(edges) else ""


def _signal(judgement: Judgement) -> Chart:
    signal = judgement.signal
    parts = [
        (signal.loss_tokens, TRAIN, "train", "trained on (loss)"),
        (signal.tokens - signal.loss_tokens, OTHER, "accent", "only read"),
        (signal.lost_tokens, WARNING, "limit", "cut off"),
    ]
    return _stacked("Training records by use, in tokens", [("tokens", parts)])


def _duplicates(judgement: Judgement) -> Chart:
    exact, near, contradicting = (_count(judgement, code) for code in _DUPLICATES)
    rest = max(0, judgement.read - exact - near - contradicting)
    parts = [
        (rest, TRAIN, "train", f"{rest:,} unique"),
        (near, OTHER, "accent", counted(near, "near-duplicate")),
        (exact, WARNING, "limit", counted(exact, "exact duplicate")),
        (contradicting, VALIDATION, "validation", counted(contradicting, "contradiction")),
    ]
    return _stacked("Repeated records", [("records", parts)])


def _count(judgement: Judgement, code: str) -> int:
    finding = judgement.finding(code)
    return 0 if finding is None else finding.count


def _sources(judgement: Judgement) -> Chart:
    rows = [
        (
            source.path.rpartition("/")[2],
            [(source.usable, TRAIN, "train", "usable"), (source.read - source.usable, WARNING, "limit", "left out")],
        )
        for source in judgement.sources
    ]
    return _stacked("Records by source", rows)


_Parts = Sequence[tuple[float, str, str, str]]


def _stacked(title: str, rows: Sequence[tuple[str, _Parts]]) -> Chart:
    """Horizontal stacked bars; a part is (size, color, CSS class of its legend entry, name)."""

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
