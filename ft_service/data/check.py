"""Checks a dataset: every shard by itself, then all shards together. The result is one judgement."""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from ft_service.data.dataset import JUDGEMENT_FILE
from ft_service.data.files.shard import FileShard
from ft_service.data.gate import Gate, Hit, Judgement, SecondPass
from ft_service.data.gate.gate import add_base_and_steps
from ft_service.data.gate.records import place_key, place_of
from ft_service.data.tasks import Reread, RunTasks, TaskContext, check_shard, load_partial_result, read_again
from ft_service.spec.schema import RunSpec

Say = Callable[[str], None]

FINDINGS_FILE = "findings.jsonl"
"""Every place of every finding on records: ``{code, file, line, detail, excerpt}``."""
QUARANTINE_FILE = "quarantine.jsonl"
"""Every record that is left out: ``{code, reason, file, line, source, excerpt}``; sources are numbered from 0."""


@dataclass(frozen=True)
class CheckResult:
    """A judgement, and the records that are not left out."""

    judgement: Judgement
    keys: np.ndarray
    """uint64 [used records], in order of the data."""
    held_out: np.ndarray
    """bool [used records]: for validation."""
    groups: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    """`Gate.groups`, if they were asked for."""


def check_shards(
    context: TaskContext,
    shards: Sequence[FileShard],
    run_tasks: RunTasks,
    folder: Path,
    fraction: float,
    seed: int,
    say: Say,
    with_groups: bool = False,
) -> CheckResult:
    """Check all shards, and write the three files into `folder`. Raises `ShardChanged`."""
    num_records = 0
    for checked in run_tasks(check_shard, context, list(enumerate(shards))):
        num_records += checked.records
        say(f"Data: shard {checked.number + 1} of {len(shards)}, {num_records:,} records read")
    gate = context.gate(fraction=fraction, seed=seed)
    with tempfile.TemporaryDirectory(prefix="ft-data-") as fetched, _HitWriter(folder, gate) as writer:
        for number in range(len(shards)):
            partial_result, hits = load_partial_result(context, number, Path(fetched))
            gate.merge(partial_result, writer.write_through(hits))
        second_pass = gate.second_pass()
        rereads = list(_rereads(shards, second_pass))
        if rereads:
            num_records = sum(len(reread.keys) for reread in rereads)
            say(f"Data: reading {num_records:,} records a second time, to compare them")
        for partial_pass in run_tasks(read_again, context, rereads):
            second_pass.merge(partial_pass)
        judgement = gate.judgement(second_pass, writer.write)
        used = gate.used_records()
        groups = gate.groups(second_pass) if with_groups else None
    (folder / JUDGEMENT_FILE).write_text(judgement.model_dump_json(indent=2), encoding="utf-8")
    return CheckResult(judgement, *used, groups)


def judgement_for_run(judgement: Judgement, spec: RunSpec) -> Judgement:
    """The judgement with what depends on the run: its base's license, and the number of steps."""
    return add_base_and_steps(judgement, spec.model.base, spec.data.max_seq_len, spec.train.global_batch_size)


def _rereads(shards: Sequence[FileShard], second_pass: SecondPass) -> Iterator[Reread]:
    """The records of each shard that are read a second time."""
    starts = np.array([place_key(shard.source, shard.file, shard.first) for shard in shards], dtype=np.uint64)
    keys = second_pass.keys()
    shard_of_key = np.searchsorted(starts, keys, side="right") - 1
    for number in np.unique(shard_of_key).tolist():
        shard_keys = keys[shard_of_key == number]
        start = place_key(shards[number].source, shards[number].file, 0)
        yield Reread(shards[number], shard_keys, frozenset((shard_keys - np.uint64(start)).tolist()))


class _HitWriter:
    """Writes the places of all findings, and the records that are left out."""

    def __init__(self, folder: Path, gate: Gate) -> None:
        self._gate = gate
        self._folder = folder

    def __enter__(self) -> "_HitWriter":
        self._findings, self._quarantine = (
            (self._folder / name).open("w", encoding="utf-8", errors="backslashreplace")
            for name in (FINDINGS_FILE, QUARANTINE_FILE)
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._findings.close()
        self._quarantine.close()

    def write_through(self, hits: Iterator[list[Hit]]) -> Iterator[list[Hit]]:
        """The same hits; each record's hits are written as they pass."""
        for record_hits in hits:
            self._write(record_hits)
            yield record_hits

    def write(self, hit: Hit) -> None:
        """Write one hit across records."""
        self._write([hit])

    def _write(self, record_hits: list[Hit]) -> None:
        for hit in record_hits:
            _write_line(self._findings, {"code": hit.code, **self._gate.place(hit).model_dump()})
        if (reason := self._gate.reason_left_out(record_hits)) is not None:
            place = self._gate.place(reason)
            left_out = {
                "code": reason.code,
                "reason": place.detail,
                "file": place.file,
                "line": place.line,
                "source": place_of(reason.key)[0],
                "excerpt": place.excerpt,
            }
            _write_line(self._quarantine, left_out)


def _write_line(stream: TextIO, value: dict[str, object]) -> None:
    stream.write(json.dumps(value, ensure_ascii=False) + "\n")
