"""Exact duplicates, near-duplicates and contradictions, over the facts of all records.

MinHash only proposes pairs (`suspects`). Their records are read a second time (`SecondPass`); the Jaccard similarity of
their shingles and the numbers in them decide whether they are near-duplicates.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ft_service.data.gate.facts import BANDS, SIGNATURE, WHOLE_FROM_CJK, WHOLE_FROM_LATIN, Facts
from ft_service.data.gate.form import Hit
from ft_service.data.gate.private import excerpt
from ft_service.data.gate.records import Record
from ft_service.data.gate.text import distinct, fold, hash64, mixed, shingles
from ft_service.data.gate.wording import Slots, variants, words_of

NEAR_SAME = 0.8
"""Texts are near-duplicates from this Jaccard similarity of shingles on (Lee et al. 2022, arXiv:2107.06499)."""
NEAR_SAME_SHORT = 0.65
SHORT_FROM = 12
SHORT_TO = 100
"""One edit changes a larger share of a short text: 3 of 25 Japanese shingles leave 0.72, one English word of 12 leaves
0.76. So the threshold rises from 0.65 at 12 shingles to `NEAR_SAME` at 100. Below 12, texts must be equal."""
SUSPECT = 0.6
"""Pairs are compared from this estimated similarity on: three standard errors (of 60 permutations) below `NEAR_SAME`,
and somewhat below `NEAR_SAME_SHORT`."""
OPEN_ENDED_FROM = 10
"""A question with this many different answers is open-ended (a joke, a name): its answers do not contradict."""
CANNED_FROM = 5
"""An answer to this many different questions is canned ("Please contact support ..."): training may repeat it."""
MAX_REREAD_RECORDS = 100_000
"""At most this many records are read again, 4 KiB each. Of the others, only those with equal questions are reported:
without the text, an edit looks the same as another filling of a template."""
LONG_FROM = 500
"""Texts of this many shingles may be near-duplicates although their numbers differ, such as two dated articles. In
shorter texts a number is often the point of the question."""
TEMPLATE_SHARE = 0.01
TEMPLATE_FROM = 10
"""A shingle in more than this share of the compared prompts, and in at least so many, belongs to a template."""
_SKETCH = 512
_WORDS_CHARACTERS = 2000
"""Longer texts are not kept. The words of longer paragraphs are not compared: one is hardly ever the whole point."""
_PAIR_BLOCK = 100_000
_SAMPLE = 2000


class _Paragraph(NamedTuple):
    shingles: np.ndarray
    text: str | None
    """None if it is longer than `_WORDS_CHARACTERS`."""


@dataclass(frozen=True)
class _Prompt:
    """The paragraphs of a prompt, by the hash of their folded text."""

    parts: dict[int, _Paragraph]

    @classmethod
    def of(cls, text: str) -> "_Prompt":
        parts = ((part, fold(part)) for part in text.split("\n\n"))
        return cls({hash64(folded): _paragraph(part, folded) for part, folded in parts if folded})

    def without(self, others: "_Prompt") -> list[_Paragraph]:
        """The paragraphs that are not in the other prompt."""
        return [paragraph for part, paragraph in self.parts.items() if part not in others.parts]

    @cached_property
    def whole(self) -> np.ndarray:
        return _joined(list(self.parts.values()))


def _paragraph(text: str, folded: str) -> _Paragraph:
    return _Paragraph(shingles(folded)[:_SKETCH], text if len(text) <= _WORDS_CHARACTERS else None)


def _joined(paragraphs: Sequence[_Paragraph]) -> np.ndarray:
    sketches = [paragraph.shingles for paragraph in paragraphs]
    if len(sketches) == 1:
        return sketches[0][:_SKETCH]
    return distinct(np.concatenate(sketches))[:_SKETCH] if sketches else _NOTHING


_NOTHING = np.empty(0, dtype=np.uint64)


class SecondPass:
    """What is kept of the records that are read a second time: sketches of prompt and answer, prompts and excerpts.

    Prompts are compared without their common parts: paragraphs that both have (a system prompt, an instruction, a
    passage), and the words of a template. The words that differ decide whether they ask the same (`wording`). `merge`
    adds the result of another shard.
    """

    def __init__(self, keys: Iterable[int] = (), template_keys: Iterable[int] = ()) -> None:
        """`template_keys` are the records that show the words of a template; without any, a sample of all."""
        self._template_keys = frozenset(template_keys)
        self._keys = frozenset(keys) | self._template_keys
        self._prompts: dict[int, _Prompt] = {}
        self._outputs: dict[int, np.ndarray] = {}
        self._questions: dict[int, str] = {}
        self._answers: dict[int, str] = {}
        self._template: np.ndarray | None = None
        self._slots: Slots | None = None

    def keys(self) -> np.ndarray:
        """Keys of the records to read again, uint64, sorted."""
        return np.array(sorted(self._keys), dtype=np.uint64)

    def is_wanted(self, key: int) -> bool:
        """Whether this record is to be read again. Skip the others without converting them."""
        return key in self._keys

    def add(self, record: Record) -> None:
        """Keep the sketches of a record, if it is one of those to read again."""
        if record.key in self._keys and record.fault is None:
            self._template = None
            self._slots = None
            self._prompts[record.key] = _Prompt.of(record.prompt)
            self._outputs[record.key] = _sketch(record.output)
            self._questions[record.key] = _to_show(record.question)
            self._answers[record.key] = _to_show(record.output)

    def merge(self, other: "SecondPass") -> None:
        """Add the records of another shard."""
        self._template = None
        self._slots = None
        self._prompts |= other._prompts
        self._outputs |= other._outputs
        self._questions |= other._questions
        self._answers |= other._answers

    def excerpt(self, key: int) -> str:
        """Excerpts of question and answer; "" if the record was not read again."""
        return " → ".join(text for text in (self.question(key), self.answer(key)) if text)

    def question(self, key: int) -> str:
        """An excerpt of the question; "" if the record was not read again."""
        return excerpt(self._questions.get(key, ""))

    def answer(self, key: int) -> str:
        """An excerpt of the answer; "" if the record was not read again."""
        return excerpt(self._answers.get(key, ""))

    def same_prompt(self, first: int, second: int) -> bool | None:
        """Whether two prompts are near-duplicates; None unless both records were read again."""
        if first not in self._prompts or second not in self._prompts:
            return None
        return near_same(*self._rests(first, second))

    def same_question(self, first: int, second: int) -> bool | None:
        """Whether two prompts ask the same: near-duplicates that differ in their wording alone.

        Where the words are not compared, one of them may be why answers differ, so the prompts must be more similar.
        """
        if first not in self._prompts or second not in self._prompts:
            return None
        differing = self._differing(first, second)
        if differing is None:
            return jaccard(*self._rests(first, second)) >= NEAR_SAME
        return near_same(*self._unshared(first, second)) and all(self._same_words(*pair) for pair in differing)

    def are_fillings(self, first: int, second: int) -> bool:
        """Whether two prompts are one template with two different words in it; False unless both were read again."""
        if first not in self._prompts or second not in self._prompts:
            return False
        differing = self._differing(first, second)
        if differing is None or len(differing) != 1:
            return False
        one, other = differing[0]
        return variants(words_of(one), words_of(other)) is None and self._fills_template(one, other)

    def same_output(self, first: int, second: int) -> bool | None:
        """Whether two answers are near-duplicates; None unless both records were read again."""
        if first not in self._outputs or second not in self._outputs:
            return None
        return near_same(self._outputs[first], self._outputs[second])

    def are_long(self, first: int, second: int) -> bool:
        """Whether both records are so long that they may be near-duplicates although their numbers differ."""
        return all(
            key in self._outputs and len(self._prompts[key].whole) + len(self._outputs[key]) >= LONG_FROM
            for key in (first, second)
        )

    def _unshared(self, first: int, second: int) -> tuple[np.ndarray, np.ndarray]:
        """Shingles of the paragraphs that only one of two prompts has; all, if one has no other paragraphs."""
        one = self._prompts[first]
        other = self._prompts[second]
        rests = _joined(one.without(other)), _joined(other.without(one))
        return rests if len(rests[0]) and len(rests[1]) else (one.whole, other.whole)

    def _rests(self, first: int, second: int) -> tuple[np.ndarray, np.ndarray]:
        """`_unshared` without the shingles of a template, where more than the filling of a template is left."""
        rests = self._unshared(first, second)
        if rests[0] is self._prompts[first].whole:
            return rests
        bare = tuple(_difference(rest, self._template_shingles()) for rest in rests)
        # Little may be left. If the two have little of it in common, it fills the template; otherwise it is an edit.
        least = min(map(len, bare))
        common = len(np.intersect1d(bare[0], bare[1], assume_unique=True))
        return (bare[0], bare[1]) if least >= SHORT_FROM or common < NEAR_SAME * least else rests

    def _differing(self, first: int, second: int) -> list[tuple[str, str]] | None:
        """The paragraphs in which two prompts differ; None if one of them is too long to compare its words."""
        ours = [paragraph.text for paragraph in self._prompts[first].without(self._prompts[second])]
        theirs = [paragraph.text for paragraph in self._prompts[second].without(self._prompts[first])]
        if None in ours or None in theirs:
            return None
        if len(ours) != len(theirs):
            return [("\n".join(map(str, ours)), "\n".join(map(str, theirs)))]
        return [(str(one), str(other)) for one, other in zip(ours, theirs, strict=True)]

    def _same_words(self, first: str, second: str) -> bool:
        """Whether the words of two paragraphs differ in their wording alone."""
        differing = variants(words_of(first), words_of(second))
        return differing == [] or (differing is not None and not self._fills_template(first, second))

    def _fills_template(self, first: str, second: str) -> bool:
        """Whether two paragraphs are one template with two words in it."""
        if self._slots is None:
            paragraphs = (part.text for prompt in self._prompts.values() for part in prompt.parts.values())
            self._slots = Slots(text for text in paragraphs if text is not None)
        return self._slots.fills(first, second)

    def _template_shingles(self) -> np.ndarray:
        if self._template is None:
            keys = sorted(self._template_keys) or _sample(sorted(self._prompts))
            sample = [self._prompts[key].whole for key in keys if key in self._prompts]
            kinds, counts = np.unique(np.concatenate(sample), return_counts=True)
            self._template = kinds[counts > max(TEMPLATE_FROM, TEMPLATE_SHARE * len(sample))]
        return self._template


def _to_show(text: str) -> str:
    """What is kept of a text for its excerpt, which few records need: the text if it is short, else the excerpt."""
    return text if len(text) <= _WORDS_CHARACTERS else excerpt(text)


def _sample(keys: Sequence[int]) -> Sequence[int]:
    return keys[:: max(1, len(keys) // _SAMPLE)]


def _difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The numbers of the first sorted set that are not in the second."""
    if not len(second):
        return first
    at = np.minimum(np.searchsorted(second, first), len(second) - 1)
    return np.asarray(first[second[at] != first])


