"""The page of an adapter: whether it is better, what it lost, and where it comes from, with the evidence.

One self-contained HTML file. `read_adapter` reads everything from storage, `render_adapter_page` is a pure function.
A part that does not exist is named with the command that makes it.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from ft_service.errors import NotPublishedError, UsageError
from ft_service.evaluate.comparison import Comparison, ItemResult, sentence
from ft_service.evaluate.evaluation import Evaluation
from ft_service.evaluate.one_sidedness import Distribution
from ft_service.evaluate.scorecard import SCORECARDS
from ft_service.evaluate.stability import Flips, StabilityFigures
from ft_service.evaluate.stored import StoredComparison, compare_stored, current_evaluations, stored_results
from ft_service.evaluate.summary import loss_sentences, one_sidedness_sentences, perplexity_sentence, remarks
from ft_service.pages.lineage import Box, Lineage, draw_lineage
from ft_service.pages.page import Chart, Tile, render
from ft_service.pages.run_report import RunContents, loss_chart, read_run
from ft_service.registry.promotions import Promotion, Promotions
from ft_service.registry.registry import AdapterRecord, Registry, page_file
from ft_service.storage.storage import Storage
from ft_service.text import counted

SHOWN_CHANGES = 5
"""Items that became better, and as many that became worse."""
CHART_WIDTH = 240.0
_MARGIN = 8.0
_SCALES = (0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class StudyResult:
    """What people's votes say of an adapter, in sentences."""

    name: str
    title: str
    is_closed: bool
    votes: int
    """That compare it with another model; repeats, controls and attention items do not count."""
    lines: Sequence[str]


@dataclass(frozen=True)
class Evaluated:
    """An evaluation with its items; without items if its folder was deleted."""

    evaluation: Evaluation
    results: Sequence[ItemResult]


@dataclass(frozen=True)
class AdapterContents:
    """Everything that is known of an adapter. Parts that do not exist are empty."""

    record: AdapterRecord
    run: RunContents | None = None
    evaluations: Sequence[Evaluated] = ()
    studies: Sequence[StudyResult] = ()
    promotion: Promotion | None = None


@dataclass(frozen=True)
class Row:
    """A comparison as a row of a table, with its interval in the units of the drawing."""

    comparison: Comparison
    low: float
    high: float
    middle: float

    @property
    def tone(self) -> str:
        return {"better": "good", "worse": "bad"}.get(self.comparison.verdict, "muted")


@dataclass(frozen=True)
class Rows:
    """Comparisons that are drawn to the same scale."""

    rows: Sequence[Row]
    limit: float
    """The ends of the scale, as a share."""
    first: str = "base"
    second: str = "adapter"
    width: float = CHART_WIDTH

    @property
    def zero(self) -> float:
        return self.width / 2


@dataclass(frozen=True)
class Changes:
    """The items that became better most, those that became worse most, and how many there are of each."""

    improved: Sequence[ItemResult]
    worsened: Sequence[ItemResult]
    num_improved: int
    num_worsened: int


@dataclass(frozen=True)
class _Section:
    """An evaluation, prepared for the template."""

    evaluation: Evaluation
    sentences: Sequence[str]
    rows: Rows
    tasks: Rows | None
    changes: Changes
    has_items: bool
    forgetting: Rows
    forgetting_sentences: Sequence[str]
    one_sidedness: Sequence[str]
    distributions: Sequence[tuple[str, Sequence[str]]]
    stability: Sequence[tuple[str, str, str]]
    remarks: Sequence[str]


@dataclass(frozen=True)
class _Pair:
    """Two adapters on the same items."""

    stored: StoredComparison
    rows: Rows
    changes: Changes


@dataclass(frozen=True)
class _Part:
    """An adapter, prepared for the template."""

    contents: AdapterContents
    tiles: Sequence[Tile]
    sections: Sequence[_Section]
    lineage: Lineage
    chart: Chart | None
    memory: Sequence[tuple[str, float, float]] = field(default=())
    """Name, GiB, and the share of the larger one."""


