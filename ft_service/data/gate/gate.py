"""The gate: checks records one by one, merges the results of other shards, and gives the judgement of all of them.

    gate = Gate(sources, max_seq_len=..., evaluation=...)
    for record in records:
        hits = gate.check(record)                 # findings of this record alone
    gate.merge(partial_result, hits)              # of a gate that checked another shard
    second_pass = gate.second_pass()              # which few records to read a second time
    for record in records:
        second_pass.add(record)
    judgement = gate.judgement(second_pass, on_hit)     # findings across records go to `on_hit`

Memory: half a KiB of facts for each record, and none of its text.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappush, heapreplace
from itertools import chain, count
from typing import Literal

import numpy as np

from ft_service.chat.format import ChatFormat
from ft_service.data.convert import unused_fields
from ft_service.data.gate.balance import check_balance
from ft_service.data.gate.codes import CODES, LEFT_OUT
from ft_service.data.gate.duplicates import (
    Repeats,
    SecondPass,
    check_repeats,
    find_repeats,
    groups_of,
    suspects,
)
from ft_service.data.gate.facts import Facts, FactTable
from ft_service.data.gate.findings import (
    Finding,
    Histogram,
    Judgement,
    Place,
    Signal,
    SourceCount,
    by_severity,
    verdict_of,
)
from ft_service.data.gate.form import OTHER_FIELDS, Hit, check_files, check_record, check_unused, null_text
from ft_service.data.gate.leakage import EvaluationSets
from ft_service.data.gate.private import detail, visible
from ft_service.data.gate.records import Record, Source, place_of
from ft_service.data.gate.rights import base_duties, check_rights
from ft_service.data.gate.signal import FEW_LOSS_TOKENS, check_rendering, check_signal, is_rendering_sample
from ft_service.data.gate.size import NARROW, TOO_FEW, advise
from ft_service.data.gate.style import check_style
from ft_service.data.gate.text import mixed
from ft_service.text import counted

FIRST_PLACES = 20
"""Places that a finding carries; `on_hit` gets all of them."""
MAX_UNUSED_FIELDS = 1000
"""Names of unused fields that are counted one by one; a file may have other names in every record."""
_SHOWN_CURES = 3
"""Cures of a finding whose records have several causes."""
_EDGES = [0, *(round(16 * 2 ** (step / 2)) for step in range(31))]


class Tally:
    """Counts of hits by code and by source, with the first hits of each code. The tallies of two shards add up."""

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
        """The first hits of a code, in order of the data."""
        return [hit for *_, hit in sorted(self._first.get(code, []), key=lambda kept: (-kept[0], -kept[1]))]

    def _keep(self, hit: Hit) -> None:
        kept = self._first.setdefault(hit.code, [])  # a heap with the last place on top
        entry = (-hit.key, -next(self._order), hit)
        if len(kept) < FIRST_PLACES:
            heappush(kept, entry)
        elif entry[0] > kept[0][0]:
            heapreplace(kept, entry)


@dataclass(frozen=True)
class PartialResult:
    """What a gate keeps of the records it checked, apart from their hits."""

    read: dict[int, int]
    """Source -> records read."""
    rendered: int
    """Records whose rendering was checked."""
    facts: np.ndarray
    """[usable records] of `FACTS`."""
    columns: frozenset[tuple[int, str]] = frozenset()
    """(source, column): the optional columns that some record has."""
    unused: Counter[tuple[int, str]] = field(default_factory=Counter)
    """(source, field) -> records with a value in a field that is not used."""


class Gate:
    """Checks the records of some sources; the module's docstring shows how.

    Records with a code in `keep` are not left out, although the code allows it. With `fraction`, about that share of
    the records is held out for validation, chosen by `seed` and content alone.
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
        self._evaluation = evaluation
        self._chat = chat
        self._leaves_out = LEFT_OUT - frozenset(keep)
        self._fraction = fraction
        self._seed = seed
        self._tally = Tally()
        self._read: Counter[int] = Counter()
        self._left_out: Counter[str] = Counter()
        self._left_out_by_source: Counter[int] = Counter()
        self._rendered = 0
        self._columns: set[tuple[int, str]] = set()
        self._unused: Counter[tuple[int, str]] = Counter()
        self._table = FactTable()
        self._frozen: tuple[Facts, Repeats] | None = None

    # -- records -------------------------------------------------------------------------------------------------------

    def check(self, record: Record) -> list[Hit]:
        """The findings of one record alone. `reason_left_out` of them says whether the record is left out."""
        self._frozen = None
        self._read[record.source] += 1
        self._columns.update(
            (record.source, name) for name in self.sources[record.source].optional if name in record.raw
        )
        self._count_unused(record)
        hits = [*check_record(record), *check_signal(record)]
        hits += null_text(record, self.sources[record.source].texts)
        if self._evaluation is not None:
            hits += self._evaluation.check(record)
        if self._chat is not None and is_rendering_sample(record):
            self._rendered += 1
            hits += check_rendering(record, self._chat)
        if not self._count(record.key, hits) and record.fault is None:
            self._table.add(record)
        return hits

    def reason_left_out(self, hits: Iterable[Hit]) -> Hit | None:
        """The first of a record's hits that leaves the record out; None if the record is used."""
        return next((hit for hit in hits if hit.code in self._leaves_out), None)

    def partial_result(self) -> PartialResult:
        """The result so far, for another gate of the same sources to `merge`."""
        return PartialResult(
            dict(self._read), self._rendered, self._table.rows(), frozenset(self._columns), self._unused.copy()
        )

    def merge(self, other: PartialResult, hits: Iterable[Sequence[Hit]]) -> None:
        """Add the result of another gate, and all its hits: one sequence for each record."""
        self._frozen = None
        self._read.update(other.read)
        self._rendered += other.rendered
        self._columns |= other.columns
        self._unused += other.unused
        self._table.add_rows(other.facts)
        for record_hits in hits:
            if record_hits:
                self._count(record_hits[0].key, record_hits)

    def _count_unused(self, record: Record) -> None:
        source = self.sources[record.source]
        if source.used is None:
            return
        for name in unused_fields(record.raw, source.used, source.messages):
            known = (record.source, name) in self._unused or len(self._unused) < MAX_UNUSED_FIELDS
            self._unused[record.source, name if known else OTHER_FIELDS] += 1

    def _count(self, key: int, hits: Sequence[Hit]) -> bool:
        """Count a record's hits; returns whether the record is left out."""
        for hit in hits:
            self._tally.add(hit)
        if (reason := self.reason_left_out(hits)) is None:
            return False
        self._left_out[reason.code] += 1
        self._left_out_by_source[place_of(key)[0]] += 1
        return True

    # -- the whole -----------------------------------------------------------------------------------------------------

    def second_pass(self) -> SecondPass:
        """The records to read a second time: possible repeats, and the examples that findings show."""
        facts, repeats = self._freeze()
        tally = Tally()
        for hit in chain(check_style(facts), check_balance(facts, SecondPass())[1]):
            tally.add(hit)
        examples = [hit.key for code in tally.counts for hit in tally.first(code)]
        for column in ("output", "output_opening", "prompt_opening"):  # the balance check shows an example of each
            examples += _first_of_the_largest(facts, column)
        rows, template_rows = suspects(facts, repeats, examples)
        return SecondPass([*rows.tolist(), *examples], template_rows.tolist())

    def judgement(self, second_pass: SecondPass, on_hit: Callable[[Hit], None] = lambda hit: None) -> Judgement:
        """The judgement of all records. `on_hit` gets the hits across records; `check` returned the others."""
        facts, repeats = self._freeze()
        tally = Tally()
        tally.merge(self._tally)
        left_out = Counter(self._left_out)
        left_out_by_source = Counter(self._left_out_by_source)
        entropy, balance_hits = check_balance(facts, second_pass)
        repeat_hits = check_repeats(facts, repeats, second_pass, self.place_text)
        for hit in chain(balance_hits, check_style(facts), repeat_hits):
            if not hit.excerpt:
                hit = Hit(hit.code, hit.key, hit.detail, second_pass.excerpt(hit.key))
            tally.add(hit)
            if hit.code in self._leaves_out:
                left_out[hit.code] += 1
                left_out_by_source[place_of(hit.key)[0]] += 1
            on_hit(hit)
        read = sum(self._read.values())
        train = self._is_used(facts, repeats) & ~facts["validation"]
        signal = _signal(facts, train)
        size = advise(int(train.sum()), signal.tokens, self._max_seq_len, None)
        findings = [self._finding(code, tally, read) for code in tally.counts]
        findings += check_rights(self.sources)
        findings += check_files(self.sources, self._read, self._columns)
        findings += check_unused(self.sources, self._read, self._unused)
        findings += self._evaluation.findings() if self._evaluation is not None else []
        if signal.records and signal.loss_share < FEW_LOSS_TOKENS:
            message = f"{signal.loss_share:.1%} of the tokens are trained on."
            findings.append(_finding_on_all("signal.few-loss-tokens", signal.records, message))
        if size.training_records < NARROW:
            code = "size.too-few" if size.training_records < TOO_FEW else "size.small"
            findings.append(_finding_on_all(code, size.training_records, size.text))
        findings = by_severity(findings)
        return Judgement(
            verdict=verdict_of(findings),
            findings=findings,
            read=read,
            usable=read - sum(left_out.values()),
            left_out=dict(sorted(left_out.items())),
            sources=[
                self._source(number, facts, train, tally, left_out_by_source[number])
                for number in range(len(self.sources))
            ],
            lengths=_lengths(facts, train),
            signal=signal,
            entropy=entropy,
            size=size,
        )

    def place_text(self, key: int) -> str:
        """A record's place as ``file:line``."""
        return str(self.place(Hit("", key)))

    def place(self, hit: Hit) -> Place:
        """A hit's place, safe to print: masked, without control characters."""
        source, file, line = place_of(hit.key)
        name = visible(self.sources[source].files[file])
        return Place(file=name, line=line, detail=detail(hit.detail), excerpt=hit.excerpt)

    def used_records(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys of all records that are not left out, uint64 [N], in order; and whether each is held out, bool [N]."""
        facts, repeats = self._freeze()
        used = self._is_used(facts, repeats)
        return facts["key"][used], facts["validation"][used]

    def groups(self, second_pass: SecondPass) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Groups of records that ask or say the same: keys, uint64 [N], in order; the first key of the group of each,
        uint64 [N]; and the hash of the content of that first record, uint64 [N]."""
        facts, repeats = self._freeze()
        firsts = groups_of(facts, repeats, second_pass)
        return facts["key"], facts["key"][firsts], facts["content"][firsts]

    def _freeze(self) -> tuple[Facts, Repeats]:
        if self._frozen is None:
            facts = self._table.freeze()
            if self._fraction:
                facts.hold_out(held_out(facts["content"], self._fraction, self._seed))
            self._frozen = facts, find_repeats(facts)
        return self._frozen

    def _is_used(self, facts: Facts, repeats: Repeats) -> np.ndarray:
        if "quality.exact-duplicate" not in self._leaves_out:
            return np.ones(len(facts), dtype=bool)
        return repeats.exact == np.arange(len(facts))

    def _finding(self, code: str, tally: Tally, read: int) -> Finding:
        known = CODES[code]
        count = tally.counts[code]
        checked = self._rendered if code == "signal.round-trip" else read
        first = tally.first(code)
        cures = list(dict.fromkeys(hit.cure or known.cure for hit in first))
        return Finding(
            code=code,
            severity=known.severity(count / checked),
            count=count,
            share=count / checked,
            places=[self.place(hit) for hit in first],
            why=known.why,
            cure=visible(" ".join(cures[:_SHOWN_CURES])),
            message=f"A sample of {counted(checked, 'record')} was checked." if code == "signal.round-trip" else "",
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


def add_base_and_steps(judgement: Judgement, base: str, max_seq_len: int, global_batch_size: int) -> Judgement:
    """The judgement for a run: with the conditions of its base's license, and the steps that its batches need."""
    findings = [*judgement.findings, *base_duties(base)]
    size = advise(judgement.size.training_records, judgement.signal.tokens, max_seq_len, global_batch_size)
    return judgement.model_copy(update={"findings": by_severity(findings), "size": size})


def held_out(contents: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which records are held out, bool [N], by the hashes of their contents, uint64 [N].

    Equal contents are never split, and a record stays on its side when others are added. (The exception: if there are
    two or more distinct contents, each side gets at least one.)
    """
    shares = mixed(contents ^ mixed(np.array([seed + 1], dtype=np.uint64))) / 2.0**64
    distinct = np.unique(shares)
    if len(distinct) < 2:
        return np.zeros(len(contents), dtype=bool)
    return shares < min(max(fraction, distinct[1]), distinct[-1])


def _finding_on_all(code: str, count: int, message: str) -> Finding:
    """A finding about all records together, without places."""
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
    """Lengths of whole records in tokens; without a tokenizer, of answers in characters."""
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
