"""report.html: one run on one self-contained page.

`write_report` reads the run's folder, at any time during or after the run; `render_report` is a pure function.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator
from pydantic import BaseModel, ConfigDict, Field

from ft_service.pages.page import OTHER, TICK_STEPS, TRAIN, VALIDATION, WARNING, Chart, Tile, render, svg
from ft_service.plan.plan import RunPlan
from ft_service.registry.registry import AdapterRecord, DatasetRef, Registry
from ft_service.runs.events import Event, read_events
from ft_service.runs.folder import ENDED, REPORT_FILE, RunStatus, find_run
from ft_service.runs.metrics import StepMetrics, read_metrics
from ft_service.runs.overfitting import find_overfitting, validations
from ft_service.storage.storage import Storage
from ft_service.text import format_count, format_duration

SAMPLES_FILE = "samples.json"
REFRESH_SECONDS = 10
"""How often a browser reloads the page while the run is on."""
SMOOTHING_SHARE = 1 / 40
"""Width of the moving average of the training loss, as a fraction of the steps."""


class Sample(BaseModel):
    """One prompt with the answers of the base and of the trained model."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    reference: str | None = Field(default=None, description="The answer in the data, if there is one.")
    base: str
    adapter: str


@dataclass(frozen=True)
class RunContents:
    """The contents of a run's folder. Parts that the run has not produced yet are empty."""

    run_id: str
    status: RunStatus | None = None
    spec_yaml: str | None = None
    plan: RunPlan | None = None
    sources: Sequence[DatasetRef] = ()
    metrics: Sequence[StepMetrics] = ()
    events: Sequence[Event] = ()
    samples: Sequence[Sample] = ()
    record: AdapterRecord | None = None


def write_report(storage: Storage, run_id: str) -> None:
    """Write or update runs/<run id>/report.html. Raises `NotPublishedError` if there is no such run."""
    html = render_report(read_run(storage, run_id))
    storage.write_bytes(f"runs/{run_id}/{REPORT_FILE}", html.encode())


def read_run(storage: Storage, run_id: str) -> RunContents:
    """Read the contents of a run, finished or not. Raises `NotPublishedError` if there is no such run."""
    run = find_run(storage, run_id)

    def has(name: str) -> bool:
        return storage.exists(f"{run.path}/{name}")

    status = run.status()
    samples = storage.read_json(f"{run.path}/{SAMPLES_FILE}") if has(SAMPLES_FILE) else []
    return RunContents(
        run_id=run_id,
        status=status,
        spec_yaml=storage.read_bytes(f"{run.path}/spec.yaml").decode() if has("spec.yaml") else None,
        plan=run.plan() if has("plan.json") else None,
        sources=run.sources() if has("dataset.json") else [],
        metrics=read_metrics(storage, run_id),
        events=read_events(storage, run_id),
        samples=[Sample.model_validate(sample) for sample in samples],
        record=Registry(storage).resolve(status.published) if status and status.published else None,
    )


def render_report(run: RunContents) -> str:
    """The report as one HTML page: styles and charts are inline, there is no script, and all values are escaped."""
    plan = run.plan
    return render(
        "report.html.jinja",
        run=run,
        state=run.status.state if run.status else "unknown",
        refresh_seconds=None if run.status is None or run.status.state in ENDED else REFRESH_SECONDS,
        name=plan.spec.name if plan else run.run_id,
        trained_name="fine-tuned" if plan and plan.spec.method.type == "full" else "adapter",
        tiles=_tiles(run),
        alerts=_alerts(run),
        charts=_charts(run),
        plan_rows=_rows(plan.model_dump(exclude=_SHOWN_ELSEWHERE)) if plan else [],
        data_rows=_data_rows(plan) if plan else [],
        num_records=sum(source.records for source in run.sources),
        validations=[m for m in run.metrics if m.validation_loss is not None],
    )


# -- figures and warnings --------------------------------------------------------------------------------------------


def _best(metrics: Sequence[StepMetrics]) -> tuple[int, float] | None:
    """Step and value of the lowest validation loss."""
    return min(validations(metrics), key=lambda measured: measured[1], default=None)


def _tiles(run: RunContents) -> list[Tile]:
    metrics = run.metrics
    plan = run.plan
    if not metrics:
        return []
    first = metrics[0]
    last = metrics[-1]
    best = _best(metrics)
    tokens = sum(m.tokens for m in metrics)
    trained_share = sum(m.loss_tokens for m in metrics) / max(1, tokens)
    times = [m.time for m in metrics] + [event.time for event in run.events if event.time]
    planned_gib = plan.memory_gib.get("total") if plan else None
    return [
        Tile("Training loss", f"{last.loss:.4f}", f"{first.loss:.4f} at step {first.step}"),
        Tile("Best validation loss", f"{best[1]:.4f}", f"at step {best[0]:,}")
        if best
        else Tile("Best validation loss", "–", "not measured"),
        Tile("Steps", f"{last.step:,}", f"of {plan.num_steps:,} · {last.epoch:.2f} epochs" if plan else ""),
        Tile("Tokens", format_count(tokens), f"{trained_share:.0%} loss tokens"),
        Tile("Time", format_duration((max(times) - min(times)).total_seconds()), "first to last event"),
        Tile("Throughput", format_count(statistics.median(m.tokens_per_second for m in metrics)), "tokens/s, median"),
        Tile(
            "Peak memory",
            f"{max(m.peak_memory_gib for m in metrics):.1f} GiB",
            f"{planned_gib:.1f} GiB planned" if planned_gib else "maximum over workers",
        ),
    ]


