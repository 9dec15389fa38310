"""A cleaned copy of the data: what cannot be trained on, and exact copies, are left out, and each decision is told."""

import json
import os
import tempfile
from pathlib import Path

from ft_service.data.judge import Judgement
from ft_service.data.judging import QUARANTINE_FILE
from ft_service.data.prepare import all_sources, judge_dataset
from ft_service.data.read import Fault, read_shard, scan
from ft_service.data.stages import Run, here
from ft_service.errors import UsageError
from ft_service.spec import RunSpec

DECISIONS_FILE = "left_out.jsonl"
"""A line for each record that is left out: ``{code, reason, file, line, source}``."""


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
        judgement = judge_dataset(spec, None, judged, run=run)
        left_out = _left_out(judged / QUARANTINE_FILE)
        for number, source in enumerate(all_sources(spec)):
            name = f"{number}-{Path(source.path.replace(':', '-')).stem}.jsonl"
            with (made / name).open("w", encoding="utf-8") as file:
                for shard in scan(number, source).shards:
                    gone = left_out.get((number, shard.path), set())
                    for line, raw in read_shard(shard, source):
                        if not isinstance(raw, Fault) and line not in gone:
                            file.write(json.dumps(raw, ensure_ascii=False, default=str) + "\n")
        os.replace(judged / QUARANTINE_FILE, made / DECISIONS_FILE)
        made.rename(out)
    return judgement


def _left_out(quarantine: Path) -> dict[tuple[int, str], set[int]]:
    """Numbers of the records that are left out, by source and file: a file may be in two sources."""
    found: dict[tuple[int, str], set[int]] = {}
    with quarantine.open(encoding="utf-8") as stream:
        for line in stream:
            told = json.loads(line)
            found.setdefault((told["source"], told["file"]), set()).add(told["line"])
    return found
