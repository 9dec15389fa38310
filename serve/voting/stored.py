"""The votes of a study as its files on storage hold them, without a database."""

from collections import Counter

from serve.voting.export import VoteRecord
from serve.voting.files import Assignment, Comparison, StudyFile, StudyFolder, VoteFile


def stored_votes(folder: StudyFolder) -> list[VoteRecord]:
    """The votes that count, oldest first: those that are neither withdrawn nor void, of raters whose data are kept.

    Raters appear by id, not by name. Raises `NotPublishedError` if there is no such study.
    """
    study, digest = folder.read()
    comparisons = {one.id: one for one in study.comparisons}
    added = folder.added()
    assignments = {one.id: one for one in [*study.assignments, *(one for file in added for one in file.assignments)]}
    raters = [rater.id for rater in folder.raters(study) if rater.deleted is None]
    found = []
    for rater in raters:
        votes, withdrawn, revealed = folder.votes_of(rater)
        rounds = Counter(one.assignment for one in withdrawn)
        void = {assignment for one in revealed for assignment in one.void}
        found += [
            _record(study, digest, vote, assignments[vote.assignment], comparisons[vote.comparison])
            for vote in votes
            if vote.round == rounds[vote.assignment]
            and vote.assignment in assignments
            and vote.assignment not in void
            and vote.study_digest == digest
        ]
    return sorted(found, key=lambda record: record.time)


def _record(
    study: StudyFile, digest: str, vote: VoteFile, assignment: Assignment, comparison: Comparison
) -> VoteRecord:
    question = next(one for one in study.questions if one.id == comparison.question)
    digests = {model.id: model.adapter_digest for model in study.models}
    sides = (comparison.first, comparison.second)
    left, right = sides if assignment.first_is_left else sides[::-1]
    return VoteRecord(
        study=study.name,
        study_digest=digest,
        rater=vote.rater,
        kind=vote.kind,
        question=question.name,
        question_id=question.id,
        turns=[turn.model_dump() for turn in question.turns],
        comparison=comparison.id,
        comparison_digest=comparison.digest,
        left_model=left.model,
        right_model=right.model,
        left_digest=digests.get(left.model or ""),
        right_digest=digests.get(right.model or ""),
        left_answer=left.text,
        right_answer=right.text,
        outcome=vote.outcome,
        winner={"left": left.model, "right": right.model}.get(vote.outcome),
        expected=None if comparison.kind != "attention" else "left" if assignment.first_is_left else "right",
        scores=dict(vote.scores),
        note=vote.note,
        seconds=vote.seconds,
        time=vote.time.isoformat(),
    )
