"""The judge: sees records one by one, takes over what others saw of other shards, and comes to a judgement.

    judge = Judge(sources, max_seq_len=..., evaluation=[...])
    for record in records:
        hits = judge.see(record)            # at once: what is wrong with it; is it left out?
    judge.absorb(seen, hits)                # of another judge, which saw another shard
    looks = judge.second_look()             # which records to read again: few
    for record in records:
        if looks.wants(record.key): looks.see(record)
    judgement = judge.close(looks, note)    # late hits go to `note`

Memory: half a KiB a record (`facts`), and nothing of its text.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heappush, heapreplace
from itertools import chain, count
from typing import Literal

import numpy as np

from ft_service.chat.format import ChatFormat
from ft_service.data.gate.balance import judge_balance
from ft_service.data.gate.codes import CODES, LEFT_OUT
from ft_service.data.gate.duplicates import Looks, Repeats, find_repeats, judge_repeats, suspects
from ft_service.data.gate.facts import Facts, FactTable
from ft_service.data.gate.findings import (
    Finding,
    Histogram,
    Judgement,
    Place,
    Signal,
    SourceCount,
    by_gravity,
    verdict_of,
)
from ft_service.data.gate.form import Hit, check_record, judge_files
from ft_service.data.gate.leakage import EvaluationSets
from ft_service.data.gate.private import detail, visible
from ft_service.data.gate.records import Record, Source, place_of
from ft_service.data.gate.rights import base_duties, judge_rights
from ft_service.data.gate.signal import FEW_LOSS_TOKENS, check_rendering, check_signal, is_rendered
from ft_service.data.gate.size import NARROW, TOO_FEW, advise
from ft_service.data.gate.style import judge_style
from ft_service.data.gate.text import mixed

FIRST_PLACES = 20
"""Places that a finding carries; all of them go to `note`."""
_EDGES = [0, *(round(16 * 2 ** (step / 2)) for step in range(31))]


class Tally:
    """Hits by code: how many, of which source, and the first of them. Two tallies of two shards add up."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.by_source: Counter[tuple[int, str]] = Counter()
        self._first: dict[str, list[tuple[int, int, Hit]]] = {}
        self._order = count()

    def add(self, hit: Hit) -> None:
        self.counts[hit.code] += 1
        self.by_source[place_of(hit.key)[0], hit.code] += 1
        self._keep(hit)

    def merge(self, other: "Tally") -> None:
        self.counts += other.counts
        self.by_source += other.by_source
        for code in other.counts:
            for hit in other.first(code):
                self._keep(hit)

    def first(self, code: str) -> list[Hit]:
        """The first places of a code, in order of the data."""
        return [hit for *_, hit in sorted(self._first.get(code, []), key=lambda kept: (-kept[0], -kept[1]))]

    def _keep(self, hit: Hit) -> None:
        kept = self._first.setdefault(hit.code, [])  # a heap with the last place on top
        entry = (-hit.key, -next(self._order), hit)
        if len(kept) < FIRST_PLACES:
            heappush(kept, entry)
        elif entry[0] > kept[0][0]:
            heapreplace(kept, entry)


@dataclass(frozen=True)
class Seen:
    """What a judge saw, beside the hits that it gave at once."""

    read: dict[int, int]
    """Records of each source."""
    rendered: int
    """Records whose rendering was tried."""
    facts: np.ndarray
    """[usable records] of `FACTS`."""
    columns: frozenset[tuple[int, str]] = frozenset()
    """Of each source, its optional columns that were there."""