def write_adapter_page(storage: Storage, adapters: Sequence[AdapterContents]) -> str:
    """Write the page beside the score cards. Returns its path below the storage root."""
    path = _path(adapters)
    storage.write_bytes(path, adapter_page(storage, adapters).encode())
    return path


def adapter_page(storage: Storage, adapters: Sequence[AdapterContents]) -> str:
    """The page of these adapters, with a comparison of every two that the same suite has judged."""
    pairs: list[StoredComparison] = []
    unmatched = []
    for first, second in itertools.combinations(adapters, 2):
        try:
            pairs += compare_stored(storage, first.record, second.record)
        except UsageError as error:
            unmatched.append(str(error))
    return render_adapter_page(adapters, pairs, unmatched)


def read_adapter(storage: Storage, adapter_id: str, studies: Sequence[StudyResult] = ()) -> AdapterContents:
    """Read what is known of an adapter. `studies` are those about exactly its weights. Raises `NotPublishedError`."""
    registry = Registry(storage)
    record = registry.resolve(adapter_id)
    try:
        run = read_run(storage, record.run_id)
    except NotPublishedError:
        run = None
    return AdapterContents(
        record=record,
        run=run,
        evaluations=[
            Evaluated(one, stored_results(storage, one)) for one in current_evaluations(storage, record).values()
        ],
        studies=studies,
        promotion=Promotions(registry).of(record) if record.kind == "adapter" else None,
    )


def render_adapter_page(
    adapters: Sequence[AdapterContents], pairs: Sequence[StoredComparison] = (), unmatched: Sequence[str] = ()
) -> str:
    """The page of one adapter, or of several side by side. All values are escaped."""
    return render(
        "adapter.html.jinja",
        parts=[_part(contents) for contents in adapters],
        pairs=[
            _Pair(stored, rows_of(stored.rows, stored.first, stored.second), changes_of(stored.results))
            for stored in pairs
        ],
        unmatched=unmatched,
        overview=_overview(adapters),
    )


def rows_of(comparisons: Sequence[Comparison], first: str = "base", second: str = "adapter") -> Rows:
    """Rows with their intervals, drawn to one scale that is symmetric around no difference."""
    largest = max((abs(end) for one in comparisons for end in (one.low, one.high, one.difference)), default=0.0)
    limit = next((scale for scale in _SCALES if largest <= scale), largest)

    def place(value: float) -> float:
        return CHART_WIDTH / 2 + value / limit * (CHART_WIDTH / 2 - _MARGIN)

    rows = [Row(one, place(one.low), place(one.high), place(one.difference)) for one in comparisons]
    return Rows(rows, limit, first, second)


# -- one adapter -----------------------------------------------------------------------------------------------------


def _part(contents: AdapterContents) -> _Part:
    run = contents.run
    return _Part(
        contents=contents,
        tiles=_tiles(contents),
        sections=[_section(one) for one in contents.evaluations],
        lineage=draw_lineage(_lineage(contents)),
        chart=loss_chart(run.metrics) if run and run.metrics else None,
        memory=_memory(run) if run else (),
    )


def _section(evaluated: Evaluated) -> _Section:
    evaluation = evaluated.evaluation
    overall = evaluation.comparison.overall
    forgetting = evaluation.forgetting
    texts = [perplexity_sentence(forgetting.texts)] if forgetting.texts else []
    judged = [evaluation.judge.sentence] if evaluation.judge else []
    return _Section(
        evaluation=evaluation,
        sentences=[
            sentence(overall) if overall else "No item that counts was answered by both models.",
            *loss_sentences(evaluation),
            *judged,
        ],
        rows=rows_of([*evaluation.comparison.skills, *([overall] if overall else [])]),
        tasks=rows_of(evaluation.other_tasks) if evaluation.other_tasks else None,
        changes=changes_of(evaluated.results),
        has_items=bool(evaluated.results),
        forgetting=rows_of([*forgetting.skills, *([forgetting.overall] if forgetting.overall else [])]),
        forgetting_sentences=[forgetting.sentence, *texts],
        one_sidedness=one_sidedness_sentences(evaluation),
        distributions=_distributions(evaluation),
        stability=_stability(evaluation),
        remarks=remarks(evaluation),
    )


