"""Leakage: whether what is evaluated on stands in what is trained on, by overlap of n-grams."""

from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np

from ft_service.data.judge.form import Hit
from ft_service.data.judge.private import excerpt
from ft_service.data.judge.records import Record
from ft_service.data.judge.text import grams, has_cjk, is_cjk

GRAM_WORDS, GRAM_CJK = 5, 8
"""Words, and characters where there are no spaces. PaLM takes 8 words (arXiv:2204.02311, section 8), GPT-3 13; five
still find a question of 25 words in which two were changed. Eight characters are about four words."""
OVERLAP = 0.6
"""Share of an item's n-grams found in one training record from which it counts as seen (PaLM: 0.7, of longer ones)."""
TEMPLATE_SHARE, TEMPLATE_FROM = 0.01, 10
"""An n-gram in more than this share of the items, and in so many, belongs to their template and tells nothing."""
Code = Literal["leak.validation", "leak.evaluation"]


class EvaluationSet:
    """N-grams of the questions of a held-out set: 12 bytes each. Built once, read by all shards."""

    def __init__(self, name: str, records: Iterable[Record], code: Code = "leak.evaluation") -> None:
        self.name, self.code = name, code
        hashes, items = [np.empty(0, dtype=np.uint64)], [np.empty(0, dtype=np.uint32)]
        self.size = 0
        for record in records:
            if record.fault is None:
                found = _grams_of_item(record.question or record.output)
                hashes.append(found)
                items.append(np.full(len(found), self.size, dtype=np.uint32))
                self.size += 1
        all_hashes, all_items = np.concatenate(hashes), np.concatenate(items)
        order = np.argsort(all_hashes, kind="stable")
        all_hashes, all_items = all_hashes[order], all_items[order]
        kinds, inverse, counts = np.unique(all_hashes, return_inverse=True, return_counts=True)
        telling = counts[inverse] <= max(TEMPLATE_FROM, TEMPLATE_SHARE * self.size) if len(kinds) else slice(0)
        self._hashes, self._items = all_hashes[telling], all_items[telling]
        self._grams_of = np.bincount(self._items, minlength=self.size)

    def check(self, record: Record) -> Iterator[Hit]:
        """A hit if an item of the set stands in a training record."""
        if not len(self._hashes) or record.fault is not None or record.split != "train":
            return
        found = self._grams_of_record(record)
        start = np.searchsorted(self._hashes, found, side="left")
        end = np.searchsorted(self._hashes, found, side="right")
        if not (end > start).any():
            return
        items = np.concatenate([self._items[a:b] for a, b in zip(start, end, strict=True) if b > a])
        counts = np.bincount(items)
        overlap = counts / np.maximum(1, self._grams_of[: len(counts)])
        if (best := float(overlap.max())) >= OVERLAP:
            item = int(overlap.argmax()) + 1
            yield Hit(self.code, record.key, f"{best:.0%} of item {item} of {self.name}", excerpt(record.text))

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
