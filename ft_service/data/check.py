"""From shards to a judgement: every shard is examined, and what was seen of all of them is judged as one."""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from ft_service.data.gate import Hit, Judge, Judgement, Looks
from ft_service.data.gate.judge import rights_and_size
from ft_service.data.gate.records import place_key, place_of
from ft_service.data.read import Shard
from ft_service.data.tasks import Run, Wanted, Work, examine, look_again, seen_of
from ft_service.spec.schema import RunSpec

Say = Callable[[str], None]

JUDGEMENT_FILE = "judgement.json"
FINDINGS_FILE = "findings.jsonl"
"""Every place of every finding on records: ``{code, file, line, detail, excerpt}``."""
QUARANTINE_FILE = "quarantine.jsonl"
"""Every record that is left out: ``{code, reason, file, line, source, excerpt}``; sources are numbered from 0."""


@dataclass(frozen=True)
class Judged:
    """A judgement, and which records it leaves."""

    judgement: Judgement
    keys: np.ndarray
    """uint64 [used records], in order of the data."""
    held_out: np.ndarray
    """bool [used records]: for validation."""


def judge_shards(
    work: Work, shards: Sequence[Shard], run: Run, folder: Path, fraction: float, seed: int, say: Say
) -> Judged:
    """Examine and judge; writes the three files into `folder`. Raises `ShardChanged`."""
    records = 0
    for examined in run(examine, work, list(enumerate(shards))):
        records += examined.records
        say(f"Data: shard {examined.number + 1} of {len(shards)}, {records:,} records read")
    judge = work.judge(fraction=fraction, seed=seed)
    with tempfile.TemporaryDirectory(prefix="ft-data-") as fetched, _Notes(folder, judge) as notes:
        for number in range(len(shards)):
            seen, hits = seen_of(work, number, Path(fetched))
            judge.absorb(seen, notes.taking(hits))
        looks = judge.second_look()
        wanted = list(_wanted(shards, looks))
        if wanted:
            say(f"Data: {sum(len(some.keys) for some in wanted):,} records are read again, to compare them")
        for seen_again in run(look_again, work, wanted):
            looks.merge(seen_again)
        judgement = judge.close(looks, notes.note)
        used = judge.used()
    (folder / JUDGEMENT_FILE).write_text(judgement.model_dump_json(indent=2), encoding="utf-8")
    return Judged(judgement, *used)


def for_run(judgement: Judgement, spec: RunSpec) -> Judgement:
    """The judgement with what a run adds to the data: the duties that its base brings, and the steps that follow."""
    return rights_and_size(judgement, spec.model.base, spec.data.max_seq_len, spec.train.global_batch_size)


def _wanted(shards: Sequence[Shard], looks: Looks) -> Iterator[Wanted]:
    """Which records of which shard are read again."""
    starts = np.array([place_key(shard.source, shard.file, shard.first) for shard in shards], dtype=np.uint64)
    keys = looks.keys()
    of_shard = np.searchsorted(starts, keys, side="right") - 1
    for number in np.unique(of_shard).tolist():
        chosen = keys[of_shard == number]
        first = place_key(shards[number].source, shards[number].file, 0)
        yield Wanted(shards[number], chosen, frozenset((chosen - np.uint64(first)).tolist()))


class _Notes:
    """Writes all places of findings, and the records that are left out."""

    def __init__(self, folder: Path, judge: Judge) -> None:
        self._judge = judge
        self._paths = folder / FINDINGS_FILE, folder / QUARANTINE_FILE

    def __enter__(self) -> "_Notes":
        self._findings, self._quarantine = (
            path.open("w", encoding="utf-8", errors="backslashreplace") for path in self._paths
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._findings.close()
        self._quarantine.close()

    def taking(self, hits: Iterator[list[Hit]]) -> Iterator[list[Hit]]:
        """The same hits, written down on their way."""
        for of_record in hits:
            self._write(of_record)
            yield of_record

    def note(self, hit: Hit) -> None:
        self._write([hit])

    def _write(self, of_record: list[Hit]) -> None:
        for hit in of_record:
            _line(self._findings, {"code": hit.code, **self._judge.place(hit).model_dump()})
        if (reason := self._judge.is_left_out(of_record)) is not None:
            place = self._judge.place(reason)
            source = place_of(reason.key)[0]
            told = {
                "code": reason.code,
                "reason": place.detail,
                "file": place.file,
                "line": place.line,
                "source": source,
                "excerpt": place.excerpt,
            }
            _line(self._quarantine, told)


def _line(stream: TextIO, value: dict[str, object]) -> None:
    stream.write(json.dumps(value, ensure_ascii=False) + "\n")
