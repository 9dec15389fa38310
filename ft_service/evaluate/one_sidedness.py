"""Whether an adapter's answers became one-sided: their length, language, register, first words and labels.

Each figure of the adapter is compared with that of the base and, where there are references, with that of the data. A
change towards the data is what training is for. A finding needs distance from both.
"""

import statistics
from collections import Counter
from collections.abc import Sequence

from pydantic import Field

from ft_service.evaluate.comparison import ItemResult, Result
from ft_service.evaluate.rules import FormRule, language_of
from ft_service.evaluate.text_forms import JAPANESE_CHARACTER, normalised, tokens

FEWEST_ANSWERS = 20
"""Of a group that findings are made of."""
_OPENING_TOKENS = 3
_OPENING_CHARACTERS = 6
_LABEL_TOKENS = 3
_MORE = 0.2
"""So much larger must a share be than that of base and data."""
_FACTOR = 2.0
"""So many times longer or shorter must answers be."""
_POLITE = FormRule(rule="polite")


class Distribution(Result):
    """Figures of a set of answers. Shares are from 0 to 1."""

    answers: int
    median_characters: float
    empty: float = Field(description="Share of answers without text.")
    other_language: float = Field(description="Share of answers that are not in the language of their item.")
    polite: float | None = Field(description="Share of Japanese answers in です・ます; None without Japanese answers.")
    top_opening: str = Field(description="The most frequent first words.")
    top_opening_share: float
    top_answer: str = Field(description="The most frequent whole answer of at most three words.")
    top_answer_share: float
    distinct: float = Field(description="Different answers as a share of all.")


class OneSidedness(Result):
    """Distributions side by side, and what stands out."""

    base: Distribution | None
    adapter: Distribution | None
    data: Distribution | None = Field(description="Of the reference answers of held-out data.")
    findings: list[str] = Field(description="In plain words; empty if nothing stands out.")


def measure_one_sidedness(results: Sequence[ItemResult], references: Sequence[tuple[str, str]]) -> OneSidedness:
    """`results` have the answers of both models; `references` are (text, language) of held-out answers.

    Held-out items are compared with the data only by themselves: their answers have another form than general ones.
    """
    questions = {(result.cluster, result.prompt): result for result in results}.values()
    groups = [
        ([result for result in questions if result.skill == "held_out"], references),
        ([result for result in questions if result.skill != "held_out"], ()),
    ]
    measured = [
        (
            _distribution([(result.base.text, result.language) for result in group]),
            _distribution([(result.adapter.text, result.language) for result in group]),
            _distribution(data),
        )
        for group, data in groups
        if len(group) >= FEWEST_ANSWERS
    ]
    findings = [finding for base, adapter, data in measured for finding in _findings(base, adapter, data)]
    everything = list(questions)
    return OneSidedness(
        base=_distribution([(result.base.text, result.language) for result in everything]),
        adapter=_distribution([(result.adapter.text, result.language) for result in everything]),
        data=_distribution(references),
        findings=list(dict.fromkeys(findings)),
    )


def _distribution(answers: Sequence[tuple[str, str]]) -> Distribution | None:
    if not answers:
        return None
    texts = [text.strip() for text, _ in answers]
    openings = Counter(_opening(text) for text in texts if text)
    labels = Counter(normalised(text) for text in texts if 0 < len(tokens(text)) <= _LABEL_TOKENS)
    japanese = [text for text in texts if language_of(text) == "ja"]
    opening, num_opening = openings.most_common(1)[0] if openings else ("", 0)
    label, num_label = labels.most_common(1)[0] if labels else ("", 0)
    return Distribution(
        answers=len(texts),
        median_characters=statistics.median(map(len, texts)),
        empty=_share(not text for text in texts),
        other_language=_share(language_of(text) not in (None, language) for text, language in answers),
        polite=_share(_POLITE.problem(text) is None for text in japanese) if japanese else None,
        top_opening=opening,
        top_opening_share=num_opening / len(texts),
        top_answer=label,
        top_answer_share=num_label / len(texts),
        distinct=len({normalised(text) for text in texts}) / len(texts),
    )


def _opening(text: str) -> str:
    if JAPANESE_CHARACTER.match(text):
        return text[:_OPENING_CHARACTERS]
    return " ".join(text.casefold().split()[:_OPENING_TOKENS])


def _share(values: object) -> float:
    flags = [bool(value) for value in values]  # type: ignore[attr-defined]
    return sum(flags) / len(flags)


def _findings(base: Distribution | None, adapter: Distribution | None, data: Distribution | None) -> list[str]:
    if base is None or adapter is None:
        return []
    others = [one for one in (base, data) if one is not None]
    names = "the base" if data is None else "the base and the data"
    found = []

    def stands_out(name: str) -> bool:
        value = getattr(adapter, name)
        return all(value >= getattr(other, name) + _MORE for other in others)

    def figures(name: str) -> str:
        return " and ".join(f"{getattr(other, name):.0%}" for other in others)

    if all(adapter.median_characters > _FACTOR * max(1, other.median_characters) for other in others):
        found.append(f"Answers are longer than those of {names}: {_lengths(adapter, others)} characters (median).")
    if all(_FACTOR * max(1, adapter.median_characters) < other.median_characters for other in others):
        found.append(f"Answers are shorter than those of {names}: {_lengths(adapter, others)} characters (median).")
    if stands_out("empty"):
        found.append(f"{adapter.empty:.0%} of the answers are empty ({names}: {figures('empty')}).")
    if stands_out("other_language"):
        share = f"{adapter.other_language:.0%}"
        found.append(f"{share} of the answers are in another language than expected ({figures('other_language')}).")
    if stands_out("top_opening_share"):
        found.append(
            f"{adapter.top_opening_share:.0%} of the answers begin with {adapter.top_opening!r}; the most frequent "
            f"beginning of {names} has {figures('top_opening_share')}."
        )
    if stands_out("top_answer_share"):
        found.append(
            f"{adapter.top_answer_share:.0%} of the answers are {adapter.top_answer!r}; the most frequent answer of "
            f"{names} has {figures('top_answer_share')}."
        )
    with_politeness = [other.polite for other in others if other.polite is not None]
    polite = adapter.polite
    if polite is not None and with_politeness and all(abs(polite - value) >= _MORE for value in with_politeness):
        shown = " and ".join(f"{value:.0%}" for value in with_politeness)
        found.append(f"{polite:.0%} of the Japanese answers are in です・ます ({names}: {shown}).")
    return found


def _lengths(adapter: Distribution, others: Sequence[Distribution]) -> str:
    return f"{adapter.median_characters:.0f} against {' and '.join(f'{one.median_characters:.0f}' for one in others)}"