@dataclass(frozen=True)
class _Alert:
    severity: str
    """'bad' or 'warning'."""
    title: str
    messages: Sequence[str]


def _alerts(run: RunContents) -> list[_Alert]:
    alerts = []
    if run.status and run.status.state == "failed":
        alerts.append(
            _Alert("bad", "This run failed", [run.status.message or "No reason was recorded. See the log of the run."])
        )
    if overfitting := find_overfitting(run.metrics):
        alerts.append(_Alert("warning", "Overfitting", [overfitting.message]))
    if run.plan and run.plan.warnings:
        alerts.append(_Alert("warning", "Plan warnings", run.plan.warnings))
    if events := [event.message for event in run.events if event.type == "warning"]:
        alerts.append(_Alert("warning", "Run warnings", events))
    return alerts


# -- tables ----------------------------------------------------------------------------------------------------------

_SHOWN_ELSEWHERE = {"spec", "dataset", "summary", "warnings", "remarks"}


def _rows(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as rows of a dotted name and a text."""
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += _rows(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", _text(value)))
    return rows


def _text(value: object) -> str:
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.4g}"
        case list() | tuple():
            return ", ".join(map(_text, value)) or "–"
    return str(value)


def _data_rows(plan: RunPlan) -> list[tuple[str, str, str]]:
    """Rows of name, training split and validation split."""
    data = plan.dataset
    capacity = data.rows * plan.spec.data.max_seq_len
    return [
        ("examples", f"{data.conversations:,}", f"{data.validation_conversations:,}"),
        ("packed rows", f"{data.rows:,}", f"{data.validation_rows:,}"),
        ("tokens", f"{data.tokens:,}", f"{data.validation_tokens:,}"),
        ("loss tokens", f"{data.loss_tokens:,}", f"{data.validation_loss_tokens:,}"),
        ("rows filled", f"{data.tokens / capacity:.0%}" if capacity else "–", ""),
        (f"truncated at {plan.spec.data.max_seq_len:,} tokens", f"{data.truncated:,}", ""),
    ]


# -- charts ----------------------------------------------------------------------------------------------------------


def _charts(run: RunContents) -> list[Chart]:
    metrics = run.metrics
    if not metrics:
        return []
    steps = [m.step for m in metrics]
    planned_gib = run.plan.memory_gib.get("total") if run.plan else None

    def series(values: Sequence[float], format_tick: Callable[[float], str], limit: float | None = None) -> Markup:
        def draw(axes: Axes) -> None:
            _plot(axes, steps, values, color=OTHER, linewidth=1.3)
            if limit:
                axes.axhline(limit, color=WARNING, linewidth=1, linestyle=(0, (4, 3)))
            axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tick(value)))
            axes.yaxis.set_major_locator(MaxNLocator(4, steps=TICK_STEPS))

        return svg(draw, width=5.2, height=1.9)

    return [
        loss_chart(metrics),
        Chart("Learning rate", series([m.learning_rate for m in metrics], lambda v: f"{v:.1e}" if v else "0")),
        Chart("Gradient norm, before clipping", series([m.grad_norm for m in metrics], lambda v: f"{v:g}")),
        Chart("Throughput, tokens/s", series([m.tokens_per_second for m in metrics], format_count)),
        Chart(
            "Peak memory of a worker, GiB",
            series([m.peak_memory_gib for m in metrics], lambda v: f"{v:g}", planned_gib),
            legend=[("accent", "measured"), ("limit", f"planned {planned_gib:.1f}")] if planned_gib else (),
        ),
    ]


def loss_chart(metrics: Sequence[StepMetrics]) -> Chart:
    """Training and validation loss over the steps, with the best validation loss and overfitting marked."""
    best = _best(metrics)
    overfitting = find_overfitting(metrics)
    steps = [m.step for m in metrics]
    losses = [m.loss for m in metrics]
    measured = validations(metrics)

    def draw(axes: Axes) -> None:
        _plot(axes, steps, losses, color=TRAIN, linewidth=0.8, alpha=0.3)
        _plot(axes, steps, _smooth(losses), color=TRAIN, linewidth=1.8)
        if overfitting:
            axes.axvspan(overfitting.best_step, overfitting.last_step, color=WARNING, alpha=0.1, linewidth=0)
        if measured:
            axes.plot(*zip(*measured, strict=True), color=VALIDATION, linewidth=1.8, marker="o", markersize=3.2)
        if best:
            axes.axvline(best[0], color=VALIDATION, linewidth=0.8, linestyle=(0, (2, 3)))
            axes.plot(*best, "o", color=VALIDATION, markersize=9, fillstyle="none")
        axes.set_xlabel("step")

    legend = [("train", "training, moving average"), ("raw", "training, each step")]
    if best:
        legend += [("validation", "validation"), ("best", f"best {best[1]:.4f} at step {best[0]:,}")]
    if overfitting:
        legend.append(("overfitting", "overfitting"))
    return Chart("Loss, nats per loss token", svg(draw, width=10.8, height=3.6), is_wide=True, legend=legend)


def _plot(axes: Axes, steps: Sequence[int], values: Sequence[float], **style: Any) -> None:
    axes.plot(steps, values, marker="o" if len(steps) == 1 else None, markersize=4, **style)


def _smooth(values: Sequence[float]) -> Sequence[float]:
    """Centred moving average, with fewer values near the ends."""
    kernel = np.ones(2 * int(len(values) * SMOOTHING_SHARE / 2) + 1)
    sums = np.convolve(values, kernel, mode="same")
    return list(sums / np.convolve(np.ones(len(values)), kernel, mode="same"))
