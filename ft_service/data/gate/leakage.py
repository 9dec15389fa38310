"""Leakage: whether what is evaluated on stands in what is trained on, by overlap of n-grams."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator

import numpy as np

from ft_service.data.gate.codes import CODES
from ft_service.data.gate.findings import Finding, Place
from ft_service.data.gate.form import Hit
from ft_service.data.gate.private import detail, excerpt, visible
from ft_service.data.gate.records import Record
from ft_service.data.gate.text import fold, grams, has_cjk, hash64, is_cjk

GRAM_WORDS, GRAM_CJK = 5, 8
"""Words, and characters where there are no spaces. PaLM takes 8 words (arXiv:2204.02311, section 8), GPT-3 13; five
still find a question of 25 words in which two were changed. Eight characters are about four words."""
OVERLAP = 0.6
"""Share of an item's n-grams found in one training record from which it counts as seen (PaLM: 0.7, of longer ones)."""
FEW_GRAMS = 8
"""An item of fewer n-grams counts as seen only if all of them are: short questions differ in a word."""
TEMPLATE_SHARE, TEMPLATE_FROM = 0.01, 10
"""An n-gram in more than this share of the items, and in so many, belongs to their template and tells nothing."""
CODE, UNREAD = "leak.evaluation", "leak.unread-evaluation"
_FIRST_PLACES = 20


class EvaluationSets:
    """N-grams of the questions of sets that a model is to be judged on, 12 bytes each; built once, read by all."""

    def __init__(self, sets: Iterable[tuple[str, Iterable[Record]]]) -> None:
        """`sets` are names and records."""
        hashes, items = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.uint32)]
        self._names: list[str] = []
        self._starts: list[int] = []
        self._unread: list[Place] = []
        self._counts: list[tuple[int, int]] = []  # unread and all records of each set
        self.size = 0
        distinct: set[int] = set()  # a question that stands there often is no template
        for name, records in sets:
            self._names.append(name)
            self._starts.append(self.size)
            unread = 0
            for record in records:
                question = record.question or record.output
                if record.fault is not None:
                    unread += 1
                    self._note_unread(name, record.line, record.fault.reason)
                elif (known := hash64(fold(question))) not in distinct:
                    distinct.add(known)
                    found = _grams_of_item(question)
                    hashes.append(found)
                    items.append(np.full(len(found), self.size, dtype=np.uint32))
                self.size += 1
            if self.size == self._starts[-1]:
                unread, self.size = 1, self.size + 1
                self._note_unread(name, 0, "holds no questions")
            self._counts.append((unread, self.size - self._starts[-1]))
        all_hashes, all_items = np.concatenate(hashes), np.concatenate(items)
        order = np.argsort(all_hashes, kind="stable")
        all_hashes, all_items = all_hashes[order], all_items[order]
        kinds, inverse, counts = np.unique(all_hashes, return_inverse=True, return_counts=True)
        telling = counts[inverse] <= max(TEMPLATE_FROM, TEMPLATE_SHARE * self.size) if len(kinds) else slice(0)
        self._hashes, self._items = all_hashes[telling], all_items[telling]
        self._grams_of = np.bincount(self._items, minlength=self.size)

    def check(self, record: Record) -> Iterator[Hit]:
        """A hit if an item of any set stands in a training record."""
        if not len(self._hashes) or record.fault is not None or record.split != "train":
            return
        found = self._grams_of_record(record)
        start = np.searchsorted(self._hashes, found, side="left")
        end = np.searchsorted(self._hashes, found, side="right")
        if not (end > start).any():
            return
        items = np.concatenate([self._items[a:b] for a, b in zip(start, end, strict=True) if b > a])
        counts = np.bincount(items)
        of = self._grams_of[: len(counts)]
        overlap = counts / np.maximum(1, of)
        is_seen = overlap >= np.where(of < FEW_GRAMS, 1.0, OVERLAP)
        if is_seen.any():
            best = int(np.argmax(np.where(is_seen, overlap, 0.0)))
            at = bisect_right(self._starts, best) - 1
            told = f"{overlap[best]:.0%} of item {best - self._starts[at] + 1} of {self._names[at]}"
            yield Hit(CODE, record.key, told, excerpt(record.text))

    def findings(self) -> list[Finding]:
        """What of the sets could not be compared with."""
        count = sum(unread for unread, _ in self._counts)
        if not count:
            return []
        known, share = CODES[UNREAD], max(unread / records for unread, records in self._counts)
        return [
            Finding(
                code=UNREAD,
                severity=known.severity(share),
                count=count,
                share=share,
                places=self._unread,
                why=known.why,
                cure=known.cure,
                message="Records of evaluation sets; the share is of the set with the most.",
            )
        ]

    def _note_unread(self, name: str, line: int, reason: str) -> None:
        if len(self._unread) < _FIRST_PLACES:
            self._unread.append(Place(file=visible(name), line=line, detail=detail(reason)))

    @staticmethod
    def _grams_of_record(record: Record) -> np.ndarray:
        found = [grams(record.text, GRAM_WORDS)]
        if has_cjk(record.text):
            found.append(grams(record.text, GRAM_CJK))
        if record.question:  # a short question is one n-gram, which the answer must not swallow
            found.append(_grams_of_item(record.question))
        return np.unique(np.concatenate(found))


def _grams_of_item(text: str) -> np.ndarray:
    return grams(text, GRAM_CJK if is_cjk(text) else GRAM_WORDS)
