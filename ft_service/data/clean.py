"""A cleaned copy of the data: no unusable records, no exact copies, private data masked on request.

OUT/0-NAME.jsonl ...          the training sources, one file each
OUT/validation/1-NAME.jsonl   the validation sources, if the spec has any
OUT/decisions/                left_out.jsonl, redacted.jsonl: each decision, outside of what is read as data
"""

import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from transformers import PreTrainedTokenizerBase

from ft_service.data.check import QUARANTINE_FILE
from ft_service.data.files.shard import Fault
from ft_service.data.gate import Judgement
from ft_service.data.gate.facts import hash_of_example
from ft_service.data.gate.private import excerpt, find_private, visible
from ft_service.data.gate.records import to_record
from ft_service.data.prepare import all_sources, check_dataset
from ft_service.data.read import DECISIONS_FOLDER, LEFT_OUT_FILE, VALIDATION_FOLDER, read_shard, scan
from ft_service.data.redact import redact, redact_pieces, redact_text
from ft_service.data.tasks import RunTasks, run_locally
from ft_service.errors import UsageError
from ft_service.spec.schema import DataSource, RunSpec

REDACTED_FILE = "redacted.jsonl"
"""One line for each mask: ``{file, line, source, code, column, start, characters, mask}``. The private data itself is
in no list."""
_COPY_CODE = "quality.exact-duplicate"


@dataclass(frozen=True)
class Cleaned:
    """What `clean` read, wrote, left out and masked."""

    judgement: Judgement
    """Of the original data."""
    left_out: dict[str, int]
    """Code -> records left out."""
    redacted: dict[str, int]
    """Code -> masks."""
    files: tuple[tuple[str, str], ...]
    """(path of the source, its cleaned file relative to the new folder), in the order of the sources."""

    @property
    def written(self) -> int:
        """Records written."""
        return self.judgement.read - sum(self.left_out.values())