def _sketch(text: str) -> np.ndarray:
    return shingles(fold(text))[:_SKETCH]


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Jaccard similarity of two sets from the `_SKETCH` smallest of their sorted hashes: exact up to 512 shingles.

    Bottom-k sketches (Broder 1997): the k smallest hashes of the union are a fair sample of it.
    """
    if len(first) == 0 and len(second) == 0:
        return 1.0
    common = np.intersect1d(first, second, assume_unique=True)
    if len(first) < _SKETCH and len(second) < _SKETCH:
        return len(common) / (len(first) + len(second) - len(common))
    union = np.union1d(first, second)[:_SKETCH]
    return float(np.isin(common, union, assume_unique=True).sum() / len(union))


def near_same(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two texts are near-duplicates, from their sketches."""
    size = max(len(first), len(second))
    least = NEAR_SAME
    if SHORT_FROM <= size < SHORT_TO:
        least -= (NEAR_SAME - NEAR_SAME_SHORT) * (SHORT_TO - size) / (SHORT_TO - SHORT_FROM)
    return jaccard(first, second) >= least


@dataclass(frozen=True)
class Repeats:
    """Repeated records, as row numbers of `Facts`."""

    exact: np.ndarray
    """For each row, the first row with the same content; its own number if there is none before it."""
    whole_pairs: np.ndarray
    """Pairs [P, 2] whose texts may be near-duplicates, the earlier row first."""
    prompt_pairs: np.ndarray
    """Pairs [P, 2] whose prompts are equal or may be near-duplicates."""


