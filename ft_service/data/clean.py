"""A cleaned copy of the data, without unusable records and exact copies. Each record left out is listed."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from ft_service.data.check import QUARANTINE_FILE
from ft_service.data.files.shard import Fault
from ft_service.data.gate import Judgement
from ft_service.data.gate.private import visible
from ft_service.data.prepare import all_sources, check_dataset
from ft_service.data.read import read_shard, scan
from ft_service.data.tasks import RunTasks, run_locally
from ft_service.errors import UsageError
from ft_service.spec.schema import RunSpec

LEFT_OUT_FILE = "left_out.jsonl"
"""One line for each record that is left out: ``{code, reason, file, line, source, excerpt}``, and the whole record as
``record``, or as ``text`` if it could not be read."""


def clean(spec: RunSpec, out: Path, run_tasks: RunTasks = run_locally) -> Judgement:
    """Write each source as one file of JSON lines, and `LEFT_OUT_FILE`, into the new folder `out`.

    Returns the judgement of the original data. Records keep their order and all their columns. Raises `UsageError` if
    `out` exists, and `DataError` if a file is missing; then nothing is written.
    """
    if out.exists():
        raise UsageError(f"OUT = {str(out)!r}: already exists. Name a new folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        copy = Path(temporary, "copy")
        check_folder = Path(temporary, "check")
        copy.mkdir()
        check_folder.mkdir()
        # Scan before the check: if a file changes between the two, reading it fails, so the line numbers agree.
        scans = [scan(number, source) for number, source in enumerate(all_sources(spec))]
        judgement = check_dataset(spec, None, check_folder, run_tasks=run_tasks)
        left_out = _left_out(check_folder / QUARANTINE_FILE)
        with _opened(copy / LEFT_OUT_FILE) as left_out_file:
            for number, source in enumerate(all_sources(spec)):
                name = f"{number}-{Path(source.path.replace(':', '-')).stem}.jsonl"
                with _opened(copy / name) as kept:
                    for shard in scans[number].shards:
                        for line, raw in read_shard(shard, source):
                            entry = left_out.get((number, visible(shard.path), line))
                            if entry is not None:
                                record = {"text": raw.text} if isinstance(raw, Fault) else {"record": raw}
                                _write(left_out_file, {**json.loads(entry), **record})
                            elif not isinstance(raw, Fault):
                                _write(kept, raw)
        copy.rename(out)
    return judgement


def _left_out(quarantine: Path) -> dict[tuple[int, str, int], str]:
    """The lines of the quarantine by (source, file, record number); two sources may share a file."""
    lines = {}
    with quarantine.open(encoding="utf-8") as stream:
        for line in stream:
            entry = json.loads(line)
            lines[entry["source"], entry["file"], entry["line"]] = line
    return lines


def _opened(file: Path) -> TextIO:
    """Open for JSON. Half a surrogate pair, which UTF-8 cannot encode, is written as its JSON escape."""
    return file.open("w", encoding="utf-8", errors="backslashreplace")


def _write(stream: TextIO, value: Mapping[str, Any]) -> None:
    stream.write(json.dumps(value, ensure_ascii=False, default=str) + "\n")
