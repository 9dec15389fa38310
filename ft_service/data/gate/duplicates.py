"""Exact duplicates, near-duplicates and contradictions, over the facts of all records.

MinHash only proposes pairs (`suspects`). Whether two records are near-same is decided on the records themselves, which
are read a second time for it (`Looks`): by the Jaccard similarity of their shingles, and by their numbers.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ft_service.data.gate.facts import BAND_ROWS, BANDS, SIGNATURE, Facts
from ft_service.data.gate.form import Hit
from ft_service.data.gate.private import excerpt
from ft_service.data.gate.records import Record
from ft_service.data.gate.text import fold, hash64, shingles

NEAR_SAME = 0.8
"""Jaccard similarity of shingles from which texts are near-duplicates (Lee et al. 2022, arXiv:2107.06499)."""
NEAR_SAME_SHORT, SHORT_FROM, SHORT_TO = 0.65, 12, 100
"""In a short text one edit costs more: 3 of 25 Japanese shingles changed leave 0.72, one word of 12 in English 0.76. So
the threshold rises from 0.65 at 12 shingles to `NEAR_SAME` at 100. Below 12 another character makes another answer."""
SUSPECT = 0.6
"""Estimated similarity from which a pair is looked at: three standard errors (of 60 permutations) below `NEAR_SAME`,
and somewhat below `NEAR_SAME_SHORT`."""
OPEN_ENDED_FROM = 10
"""A question that is given so many different answers asks for ideas (a joke, a name), not for the truth."""
MOST_LOOKS = 100_000
"""Records read again at most, 4 KiB each. Of others only those of the very same question are told: a template's filling
cannot be told from an edit without reading it."""
LONG_FROM = 500
"""Shingles from which on texts may be near-same although their numbers differ: an article of another day. In shorter
ones a number is what is asked."""
TEMPLATE_SHARE, TEMPLATE_FROM = 0.01, 10
"""A shingle in more than this share of the prompts that are looked at, and in so many, belongs to their template."""
_SKETCH = 512
_PAIR_BLOCK = 100_000
_SAMPLE = 2000


@dataclass(frozen=True)
class _Prompt:
    """The paragraphs of a prompt: hash of each -> its shingles."""

    parts: dict[int, np.ndarray]

    def without(self, others: "_Prompt") -> np.ndarray:
        """Shingles of the paragraphs that the other prompt has not."""
        own = [shingles for part, shingles in self.parts.items() if part not in others.parts]
        return np.unique(np.concatenate(own))[:_SKETCH] if own else np.empty(0, dtype=np.uint64)

    def whole(self) -> np.ndarray:
        return np.unique(np.concatenate(list(self.parts.values())))[:_SKETCH] if self.parts else _NOTHING


_NOTHING = np.empty(0, dtype=np.uint64)


class Looks:
    """What a second reading of some records tells: sketches of prompt and answer, and excerpts. Shards join.

    Prompts are compared without what all of them share: paragraphs that two of them have alike (a system prompt, an
    instruction, a passage), and the words of a template.
    """

    def __init__(self, wanted: Iterable[int] = ()) -> None:
        self._wanted = frozenset(wanted)
        self._prompts: dict[int, _Prompt] = {}
        self._outputs: dict[int, np.ndarray] = {}
        self.questions: dict[int, str] = {}
        self.answers: dict[int, str] = {}
        self._template: np.ndarray | None = None

    def keys(self) -> np.ndarray:
        """All that are worth reading again, uint64, sorted."""
        return np.array(sorted(self._wanted), dtype=np.uint64)

    def wants(self, key: int) -> bool:
        """Whether this record is worth reading again; skip the others without converting them."""
        return key in self._wanted

    def see(self, record: Record) -> None:
        """Look at a record; one that is not wanted makes no difference."""
        if record.key in self._wanted and record.fault is None:
            self._template = None
            parts = (fold(part) for part in record.prompt.split("\n\n"))
            self._prompts[record.key] = _Prompt({hash64(part): shingles(part)[:_SKETCH] for part in parts if part})
            self._outputs[record.key] = _sketch(record.output)
            self.questions[record.key] = excerpt(record.question)
            self.answers[record.key] = excerpt(record.output)

    def merge(self, other: "Looks") -> None:
        """Take over what another shard saw."""
        self._template = None
        self._prompts |= other._prompts
        self._outputs |= other._outputs
        self.questions |= other.questions
        self.answers |= other.answers

    def excerpt(self, key: int) -> str:
        """Question and answer of a record, in short; "" if it was not seen."""
        return " → ".join(text for text in (self.questions.get(key), self.answers.get(key)) if text)

    def same_prompt(self, first: int, second: int) -> bool | None:
        """Whether two records' prompts are near-same; None unless both were seen."""
        found = self._rests(first, second)
        return None if found is None else near_same(*found)

    def same_question(self, first: int, second: int) -> bool | None:
        """Whether two prompts ask the same. Stricter: beside another answer, one other word may be what is asked."""
        found = self._rests(first, second)
        return None if found is None else jaccard(*found) >= NEAR_SAME

    def same_output(self, first: int, second: int) -> bool | None:
        """Whether two records' answers are near-same; None unless both were seen."""
        if first not in self._outputs or second not in self._outputs:
            return None
        return near_same(self._outputs[first], self._outputs[second])

    def are_long(self, first: int, second: int) -> bool:
        """Whether prompt and answer together are so long that other numbers in them make no other record."""
        return all(
            key in self._outputs and len(self._prompts[key].whole()) + len(self._outputs[key]) >= LONG_FROM
            for key in (first, second)
        )

    def _rests(self, first: int, second: int) -> tuple[np.ndarray, np.ndarray] | None:
        """What of two prompts is left to be compared; None unless both were seen."""
        if first not in self._prompts or second not in self._prompts:
            return None
        one, other = self._prompts[first], self._prompts[second]
        rests = one.without(other), other.without(one)
        if not (len(rests[0]) and len(rests[1])):
            return one.whole(), other.whole()
        bare = tuple(np.setdiff1d(rest, self._template_shingles(), assume_unique=True) for rest in rests)
        # Where hardly anything is left, it is what fills the template if the two have little of it in common; otherwise
        # they differ by an edit.
        least = min(map(len, bare))
        common = len(np.intersect1d(bare[0], bare[1], assume_unique=True))
        return (bare[0], bare[1]) if least >= SHORT_FROM or common < NEAR_SAME * least else rests

    def _template_shingles(self) -> np.ndarray:
        if self._template is None:
            step = max(1, len(self._prompts) // _SAMPLE)
            sample = [self._prompts[key].whole() for key in sorted(self._prompts)[::step]]
            kinds, counts = np.unique(np.concatenate(sample), return_counts=True)
            self._template = kinds[counts > max(TEMPLATE_FROM, TEMPLATE_SHARE * len(sample))]
        return self._template


def _sketch(text: str) -> np.ndarray:
    return shingles(fold(text))[:_SKETCH]


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """Similarity of two sets by the least `_SKETCH` of their sorted hashes: exact for texts of up to 512 shingles.

    Bottom-k sketches (Broder 1997): the least k of the union are a fair sample of it.
    """
    if len(first) == 0 and len(second) == 0:
        return 1.0
    union = np.union1d(first, second)
    if len(first) == _SKETCH or len(second) == _SKETCH:
        union = union[:_SKETCH]
    common = np.intersect1d(first, second, assume_unique=True)
    return float(np.isin(common, union, assume_unique=True).sum() / len(union))


def near_same(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two texts are near-duplicates, by their sketches."""
    size = max(len(first), len(second))
    least = NEAR_SAME
    if SHORT_FROM <= size < SHORT_TO:
        least -= (NEAR_SAME - NEAR_SAME_SHORT) * (SHORT_TO - size) / (SHORT_TO - SHORT_FROM)
    return jaccard(first, second) >= least


@dataclass(frozen=True)
class Repeats:
    """What repeats, as row numbers of `Facts`: `first[i]` is the row that row i repeats, or i itself."""

    exact: np.ndarray
    whole_pairs: np.ndarray
    """Pairs [P, 2] whose texts may be near-same, earlier row first."""
    prompt_pairs: np.ndarray
    """Pairs whose prompts are the same or may be near-same."""


def find_repeats(facts: Facts) -> Repeats:
    """Exact duplicates, and the pairs that MinHash proposes among the rest."""
    # A copy of a training record in validation is no duplicate: it is told as a leak.
    exact = _first_of_each(facts["exact"] * np.uint64(2) + facts["validation"])
    alive = np.flatnonzero(exact == np.arange(len(facts)))
    prompts = facts["prompt"][alive]
    same_prompt = alive[_first_of_each(prompts)]
    repeated = (same_prompt != alive) & (prompts != 0)
    pairs = np.stack([same_prompt[repeated], alive[repeated]], axis=1)
    return Repeats(
        exact,
        _proposed(facts, "whole_signature", alive),
        np.unique(np.concatenate([pairs, _proposed(facts, "prompt_signature", alive[prompts != 0])]), axis=0),
    )


def suspects(facts: Facts, repeats: Repeats) -> np.ndarray:
    """Keys of the records to look at again, at most `MOST_LOOKS`."""
    rows = np.unique(np.concatenate([repeats.whole_pairs.ravel(), repeats.prompt_pairs.ravel()]).astype(np.int64))
    return facts["key"][rows[:MOST_LOOKS]] if len(rows) else np.empty(0, dtype=np.uint64)


def _first_of_each(values: np.ndarray) -> np.ndarray:
    """For each row the first row of the same value."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return first[inverse]


def _proposed(facts: Facts, column: str, rows: np.ndarray) -> np.ndarray:
    """Pairs of rows that share a band, each bucket as a chain and a star, if their signatures are alike enough."""
    packed = np.empty(0, dtype=np.uint64)  # one number a pair sorts ten times faster than two
    for band in range(BANDS if len(rows) > 1 else 0):
        values = np.ascontiguousarray(facts.band(column, band)[rows]).view(f"V{4 * BAND_ROWS}").ravel()
        _, bucket = np.unique(values, return_inverse=True)
        order = np.argsort(bucket, kind="stable")
        sorted_bucket, sorted_rows = bucket[order], rows[order].astype(np.uint64)
        follows = np.flatnonzero(sorted_bucket[1:] == sorted_bucket[:-1]) + 1
        heads = np.searchsorted(sorted_bucket, sorted_bucket[follows])
        chain, star = (sorted_rows[earlier] << np.uint64(32) | sorted_rows[follows] for earlier in (follows - 1, heads))
        new = np.setdiff1d(np.concatenate([chain, star]), packed)
        # At once: of a million records of one template nearly all pairs are met, and nearly none is alike.
        alike = [block[_of_block(facts, column, _unpacked(block)) >= SUSPECT] for block in _blocks(new)]
        packed = np.union1d(packed, np.concatenate(alike)) if alike else packed
    return _unpacked(packed)


def _unpacked(packed: np.ndarray) -> np.ndarray:
    """Pairs [P, 2] of rows."""
    return np.stack([packed >> np.uint64(32), packed & np.uint64(0xFFFFFFFF)], axis=1).astype(np.int64)


def _estimated(facts: Facts, column: str, pairs: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """Each pair with its estimate. As Python numbers all pairs of a million records of one template would fill GiBs."""
    for block in _blocks(pairs):
        estimates = _of_block(facts, column, block)
        yield from zip(*block.T.tolist(), estimates.tolist(), strict=True)


def _each(pairs: np.ndarray) -> Iterator[tuple[int, int]]:
    for block in _blocks(pairs):
        yield from zip(*block.T.tolist(), strict=True)


def _of_block(facts: Facts, column: str, pairs: np.ndarray) -> np.ndarray:
    first, second = pairs.T
    equal = facts.signatures(column, first) == facts.signatures(column, second)
    return np.asarray(equal.sum(axis=1) / SIGNATURE)


def _blocks(pairs: np.ndarray) -> Iterator[np.ndarray]:
    return (pairs[start : start + _PAIR_BLOCK] for start in range(0, len(pairs), _PAIR_BLOCK))


# -- what comes of it ------------------------------------------------------------------------------------------------


def judge_repeats(facts: Facts, repeats: Repeats, looks: Looks, say_place: Callable[[int], str]) -> Iterator[Hit]:
    """Exact duplicates, near-duplicates, contradictions, and training records that validation repeats."""
    keys, validation = facts["key"].tolist(), facts["validation"]

    def hit(code: str, row: int, detail: str) -> Hit:
        return Hit(code, keys[row], detail)

    leaked: set[tuple[int, int]] = set()
    copies = np.flatnonzero(repeats.exact != np.arange(len(facts)))
    for row, first in zip(copies.tolist(), repeats.exact[copies].tolist(), strict=True):
        yield hit("quality.exact-duplicate", row, f"same as {say_place(keys[first])}")
    leaked |= _copies_across(facts["exact"], validation)
    near, disagreeing = _decide(facts, repeats, looks)
    groups = _Groups()
    for first, second in near:
        if validation[first] != validation[second]:
            leaked.add((first, second))
        else:
            groups.join(first, second)
    for row in sorted(groups.members()):
        if (first := groups.first(row)) != row:
            yield hit("quality.near-duplicate", row, f"nearly the same as {say_place(keys[first])}")
    told = set()
    for row, other in sorted({(max(pair), min(pair)) for pair in leaked}):
        train = other if validation[row] else row
        if train not in told:
            told.add(train)
            yield hit("leak.validation", train, f"also in validation, {say_place(keys[row + other - train])}")
    told.clear()
    for first, second in sorted(disagreeing):
        for row, other in ((first, second), (second, first)):
            if row not in told:
                told.add(row)
                yield hit("quality.contradiction", row, f"answered otherwise at {say_place(keys[other])}")


def _copies_across(exact: np.ndarray, validation: np.ndarray) -> set[tuple[int, int]]:
    """Training rows whose very record is held out too, each with the first such row."""
    held_out = np.flatnonzero(validation)
    kinds, first = np.unique(exact[held_out], return_index=True)
    if not len(kinds):
        return set()
    train = np.flatnonzero(~validation)
    at = np.minimum(np.searchsorted(kinds, exact[train]), len(kinds) - 1)
    found = kinds[at] == exact[train]
    return set(zip(held_out[first[at[found]]].tolist(), train[found].tolist(), strict=True))


def _decide(facts: Facts, repeats: Repeats, looks: Looks) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """Pairs that are near-same as a whole, and pairs with (near-)same prompts whose answers differ."""
    key, prompt, output = facts["key"], facts["prompt"], facts["output"]
    numbers = facts["prompt_numbers"].astype(np.uint64) << np.uint64(32) | facts["output_numbers"]
    prompt_numbers, length = facts["prompt_numbers"], facts["output_length"]

    Same = Callable[[int, int], bool | None]

    def same(equal: np.ndarray, look: Same, a: int, b: int) -> bool | None:
        """Whether prompts or answers are (near-)same; None where nobody looked and it cannot be told otherwise."""
        if equal[a] == equal[b]:
            return True
        if equal is output and max(length[a], length[b]) < SHORT_FROM:
            return False
        return look(int(key[a]), int(key[b]))

    near = set()
    for a, b, estimate in _estimated(facts, "whole_signature", repeats.whole_pairs):
        if numbers[a] == numbers[b] or looks.are_long(int(key[a]), int(key[b])):
            same_output = same(output, looks.same_output, a, b)
            alike = same_output or (same_output is None and estimate >= NEAR_SAME)
            if alike and same(prompt, looks.same_prompt, a, b):
                near.add((a, b))
    open_ended = _open_ended(prompt, output)
    disagreeing = set()
    for a, b in _each(repeats.prompt_pairs):
        if prompt_numbers[a] != prompt_numbers[b] or prompt[a] in open_ended or prompt[b] in open_ended:
            continue
        if same(prompt, looks.same_question, a, b):
            if numbers[a] == numbers[b] and same(output, looks.same_output, a, b):
                near.add((a, b))
            elif (a, b) not in near:
                disagreeing.add((a, b))
    return near, disagreeing


def _open_ended(prompt: np.ndarray, output: np.ndarray) -> set[int]:
    """Prompts with many different answers."""
    pairs = np.unique(np.stack([prompt, output], axis=1), axis=0)
    prompts, answers = np.unique(pairs[:, 0], return_counts=True)
    return set(prompts[answers >= OPEN_ENDED_FROM].tolist())


class _Groups:
    """Rows joined by pairs, each group told by its first row."""

    def __init__(self) -> None:
        self._up: dict[int, int] = {}

    def first(self, row: int) -> int:
        while (up := self._up.get(row, row)) != row:
            self._up[row] = self._up.get(up, up)
            row = up
        return row

    def join(self, first: int, second: int) -> None:
        first, second = sorted((self.first(first), self.first(second)))
        self._up[second] = first
        self._up.setdefault(first, first)

    def members(self) -> list[int]:
        return list(self._up)
