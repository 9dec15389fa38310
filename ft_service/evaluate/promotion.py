"""Whether an adapter may be promoted: the thresholds of its suite against what was measured of exactly these weights.

A check that fails can be waived by its name, with a reason. The promotion keeps every check and every reason.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ft_service.errors import PromotionError, UsageError
from ft_service.evaluate.evaluation import Evaluation
from ft_service.evaluate.scorecard import ScoreCard, read_scorecard
from ft_service.evaluate.statistics.intervals import FEWEST_RATERS_FOR_A_VERDICT, Share
from ft_service.registry.promotions import PassedCheck, Promotion, Promotions
from ft_service.registry.registry import AdapterRecord, Registry
from ft_service.storage.storage import Storage
from ft_service.text import counted

CHECKS = ("evaluated", "complete", "evidence", "forgetting", "stability", "votes", "win share")


@dataclass(frozen=True)
class PeoplesVotes:
    """Votes that compare an adapter with other models, and the share of them that it wins; None without a vote."""

    votes: int = 0
    win_share: Share | None = None
    raters: int = 0


def promote(
    storage: Storage,
    adapter_id: str,
    suite: str | None = None,
    waived: Mapping[str, str] | None = None,
    people: PeoplesVotes = PeoplesVotes(),
) -> Promotion:
    """Give the adapter its alias, if it passes the checks of the suite, or those that fail are waived.

    `suite` is the name of an evaluated suite; it is needed where there are several. Raises `PromotionError` with every
    check that failed, `UsageError`, or `NotPublishedError`.
    """
    waived = waived or {}
    _check_waivers(waived)
    registry = Registry(storage)
    record = registry.resolve(adapter_id)
    evaluation = _evaluation(read_scorecard(storage, record.id), record, suite)
    checks = [
        check.model_copy(update={"waived": waived.get(check.name)}) if not check.passed else check
        for check in checks_of(record, evaluation, people)
    ]
    failed = [check for check in checks if not check.passed and check.waived is None]
    if failed:
        raise PromotionError(record.id, [f"{check.name}: {check.detail}" for check in failed], failed[0].name)
    unused = sorted(set(waived) - {check.name for check in checks if check.waived is not None})
    if unused:
        raise UsageError(f"--waive = {unused[0]!r}: that check did not fail, or does not apply. Leave it out.")
    return Promotions(registry).promote(record, evaluation.id if evaluation else None, checks)


def checks_of(record: AdapterRecord, evaluation: Evaluation | None, people: PeoplesVotes) -> list[PassedCheck]:
    """Every check that the thresholds of the suite ask for; without an evaluation, only that there is none."""
    return list(_checks(record, evaluation, people))


def _checks(record: AdapterRecord, evaluation: Evaluation | None, people: PeoplesVotes) -> Iterator[PassedCheck]:
    if evaluation is None:
        detail = f"no evaluation of these weights. Run: ft evaluate {record.id} --suite general-en"
        yield PassedCheck(name="evaluated", passed=False, detail=detail)
        return
    thresholds = evaluation.suite.thresholds
    yield PassedCheck(name="evaluated", passed=True, detail=f"{evaluation.suite.name}, {evaluation.id}")
    missing = counted(evaluation.num_failures, "question")
    detail = "every question has an answer" if evaluation.is_complete else f"{missing} without an answer"
    yield PassedCheck(name="complete", passed=evaluation.is_complete, detail=detail)
    asked = (
        f"{counted(evaluation.items, 'question')} answered by both models; the suite asks for {thresholds.min_items}"
    )
    yield PassedCheck(name="evidence", passed=evaluation.items >= thresholds.min_items, detail=asked)
    forgetting = evaluation.forgetting
    yield PassedCheck(name="forgetting", passed=forgetting.verdict == "within the limit", detail=forgetting.sentence)
    if thresholds.min_stability is not None:
        stability = evaluation.stability
        agreement = stability.adapter.self_agreement if stability else None
        found = "not measured" if agreement is None else f"answers to the same question overlap by {agreement:.0%}"
        detail = f"{found}; the suite asks for {thresholds.min_stability:.0%}"
        passed = agreement is not None and agreement >= thresholds.min_stability
        yield PassedCheck(name="stability", passed=passed, detail=detail)
    if thresholds.min_votes is not None:
        detail = f"{counted(people.votes, 'vote')} of people; the suite asks for {thresholds.min_votes}"
        yield PassedCheck(name="votes", passed=people.votes >= thresholds.min_votes, detail=detail)
    if thresholds.min_win_share is not None:
        yield _win_share_check(people, thresholds.min_win_share)


def _win_share_check(people: PeoplesVotes, least: float) -> PassedCheck:
    """The whole interval must lie above the threshold, and one or two people say nothing about others."""
    share = people.win_share
    found = "no votes of people"
    if share is not None:
        interval = f"{share.interval.low:.0%} to {share.interval.high:.0%}"
        found = f"wins {share.value:.0%} of {counted(people.votes, 'vote')} of {counted(people.raters, 'rater')}"
        found = f"{found} ({interval})"
    passed = share is not None and share.interval.low >= least and people.raters >= FEWEST_RATERS_FOR_A_VERDICT
    wanted = f"the suite asks for {least:.0%} at the lower end, from {FEWEST_RATERS_FOR_A_VERDICT} raters or more"
    return PassedCheck(name="win share", passed=passed, detail=f"{found}; {wanted}")


def _evaluation(card: ScoreCard | None, record: AdapterRecord, suite: str | None) -> Evaluation | None:
    """The evaluation of these weights by the suite; by the only one that there is, if none is named."""
    evaluations = card.evaluations if card else {}
    current = {name: one for name, one in evaluations.items() if one.adapter.digest == record.digest}
    if suite is not None:
        if suite not in current:
            others = ", ".join(current) or "none"
            raise UsageError(
                f"--suite = {suite!r}: {record.id} was not evaluated by it. Evaluated by: {others}. Run: ft evaluate "
                f"{record.id} --suite {suite}"
            )
        return current[suite]
    if len(current) > 1:
        raise UsageError(f"--suite: {record.id} was evaluated by {', '.join(current)}. Name the one that decides.")
    return next(iter(current.values()), None)


def _check_waivers(waived: Mapping[str, str]) -> None:
    for name, reason in waived.items():
        if name not in CHECKS:
            raise UsageError(f"--waive = {name!r}: is no check. Checks: {', '.join(CHECKS)}.")
        if not reason.strip():
            raise UsageError(f"--waive = {name!r}: has no reason. Write --waive {name}=REASON.")


def parse_waivers(given: Sequence[str]) -> dict[str, str]:
    """``["forgetting=Only German is asked."]`` -> name to reason. Raises `UsageError`."""
    waived = dict(text.partition("=")[::2] for text in given)
    _check_waivers(waived)
    return waived