def changes_of(results: Sequence[ItemResult]) -> Changes:
    """The largest changes first; items that did not change are left out."""
    by_change = sorted(results, key=lambda result: (result.change, result.id))
    worse = [result for result in by_change if result.change < 0]
    better = [result for result in reversed(by_change) if result.change > 0]
    return Changes(better[:SHOWN_CHANGES], worse[:SHOWN_CHANGES], len(better), len(worse))


def _distributions(evaluation: Evaluation) -> Sequence[tuple[str, Sequence[str]]]:
    """Rows of a name and the values of base, adapter and data."""
    columns = [evaluation.one_sidedness.base, evaluation.one_sidedness.adapter, evaluation.one_sidedness.data]

    def row(name: str, value: str) -> tuple[str, Sequence[str]]:
        return name, [_distribution_value(column, value) if column else "–" for column in columns]

    rows = [
        row("answers", "answers"),
        row("median length, characters", "median_characters"),
        row("without text", "empty"),
        row("in another language", "other_language"),
        row("in です・ます, of Japanese ones", "polite"),
        row("different answers", "distinct"),
        row("most frequent first words", "top_opening"),
        row("most frequent short answer", "top_answer"),
    ]
    return rows if any(columns) else []


def _distribution_value(distribution: Distribution, name: str) -> str:
    if name in ("top_opening", "top_answer"):
        text = getattr(distribution, name)
        return f"{text!r}, {getattr(distribution, f'{name}_share'):.0%}" if text else "–"
    value = getattr(distribution, name)
    if value is None:
        return "–"
    return f"{value:,.0f}" if name in ("answers", "median_characters") else f"{value:.0%}"


def _stability(evaluation: Evaluation) -> Sequence[tuple[str, str, str]]:
    """Rows of a name and the values of base and adapter."""
    if evaluation.stability is None:
        return []
    models = (evaluation.stability.base, evaluation.stability.adapter)

    def row(name: str, value: str) -> tuple[str, str, str]:
        base, adapter = (_stability_value(figures, value) for figures in models)
        return name, base, adapter

    return [
        row("items asked again", "items"),
        row("overlap of two answers to one question", "self_agreement"),
        row("bit for bit the same at temperature 0", "equal_at_zero"),
        row("bit for bit the same with the same seed", "equal_with_seed"),
        row("items that flip at temperature 0", "flips_at_zero"),
        row("items that flip over seeds", "flips_over_seeds"),
        row("items that flip over paraphrases", "flips_over_paraphrases"),
    ]


def _stability_value(figures: StabilityFigures, name: str) -> str:
    value = getattr(figures, name)
    match value:
        case None:
            return "not measured"
        case Flips():
            return f"{value.share:.0%} ({value.low:.0%} to {value.high:.0%})"
        case int():
            return f"{value:,}"
    return f"{value:.0%}"


def _memory(run: RunContents) -> Sequence[tuple[str, float, float]]:
    planned = run.plan.memory_gib.get("total") if run.plan else None
    measured = max((step.peak_memory_gib for step in run.metrics), default=None)
    values = [(name, gib) for name, gib in (("planned", planned), ("measured", measured)) if gib]
    largest = max((gib for _, gib in values), default=1.0)
    return [(name, gib, gib / largest) for name, gib in values]


def _tiles(contents: AdapterContents) -> list[Tile]:
    tiles = []
    for evaluated in contents.evaluations:
        evaluation = evaluated.evaluation
        if overall := evaluation.comparison.overall:
            interval = f"{_points(overall.low)} to {_points(overall.high)} points, {counted(overall.items, 'item')}"
            tiles.append(
                Tile(f"{evaluation.suite.name}: {overall.verdict}", f"{_points(overall.difference)} points", interval)
            )
    if not tiles:
        tiles.append(Tile("Evaluation", "–", "not evaluated"))
    return [
        *tiles,
        _forgetting_tile(contents),
        _stability_tile(contents),
        _votes_tile(contents),
        _promotion_tile(contents),
    ]


