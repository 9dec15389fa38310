"""Studies in the database: opened whole, rebuilt from storage, listed, closed; a rater's data deleted."""

import math
import secrets
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Engine, delete, func, select
from sqlalchemy.orm import Session

from ft_service.errors import NotPublishedError, StorageError, UsageError
from ft_service.storage.storage import Storage
from serve.database.audit import COMMAND_LINE, audit
from serve.database.database import session
from serve.database.tables import (
    AssignmentRow,
    ComparisonRow,
    QuestionRow,
    RaterRow,
    StudyRow,
    VoteRow,
    with_utc,
)
from serve.voting.draw import draw_assignments
from serve.voting.files import AddedFile, Assignment, RaterFile, StudyFile, StudyFolder
from serve.voting.links import link, token_digest, token_of, voting_secret

_TABLES = (VoteRow, AssignmentRow, RaterRow, ComparisonRow, QuestionRow)
"""Of one study, in an order in which they can be deleted."""
REVEALED = "models revealed"
"""Why an assignment is void."""
_writing = threading.Lock()


@dataclass(frozen=True)
class RaterProgress:
    id: str
    name: str | None
    done: int
    assigned: int
    deleted: datetime | None


@dataclass(frozen=True)
class StudySummary:
    name: str
    title: str
    created: datetime
    closed: datetime | None
    models: list[dict[str, Any]]
    settings: dict[str, Any]
    digest: str
    questions: int
    comparisons: int
    reviews: dict[int, int]
    """Number of votes -> number of real comparisons that have so many."""
    raters: list[RaterProgress]

    @property
    def done(self) -> int:
        return sum(rater.done for rater in self.raters)

    @property
    def assigned(self) -> int:
        return sum(rater.assigned for rater in self.raters)


@contextmanager
def changing(engine: Engine) -> Iterator[Session]:
    """A session whose transaction writes, one at a time where the database is one file.

    SQLite lets one transaction write. Waiting in line here is fair, while its own waiting can starve a thread.
    """
    if engine.dialect.name != "sqlite":
        with session(engine) as opened:
            yield opened
        return
    with _writing, session(engine) as opened:
        opened.connection().exec_driver_sql("BEGIN IMMEDIATE")
        yield opened


def open_study(engine: Engine, storage: Storage, name: str, *, by: str = COMMAND_LINE, action: str = "open") -> int:
    """Make the tables of a study from storage, in one transaction, in place of what they hold. Returns its votes.

    Votes that were withdrawn, or on assignments that are void, stay out. Raises `NotPublishedError` if storage has no
    such study, and `StorageError` if a file of it is damaged or belongs to another one.
    """
    folder = StudyFolder(storage, name)
    study, digest = folder.read()
    raters = folder.raters(study)
    assignments = [*study.assignments, *(one for added in folder.added() for one in added.assignments)]
    secret = voting_secret(engine)
    closed = folder.closed()
    with changing(engine) as opened:
        for table in _TABLES:
            opened.execute(delete(table).where(table.study == name))
        opened.execute(delete(StudyRow).where(StudyRow.name == name))
        opened.add(_study_row(study, digest, closed))
        opened.flush()
        opened.add_all(
            QuestionRow(id=one.id, study=name, name=one.name, turns=[turn.model_dump() for turn in one.turns])
            for one in study.questions
        )
        opened.add_all(
            RaterRow(
                id=rater.id,
                study=name,
                name=rater.name,
                token_digest=None if rater.deleted else token_digest(token_of(secret, name, rater.id)),
                deleted=rater.deleted,
            )
            for rater in raters
        )
        opened.flush()
        opened.add_all(_comparison_rows(study))
        opened.flush()
        number = 0
        for rater in raters:
            own = [one for one in assignments if one.rater == rater.id]
            number += _add_rater_rows(opened, folder, own, digest, rater)
        audit(opened, by, f"studies.{action}", name, {"votes": number})
        opened.commit()
    return number


def study_names_in(engine: Engine) -> list[str]:
    """Names of all studies in the database, oldest first."""
    with session(engine) as opened:
        return list(opened.scalars(select(StudyRow.name).order_by(StudyRow.created)))


def study_summaries(engine: Engine) -> list[StudySummary]:
    """All studies that are or were open, oldest first."""
    names = study_names_in(engine)
    with session(engine) as opened:
        return [_summary(opened, name) for name in names]


def study_summary(engine: Engine, name: str) -> StudySummary:
    """Raises `NotPublishedError`."""
    with session(engine) as opened:
        return _summary(opened, name)


