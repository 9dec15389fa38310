"""Votes as rows, for people and for training: CSV, JSON lines, and preference pairs for DPO."""

import csv
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Engine, select

from serve.database.database import session
from serve.database.tables import AssignmentRow, ComparisonRow, QuestionRow, RaterRow, StudyRow, VoteRow, with_utc

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet takes a cell that begins so for a formula."""


@dataclass(frozen=True)
class VoteRecord:
    """One vote that counts, with everything it was about. `scores` favour the left answer below 0, the right above."""

    study: str
    study_digest: str
    rater: str
    kind: str
    """real, repeat, control or attention"""
    question: str
    question_id: str
    turns: list[dict[str, str]]
    comparison: str
    comparison_digest: str
    left_model: str | None
    right_model: str | None
    left_digest: str | None
    right_digest: str | None
    left_answer: str
    right_answer: str
    outcome: str
    winner: str | None
    expected: str | None
    """The right outcome of an attention item."""
    scores: dict[str, int]
    note: str
    seconds: float | None
    time: str


def vote_records(engine: Engine, study: str) -> list[VoteRecord]:
    """All votes of a study, oldest first."""
    query = (
        select(VoteRow, AssignmentRow, ComparisonRow, QuestionRow, RaterRow, StudyRow)
        .join(AssignmentRow, AssignmentRow.id == VoteRow.assignment)
        .join(ComparisonRow, ComparisonRow.id == AssignmentRow.comparison)
        .join(QuestionRow, QuestionRow.id == ComparisonRow.question)
        .join(RaterRow, RaterRow.id == VoteRow.rater)
        .join(StudyRow, StudyRow.name == VoteRow.study)
        .where(VoteRow.study == study)
        .order_by(VoteRow.time)
    )
    with session(engine) as opened:
        return [_record(*row) for row in opened.execute(query)]


def _record(
    vote: VoteRow,
    assignment: AssignmentRow,
    comparison: ComparisonRow,
    question: QuestionRow,
    rater: RaterRow,
    study: StudyRow,
) -> VoteRecord:
    digests = {model["id"]: model["adapter_digest"] for model in study.models}
    first = (comparison.first_model, comparison.first_answer)
    second = (comparison.second_model, comparison.second_answer)
    left, right = (first, second) if assignment.first_is_left else (second, first)
    winner = {"left": left[0], "right": right[0]}.get(vote.outcome)
    expected = None
    if comparison.kind == "attention":
        expected = "left" if assignment.first_is_left else "right"
    return VoteRecord(
        study=vote.study,
        study_digest=study.digest,
        rater=rater.name or rater.id,
        kind=assignment.kind,
        question=question.name,
        question_id=question.id,
        turns=list(question.turns),
        comparison=comparison.id,
        comparison_digest=comparison.digest,
        left_model=left[0],
        right_model=right[0],
        left_digest=_text(digests.get(left[0] or "")),
        right_digest=_text(digests.get(right[0] or "")),
        left_answer=left[1],
        right_answer=right[1],
        outcome=vote.outcome,
        winner=winner,
        expected=expected,
        scores=dict(vote.scores),
        note=vote.note,
        seconds=vote.seconds,
        time=with_utc(vote.time).isoformat(),
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def as_jsonl(records: Iterable[VoteRecord]) -> str:
    return _lines(asdict(record) for record in records)


def as_csv(records: Sequence[VoteRecord], axes: Sequence[str]) -> str:
    """One row a vote, one column for each axis. A text that a spreadsheet would run as a formula gets a quote first."""
    names = [name for name in VoteRecord.__dataclass_fields__ if name != "scores"]
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([*names, *(f"score_{axis}" for axis in axes)])
    for record in records:
        cells = {**asdict(record), "turns": shown_turns(record.turns)}
        writer.writerow([_cell(cells[name]) for name in names] + [record.scores.get(axis, "") for axis in axes])
    return out.getvalue()


def as_preferences(records: Iterable[VoteRecord]) -> str:
    """Lines of {"prompt", "chosen", "rejected"}: each comparison in which most decisive votes agree.

    Repeats, controls and attention items are left out, and so are comparisons without a majority, or with as many
    votes for "both bad" as for the winner. If every question is one turn of the user, the three are texts; otherwise
    they are lists of messages, in every line.
    """
    by_comparison: dict[str, list[VoteRecord]] = defaultdict(list)
    for record in records:
        if record.kind == "real":
            by_comparison[record.comparison].append(record)
    pairs = [pair for votes in by_comparison.values() if (pair := _preferred(votes))]
    is_plain = all([turn["role"] for turn in turns] == ["user"] for turns, _, _ in pairs)
    return _lines(_plain(pair) if is_plain else _conversation(pair) for pair in pairs)


Preference = tuple[list[dict[str, str]], str, str]


def _preferred(votes: Sequence[VoteRecord]) -> Preference | None:
    outcomes = Counter(vote.winner or vote.outcome for vote in votes)
    one = votes[0]
    assert one.left_model and one.right_model
    left = outcomes[one.left_model]
    right = outcomes[one.right_model]
    if left == right or max(left, right) <= outcomes["both bad"] or one.left_answer == one.right_answer:
        return None
    answers = (one.left_answer, one.right_answer) if left > right else (one.right_answer, one.left_answer)
    return one.turns, *answers


def _plain(pair: Preference) -> dict[str, Any]:
    turns, chosen, rejected = pair
    return {"prompt": turns[0]["content"], "chosen": chosen, "rejected": rejected}


def _conversation(pair: Preference) -> dict[str, Any]:
    turns, *answers = pair
    chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in answers)
    return {"prompt": turns, "chosen": chosen, "rejected": rejected}


def shown_turns(turns: Sequence[dict[str, str]]) -> str:
    """A question as one text: its only turn, or all of them with their roles."""
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def _cell(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _lines(values: Iterable[Any]) -> str:
    return "".join(_line(values))


def _line(values: Iterable[Any]) -> Iterator[str]:
    return (json.dumps(value, ensure_ascii=False) + "\n" for value in values)
