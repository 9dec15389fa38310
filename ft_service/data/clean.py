"""A cleaned copy of the data: what cannot be trained on, and exact copies, are left out, and each decision is told."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from ft_service.data.check import QUARANTINE_FILE
from ft_service.data.gate import Judgement
from ft_service.data.gate.private import visible
from ft_service.data.prepare import all_sources, judge_dataset
from ft_service.data.read import Fault, read_shard, scan
from ft_service.data.tasks import Run, here
from ft_service.errors import UsageError
from ft_service.spec.schema import RunSpec

DECISIONS_FILE = "left_out.jsonl"
"""A line for each record that is left out: ``{code, reason, file, line, source, excerpt}`` and the whole of it as
``record``, or as ``text`` where it could not be read."""


def clean(spec: RunSpec, out: Path, run: Run = here) -> Judgement:
    """Write the spec's sources, one file of JSON lines each, and `DECISIONS_FILE` into the new folder `out`.

    Returns the judgement of the data as they were. Records keep their order and all their columns. Raises `UsageError`
    if `out` exists, and `DataError` where a file is missing; nothing is left behind then.
    """
    if out.exists():
        raise UsageError(f"OUT = {str(out)!r}: exists already. Name a folder that does not.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        made, judged = Path(temporary, "made"), Path(temporary, "judged")
        made.mkdir()
        judged.mkdir()
        # Before they are judged: a file that changes meanwhile is told, and not copied by the lines it had.
        scans = [scan(number, source) for number, source in enumerate(all_sources(spec))]
        judgement = judge_dataset(spec, None, judged, run=run)
        left_out = _left_out(judged / QUARANTINE_FILE)
        with _opened(made / DECISIONS_FILE) as decisions:
            for number, source in enumerate(all_sources(spec)):
                name = f"{number}-{Path(source.path.replace(':', '-')).stem}.jsonl"
                with _opened(made / name) as kept:
                    for shard in scans[number].shards:
                        for line, raw in read_shard(shard, source):
                            told = left_out.get((number, visible(shard.path), line))
                            if told is not None:
                                record = {"text": raw.text} if isinstance(raw, Fault) else {"record": raw}
                                _write(decisions, {**json.loads(told), **record})
                            elif not isinstance(raw, Fault):
                                _write(kept, raw)
        made.rename(out)
    return judgement


def _left_out(quarantine: Path) -> dict[tuple[int, str, int], str]:
    """The lines of the quarantine by source, file and number of the record: a file may be in two sources."""
    found = {}
    with quarantine.open(encoding="utf-8") as stream:
        for line in stream:
            told = json.loads(line)
            found[told["source"], told["file"], told["line"]] = line
    return found


def _opened(file: Path) -> TextIO:
    """For JSON: half a surrogate pair, which UTF-8 has no bytes for, is then written as JSON's own escape of it."""
    return file.open("w", encoding="utf-8", errors="backslashreplace")


def _write(stream: TextIO, value: Mapping[str, Any]) -> None:
    stream.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
