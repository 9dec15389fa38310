"""The run report: self-contained, safe with hostile content, correct, and available at any time of a run."""

import re
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ft_service.errors import NotPublishedError
from ft_service.pages.run_report import RunContents, Sample, render_report, write_report
from ft_service.plan.facts import DatasetFacts
from ft_service.plan.plan import RunPlan
from ft_service.registry.registry import DatasetRef
from ft_service.runs.events import Event, EventLog, Notice, TrainingStarted, WorkerPlace
from ft_service.runs.folder import RunFolder, RunStatus
from ft_service.runs.lease import Lease
from ft_service.runs.metrics import JsonlSink, StepMetrics
from ft_service.spec.load import parse_run_spec
from ft_service.storage.storage import Storage

RUN = "support-bot-1"
START = datetime(2026, 7, 3, 9, 0, tzinfo=UTC)
SPEC = """
name: support-bot
model: {base: some/llama}
method: {type: lora, lora_rank: 8}
data:
  train: [{path: tickets.jsonl}, {path: faq.jsonl}]
  max_seq_len: 100
storage: /data/ft
"""
HOSTILE = "</pre></details><script src='//evil.example/x.js'>alert(1)</script><img src=x onerror=alert(2)>"


def a_plan(**changes: object) -> RunPlan:
    facts = DatasetFacts(digest="d", conversations=900, rows=80, tokens=7600, loss_tokens=1900, truncated=7)
    values = {
        "spec": parse_run_spec(SPEC),
        "dataset": facts,
        "base_short_name": "llama",
        "parameters": 1_000_000,
        "trainable_parameters": 10_000,
        "zero_stage": 2,
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "global_batch_size": 64,
        "num_steps": 10,
        "epochs": 3.0,
        "warmup_steps": 1,
        "learning_rate": 2e-4,
        "activation_checkpointing": False,
        "validate_every_steps": 2,
        "tokens": 22_800,
        "loss_tokens": 5700,
        "memory_gib": {"weights": 5.9, "total": 33.6},
        "summary": ["Batch: 8 rows x 4 workers x 2 accumulation = 64 rows per step."],
        "warnings": ["7 of 900 examples are cut."],
        "remarks": ["Built with Llama."],
    }
    return RunPlan.model_validate({**values, **changes})


def steps(validation_losses: dict[int, float], count: int = 10) -> list[StepMetrics]:
    """Training loss falls from 1.95 by 0.05 a step; a step takes 30 s."""
    return [
        StepMetrics(
            step=step,
            epoch=step * 0.3,
            loss=2.0 - 0.05 * step,
            validation_loss=validation_losses.get(step),
            learning_rate=1e-4,
            grad_norm=0.5,
            tokens=2000,
            loss_tokens=500,
            tokens_per_second=1000.0 + step,
            peak_memory_gib=31.4,
            time=START + timedelta(seconds=30 * step),
        )
        for step in range(1, count + 1)
    ]


def a_run(**changes: object) -> RunContents:
    values = {
        "run_id": RUN,
        "status": RunStatus(run_id=RUN, state="succeeded", time=START),
        "spec_yaml": SPEC,
        "plan": a_plan(),
        "sources": [
            DatasetRef(path="tickets.jsonl", source="https://example.com/t", license="MIT", records=750, digest="a"),
            DatasetRef(path="faq.jsonl", source=None, license=None, records=250, digest="b"),
        ],
        "metrics": steps({2: 1.9, 4: 1.8, 6: 1.7, 8: 1.6, 10: 1.5}),
        "events": [Event(time=START, type="running", message="4 workers, 10 steps.")],
        "samples": [
            Sample(prompt="道を教えて", reference="右です", base="I cannot.", adapter="まっすぐ進んで右です。")
        ],
    }
    return RunContents(**{**values, **changes})  # type: ignore[arg-type]


