"""Before and after: the recorded answers of the earlier models against those of the new ones, item by item.

Both are scored by the reference answers of the job's validation file, as `ft evaluate` scores held-out records, and
compared in pairs: a difference has an interval, and is called better or worse only where that excludes 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ft_service.errors import DataError, UsageError
from ft_service.evaluate.ask import Answer, Answers, Endpoint, ask_now
from ft_service.evaluate.comparison import Comparison, Comparisons, ItemResult, compare_items, sentence
from ft_service.evaluate.held_out import HELD_OUT, HeldOutRecord, items_of
from ft_service.evaluate.scored import item_result
from ft_service.evaluate.suite import HeldOut
from ft_service.migrate.create import FineTuningServer
from ft_service.migrate.migration import MigrationJob
from ft_service.migrate.recorded import (
    held_out_of,
    prompt_of,
    question_to,
    questions_file,
    read_questions,
    read_recorded,
)
from ft_service.pages.adapter_page import Rows, rows_of
from ft_service.pages.page import render
from ft_service.storage.storage import Storage
from ft_service.text import counted

SHOWN_ITEMS = 30
Show = Callable[[str, int, int], None]
"""Shows progress: the job, its answers, all its questions."""


@dataclass(frozen=True)
class Asking:
    """How models are asked and scored."""

    metrics: Sequence[str] = ("f1",)
    language: str = "en"
    limit: int = 200
    max_tokens: int = 256
    seed: int = 0
    concurrency: int = 8
    questions: dict[str, Path] = field(default_factory=dict)
    """Job at OpenAI -> a file of its questions, in place of its validation file."""

    def held_out(self, job: MigrationJob) -> HeldOut:
        """Raises `UsageError` for a job without questions."""
        path = self.questions.get(job.source.id) or questions_file(job)
        return held_out_of(path, self.metrics, self.language, self.limit, self.max_tokens)


@dataclass
class JobComparison:
    """One job: its earlier model and its new one."""

    source: str
    old_model: str | None
    job: str | None = None
    new_model: str | None = None
    comparison: Comparisons | None = None
    results: list[ItemResult] = field(default_factory=list)
    """The earlier model's answers are `base`, those of the new one `adapter`."""
    remarks: list[str] = field(default_factory=list)
    """Why there is no comparison, and what to know before its figures are trusted."""

    @property
    def rows(self) -> list[Comparison]:
        return [] if self.comparison is None else self.comparison.skills

    @property
    def sentence(self) -> str:
        overall = None if self.comparison is None else self.comparison.overall
        return "" if overall is None else sentence(overall, "The new model")

    def as_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "old_model": self.old_model,
            "job": self.job,
            "new_model": self.new_model,
            "sentence": self.sentence or None,
            "remarks": self.remarks,
            "comparison": None if self.comparison is None else self.comparison.model_dump(mode="json"),
            "items": [result.model_dump(mode="json") for result in self.results],
        }


def compare_jobs(
    jobs: Sequence[MigrationJob],
    server: FineTuningServer,
    endpoint: Endpoint,
    recorded: Path,
    folder: Path,
    asking: Asking,
    show: Show = lambda job, done, total: None,
) -> list[JobComparison]:
    """Compare each job that was carried over; asks the new models on the server.

    `recorded` has the answers of the earlier models, and `folder` keeps those of the new ones, so that the same call
    asks only what is missing. Raises `ServingError` for a server that does not answer.
    """
    found = []
    for job in jobs:
        if job.outcome == "skipped":
            continue
        one = JobComparison(job.source.id, job.source.fine_tuned_model)
        found.append(one)
        try:
            _compare(job, one, server, endpoint, recorded, Storage(str(folder)), asking, show)
        except (UsageError, DataError) as error:
            one.remarks.append(str(error))
    return found


def _compare(
    job: MigrationJob,
    one: JobComparison,
    server: FineTuningServer,
    endpoint: Endpoint,
    recorded: Path,
    storage: Storage,
    asking: Asking,
    show: Show,
) -> None:
    new = server.migrated_job(job.source.id)
    if new is None:
        raise UsageError("It has no job on the server. Create it first: ft migrate openai.")
    one.job = str(new["id"])
    one.new_model = new.get("fine_tuned_model")
    if not one.new_model:
        raise UsageError(f"{one.job} is {new.get('status')}: it has no model yet. Wait until it has succeeded.")
    held_out = asking.held_out(job)
    old = read_recorded(recorded, job)
    records, remarks = read_questions(job, held_out, asking.seed)
    one.remarks += remarks
    asked = [record for record in records if prompt_of(record) in old]
    if missing := len(records) - len(asked):
        one.remarks.append(f"{counted(missing, 'question')} without a recorded answer left out.")
    if not asked:
        raise UsageError("None of the recorded answers belongs to a question of this file.")
    answers = Answers(storage, f"{job.source.id}/{one.job}")
    questions = [question_to(one.new_model, record, held_out.max_tokens, asking.seed) for record in asked]
    outcome = ask_now(
        endpoint,
        questions,
        answers,
        {},
        concurrency=asking.concurrency,
        progress=lambda done, total: show(job.source.id, done, total),
    )
    if outcome.failures or outcome.stopped:
        reason = outcome.stopped or next(iter(outcome.failures.values()))
        one.remarks.append(f"Not every question has an answer ({reason}). The same command asks again.")
    cut = 0
    for record, question in zip(asked, questions, strict=True):
        if (answer := answers.get(question)) is not None:
            cut += answer.is_cut
            one.results += _results(record, held_out, old[prompt_of(record)], answer)
    if cut:
        one.remarks.append(f"{counted(cut, 'answer')} of the new model cut at {held_out.max_tokens} tokens.")
    if one.results:
        one.comparison = compare_items(one.results, asking.seed)


def _results(record: HeldOutRecord, held_out: HeldOut, old: str, new: Answer) -> list[ItemResult]:
    """Both answers, scored by each metric. Raises `DataError` for a reference that a metric cannot score."""
    recorded = Answer(key="", model="", text=old)
    items = items_of(record, held_out, HELD_OUT, None)
    return [item_result(item.model_copy(update={"skill": item.metric}), recorded, new) for item in items]


@dataclass(frozen=True)
class _Part:
    """A job on the page."""

    comparison: JobComparison
    rows: Rows
    examples: list[ItemResult]


def comparison_page(found: Sequence[JobComparison]) -> str:
    """The comparisons as a self-contained page."""
    parts = []
    for one in found:
        questions = [result for result in one.results if result.counts]
        questions.sort(key=lambda result: result.change)
        parts.append(_Part(one, rows_of(one.rows, "earlier", "new"), questions[:SHOWN_ITEMS]))
    return render("migration.html.jinja", parts=parts)
