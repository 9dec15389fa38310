"""Results in plain words, for pages and terminals."""

from ft_service.evaluate.statistics.agreement import Alpha, JudgeAgreement, RaterReport, RaterVerdict
from ft_service.evaluate.statistics.flips import FlipResult
from ft_service.evaluate.statistics.intervals import Interval, Share, Verdict
from ft_service.evaluate.statistics.paired import PairedComparison
from ft_service.evaluate.statistics.strengths import ExpectedShare, Strength
from ft_service.evaluate.statistics.study import StudyResult
from ft_service.evaluate.statistics.votes import ControlResult, Outcome, PairResult, SideResult
from ft_service.text import counted

MANY_VOTES = 10_000


def percent(value: float, interval: Interval, of: str = "") -> str:
    """``64 % of comparisons, 58 to 70 %``. With a decimal where rounding could move a bound onto none, half or all."""
    bounds = (interval.low, interval.high)
    digits = 1 if any(0 < abs(bound - mark) < 0.01 for bound in bounds for mark in (0, 0.5, 1)) else 0
    whole = f" of {of}" if of else ""
    return f"{100 * value:.{digits}f} %{whole}, {100 * interval.low:.{digits}f} to {100 * interval.high:.{digits}f} %"


def share_words(share: Share, of: str = "") -> str:
    """``64 % of comparisons, 58 to 70 %``."""
    return percent(share.value, share.interval, of)


def paired_words(
    result: PairedComparison, *, base: str = "base", other: str = "adapter", percentages: bool = True
) -> str:
    """Scores, difference, verdict, and what the items can show.

    `percentages`: scores between 0 and 1, shown as percentages; otherwise in their own unit.
    """
    scale = 100 if percentages else 1
    digits = 1 if percentages else 3
    mark = " %" if percentages else ""
    unit = " points" if percentages else ""

    def number(value: float, sign: str = "") -> str:
        return f"{scale * value:{sign}.{digits}f}"

    groups = "" if result.clusters == result.items else f" in {counted(result.clusters, 'group')}"
    scores = f"{other} scores {number(result.other_mean)}{mark} and {base} {number(result.base_mean)}{mark}"
    interval = f"{number(result.interval.low, '+')} to {number(result.interval.high, '+')}"
    difference = f"a difference of {number(result.difference, '+')}{unit}, {interval}"
    verdict = verdict_words(result.verdict, other, result.reason)
    words = f"On {counted(result.items, 'item')}{groups} {scores}: {difference}. {verdict}"
    if result.verdict is Verdict.NOT_SETTLED and result.smallest_effect is not None:
        effect = f"{number(result.smallest_effect)}{unit}"
        words += f" With such items, a true difference of {effect} shows in 4 of 5 comparisons."
    return words


def verdict_words(verdict: Verdict, name: str, reason: str) -> str:
    """``Not settled: too few items differ.`` or ``Verdict: adapter is better.``"""
    return f"Not settled: {reason}." if verdict is Verdict.NOT_SETTLED else f"Verdict: {name} is {verdict}."


def pair_words(result: PairResult) -> str:
    """The win share of one pair, what counts as half, the verdict, and how many votes are missing."""
    share = share_words(result.share, f"comparisons with {result.second}")
    votes = f"{counted(result.votes, 'vote')} of {counted(result.raters, 'rater')}"
    words = [f"{result.first} wins {share} ({votes})."]
    halves = [
        *([counted(result.ties, "tie")] if result.ties else []),
        *([f'{result.both_bad:,} times "both bad"'] if result.both_bad else []),
    ]
    if halves:
        words.append(f"Counted as half a win for each: {' and '.join(halves)}.")
    words.append(verdict_words(result.verdict, result.first, result.reason))
    if result.verdict is Verdict.NOT_SETTLED:
        words.append(more_votes_words(result.more_votes))
    return " ".join(words)


def more_votes_words(more_votes: int | None) -> str:
    """How many votes are missing, or that no number is enough."""
    if more_votes is None:
        return "At exactly half, no number of votes settles it."
    if more_votes > MANY_VOTES:
        return f"More than {MANY_VOTES:,} further votes are needed to settle it."
    return f"About {counted(more_votes, 'more vote')}, from more raters, would settle it if the share stays as it is."


