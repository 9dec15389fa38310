"""Recorded answers of a model: the conversations of a validation file, each ending in that model's own answer.

<folder>/<job id>.jsonl     a conversation a line, in the form of the training file; the last assistant turn is recorded
"""

import json
from collections.abc import Sequence
from pathlib import Path

from ft_service.chat.format import Message
from ft_service.errors import DataError, UsageError
from ft_service.evaluate.ask import Answers, Endpoint, Progress, Question, ask_now
from ft_service.evaluate.held_out import HeldOutRecord, read_held_out
from ft_service.evaluate.suite import HeldOut
from ft_service.migrate.migration import MigrationJob
from ft_service.storage.storage import Storage
from ft_service.text import counted

Prompt = tuple[tuple[str, str], ...]
"""(role, content) of each turn before the answer."""


def questions_file(job: MigrationJob) -> Path:
    """The validation file of a job. Raises `UsageError` for a job without one."""
    if job.validation is not None:
        return job.validation
    name = job.source.validation_file
    if name is not None:
        raise UsageError(f"validation_file = {name!r}: its content is not in --files. Download it there.")
    raise UsageError(
        "It has no validation file, so nothing was held out to compare models on. Name a file of the same form: "
        f"--questions {job.source.id}=FILE."
    )


def read_questions(job: MigrationJob, held_out: HeldOut, seed: int) -> tuple[list[HeldOutRecord], list[str]]:
    """The records of a job's validation file that can be asked, and remarks. Raises `DataError` if there is none."""
    read = read_held_out(held_out, Storage("."), None, seed)
    remarks = []
    if read.with_tools:
        left_out = counted(read.with_tools, "conversation")
        remarks.append(f"{held_out.path}: {left_out} with tools left out: no metric scores the calls of an answer.")
    if others := read.left_out - read.with_tools:
        reasons = "; ".join(read.problems[:others])
        remarks.append(f"{held_out.path}: {counted(others, 'record')} cannot be asked ({reasons}).")
    return list(read.records), remarks


def prompt_of(record: HeldOutRecord) -> Prompt:
    return tuple((turn.role, turn.content) for turn in record.turns[:-1])


def read_recorded(folder: Path, job: MigrationJob) -> dict[Prompt, str]:
    """The answers that were recorded of a job's earlier model. Raises `UsageError` or `DataError`."""
    path = folder / f"{job.source.id}.jsonl"
    if not path.is_file():
        raise UsageError(
            f"{path}: there are no recorded answers of {job.source.fine_tuned_model or job.source.id}. Record them "
            "while the model answers: ft migrate record."
        )
    held_out = HeldOut(path=str(path), format="chat", limit=1_000_000)
    records = read_held_out(held_out, Storage("."), None, 0).records
    return {prompt_of(record): record.turns[-1].content for record in reversed(records)}


def record(
    job: MigrationJob,
    model: str,
    endpoint: Endpoint,
    folder: Path,
    held_out: HeldOut,
    seed: int,
    concurrency: int,
    progress: Progress = lambda done, total: None,
) -> tuple[int, list[str]]:
    """Ask `model` the questions of a job's validation file, and write its answers. Again, it asks what is missing.

    Returns how many answers there are, and remarks. Raises `UsageError`, `DataError` and `ServingError`.
    """
    records, remarks = read_questions(job, held_out, seed)
    answers = Answers(Storage(str(folder)), f"{job.source.id}.parts")
    questions = [question_to(model, one, held_out.max_tokens, seed) for one in records]
    asked = ask_now(endpoint, questions, answers, {}, concurrency=concurrency, progress=progress)
    lines = []
    for one, question in zip(records, questions, strict=True):
        if (answer := answers.get(question)) is not None:
            lines.append(_line(one.turns[:-1], answer.text))
    if asked.stopped or asked.failures:
        reason = asked.stopped or next(iter(asked.failures.values()))
        remarks.append(f"{len(records) - len(lines)} questions have no answer ({reason}). The same command asks again.")
    if not lines:
        raise DataError(f"{model}: answered no question ({'; '.join(remarks)}).")
    Storage(str(folder)).write_bytes(f"{job.source.id}.jsonl", "".join(lines).encode())
    return len(lines), remarks


def question_to(model: str, one: HeldOutRecord, max_tokens: int, seed: int) -> Question:
    return Question(model, messages=prompt_of(one), max_tokens=max_tokens, seed=seed)


def held_out_of(path: Path, metrics: Sequence[str], language: str, limit: int, max_tokens: int) -> HeldOut:
    """A validation file as held-out data of an evaluation. Raises pydantic's `ValidationError`."""
    return HeldOut.model_validate(
        {
            "path": str(path),
            "format": "chat",
            "metrics": list(metrics),
            "language": language,
            "limit": limit,
            "max_tokens": max_tokens,
        }
    )


def _line(turns: Sequence[Message], answer: str) -> str:
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    messages.append({"role": "assistant", "content": answer})
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