def find_repeats(facts: Facts) -> Repeats:
    """Exact duplicates, and the pairs that MinHash proposes among the rest."""
    # A copy of a training record in validation is not a duplicate but a leak.
    exact = _first_of_each(facts["exact"] * np.uint64(2) + facts["validation"])
    distinct = np.flatnonzero(exact == np.arange(len(facts)))
    prompts = facts["prompt"][distinct]
    same_prompt = distinct[_first_of_each(prompts)]
    repeated = (same_prompt != distinct) & (prompts != 0)
    pairs = np.stack([same_prompt[repeated], distinct[repeated]], axis=1)
    return Repeats(
        exact,
        _proposed(facts, "whole_signature", distinct),
        np.unique(np.concatenate([pairs, _proposed(facts, "prompt_signature", distinct[prompts != 0])]), axis=0),
    )


def suspects(facts: Facts, repeats: Repeats, examples: Iterable[int] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Keys of the records to read again, at most `MAX_REREAD_RECORDS`; and keys that show the words of templates.

    Pairs that `_compare` drops without their text, because their numbers differ, are read for their templates alone,
    and a sample of them is enough. `examples` are keys that are read again for another reason.
    """
    keys = facts["key"]
    all_rows = np.unique(np.concatenate([repeats.whole_pairs.ravel(), repeats.prompt_pairs.ravel()]).astype(np.int64))
    compared = [
        _comparable(facts, repeats.whole_pairs),
        repeats.prompt_pairs[_same_numbers(facts, repeats.prompt_pairs)],
    ]
    rows = np.unique(np.concatenate([pairs.ravel() for pairs in compared]).astype(np.int64))
    known = sorted({*keys[all_rows[:MAX_REREAD_RECORDS]].tolist(), *examples})
    return keys[rows[:MAX_REREAD_RECORDS]], np.array(_sample(known), dtype=np.uint64)


def _comparable(facts: Facts, pairs: np.ndarray) -> np.ndarray:
    """The pairs [P, 2] with equal numbers, or so long that different numbers do not matter (`SecondPass.are_long`)."""
    outputs = facts["output_numbers"]
    sizes = facts["num_shingles"]
    equal = _same_numbers(facts, pairs) & (outputs[pairs[:, 0]] == outputs[pairs[:, 1]])
    return pairs[equal | (sizes[pairs].min(axis=1) >= LONG_FROM)]


def _same_numbers(facts: Facts, pairs: np.ndarray) -> np.ndarray:
    numbers = facts["prompt_numbers"]
    return np.asarray(numbers[pairs[:, 0]] == numbers[pairs[:, 1]])


def _first_of_each(values: np.ndarray) -> np.ndarray:
    """For each row, the first row with the same value."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return first[inverse]


def _proposed(facts: Facts, column: str, rows: np.ndarray) -> np.ndarray:
    """Pairs of rows that share a band and are similar by their signatures; each bucket gives a chain and a star."""
    packed = np.empty(0, dtype=np.uint64)  # one number for each pair sorts ten times faster than two
    for band in range(BANDS if len(rows) > 1 else 0):
        bucket = _hash_of_bands(facts.band(column, band)[rows])
        order = np.argsort(bucket, kind="stable")
        sorted_bucket = bucket[order]
        sorted_rows = rows[order].astype(np.uint64)
        follows = np.flatnonzero(sorted_bucket[1:] == sorted_bucket[:-1]) + 1
        heads = np.searchsorted(sorted_bucket, sorted_bucket[follows])
        chain, star = (sorted_rows[earlier] << np.uint64(32) | sorted_rows[follows] for earlier in (follows - 1, heads))
        new = _difference(distinct(np.concatenate([chain, star])), packed)
        # Drop dissimilar pairs at once: a million records of one template give nearly all pairs, and few are similar.
        similar = [block[_estimates(facts, column, _unpacked(block)) >= SUSPECT] for block in _blocks(new)]
        packed = distinct(np.concatenate([packed, *similar])) if similar else packed
    return _unpacked(packed)


def _hash_of_bands(bands: np.ndarray) -> np.ndarray:
    """One number, uint64 [N], for each band [N, BAND_ROWS]: sorts faster, and unequal bands hardly ever share one."""
    hashes = np.zeros(len(bands), dtype=np.uint64)
    for column in bands.T:
        hashes = mixed(hashes * np.uint64(0x9E3779B97F4A7C15) + column.astype(np.uint64))
    return hashes


def _unpacked(packed: np.ndarray) -> np.ndarray:
    """Pairs [P, 2] of rows, from one number for each pair."""
    return np.stack([packed >> np.uint64(32), packed & np.uint64(0xFFFFFFFF)], axis=1).astype(np.int64)


def _estimated(facts: Facts, column: str, pairs: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """Each pair with its estimated similarity, in blocks: as Python numbers, all pairs at once would fill GiBs."""
    for block in _blocks(pairs):
        estimates = _estimates(facts, column, block)
        yield from zip(*block.T.tolist(), estimates.tolist(), strict=True)


def _pairs(pairs: np.ndarray) -> Iterator[tuple[int, int]]:
    for block in _blocks(pairs):
        yield from zip(*block.T.tolist(), strict=True)


def _estimates(facts: Facts, column: str, pairs: np.ndarray) -> np.ndarray:
    first, second = pairs.T
    equal = facts.signatures(column, first) == facts.signatures(column, second)
    return np.asarray(equal.sum(axis=1) / SIGNATURE)


def _blocks(pairs: np.ndarray) -> Iterator[np.ndarray]:
    return (pairs[start : start + _PAIR_BLOCK] for start in range(0, len(pairs), _PAIR_BLOCK))


# -- findings --------------------------------------------------------------------------------------------------------


def check_repeats(
    facts: Facts, repeats: Repeats, second_pass: SecondPass, place_text: Callable[[int], str]
) -> Iterator[Hit]:
    """Exact duplicates, near-duplicates, contradictions, and training records that validation repeats."""
    keys = facts["key"].tolist()
    validation = facts["validation"]

    def hit(code: str, row: int, detail: str) -> Hit:
        return Hit(code, keys[row], detail)

    leaked: set[tuple[int, int]] = set()
    copies = np.flatnonzero(repeats.exact != np.arange(len(facts)))
    for row, first in zip(copies.tolist(), repeats.exact[copies].tolist(), strict=True):
        yield hit("quality.exact-duplicate", row, f"same as {place_text(keys[first])}")
    leaked |= _copies_across(facts["exact"], validation)
    near, disagreeing = _compare(facts, repeats, second_pass)
    is_canned = _canned(facts)
    prompt = facts["prompt"]
    groups = _Groups()
    for first, second in near:
        if validation[first] != validation[second]:
            # Alike questions with one canned answer are different questions; with another answer, one is an edit.
            if not (is_canned[first] and is_canned[second] and prompt[first] != prompt[second]):
                leaked.add((first, second))
        else:
            groups.join(first, second)
    for row in sorted(groups.members()):
        if (first := groups.first(row)) != row:
            yield hit("quality.near-duplicate", row, f"nearly the same as {place_text(keys[first])}")
    reported = set()
    for row, other in sorted({(max(pair), min(pair)) for pair in leaked}):
        train = other if validation[row] else row
        if train not in reported:
            reported.add(train)
            yield hit("leak.validation", train, f"also in validation, {place_text(keys[row + other - train])}")
    for train, held_out in _canned_across(facts, is_canned):
        if train not in reported:
            detail = f"the same answer to another question is in validation, {place_text(keys[held_out])}"
            yield hit("leak.canned-answer", train, detail)
    reported.clear()
    for first, second in sorted(disagreeing):
        for row, other in ((first, second), (second, first)):
            if row not in reported:
                reported.add(row)
                yield hit("quality.contradiction", row, f"different answer at {place_text(keys[other])}")


def groups_of(facts: Facts, repeats: Repeats, second_pass: SecondPass) -> np.ndarray:
    """For each row, the first row of its group: copies, near-duplicates and records that ask the same.

    Open-ended questions, such as "Tell me a joke.", join no records.
    """
    groups = _Groups()
    near, disagreeing = _compare(facts, repeats, second_pass)
    for first, second in (*near, *disagreeing):
        groups.join(first, second)
    prompt = facts["prompt"]
    open_ended = np.array(sorted(_open_ended(prompt, facts["output"])), dtype=np.uint64)
    joins_by_prompt = (prompt != 0) & ~np.isin(prompt, open_ended)
    rows = np.arange(len(facts))
    for firsts in (repeats.exact, np.where(joins_by_prompt, _first_of_each(prompt), rows)):
        for row in np.flatnonzero(firsts != rows).tolist():
            groups.join(int(firsts[row]), row)
    return np.array([groups.first(row) for row in rows.tolist()], dtype=np.int64)


def _canned(facts: Facts) -> np.ndarray:
    """Which rows have a canned answer, bool [N]: a whole sentence that answers several different questions."""
    prompt = facts["prompt"]
    output = facts["output"]
    pairs = np.unique(np.stack([output, prompt], axis=1), axis=0)
    outputs, questions = np.unique(pairs[pairs[:, 1] != 0][:, 0], return_counts=True)
    is_sentence = facts["output_length"] >= np.where(facts["cjk"], WHOLE_FROM_CJK, WHOLE_FROM_LATIN)
    return np.asarray(is_sentence & np.isin(output, outputs[questions >= CANNED_FROM]))


def _canned_across(facts: Facts, is_canned: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs (training row, held-out row) with one canned answer; the first held-out row of each answer."""
    validation = facts["validation"]
    output = facts["output"]
    held_out = np.flatnonzero(validation & is_canned)
    kinds, first = np.unique(output[held_out], return_index=True)
    for row in np.flatnonzero(~validation & is_canned & np.isin(output, kinds)).tolist():
        yield row, int(held_out[first[np.searchsorted(kinds, output[row])]])


def _copies_across(exact: np.ndarray, validation: np.ndarray) -> set[tuple[int, int]]:
    """Pairs (held-out row, training row) with the same content; the first held-out row of each content."""
    held_out = np.flatnonzero(validation)
    kinds, first = np.unique(exact[held_out], return_index=True)
    if not len(kinds):
        return set()
    train = np.flatnonzero(~validation)
    at = np.minimum(np.searchsorted(kinds, exact[train]), len(kinds) - 1)
    is_copy = kinds[at] == exact[train]
    return set(zip(held_out[first[at[is_copy]]].tolist(), train[is_copy].tolist(), strict=True))


def _compare(
    facts: Facts, repeats: Repeats, second_pass: SecondPass
) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """Pairs of near-duplicates, and pairs that ask the same but have different answers."""
    key = facts["key"]
    prompt = facts["prompt"]
    output = facts["output"]
    numbers = facts["prompt_numbers"].astype(np.uint64) << np.uint64(32) | facts["output_numbers"]
    length = facts["output_length"]

    Same = Callable[[int, int], bool | None]

    def same(equal: np.ndarray, compare: Same, a: int, b: int) -> bool | None:
        """Whether prompts or answers are near-duplicates; None if that needs the text, which was not read again."""
        if equal[a] == equal[b]:
            return True
        if equal is output and max(length[a], length[b]) < SHORT_FROM:
            return False
        return compare(int(key[a]), int(key[b]))

    near = set()
    for a, b, estimate in _estimated(facts, "whole_signature", _comparable(facts, repeats.whole_pairs)):
        if numbers[a] == numbers[b] or second_pass.are_long(int(key[a]), int(key[b])):
            same_output = same(output, second_pass.same_output, a, b)
            similar = same_output or (same_output is None and estimate >= NEAR_SAME)
            if not (similar and same(prompt, second_pass.same_prompt, a, b)):
                continue
            # "Is a monitor insured?" and "Is a router insured?", with answers that name them, are two records.
            if output[a] == output[b] or not second_pass.are_fillings(int(key[a]), int(key[b])):
                near.add((a, b))
    open_ended = _open_ended(prompt, output)
    disagreeing = set()
    for a, b in _pairs(repeats.prompt_pairs[_same_numbers(facts, repeats.prompt_pairs)]):
        if prompt[a] in open_ended or prompt[b] in open_ended:
            continue
        if same(prompt, second_pass.same_question, a, b):
            if numbers[a] == numbers[b] and same(output, second_pass.same_output, a, b):
                near.add((a, b))
            elif (a, b) not in near:
                disagreeing.add((a, b))
    return near, disagreeing


def _open_ended(prompt: np.ndarray, output: np.ndarray) -> set[int]:
    """Hashes of the prompts that have many different answers."""
    pairs = np.unique(np.stack([prompt, output], axis=1), axis=0)
    prompts, answers = np.unique(pairs[:, 0], return_counts=True)
    return set(prompts[answers >= OPEN_ENDED_FROM].tolist())


class _Groups:
    """Groups of rows, joined by pairs; the first row of a group identifies it."""

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}

    def first(self, row: int) -> int:
        while (parent := self._parents.get(row, row)) != row:
            self._parents[row] = self._parents.get(parent, parent)
            row = parent
        return row

    def join(self, first: int, second: int) -> None:
        first, second = sorted((self.first(first), self.first(second)))
        self._parents[second] = first
        self._parents.setdefault(first, first)

    def members(self) -> list[int]:
        return list(self._parents)