def side_words(result: SideResult) -> str:
    """Whether raters prefer a side."""
    if result.share is None:
        return "No vote is for one side."
    preference = f"Raters prefer the {result.preferred} side" if result.preferred else "No side is preferred"
    return f"The left answer wins {share_words(result.share, 'votes for one side')}. {preference}."


def control_words(result: ControlResult) -> str:
    """What raters see where there is no difference."""
    if result.decided is None:
        return "No model was compared with itself."
    share = share_words(result.decided, counted(result.votes, "comparison"))
    words = f"Where both answers come from the same model, raters still prefer one in {share}."
    return words if result.sides.preferred is None else f"{words} They prefer the {result.sides.preferred} side there."


def alpha_words(result: Alpha) -> str:
    """How far the raters agree."""
    if result.value is None or result.interval is None:
        return "Agreement cannot be computed: too few answers have two judgements, or all judgements are the same."
    return (
        f"Agreement between raters is {result.value:.2f}, {result.interval.low:.2f} to {result.interval.high:.2f}; "
        "0 is what chance gives, 1 is full agreement."
    )


def judge_words(judge: str, result: JudgeAgreement) -> str:
    """How far a judge decides as people do, beside how far people do among themselves."""
    words = f"{judge} decides as people do in {share_words(result.with_people, 'votes')}"
    if result.between_people is not None:
        words += f"; two people decide the same in {share_words(result.between_people, 'cases')}"
    alpha = result.alpha
    if alpha.value is None or alpha.interval is None:
        return f"{words}."
    bounds = f"{alpha.interval.low:.2f} to {alpha.interval.high:.2f}"
    return f"{words}. Its agreement with most people is {alpha.value:.2f}, {bounds}; 0 is chance, 1 is full agreement."


def rater_words(report: RaterReport) -> str:
    """What a rater did, and whether it looks random."""
    evidence = [
        f"{words} {hits.hits} of {hits.trials} times"
        for words, hits in (
            ("agrees with the other raters", report.with_others),
            ("repeats the earlier answer", report.with_self),
            ("passes the attention check", report.attention),
        )
        if hits.trials
    ]
    blind = "" if report.chance is None else f" (clicking without reading: {100 * report.chance:.0f} %)"
    conclusion = {
        RaterVerdict.CONSISTENT: "does not click at random",
        RaterVerdict.RANDOM: "looks random",
        RaterVerdict.NOT_SETTLED: "too little evidence",
    }[report.verdict]
    words = f"{report.rater}, {counted(report.votes, 'vote')}: {conclusion}"
    words += f"; {', '.join(evidence) or 'nothing to compare with'}{blind}."
    if report.preferred_side is None:
        return words
    hits = report.left.hits if report.preferred_side is Outcome.LEFT else report.left.trials - report.left.hits
    return f"{words} Prefers the {report.preferred_side} side: {hits} of {report.left.trials} times."


def random_raters_words(result: StudyResult) -> str:
    """Who looks random, and the win shares without them."""
    if not result.looks_random:
        return "No rater looks random."
    verb = "looks" if len(result.looks_random) == 1 else "look"
    who = f"{len(result.looks_random)} of {counted(len(result.raters), 'rater')}"
    words = f"{who} {verb} random ({', '.join(result.looks_random)})."
    if result.without_random is None:
        return f"{words} Nobody else voted."
    shares = "; ".join(
        f"{pair.first} wins {share_words(pair.share, f'comparisons with {pair.second}')}"
        for pair in result.without_random.pairs
    )
    return f"{words} Without them: {shares}. The main result includes them."


def strength_words(strength: Strength) -> str:
    """What a model is expected to win against all others of the study."""
    share = percent(strength.expected_share, strength.interval, "comparisons with the other models")
    return f"{strength.model} is expected to win {share}."


def expected_share_words(share: ExpectedShare) -> str:
    """What a model is expected to win against one other model."""
    return (
        f"{share.first} is expected to win {percent(share.share, share.interval, f'comparisons with {share.second}')}."
    )


def flip_words(result: FlipResult) -> str:
    """How many items change their answer, and how probable two equal answers are."""
    flipped = share_words(result.flipped, counted(result.items, "item"))
    agreement = share_words(result.agreement, "cases")
    words = (
        f"Over {counted(result.variants, 'variant')} the answer changes for {flipped}. "
        f"Two answers to the same item are the same in {agreement}."
    )
    if not result.left_out:
        return words
    return f"{words} {counted(result.left_out, 'item')} with fewer than two answers: left out."