def study_links(engine: Engine, name: str, server: str) -> dict[str, str]:
    """Rater -> link, of raters whose data were not deleted. Raises `NotPublishedError`."""
    secret = voting_secret(engine)
    with session(engine) as opened:
        _study(opened, name)
        rows = opened.scalars(
            select(RaterRow).where(RaterRow.study == name, RaterRow.deleted.is_(None)).order_by(RaterRow.name)
        )
        return {row.name or row.id: link(server, token_of(secret, name, row.id)) for row in rows}


def close_study(engine: Engine, storage: Storage, name: str, by: str = COMMAND_LINE) -> None:
    """No vote is taken from now on; again is no error."""
    now = datetime.now(UTC)
    with changing(engine) as opened:
        study = _study(opened, name)
        if study.closed is not None:
            return
        study.closed = now
        audit(opened, by, "studies.close", name)
        opened.flush()
        StudyFolder(storage, name).write_closed(now)
        opened.commit()


def add_rater(engine: Engine, storage: Storage, name: str, rater_name: str, by: str = COMMAND_LINE) -> int:
    """A rater who joins later, for one who left. Returns the number of their assignments.

    They get the comparisons with the fewest votes, at most as many as a rater had at the start, and hidden checks like
    everybody. Raises `UsageError` if the name is taken, the study is closed, or every comparison has its votes.
    """
    folder = StudyFolder(storage, name)
    study, digest = folder.read()
    secret = voting_secret(engine)
    with changing(engine) as opened:
        row = _study(opened, name)
        if row.closed is not None:
            raise UsageError(f"NAME = {name!r}: is closed, so nobody can join it.")
        if not rater_name.strip() or rater_name in opened.scalars(select(RaterRow.name).where(RaterRow.study == name)):
            raise UsageError(f"RATER = {rater_name!r}: is empty, or the study has a rater of this name.")
        votes = _reviews(opened, name)
        real = [one for one in study.comparisons if one.kind == "real"]
        wanted = study.settings.votes_per_item
        few = sorted((one for one in real if votes.get(one.id, 0) < wanted), key=lambda one: votes.get(one.id, 0))
        if not few:
            raise UsageError(f"NAME = {name!r}: every comparison has its {wanted} votes, so nobody else is needed.")
        few = few[: math.ceil(len(real) * wanted / len(study.raters))]
        rater = RaterFile(id=secrets.token_hex(8), name=rater_name)
        assignments = draw_assignments(
            [*few, *(one for one in study.comparisons if one.kind != "real")],
            [rater.id],
            votes_per_item=1,
            repeats=study.settings.repeats,
            controls=study.settings.controls,
            seed=secrets.randbits(32),
        )
        token = token_of(secret, name, rater.id)
        opened.add(RaterRow(id=rater.id, study=name, name=rater_name, token_digest=token_digest(token)))
        opened.flush()
        _add_rater_rows(opened, folder, assignments, digest, rater)
        audit(opened, by, "studies.add_rater", name, {"rater": rater.id})
        opened.flush()
        folder.write_rater(rater)
        folder.write_added(AddedFile(rater=rater.id, time=datetime.now(UTC), assignments=assignments))
        opened.commit()
    return len(assignments)


def delete_rater(engine: Engine, storage: Storage, name: str, rater_name: str, by: str = COMMAND_LINE) -> int:
    """Delete a rater's name, votes and notes, in the database and on storage. Returns how many votes these were.

    The rater's link is no longer valid. Raises `UsageError` if the study has no such rater.
    """
    folder = StudyFolder(storage, name)
    now = datetime.now(UTC)
    with changing(engine) as opened:
        _study(opened, name)
        wanted = select(RaterRow).where(RaterRow.study == name, RaterRow.name == rater_name)
        rater = opened.scalar(wanted.with_for_update())  # a vote that is being written ends first, and goes too
        if rater is None:
            raise UsageError(f"RATER = {rater_name!r}: the study {name} has no such rater. ft study show names them.")
        number = opened.scalar(select(func.count()).select_from(VoteRow).where(VoteRow.rater == rater.id)) or 0
        opened.execute(delete(VoteRow).where(VoteRow.rater == rater.id))
        opened.execute(delete(AssignmentRow).where(AssignmentRow.rater == rater.id))
        rater.name = None
        rater.token_digest = None
        rater.deleted = now
        audit(opened, by, "studies.delete_rater", name, {"rater": rater.id, "votes": number})
        opened.flush()
        # The notice first: a deletion that a crash interrupts must not come back with the next rebuild.
        folder.write_rater(RaterFile(id=rater.id, name=None, deleted=now))
        folder.delete_votes(rater.id)
        opened.commit()
    return number