def clean(
    spec: RunSpec,
    out: Path,
    run_tasks: RunTasks = run_locally,
    tokenizer: PreTrainedTokenizerBase | None = None,
    redact_private: bool = False,
) -> Cleaned:
    """Write each source as one file of JSON lines into the new folder `out`, and the lists of decisions.

    Records keep their order and all their columns. With `redact_private`, private data is masked in every column, in
    the lists too. With a tokenizer, records whose answer max_seq_len cuts off are left out. Raises `UsageError` if
    `out` exists, and `DataError` if a file is missing; then nothing is written.
    """
    if out.exists():
        raise UsageError(f"OUT = {str(out)!r}: already exists. Name a new folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        copy = Path(temporary, "copy")
        check_folder = Path(temporary, "check")
        (copy / DECISIONS_FOLDER).mkdir(parents=True)
        check_folder.mkdir()
        # Scan before the check: if a file changes between the two, reading it fails, so the line numbers agree.
        scans = [scan(number, source) for number, source in enumerate(all_sources(spec))]
        judgement = check_dataset(spec, tokenizer, check_folder, run_tasks=run_tasks)
        with _Writer(
            copy, _left_out(check_folder / QUARANTINE_FILE), redact_private, _COPY_CODE in spec.data.waive
        ) as (writer):
            for number, source in enumerate(all_sources(spec)):
                is_validation = number >= len(spec.data.train)
                with writer.source(number, source, VALIDATION_FOLDER if is_validation else "") as kept:
                    for shard in scans[number].shards:
                        for line, raw in read_shard(shard, source):
                            writer.add(kept, number, source, visible(shard.path), line, raw)
        copy.rename(out)
    return Cleaned(
        judgement, dict(sorted(writer.left_out.items())), dict(sorted(writer.redacted.items())), tuple(writer.files)
    )


def cleaned_sources(spec: RunSpec, out: Path, cleaned: Cleaned) -> tuple[list[DataSource], list[DataSource]]:
    """The training and the validation sources of a spec that uses the cleaned copy in `out`."""
    files = [out / file for _, file in cleaned.files]
    count = len(spec.data.train)
    return sources_at(spec.data.train, files[:count]), sources_at(all_sources(spec)[count:], files[count:])


def sources_at(sources: Sequence[DataSource], files: Sequence[Path]) -> list[DataSource]:
    """The sources, moved to these files of one folder: one source for the folder if only their paths differed."""
    moved = [
        source.model_copy(update={"path": str(file)})
        for source, file in zip(sources, files, strict=True)
        if file.exists() and file.stat().st_size > 0
    ]
    kinds = {source.model_copy(update={"path": ""}).model_dump_json() for source in moved}
    return [moved[0].model_copy(update={"path": str(files[0].parent)})] if len(kinds) == 1 else moved


class _Writer:
    """Writes the cleaned files and the lists of decisions."""

    def __init__(self, folder: Path, quarantine: dict[tuple[int, str, int], str], redacts: bool, keeps: bool) -> None:
        self._folder = folder
        self._quarantine = quarantine
        self._redacts = redacts
        self._keeps_copies = keeps
        self._seen: dict[tuple[str, int], str] = {}
        self._split = ""
        self._lists = ExitStack()
        self.left_out: Counter[str] = Counter()
        self.redacted: Counter[str] = Counter()
        self.files: list[tuple[str, str]] = []

    def __enter__(self) -> "_Writer":
        decisions = self._folder / DECISIONS_FOLDER
        self._left_out_list = self._lists.enter_context(_opened(decisions / LEFT_OUT_FILE))
        if self._redacts:
            self._redacted_list = self._lists.enter_context(_opened(decisions / REDACTED_FILE))
        return self

    def __exit__(self, *_: object) -> None:
        self._lists.close()

    def source(self, number: int, source: DataSource, split: str) -> TextIO:
        """The new file of a source."""
        self._split = split
        name = f"{number}-{Path(source.path.replace(':', '-')).stem}.jsonl"
        self.files.append((source.path, f"{split}/{name}" if split else name))
        (self._folder / split).mkdir(exist_ok=True)
        return _opened(self._folder / split / name)

    def add(
        self, kept: TextIO, number: int, source: DataSource, file: str, line: int, raw: Mapping[str, Any] | Fault
    ) -> None:
        """Write one record into its file, or into the list of records left out."""
        entry = self._quarantine.get((number, file, line))
        place = {"file": file, "line": line, "source": number}
        if entry is not None:
            decision = json.loads(entry)
            whole: dict[str, Any]
            if isinstance(raw, Fault):
                whole = {"text": redact_text(raw.text)[0] if self._redacts else raw.text}
            else:
                whole = {"record": redact(raw)[0] if self._redacts else raw}
            self._leave_out({**decision, **whole})
        elif isinstance(raw, Fault):
            return
        elif not self._redacts:
            _write(kept, raw)
        else:
            masked, redactions = redact(raw)
            record = to_record(number, 0, line, masked, source)
            pieces = {record.text[start:end]: code for code, start, end in find_private(record.text)}
            if pieces:
                masked, more = redact_pieces(masked, pieces)
                redactions += more
                record = to_record(number, 0, line, masked, source)
            if spanning := [code for code, _, _ in find_private(record.text)]:
                reason = "private data spans several values, so it cannot be masked"
                decision = {"code": spanning[0], "reason": reason, **place, "excerpt": excerpt(record.text)}
                self._leave_out(decision)
                return
            content = self._split, hash_of_example(record)
            if content in self._seen and not self._keeps_copies:
                reason = f"same as {self._seen[content]} once private data is masked"
                decision = {"code": _COPY_CODE, "reason": reason, **place, "excerpt": excerpt(record.text)}
                self._leave_out({**decision, "record": masked})
                return
            self._seen.setdefault(content, f"{file}:{line}")
            _write(kept, masked)
            for redaction in redactions:
                self.redacted[redaction.code] += 1
                _write(self._redacted_list, {**place, **dataclasses.asdict(redaction)})

    def _leave_out(self, decision: Mapping[str, Any]) -> None:
        self.left_out[decision["code"]] += 1
        _write(self._left_out_list, decision)


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