class Page(HTMLParser):
    """Tags with their attributes, the headings, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "h2":
            self.headings.append(data)
        if "style" not in self._open:
            self.text += f"{data} "

    def names(self) -> set[str]:
        return {tag for tag, _ in self.tags}


def test_the_report_needs_no_network_and_runs_no_script() -> None:
    html = render_report(a_run(sources=[]))
    page = Page(html)
    assert "://" not in html
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data", "poster"):
            assert (attributes.get(name) or "#").startswith("#")
    assert not page.names() & {"script", "link", "iframe", "object", "embed", "base"}
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*[\"']?([^)]*)", html))


def test_content_of_a_run_is_escaped() -> None:
    source = DatasetRef(path=HOSTILE, source=f"javascript:{HOSTILE}", license=HOSTILE, records=1, digest="a")
    hostile = a_run(
        run_id=HOSTILE,
        status=RunStatus(run_id=RUN, state="failed", time=START, message=HOSTILE),
        spec_yaml=HOSTILE,
        plan=a_plan(summary=[HOSTILE], warnings=[HOSTILE], remarks=[HOSTILE], memory_gib={HOSTILE: 1.0}),
        sources=[source],
        events=[Event.model_validate({"time": START, "type": HOSTILE, "message": HOSTILE, HOSTILE: HOSTILE})],
        samples=[Sample(prompt=HOSTILE, reference=HOSTILE, base=HOSTILE, adapter=HOSTILE)],
    )
    page = Page(render_report(hostile))
    assert not page.names() & {"script", "img"}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    # Run id (twice), failure, warning, prompt, base, adapter, reference, sentence, remark, spec, source, event, ...
    assert page.text.count(HOSTILE) >= 13


def test_every_section_shows_the_figures_of_the_run() -> None:
    page = Page(render_report(a_run()))
    assert page.headings == ["Metrics", "Samples", "Plan", "Data", "Events", "Provenance"]
    for text in (
        "support-bot succeeded base some/llama method lora, rank 8 run support-bot-1",
        "Training loss 1.5000 1.9500 at step 1",
        "Best validation loss 1.5000 at step 10",
        "Steps 10 of 10 · 3.00 epochs",
        "Tokens 20.0k 25% loss tokens",  # 10 steps of 2000, of which 500 train
        "Time 5m00s",  # from the event at the start to the tenth step
        "Throughput 1.0k tokens/s, median",
        "Peak memory 31.4 GiB 33.6 GiB planned",
        "Batch: 8 rows x 4 workers x 2 accumulation = 64 rows per step.",
        "7 of 900 examples are cut.",
        "Built with Llama.",
        "memory_gib.weights 5.9",
        "rows filled 95%",  # 7600 tokens in 80 rows of 100
        "tickets.jsonl https://example.com/t MIT 750 75%",
        "faq.jsonl not stated 250 25%",
        "Prompt 道を教えて Base I cannot. adapter まっすぐ進んで右です。",
        "2026-07-03 09:00:00 running 4 workers, 10 steps.",
        "Nothing has been published.",
    ):
        assert text in page.text
    assert "Overfitting" not in page.text


def test_charts_follow_the_theme() -> None:
    html = render_report(a_run())
    figures = re.findall(r"<figure.*?</figure>", html, re.DOTALL)
    titles = [re.findall(r"<h3>(.*?)</h3>", figure)[0] for figure in figures]
    assert titles == [
        "Loss, nats per loss token",
        "Learning rate",
        "Gradient norm, before clipping",
        "Throughput, tokens/s",
        "Peak memory of a worker, GiB",
    ]
    for figure in figures:
        assert "<svg viewBox=" in figure
        assert "var(--muted)" in figure
    assert "var(--train)" in figures[0]
    assert "var(--validation)" in figures[0]


def test_overfitting_is_a_warning_at_the_top() -> None:
    metrics = steps({2: 1.9, 4: 1.6, 6: 1.7, 8: 1.8, 10: 1.9})
    html = render_report(a_run(metrics=metrics))
    text = Page(html).text
    assert "Validation loss was lowest at step 4 (1.6000) and rose to 1.9000" in text
    assert text.index("Overfitting") < text.index("Metrics")
    assert "best 1.6000 at step 4" in text


def test_a_full_run_compares_base_and_fine_tuned() -> None:
    spec = parse_run_spec(SPEC, ["method={type: full}"])
    text = Page(render_report(a_run(plan=a_plan(spec=spec)))).text
    assert "fine-tuned まっすぐ進んで右です。" in text
    assert "method full run" in text


@pytest.mark.parametrize("metrics", [steps({}, count=1), steps({1: 1.9}, count=1), steps({}, count=3)])
def test_a_run_with_few_steps_or_no_validation_renders(metrics: list[StepMetrics]) -> None:
    page = Page(render_report(a_run(metrics=metrics)))
    assert [tag for tag, _ in page.tags].count("svg") == 5


def test_a_nan_loss_does_not_break_the_report() -> None:
    metrics = steps({2: 1.9, 4: float("nan")})
    metrics[-1] = metrics[-1].model_copy(update={"loss": float("nan"), "grad_norm": float("inf")})
    text = Page(render_report(a_run(metrics=metrics))).text
    assert "Training loss nan" in text
    assert "Best validation loss 1.9000 at step 2" in text


def test_a_run_that_failed_before_its_plan_shows_the_reason(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    RunFolder(storage, RUN).set_state("failed", "data/tickets.jsonl:17: no field 'output'.")
    EventLog(storage, RUN).emit(Notice(type="failed", message="no field 'output'"))
    write_report(storage, RUN)
    text = Page(storage.read_bytes(f"runs/{RUN}/report.html").decode()).text
    assert "This run failed data/tickets.jsonl:17: no field 'output'." in text
    assert "No step has completed." in text
    assert "No plan has been made." in text


def test_events_show_their_data() -> None:
    workers = [WorkerPlace(host="node-7", pid=31)]
    event = TrainingStarted(time=START, message="Training from step 20.", step=20, repeated=3, workers=workers)
    text = Page(render_report(a_run(events=[event]))).text
    for part in ("training Training from step 20.", "step = 20", "repeated = 3", "node-7"):
        assert part in text


def test_the_report_is_read_from_the_files_of_the_run(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    run = RunFolder(storage, RUN)
    contents = a_run()
    assert contents.plan is not None
    run.write_plan(contents.plan.spec, contents.plan, list(contents.sources))
    run.set_state("running")
    sink = JsonlSink(storage, RUN)
    for metrics in contents.metrics:
        sink(metrics)
    storage.write_json(f"runs/{RUN}/samples.json", [sample.model_dump() for sample in contents.samples])
    with Lease(run, log=lambda text: None):  # its driver lives
        write_report(storage, RUN)
    text = Page(storage.read_bytes(f"runs/{RUN}/report.html").decode()).text
    for part in (
        "support-bot running",
        "Best validation loss 1.5000",
        "まっすぐ進んで右です。",
        "faq.jsonl not stated 250",
    ):
        assert part in text


def test_the_same_run_gives_the_same_page() -> None:
    assert render_report(a_run()) == render_report(a_run())


def test_an_unknown_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotPublishedError, match="run = 'nowhere': does not exist on"):
        write_report(Storage(str(tmp_path)), "nowhere")