class Judge:
    """See the module. `keep` names codes of records that are not left out although they could be.

    With `fraction`, about that share of the records is held out, chosen by `seed` and content alone.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        max_seq_len: int | None = None,
        evaluation: EvaluationSets | None = None,
        chat: ChatFormat | None = None,
        keep: Iterable[str] = (),
        fraction: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.sources = tuple(sources)
        self._max_seq_len = max_seq_len
        self._evaluation, self._chat = evaluation, chat
        self._leaves_out = LEFT_OUT - frozenset(keep)
        self._fraction, self._seed = fraction, seed
        self._tally = Tally()
        self._read: Counter[int] = Counter()
        self._left_out: Counter[str] = Counter()
        self._left_out_of: Counter[int] = Counter()
        self._rendered = 0
        self._columns: set[tuple[int, str]] = set()
        self._table = FactTable()
        self._frozen: tuple[Facts, Repeats] | None = None

    # -- seeing --------------------------------------------------------------------------------------------------------

    def see(self, record: Record) -> list[Hit]:
        """What is wrong with a record. If `is_left_out` of any of it, the record is not to be used."""
        self._frozen = None
        self._read[record.source] += 1
        self._columns.update(
            (record.source, name) for name in self.sources[record.source].optional if name in record.raw
        )
        hits = [*check_record(record), *check_signal(record)]
        if self._evaluation is not None:
            hits += self._evaluation.check(record)
        if self._chat is not None and is_rendered(record):
            self._rendered += 1
            hits += check_rendering(record, self._chat)
        if not self._count(record.key, hits) and record.fault is None:
            self._table.add(record)
        return hits

    def is_left_out(self, hits: Iterable[Hit]) -> Hit | None:
        """The first of these hits for which the record is left out, or None if it is used."""
        return next((hit for hit in hits if hit.code in self._leaves_out), None)

    def seen(self) -> Seen:
        """What was seen until now, for another judge of the same sources to absorb."""
        return Seen(dict(self._read), self._rendered, self._table.rows(), frozenset(self._columns))

    def absorb(self, seen: Seen, hits: Iterable[Sequence[Hit]]) -> None:
        """Take over what another judge saw, with all the hits that it gave, those of a record together."""
        self._frozen = None
        self._read.update(seen.read)
        self._rendered += seen.rendered
        self._columns |= seen.columns
        self._table.add_rows(seen.facts)
        for of_record in hits:
            if of_record:
                self._count(of_record[0].key, of_record)

    def _count(self, key: int, hits: Sequence[Hit]) -> bool:
        """Count a record's hits; returns whether it is left out."""
        for hit in hits:
            self._tally.add(hit)
        if (reason := self.is_left_out(hits)) is None:
            return False
        self._left_out[reason.code] += 1
        self._left_out_of[place_of(key)[0]] += 1
        return True

    # -- judging -------------------------------------------------------------------------------------------------------

    def second_look(self) -> Looks:
        """What to read again: the records that may repeat each other, and the first of those that stand out."""
        facts, repeats = self._freeze()
        tally = Tally()
        for hit in chain(judge_style(facts), judge_balance(facts, Looks())[1]):
            tally.add(hit)
        shown = [hit.key for code in tally.counts for hit in tally.first(code)]
        for column in ("output", "output_opening", "prompt_opening"):  # balance tells an example of each
            shown += _first_of_the_largest(facts, column)
        return Looks([*suspects(facts, repeats).tolist(), *shown])

    def close(self, looks: Looks, note: Callable[[Hit], None] = lambda hit: None) -> Judgement:
        """The judgement. Every hit that only the whole shows goes to `note`; the others came from `see`."""
        facts, repeats = self._freeze()
        tally = Tally()
        tally.merge(self._tally)
        left_out, left_out_of = Counter(self._left_out), Counter(self._left_out_of)
        entropy, hits = judge_balance(facts, looks)
        repeated = judge_repeats(facts, repeats, looks, self.say_place)
        for hit in chain(hits, judge_style(facts), repeated):
            if not hit.excerpt:
                hit = Hit(hit.code, hit.key, hit.detail, looks.excerpt(hit.key))
            tally.add(hit)
            if hit.code in self._leaves_out:
                left_out[hit.code] += 1
                left_out_of[place_of(hit.key)[0]] += 1
            note(hit)
        read = sum(self._read.values())
        usable = read - sum(left_out.values())
        train = self._used(facts, repeats) & ~facts["validation"]
        signal = _signal(facts, train)
        size = advise(int(train.sum()), signal.tokens, self._max_seq_len, None)
        findings = [self._finding(code, tally, read) for code in tally.counts]
        findings += judge_rights(self.sources)
        findings += judge_files(self.sources, self._read, self._columns)
        findings += self._evaluation.findings() if self._evaluation is not None else []
        if signal.records and signal.loss_share < FEW_LOSS_TOKENS:
            findings.append(
                _remark("signal.few-loss-tokens", signal.records, f"{signal.loss_share:.1%} are loss tokens.")
            )
        if size.usable < NARROW:
            findings.append(_remark("size.too-few" if size.usable < TOO_FEW else "size.small", size.usable, size.text))
        findings = by_gravity(findings)
        return Judgement(
            verdict=verdict_of(findings),
            findings=findings,
            read=read,
            usable=usable,
            left_out=dict(sorted(left_out.items())),
            sources=[
                self._source(number, facts, train, tally, left_out_of[number]) for number in range(len(self.sources))
            ],
            lengths=_lengths(facts, train),
            signal=signal,
            entropy=entropy,
            size=size,
        )

    def say_place(self, key: int) -> str:
        """A place as people write it: file:line."""
        return str(self.place(Hit("", key)))

    def place(self, hit: Hit) -> Place:
        """A hit's place, for people and files."""
        source, file, line = place_of(hit.key)
        name = visible(self.sources[source].files[file])
        return Place(file=name, line=line, detail=detail(hit.detail), excerpt=hit.excerpt)

    def used(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys uint64 [N] of the records to train and validate on, in order, and which of them are held out, bool [N].

        All that were seen, but those that are left out.
        """
        facts, repeats = self._freeze()
        used = self._used(facts, repeats)
        return facts["key"][used], facts["validation"][used]

    def _freeze(self) -> tuple[Facts, Repeats]:
        if self._frozen is None:
            facts = self._table.freeze()
            if self._fraction:
                facts.hold_out(held_out(facts["content"], self._fraction, self._seed))
            self._frozen = facts, find_repeats(facts)
        return self._frozen

    def _used(self, facts: Facts, repeats: Repeats) -> np.ndarray:
        if "quality.exact-duplicate" not in self._leaves_out:
            return np.ones(len(facts), dtype=bool)
        return repeats.exact == np.arange(len(facts))

    def _finding(self, code: str, tally: Tally, read: int) -> Finding:
        known, count = CODES[code], tally.counts[code]
        of = self._rendered if code == "signal.round-trip" else read
        return Finding(
            code=code,
            severity=known.severity(count / of),
            count=count,
            share=count / of,
            places=[self.place(hit) for hit in tally.first(code)],
            why=known.why,
            cure=known.cure,
            message=f"Of {of} records that were tried." if code == "signal.round-trip" else "",
        )

    def _source(self, number: int, facts: Facts, train: np.ndarray, tally: Tally, left_out: int) -> SourceCount:
        rows = train & (facts["source"] == number)
        return SourceCount(
            path=self.sources[number].path,
            license=self.sources[number].license,
            read=self._read[number],
            usable=self._read[number] - left_out,
            tokens=int(facts["kept"][rows].sum()),
            loss_tokens=int(facts["kept_loss"][rows].sum()),
            findings={code: count for (source, code), count in sorted(tally.by_source.items()) if source == number},
        )


def rights_and_size(judgement: Judgement, base: str, max_seq_len: int, global_batch_size: int) -> Judgement:
    """The judgement for a run: with the duties that its base brings, and the steps that follow from its batches."""
    findings = [*judgement.findings, *base_duties(base)]
    size = advise(judgement.size.usable, judgement.signal.tokens, max_seq_len, global_batch_size)
    return judgement.model_copy(update={"findings": by_gravity(findings), "size": size})


def held_out(contents: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which records are held out, bool [N], by hashes uint64 [N] of their contents.

    Equal contents stay on one side, and a record keeps its side when others are added (nearly always: of two or more
    distinct contents at least one is on each side).
    """
    shares = mixed(contents ^ mixed(np.array([seed + 1], dtype=np.uint64))) / 2.0**64
    distinct = np.unique(shares)
    if len(distinct) < 2:
        return np.zeros(len(contents), dtype=bool)
    return shares < min(max(fraction, distinct[1]), distinct[-1])


def _remark(code: str, count: int, message: str) -> Finding:
    """A finding on the whole, which has no places."""
    known = CODES[code]
    return Finding(
        code=code,
        severity=known.severity(1.0),
        count=count,
        share=1.0,
        places=[],
        why=known.why,
        cure=known.cure,
        message=message,
    )


def _signal(facts: Facts, train: np.ndarray) -> Signal:
    total, kept, loss, kept_loss = (
        int(facts[name][train].sum(dtype=np.int64)) for name in ("tokens", "kept", "loss", "kept_loss")
    )
    return Signal(
        records=int((facts["tokens"][train] > 0).sum()),
        tokens=kept,
        loss_tokens=kept_loss,
        lost_tokens=total - kept,
        lost_loss_tokens=loss - kept_loss,
    )


def _lengths(facts: Facts, train: np.ndarray) -> Histogram:
    """Of whole records in tokens; of answers in characters where tokens were not counted."""
    tokens = facts["tokens"][train]
    unit: Literal["tokens", "characters"] = "tokens" if tokens.any() else "characters"
    values = tokens if unit == "tokens" else facts["output_length"][train]
    counts = np.histogram(values, bins=_EDGES)[0]
    last = int(np.flatnonzero(counts).max()) + 1 if counts.any() else 1
    return Histogram(unit=unit, edges=_EDGES[: last + 1], counts=counts[:last].tolist())


def _first_of_the_largest(facts: Facts, column: str) -> list[int]:
    """The key of the first record of the most frequent value."""
    if not len(facts):
        return []
    _, first, counts = np.unique(facts[column], return_index=True, return_counts=True)
    return [int(facts["key"][first[counts.argmax()]])]