def _study(opened: Session, name: str) -> StudyRow:
    row = opened.get(StudyRow, name)
    if row is None:
        raise NotPublishedError(f"NAME = {name!r}: the database has no such study. See ft study list.")
    return row


def _study_row(study: StudyFile, digest: str, closed: datetime | None) -> StudyRow:
    return StudyRow(
        name=study.name,
        title=study.title,
        created=study.created,
        closed=closed,
        digest=digest,
        settings=study.settings.model_dump(mode="json"),
        models=[model.model_dump(mode="json") for model in study.models],
    )


def _comparison_rows(study: StudyFile) -> list[ComparisonRow]:
    return [
        ComparisonRow(
            id=one.id,
            study=study.name,
            question=one.question,
            kind=one.kind,
            first_model=one.first.model,
            second_model=one.second.model,
            first_answer=one.first.text,
            second_answer=one.second.text,
            first_is_cut=one.first.is_cut,
            second_is_cut=one.second.is_cut,
            digest=one.digest,
        )
        for one in study.comparisons
    ]


def _add_rater_rows(
    opened: Session, folder: StudyFolder, assignments: Sequence[Assignment], digest: str, rater: RaterFile
) -> int:
    """The rater's assignments and votes. Returns the number of votes that count."""
    if rater.deleted:
        return 0
    votes, withdrawn, revealed = folder.votes_of(rater.id)
    rounds = Counter(one.assignment for one in withdrawn)
    void = {assignment for one in revealed for assignment in one.void}
    revealed_at = {one.assignment: one.time for one in revealed}
    own = {one.id for one in assignments}
    opened.add_all(
        AssignmentRow(
            id=one.id,
            study=folder.name,
            rater=rater.id,
            comparison=one.comparison,
            kind=one.kind,
            position=one.position,
            first_is_left=one.first_is_left,
            round=rounds[one.id],
            revealed=revealed_at.get(one.id),
            void=REVEALED if one.id in void else None,
        )
        for one in assignments
    )
    opened.flush()
    counted = [vote for vote in votes if vote.round == rounds[vote.assignment] and vote.assignment not in void]
    for vote in counted:
        if vote.study_digest != digest or vote.assignment not in own:
            raise StorageError(
                f"{folder.path}/votes/{rater.id}/{vote.assignment}-{vote.round}.json: is a vote of another study. "
                "Move it away."
            )
    opened.add_all(
        VoteRow(
            assignment=vote.assignment,
            study=folder.name,
            rater=rater.id,
            round=vote.round,
            outcome=vote.outcome,
            scores=vote.scores,
            note=vote.note,
            seconds=vote.seconds,
            time=vote.time,
        )
        for vote in counted
    )
    return len(counted)


def _summary(opened: Session, name: str) -> StudySummary:
    study = _study(opened, name)
    questions = opened.scalar(select(func.count()).select_from(QuestionRow).where(QuestionRow.study == name)) or 0
    assigned = _counts(
        opened,
        select(AssignmentRow.rater, func.count())
        .where(AssignmentRow.study == name, AssignmentRow.void.is_(None))
        .group_by(AssignmentRow.rater),
    )
    done = _counts(opened, select(VoteRow.rater, func.count()).where(VoteRow.study == name).group_by(VoteRow.rater))
    real = select(ComparisonRow.id).where(ComparisonRow.study == name, ComparisonRow.kind == "real")
    reviews = _reviews(opened, name)
    comparisons = list(opened.scalars(real))
    raters = opened.scalars(select(RaterRow).where(RaterRow.study == name).order_by(RaterRow.name))
    return StudySummary(
        name=name,
        title=study.title,
        created=with_utc(study.created),
        closed=None if study.closed is None else with_utc(study.closed),
        models=list(study.models),
        settings=dict(study.settings),
        digest=study.digest,
        questions=questions,
        comparisons=len(comparisons),
        reviews=dict(sorted(Counter(reviews.get(one, 0) for one in comparisons).items())),
        raters=[
            RaterProgress(
                row.id,
                row.name,
                done.get(row.id, 0),
                assigned.get(row.id, 0),
                None if row.deleted is None else with_utc(row.deleted),
            )
            for row in raters
        ],
    )


def _reviews(opened: Session, name: str) -> dict[str, int]:
    """Comparison -> its votes, without those of repeats."""
    query = (
        select(AssignmentRow.comparison, func.count())
        .join(VoteRow, VoteRow.assignment == AssignmentRow.id)
        .where(AssignmentRow.study == name, AssignmentRow.kind == "real")
        .group_by(AssignmentRow.comparison)
    )
    return _counts(opened, query)


def _counts(opened: Session, query: Any) -> dict[str, int]:
    return {row[0]: row[1] for row in opened.execute(query)}
