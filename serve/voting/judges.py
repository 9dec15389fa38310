"""A language model judges the answers that people compare, so that its agreement with people can be measured.

It gets the same questions and texts, in both orders. Its verdicts enter no result of the people.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from ft_service.errors import ServingError
from ft_service.evaluate.ask import Answers, Endpoint, ask_now
from ft_service.evaluate.judge import both_orders, decide
from ft_service.evaluate.statistics.agreement import JudgeAgreement, judge_agreement
from ft_service.evaluate.statistics.sentences import judge_words
from ft_service.evaluate.suite import Judge
from serve.voting.export import VoteRecord, shown_turns
from serve.voting.files import Comparison, JudgeFile, JudgeVerdict, StudyFile, StudyFolder
from serve.voting.results import as_vote

Progress = Callable[[int, int], None]


def judge_study(
    folder: StudyFolder,
    judge: Judge,
    endpoint: Endpoint,
    concurrency: int = 8,
    progress: Progress = lambda done, total: None,
) -> JudgeFile:
    """Ask a judge about every comparison of two models, and keep its verdicts beside the study.

    What has been answered is not asked again. Raises `NotPublishedError`, and `ServingError` if it does not answer all.
    """
    study, digest = folder.read()
    questions = {
        question.id: shown_turns([turn.model_dump() for turn in question.turns]) for question in study.questions
    }
    asked = [
        (one, both_orders(judge, questions[one.question], one.first.text, one.second.text)) for one in _real(study)
    ]
    name = _file_name(judge)
    answers = Answers(folder.storage, folder.judge_folder(name))
    everything = [question for _, both in asked for question in both]
    result = ask_now(endpoint, everything, answers, {}, concurrency=concurrency, progress=progress)
    if result.failures:
        reason = result.stopped or next(iter(result.failures.values()))
        raise ServingError(
            f"{judge.model}: {len(result.failures)} of {len(everything)} verdicts are missing ({reason}). The same "
            "command asks only these again."
        )
    decided = [(one, decide((answers.get(both[0]), answers.get(both[1])))) for one, both in asked]
    winners = {"first": lambda one: one.first.model, "second": lambda one: one.second.model}
    verdicts = [
        JudgeVerdict(
            comparison=one.id,
            winner=winners[decision.better](one) if decision.better else None,
            disagreed=decision.disagreed,
        )
        for one, decision in decided
        if decision is not None
    ]
    content = JudgeFile(
        model=judge.model,
        rubric=judge.rubric,
        study_digest=digest,
        time=datetime.now(UTC),
        verdicts=verdicts,
        unread=len(asked) - len(verdicts),
    )
    folder.write_judge(name, content)
    return content


def agreement_with(judge: JudgeFile, study: StudyFile, votes: Sequence[VoteRecord]) -> JudgeAgreement | None:
    """None if nobody has voted on what was judged."""
    comparisons = {one.id: one for one in study.comparisons}
    verdicts = {}
    for verdict in judge.verdicts:
        one = comparisons[verdict.comparison]
        first, second = sorted((str(one.first.model), str(one.second.model)))
        verdicts[one.question, (first, second)] = verdict.winner
    return judge_agreement([as_vote(vote) for vote in votes], verdicts)


def judge_lines(folder: StudyFolder, votes: Sequence[VoteRecord]) -> list[str]:
    """A sentence for each judge of exactly this study. Raises `NotPublishedError`."""
    study, digest = folder.read()
    found = []
    for judge in folder.judges():
        agreement = agreement_with(judge, study, votes) if judge.study_digest == digest else None
        if agreement is not None:
            found.append(f"Judge: {judge_words(judge.model, agreement)}")
    return found


def _real(study: StudyFile) -> list[Comparison]:
    return [one for one in study.comparisons if one.kind == "real"]


def _file_name(judge: Judge) -> str:
    """The same for the same model and rubric."""
    name = re.sub(r"[^a-z0-9-]+", "-", judge.model.lower()).strip("-")[:60] or "judge"
    return f"{name}-{hashlib.sha256(f'{judge.model} {judge.rubric}'.encode()).hexdigest()[:8]}"
