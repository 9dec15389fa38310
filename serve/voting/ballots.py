"""What a rater does: the next comparison, a vote, withdrawing the last one, seeing the models afterwards.

A vote is on storage and in the database before its reply. Both are written under one lock: the transaction holds the
rater's row (in SQLite, the whole database) while the object is written, and commits last. If the process dies between
the two, the rater got no reply, the page shows the comparison again, and the same object is written again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from ft_service.storage.storage import Storage
from serve.database.database import session
from serve.database.tables import AssignmentRow, ComparisonRow, QuestionRow, RaterRow, StudyRow, VoteRow
from serve.http.errors import ApiError
from serve.voting.files import MOST_SCORE, Outcome, RevealedFile, StudyFolder, VoteFile, WithdrawnFile
from serve.voting.links import Rater
from serve.voting.studies import REVEALED, changing

LONGEST_NOTE = 2000
_LONGEST_SECONDS = 86_400.0


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Ballot(_Wire):
    """A vote as the page sends it."""

    assignment: str = Field(pattern=r"^[0-9a-f]{16}$")
    round: int = Field(ge=0, description="From the assignment; a withdrawn vote has an earlier one.")
    outcome: Outcome
    scores: dict[str, int] = Field(
        default_factory=dict, description="Axis -> -2 (left is much better) to 2 (right is much better)."
    )
    note: str = Field(default="", max_length=LONGEST_NOTE)
    seconds: float | None = Field(default=None, ge=0, description="From showing to voting.")


class OfAssignment(_Wire):
    """The body of a request about one assignment."""

    assignment: str = Field(pattern=r"^[0-9a-f]{16}$")


class ShownAnswer(_Wire):
    text: str
    is_cut: bool


class ShownTurn(_Wire):
    role: str
    content: str


class ShownComparison(_Wire):
    """What a rater sees of a comparison. It names no model, and looks the same for every kind."""

    id: str
    round: int
    question: list[ShownTurn]
    left: ShownAnswer
    right: ShownAnswer


class LastVote(_Wire):
    assignment: str
    outcome: Outcome
    can_withdraw: bool
    can_reveal: bool
    is_revealed: bool


class State(_Wire):
    """All that the page shows."""

    title: str
    axes: list[str]
    done: int
    total: int
    comparison: ShownComparison | None = Field(description="None when the rater has judged everything.")
    last: LastVote | None


class Revealed(_Wire):
    """The models of a comparison; None stands for an answer that the makers of the study wrote."""

    left: str | None
    right: str | None
    is_void: bool = Field(description="Whether the models were shown before a vote, so that none counts.")


@dataclass(frozen=True)
class _Assigned:
    """An assignment with its comparison, under the lock of its rater."""

    row: AssignmentRow
    comparison: ComparisonRow
    study: StudyRow

    @property
    def models(self) -> tuple[str | None, str | None]:
        """Left and right."""
        both = (self.comparison.first_model, self.comparison.second_model)
        return both if self.row.first_is_left else (both[1], both[0])


class Ballots:
    """Raises `ApiError` for what a rater may not do, `DatabaseError` or `StorageError` if a vote cannot be kept."""

    def __init__(self, engine: Engine, storage: Storage) -> None:
        self._engine = engine
        self._storage = storage

    def state(self, rater: Rater) -> State:
        """Raises `ApiError` 410 for a study that is closed."""
        with session(self._engine) as opened:
            study = _open_study(opened, rater)
            return _state(opened, rater, study)

    def vote(self, rater: Rater, ballot: Ballot) -> State:
        """Count a vote once, however often it arrives: the first one counts, until it is withdrawn.

        Raises `ApiError` 404, 409 (withdrawn meanwhile, or void), 410 (closed) or 400 (axes).
        """
        with self._changing(rater) as (opened, study):
            assigned = _assigned(opened, rater, study, ballot.assignment)
            row = assigned.row
            if opened.get(VoteRow, row.id) is None:
                _check_may_vote(assigned, ballot)
                vote = _vote_row(rater, ballot)
                opened.add(vote)
                opened.flush()
                StudyFolder(self._storage, rater.study).write_vote(_vote_file(assigned, vote))
                opened.commit()
            return _state(opened, rater, study)

    def withdraw_last(self, rater: Rater, assignment: str) -> State:
        """Withdraw the rater's last vote, so that it can be given again. Again is no error.

        Raises `ApiError` 409 if it is not the last one, or if the models were shown since.
        """
        with self._changing(rater) as (opened, study):
            row = _assigned(opened, rater, study, assignment).row
            vote = opened.get(VoteRow, row.id)
            if vote is not None:
                last = _last_vote(opened, rater)
                if last is None or last.assignment != row.id:
                    raise ApiError(409, "Only the last vote can be withdrawn.", "not_the_last")
                if row.revealed is not None:
                    message = "The models of this comparison were shown, so it cannot be judged again."
                    raise ApiError(409, message, "already_revealed")
                withdrawn = WithdrawnFile(assignment=row.id, round=row.round, time=datetime.now(UTC))
                opened.delete(vote)
                row.round += 1
                opened.flush()
                StudyFolder(self._storage, rater.study).write_withdrawn(rater.id, withdrawn)
                opened.commit()
            return _state(opened, rater, study)

    def reveal(self, rater: Rater, assignment: str) -> Revealed:
        """The models of a comparison.

        Before a vote this makes the assignment void. Afterwards it makes the rater's other assignments of the same
        question void that are not judged yet: the rater would recognise an answer. Raises `ApiError` 409 if the study
        shows models only at the end and the rater is not there yet.
        """
        with self._changing(rater, may_be_closed=True) as (opened, study):
            assigned = _assigned(opened, rater, study, assignment)
            row = assigned.row
            if row.revealed is None:
                if study.settings["reveal"] == "end" and _next(opened, rater) is not None and study.closed is None:
                    message = "This study shows the models once you have judged everything."
                    raise ApiError(409, message, "too_early")
                void = _open_assignments(opened, rater, assigned.comparison.question)
                now = datetime.now(UTC)
                row.revealed = now
                for one in void:
                    one.void = REVEALED
                opened.flush()
                revealed = RevealedFile(assignment=row.id, time=now, void=[one.id for one in void])
                StudyFolder(self._storage, rater.study).write_revealed(rater.id, revealed)
                opened.commit()
            left, right = assigned.models
            return Revealed(left=left, right=right, is_void=row.void is not None)

    @contextmanager
    def _changing(self, rater: Rater, may_be_closed: bool = False) -> Iterator[tuple[Session, StudyRow]]:
        with changing(self._engine) as opened:
            study = _open_study(opened, rater, may_be_closed)
            # Postgres: one request of a rater at a time. The row is read again, since it may just have been deleted.
            row = opened.scalar(select(RaterRow).where(RaterRow.id == rater.id).with_for_update())
            if row is None or row.deleted is not None:
                raise ApiError(410, "This link is no longer valid: its votes were deleted.", "link_deleted")
            yield opened, study


def _open_study(opened: Session, rater: Rater, may_be_closed: bool = False) -> StudyRow:
    study = opened.get(StudyRow, rater.study)
    if study is None:
        raise ApiError(410, "This study is not here any more.", "study_gone")
    if study.closed is not None and not may_be_closed:
        raise ApiError(410, "This study has ended. Votes are no longer taken.", "study_closed")
    return study


def _assigned(opened: Session, rater: Rater, study: StudyRow, assignment: str) -> _Assigned:
    row = opened.get(AssignmentRow, assignment)
    if row is None or row.rater != rater.id:
        raise ApiError(404, "This comparison is not one of yours.", "unknown_assignment", "assignment")
    return _Assigned(row, opened.get_one(ComparisonRow, row.comparison), study)


def _check_may_vote(assigned: _Assigned, ballot: Ballot) -> None:
    if assigned.row.void is not None:
        message = "The models of this comparison were shown before a vote, so it does not count."
        raise ApiError(409, message, "void")
    if ballot.round != assigned.row.round:
        raise ApiError(409, "This vote was withdrawn meanwhile.", "withdrawn")
    axes = assigned.study.settings["axes"]
    assert isinstance(axes, list)
    for axis, score in ballot.scores.items():
        if axis not in axes:
            raise ApiError(400, f"scores: {axis[:40]!r} is no axis of this study.", "invalid_value", "scores")
        if abs(score) > MOST_SCORE:
            raise ApiError(400, f"scores: from -{MOST_SCORE} to {MOST_SCORE}.", "invalid_value", "scores")


def _vote_row(rater: Rater, ballot: Ballot) -> VoteRow:
    return VoteRow(
        assignment=ballot.assignment,
        study=rater.study,
        rater=rater.id,
        round=ballot.round,
        outcome=ballot.outcome,
        scores=ballot.scores,
        note=ballot.note.replace("\0", "").strip(),  # Postgres keeps no NUL
        seconds=None if ballot.seconds is None else round(min(ballot.seconds, _LONGEST_SECONDS), 1),
        time=datetime.now(UTC),
    )


def _vote_file(assigned: _Assigned, vote: VoteRow) -> VoteFile:
    left, right = assigned.models
    return VoteFile.model_validate(
        {
            "study": vote.study,
            "study_digest": assigned.study.digest,
            "rater": vote.rater,
            "assignment": vote.assignment,
            "round": vote.round,
            "kind": assigned.row.kind,
            "comparison": assigned.comparison.id,
            "comparison_digest": assigned.comparison.digest,
            "left": left,
            "right": right,
            "outcome": vote.outcome,
            "scores": vote.scores,
            "note": vote.note,
            "seconds": vote.seconds,
            "time": vote.time,
        }
    )


def _state(opened: Session, rater: Rater, study: StudyRow) -> State:
    done = opened.scalar(select(func.count()).select_from(VoteRow).where(VoteRow.rater == rater.id)) or 0
    total = opened.scalar(
        select(func.count())
        .select_from(AssignmentRow)
        .where(AssignmentRow.rater == rater.id, AssignmentRow.void.is_(None))
    )
    axes: Any = study.settings["axes"]
    coming = _next(opened, rater)
    return State(
        title=study.title,
        axes=axes,
        done=done,
        total=total or 0,
        comparison=None if coming is None else _shown(opened, coming),
        last=_last(opened, rater, study, is_finished=coming is None),
    )


def _next(opened: Session, rater: Rater) -> AssignmentRow | None:
    query = _unjudged(rater).order_by(AssignmentRow.position).limit(1)
    return opened.scalar(query)


def _unjudged(rater: Rater) -> Any:
    return (
        select(AssignmentRow)
        .outerjoin(VoteRow, VoteRow.assignment == AssignmentRow.id)
        .where(AssignmentRow.rater == rater.id, AssignmentRow.void.is_(None), VoteRow.assignment.is_(None))
    )


def _open_assignments(opened: Session, rater: Rater, question: str) -> list[AssignmentRow]:
    query = _unjudged(rater).join(ComparisonRow, ComparisonRow.id == AssignmentRow.comparison)
    return list(opened.scalars(query.where(ComparisonRow.question == question)))


def _last_vote(opened: Session, rater: Rater) -> VoteRow | None:
    return opened.scalar(select(VoteRow).where(VoteRow.rater == rater.id).order_by(VoteRow.time.desc()).limit(1))


def _last(opened: Session, rater: Rater, study: StudyRow, is_finished: bool) -> LastVote | None:
    vote = _last_vote(opened, rater)
    if vote is None:
        return None
    row = opened.get_one(AssignmentRow, vote.assignment)
    outcome: Any = vote.outcome
    return LastVote(
        assignment=row.id,
        outcome=outcome,
        can_withdraw=row.revealed is None,
        can_reveal=is_finished or study.settings["reveal"] == "vote",
        is_revealed=row.revealed is not None,
    )


def _shown(opened: Session, row: AssignmentRow) -> ShownComparison:
    one = opened.get_one(ComparisonRow, row.comparison)
    question = opened.get_one(QuestionRow, one.question)
    first = ShownAnswer(text=one.first_answer, is_cut=one.first_is_cut)
    second = ShownAnswer(text=one.second_answer, is_cut=one.second_is_cut)
    left, right = (first, second) if row.first_is_left else (second, first)
    return ShownComparison(
        id=row.id,
        round=row.round,
        question=[ShownTurn(**turn) for turn in question.turns],
        left=left,
        right=right,
    )