def _forgetting_tile(contents: AdapterContents) -> Tile:
    measured = [one.evaluation.forgetting for one in contents.evaluations if one.evaluation.forgetting.overall]
    if not measured:
        return Tile("Forgetting", "–", "not measured")
    worst = min(measured, key=lambda one: one.overall.difference if one.overall else 0.0)
    assert worst.overall is not None
    limit = f"{worst.verdict} ({-100 * worst.limit:.0f})"
    return Tile("Forgetting", f"{_points(worst.overall.difference)} points", limit)


def _stability_tile(contents: AdapterContents) -> Tile:
    found = [one.evaluation.stability for one in contents.evaluations if one.evaluation.stability]
    if not found:
        return Tile("Stability", "–", "not measured")
    least = min(found, key=lambda one: one.adapter.self_agreement)
    return Tile("Stability", f"{least.adapter.self_agreement:.0%}", f"overlap; base {least.base.self_agreement:.0%}")


def _votes_tile(contents: AdapterContents) -> Tile:
    votes = sum(study.votes for study in contents.studies)
    note = counted(len(contents.studies), "study", "studies")
    return Tile("Votes of people", f"{votes:,}" if contents.studies else "–", note if contents.studies else "no study")


def _promotion_tile(contents: AdapterContents) -> Tile:
    promotion = contents.promotion
    if promotion is None:
        return Tile("Promotion", "candidate", "not promoted")
    waived = sum(check.waived is not None for check in promotion.checks)
    note = f"since {promotion.promoted:%Y-%m-%d}" + (f", {counted(waived, 'check')} waived" if waived else "")
    return Tile("Promotion", "promoted", note)


def _lineage(contents: AdapterContents) -> list[list[Box]]:
    """Columns of boxes, from the data to the alias."""
    record = contents.record
    data = [Box("data", source.path.rsplit("/", 1)[-1], f"{source.records:,} records") for source in record.datasets]
    base = Box("base", record.base.short_name, record.base.fingerprint[:8], is_origin=True)
    evaluations = [
        Box("evaluation", one.evaluation.suite.name, one.evaluation.comparison.overall.verdict)
        if one.evaluation.comparison.overall
        else Box("evaluation", one.evaluation.suite.name, "nothing measured")
        for one in contents.evaluations
    ]
    studies = [Box("votes", study.name, counted(study.votes, "vote")) for study in contents.studies]
    promotion = contents.promotion
    waived = f" ({len(record.waivers)} waived)" if record.waivers else ""
    return [
        data or [Box("data", "not recorded", is_missing=True)],
        [Box("data check", f"{record.data_verdict}{waived}", f"prepared {record.dataset_digest[:8]}"), base],
        [Box("run", record.run_id, counted(record.steps, "step"))],
        [Box("adapter" if record.kind == "adapter" else "model", record.id, record.digest[:8])],
        [
            *(evaluations or [Box("evaluation", "none yet", is_missing=True)]),
            *(studies or [Box("votes", "none yet", is_missing=True)]),
        ],
        [
            Box("promotion", promotion.alias, f"{promotion.promoted:%Y-%m-%d}")
            if promotion
            else Box("promotion", "not promoted", is_missing=True)
        ],
    ]


# -- several adapters ------------------------------------------------------------------------------------------------


def _overview(adapters: Sequence[AdapterContents]) -> list[tuple[str, Rows]]:
    """For each suite, every adapter that it judged against its base."""
    evaluations = [one.evaluation for contents in adapters for one in contents.evaluations]
    return [
        (
            suite,
            rows_of(
                [
                    one.comparison.overall.model_copy(update={"name": one.adapter.id})
                    for one in evaluations
                    if one.suite.name == suite and one.comparison.overall is not None
                ]
            ),
        )
        for suite in dict.fromkeys(one.suite.name for one in evaluations)
    ]


def _path(adapters: Sequence[AdapterContents]) -> str:
    ids = [contents.record.id for contents in adapters]
    if len(ids) == 1:
        return page_file(ids[0])
    return f"{SCORECARDS}/side-by-side-{hashlib.sha256(' '.join(ids).encode()).hexdigest()[:8]}.html"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"
