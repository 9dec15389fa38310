"""Leakage: whether the training data contain items of evaluation sets, by overlap of n-grams."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator

import numpy as np

from ft_service.data.gate.codes import CODES
from ft_service.data.gate.findings import Finding, Place
from ft_service.data.gate.form import Hit
from ft_service.data.gate.private import detail, excerpt, visible
from ft_service.data.gate.records import Record
from ft_service.data.gate.text import fold, grams, has_cjk, hash64, is_cjk

GRAM_WORDS = 5
GRAM_CJK = 8
"""In words, or in characters where text has no spaces. PaLM uses 8 words (arXiv:2204.02311, section 8), GPT-3 13; five
still find a question of 25 words after two were changed. Eight characters are about four words."""
OVERLAP = 0.6
"""An item counts as leaked if one training record has this share of its n-grams (PaLM: 0.7, of longer n-grams)."""
FEW_GRAMS = 8
"""An item with fewer n-grams counts as leaked only if all of them match: short questions differ in one word."""
TEMPLATE_SHARE = 0.01
TEMPLATE_FROM = 10
"""An n-gram in more than this share of the items, and in at least so many, belongs to a template and is ignored."""
CODE = "leak.evaluation"
UNREAD_CODE = "leak.unread-evaluation"
_FIRST_PLACES = 20


class EvaluationSets:
    """N-grams of the questions of all evaluation sets, 12 bytes each. Built once; all tasks read it."""

    def __init__(self, sets: Iterable[tuple[str, Iterable[Record]]]) -> None:
        """`sets` are the names and the records of the sets."""
        hashes = [np.empty(0, dtype=np.uint64)]
        items = [np.empty(0, dtype=np.uint32)]
        self._names: list[str] = []
        self._starts: list[int] = []
        self._unread: list[Place] = []
        self._counts: list[tuple[int, int]] = []  # (unread, all) records of each set
        self.size = 0
        distinct: set[int] = set()  # a repeated question is not a template
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
                    of_item = _grams_of_item(question)
                    hashes.append(of_item)
                    items.append(np.full(len(of_item), self.size, dtype=np.uint32))
                self.size += 1
            if self.size == self._starts[-1]:
                unread = 1
                self.size += 1
                self._note_unread(name, 0, "has no records")
            self._counts.append((unread, self.size - self._starts[-1]))
        all_hashes = np.concatenate(hashes)
        all_items = np.concatenate(items)
        order = np.argsort(all_hashes, kind="stable")
        all_hashes = all_hashes[order]
        all_items = all_items[order]
        kinds, inverse, counts = np.unique(all_hashes, return_inverse=True, return_counts=True)
        is_rare = counts[inverse] <= max(TEMPLATE_FROM, TEMPLATE_SHARE * self.size) if len(kinds) else slice(0)
        self._hashes = all_hashes[is_rare]
        self._items = all_items[is_rare]
        self._grams_of = np.bincount(self._items, minlength=self.size)

    def check(self, record: Record) -> Iterator[Hit]:
        """A hit if a training record contains an item of any set."""
        if not len(self._hashes) or record.fault is not None or record.split != "train":
            return
        of_record = self._grams_of_record(record)
        start = np.searchsorted(self._hashes, of_record, side="left")
        end = np.searchsorted(self._hashes, of_record, side="right")
        if not (end > start).any():
            return
        items = np.concatenate([self._items[a:b] for a, b in zip(start, end, strict=True) if b > a])
        counts = np.bincount(items)
        totals = self._grams_of[: len(counts)]
        overlap = counts / np.maximum(1, totals)
        is_leaked = overlap >= np.where(totals < FEW_GRAMS, 1.0, OVERLAP)
        if is_leaked.any():
            best = int(np.argmax(np.where(is_leaked, overlap, 0.0)))
            at = bisect_right(self._starts, best) - 1
            item = f"{overlap[best]:.0%} of item {best - self._starts[at] + 1} of {self._names[at]}"
            yield Hit(CODE, record.key, f"contains {item}", excerpt(record.text))

    def findings(self) -> list[Finding]:
        """A finding on the evaluation records that could not be read."""
        count = sum(unread for unread, _ in self._counts)
        if not count:
            return []
        known = CODES[UNREAD_CODE]
        share = max(unread / records for unread, records in self._counts)
        return [
            Finding(
                code=UNREAD_CODE,
                severity=known.severity(share),
                count=count,
                share=share,
                places=self._unread,
                why=known.why,
                cure=known.cure,
                message="Counts records of evaluation sets; the share is that of the worst set.",
            )
        ]

    def _note_unread(self, name: str, line: int, reason: str) -> None:
        if len(self._unread) < _FIRST_PLACES:
            self._unread.append(Place(file=visible(name), line=line, detail=detail(reason)))

    @staticmethod
    def _grams_of_record(record: Record) -> np.ndarray:
        parts = [grams(record.text, GRAM_WORDS)]
        if has_cjk(record.text):
            parts.append(grams(record.text, GRAM_CJK))
        if record.question:  # by itself: a short question is one n-gram, which must not include the answer
            parts.append(_grams_of_item(record.question))
        return np.unique(np.concatenate(parts))


def _grams_of_item(text: str) -> np.ndarray:
    return grams(text, GRAM_CJK if is_cjk(text) else GRAM_WORDS)
