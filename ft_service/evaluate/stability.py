"""Whether a model gives the same answer to the same question: over repeats, neighbours, seeds and paraphrases.

Temperature 0 must repeat bit for bit, whatever else is in the batch: each item is asked again alone, and again in a
crowd. A seed must repeat its answer. Other seeds and other words may change the answer, but should not change whether
it is right.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import Field

from ft_service.evaluate.ask import Answer, Answers, Question
from ft_service.evaluate.comparison import Result
from ft_service.evaluate.items import Item
from ft_service.evaluate.metrics import score, token_f1
from ft_service.evaluate.statistics.flips import count_flips
from ft_service.evaluate.suite import Stability
from ft_service.evaluate.text_forms import normalised

_RIGHT = 0.5
"""A score from here on counts as right."""
_SHOWN = 5


@dataclass(frozen=True)
class Variations:
    """The ways to ask one item. The first of `at_zero` is the question of the comparison itself."""

    item: Item
    at_zero: tuple[Question, ...]
    sampled: tuple[Question, ...]
    """One for each temperature and seed."""
    seed_pairs: tuple[tuple[Question, Question], ...]
    """The same temperature and seed twice."""
    paraphrased: tuple[Question, ...]

    @property
    def alone(self) -> tuple[Question, ...]:
        """Asked while nothing else is."""
        return tuple(question for question in self.at_zero if question.repeat % 2 == 1)

    @property
    def crowded(self) -> tuple[Question, ...]:
        """Asked with many others."""
        repeated = tuple(question for question in self.at_zero if question.repeat % 2 == 0)
        again = tuple(second for _, second in self.seed_pairs)
        return (*repeated, *self.sampled, *again, *self.paraphrased)


class UnstableItem(Result):
    """Two answers to the same question, of which only one is right."""

    id: str
    prompt: str
    how: str
    first: str
    second: str


class Flips(Result):
    """The share of items that are right in one answer and wrong in another one, with its 95 % interval.

    It grows with the number of answers, so only the same number of them compares.
    """

    share: float
    low: float
    high: float
    items: int
    answers: int = Field(description="To each item.")


class StabilityFigures(Result):
    """Of one model. Shares are of items, from 0 to 1; None where nothing was asked that way."""

    items: int
    equal_at_zero: float | None = Field(description="Bitwise the same at temperature 0: repeated, alone, in a crowd.")
    equal_with_seed: float | None = Field(description="Bitwise the same with the same seed.")
    flips_at_zero: Flips | None
    flips_over_seeds: Flips | None
    flips_over_paraphrases: Flips | None
    self_agreement: float = Field(description="Overlap of two answers to one question, on average; 1 is the same text.")
    unstable: list[UnstableItem] = Field(description="At most five.")


class StabilityReport(Result):
    """Base and adapter."""

    base: StabilityFigures
    adapter: StabilityFigures
    sentence: str


def variations_of(item: Item, ask: Callable[[Item], Question], settings: Stability) -> Variations:
    """`ask` makes the question of the comparison, and that of another wording."""
    question = ask(item)
    repeats = tuple(replace(question, repeat=number) for number in range(1, settings.repeats + 1))
    sampled = tuple(
        replace(question, temperature=temperature, seed=question.seed + number)
        for temperature in settings.temperatures
        for number in range(settings.seeds)
    )
    first_seeds = [one for one in sampled if one.seed == question.seed]
    paraphrases = [item.model_copy(update={"prompt": text, "prompt_ids": None}) for text in item.paraphrases]
    return Variations(
        item=item,
        at_zero=(question, *repeats),
        sampled=sampled,
        seed_pairs=tuple((one, replace(one, repeat=1)) for one in first_seeds),
        paraphrased=tuple(map(ask, paraphrases)),
    )


def measure_stability(variations: Sequence[Variations], answers: Answers) -> StabilityFigures | None:
    """None if no item has two answers."""
    measured = [(one, _answered(one, answers)) for one in variations]
    measured = [(one, known) for one, known in measured if len(known) > 1]
    if not measured:
        return None
    by_item: list[dict[str, list[str]]] = []
    unstable = []
    for one, known in measured:
        texts = {
            "at temperature 0": _texts(one.at_zero, known),
            "over seeds": _texts(one.sampled, known),
            "over paraphrases": _texts((one.at_zero[0], *one.paraphrased), known) if one.paraphrased else [],
        }
        by_item.append(texts)
        unstable += [found for how, group in texts.items() if (found := _flip(one.item, how, group))]
    pairs = [
        (known[first.key].text, known[second.key].text)
        for one, known in measured
        for first, second in one.seed_pairs
        if first.key in known and second.key in known
    ]
    items = [one.item for one, _ in measured]
    at_zero = [texts["at temperature 0"] for texts in by_item]
    return StabilityFigures(
        items=len(measured),
        equal_at_zero=_mean(
            [len(set(texts["at temperature 0"])) == 1 for texts in by_item if len(texts["at temperature 0"]) > 1]
        ),
        equal_with_seed=_mean([first == second for first, second in pairs]),
        flips_at_zero=_flips(items, at_zero),
        flips_over_seeds=_flips(items, [texts["over seeds"] for texts in by_item]),
        flips_over_paraphrases=_flips(items, [texts["over paraphrases"] for texts in by_item]),
        self_agreement=_mean([_agreement([answer.text for answer in known.values()]) for _, known in measured]) or 0.0,
        unstable=unstable[:_SHOWN],
    )


def report(base: StabilityFigures, adapter: StabilityFigures) -> StabilityReport:
    """Both models side by side, and in a sentence."""
    overlap = f"{adapter.self_agreement:.0%} (base: {base.self_agreement:.0%})"
    parts = [f"Two answers of the adapter to the same question overlap by {overlap} on average"]
    if adapter.equal_at_zero is not None:
        parts.append(f"it repeats {adapter.equal_at_zero:.0%} of its answers bit for bit at temperature 0")
    after = adapter.flips_over_seeds
    before = base.flips_over_seeds
    if after is not None and before is not None:
        interval = f"{after.low:.0%} to {after.high:.0%}"
        parts.append(f"{after.share:.0%} of its items flip over seeds ({interval}; base: {before.share:.0%})")
    return StabilityReport(base=base, adapter=adapter, sentence="; ".join(parts) + ".")


def _answered(one: Variations, answers: Answers) -> Mapping[str, Answer]:
    questions = {*one.alone, *one.crowded}
    found = {question.key: answers.get(question) for question in questions}
    return {key: answer for key, answer in sorted(found.items()) if answer is not None}


def _texts(questions: Sequence[Question], known: Mapping[str, Answer]) -> list[str]:
    return [known[question.key].text for question in questions if question.key in known]


def _is_right(item: Item, text: str) -> bool:
    return score(text, item).value >= _RIGHT


def _flips(items: Sequence[Item], texts: Sequence[Sequence[str]]) -> Flips | None:
    """Of the items that have all their answers."""
    count = max(map(len, texts))
    complete = [(item, group) for item, group in zip(items, texts, strict=True) if len(group) == count > 1]
    if not complete:
        return None
    outcomes = [[_is_right(item, text) for text in group] for item, group in complete]
    found = count_flips(outcomes, [item.cluster for item, _ in complete]).flipped
    return Flips(
        share=found.value, low=found.interval.low, high=found.interval.high, items=len(complete), answers=count
    )


def _flip(item: Item, how: str, texts: Sequence[str]) -> UnstableItem | None:
    by_outcome = {_is_right(item, text): text for text in texts}
    if len(by_outcome) < 2:
        return None
    return UnstableItem(id=item.id, prompt=item.prompt, how=how, first=by_outcome[True], second=by_outcome[False])


def _agreement(texts: Sequence[str]) -> float:
    """Mean over all pairs: 1 for texts of the same normal form, otherwise the F1 of their tokens."""
    pairs = [
        1.0 if normalised(first) == normalised(second) else token_f1(first, second)
        for first, second in itertools.combinations(texts, 2)
    ]
    return sum(pairs) / len(pairs)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
