"""Reads sources: records in order, each with its number in its file, so that every finding can name its place.

`scan` reads each file once, for its digest, and splits it into shards. Each shard is read by itself, on any machine
that has the file. Only a JSON array is read whole. A record that cannot be read gives a `Fault` in its place.
"""

import hashlib
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ft_service.data.files.content import SUFFIXES, Content, content_of, is_named_as_data
from ft_service.data.files.csv_files import read_csv
from ft_service.data.files.datasets_library import (
    HUB_PREFIX,
    fingerprint,
    is_saved_dataset,
    open_dataset,
    read_dataset,
)
from ft_service.data.files.encoding import Utf8Check, other_encoding_fault
from ft_service.data.files.json_files import read_array, read_lines
from ft_service.data.files.parquet_files import digest_of_end, read_parquet, row_groups
from ft_service.data.files.remote import is_remote, local_copy, missing_error
from ft_service.data.files.shard import Fault, FileShard, IsWanted, Record, ShardChanged
from ft_service.errors import DataError
from ft_service.spec.schema import DataSource

DECISIONS_FOLDER = "decisions"
"""In a cleaned folder: a folder of its own, because a list among the data files would be read as data."""
LEFT_OUT_FILE = "left_out.jsonl"
"""Among the decisions. One line for each record that is left out: ``{code, reason, file, line, source, excerpt}``, and
the whole record as ``record``, or as ``text`` if it could not be read."""
VALIDATION_FOLDER = "validation"
"""In a cleaned folder or a split: the data for validation."""

SHARD_BYTES = 4 * 2**20
_DATASET_SHARD_ROWS = 50_000
_BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class Scan:
    """The files and shards of a source."""

    files: tuple[str, ...]
    """In the order of their numbers in shards and findings. A hub dataset counts as one file."""
    shards: tuple[FileShard, ...]
    digest: str
    """SHA-256 of the bytes of the files and their suffixes, which decide how they are read; of a hub dataset, of its
    fingerprint."""
    foreign: tuple[str, ...] = ()
    """Files of the folder whose type is not read."""
    notes: tuple[tuple[str, str], ...] = ()
    """(file, how it is read) of the files whose content differs from what their names say."""


def scan(number: int, source: DataSource, shard_bytes: int = SHARD_BYTES) -> Scan:
    """Read a source once, and split it into shards. Raises `DataError` if a file is missing or cannot be opened."""
    if (rows := open_dataset(source)) is not None:
        shards = tuple(
            FileShard(
                number, 0, source.path, "dataset", start, min(start + _DATASET_SHARD_ROWS, len(rows)), start + 1, ""
            )
            for start in range(0, max(1, len(rows)), _DATASET_SHARD_ROWS)
        )
        return Scan((source.path,), shards, hashlib.sha256(fingerprint(source, rows).encode()).hexdigest())
    files, foreign = files_of(source)
    shown = [source.path] if is_remote(source.path) else [str(file) for file in files]
    digest = hashlib.sha256()
    shards = ()
    notes: list[tuple[str, str]] = []
    for at, (file, name) in enumerate(zip(files, shown, strict=True)):
        try:
            content = content_of(file) or Content("lines")
            file_shards, file_digest = _split(number, at, file, content, shard_bytes)
        except OSError as error:
            raise DataError(
                f"{name}: cannot be read ({error.strerror or error}). Check that it is a file, and its permissions."
            ) from None
        digest.update(file_digest + file.suffix.encode())
        shards += tuple(replace(shard, path=name) for shard in file_shards)
        if content.note:
            notes.append((name, content.note))
    return Scan(tuple(shown), shards, digest.hexdigest(), tuple(map(str, foreign)), tuple(notes))


def files_of(source: DataSource) -> tuple[list[Path], list[Path]]:
    """The files of a source, sorted by name, and the files of its folder that are not read. Raises `DataError`.

    A file on object storage is copied to this machine.
    """
    if is_remote(source.path):
        return [_checked_copy(source.path)], []
    path = Path(source.path).expanduser()
    if path.is_dir():
        inside = sorted(path.iterdir())
        files = [file for file in inside if is_named_as_data(file) and _may_be_read(file)]
        if not files:
            raise DataError(f"{path}: a folder without {', '.join(SUFFIXES)} files. {_folders_with_data(inside)}")
        return files, sorted(set(inside) - set(files) - _written_by_clean(path))
    if not path.is_file():
        raise DataError(f"{path}: no such file. Fix the path (relative paths start at the working directory).")
    if not is_named_as_data(path):
        _check_content(path)
    return [path], []


def _checked_copy(uri: str) -> Path:
    copy = local_copy(uri)
    if not is_named_as_data(copy):
        try:
            _check_content(copy)
        except DataError as error:
            raise DataError(str(error).replace(str(copy), uri)) from None
    return copy


def _folders_with_data(inside: list[Path]) -> str:
    """What to name instead of a folder that has no data files itself."""
    folders = [
        entry
        for entry in inside
        if entry.is_dir() and entry.name != DECISIONS_FOLDER and any(map(is_named_as_data, entry.iterdir()))
    ]
    return f"Name {' or '.join(map(str, folders))}." if folders else "Name a folder that has some."


def _written_by_clean(folder: Path) -> set[Path]:
    """The folders that `ft data clean` writes beside the data of a cleaned folder."""
    if not (folder / DECISIONS_FOLDER / LEFT_OUT_FILE).is_file():
        return set()
    return {folder / DECISIONS_FOLDER, folder / VALIDATION_FOLDER}


def _check_content(path: Path) -> None:
    """Raises `DataError` unless the content of a file shows how to read it, whatever its name."""
    try:
        content = content_of(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}). Check its permissions.") from None
    if content is None:
        raise DataError(f"{path}: files of this type are not supported. Use one of {', '.join(SUFFIXES)}.")
    if content.fault is not None:
        raise DataError(f"{path}: {content.fault.reason}. {content.fault.cure}")


def _may_be_read(file: Path) -> bool:
    """Neither a folder nor a pipe, which would block. A broken link counts as a file; opening it raises an error."""
    try:
        return stat.S_ISREG(file.stat().st_mode)
    except OSError:
        return True


def check_sources(sources: list[DataSource]) -> None:
    """Raises `DataError`, which names all files that are missing. Hub datasets are not requested."""
    if errors := [error for source in sources if (error := source_error(source)) is not None]:
        raise DataError("\n".join(dict.fromkeys(map(str, errors))))


def source_error(source: DataSource) -> DataError | None:
    """Why the files of a source cannot be read; None if they can, or if it is a hub dataset."""
    if source.path.startswith(HUB_PREFIX) or is_saved_dataset(Path(source.path).expanduser()):
        return None
    if is_remote(source.path):
        return missing_error(source.path)
    try:
        files_of(source)
    except DataError as error:
        return error
    return None


def read_shard(
    shard: FileShard, source: DataSource, is_wanted: IsWanted | None = None
) -> Iterator[tuple[int, Record | Fault]]:
    """Every record of a shard with its number (line, row or array position) from 1; 0 means the whole file.

    With `is_wanted`, records of other numbers are skipped, unparsed where possible. Raises `ShardChanged`.
    """
    if is_remote(source.path):
        shard = replace(shard, path=str(local_copy(source.path)))
    try:
        for number, record in _records_of(shard, source, is_wanted):
            if is_wanted is None or is_wanted(number):
                yield number, record
    except OSError as error:
        raise ShardChanged(f"{shard.path}: cannot be read ({error.strerror or error}).") from None


def _records_of(
    shard: FileShard, source: DataSource, is_wanted: IsWanted | None
) -> Iterator[tuple[int, Record | Fault]]:
    if shard.fault is not None:
        return iter([(0, shard.fault)])
    if shard.kind == "lines":
        return read_lines(shard, is_wanted)
    if shard.kind == "dataset":
        return read_dataset(shard, source)
    return {"array": read_array, "csv": read_csv, "parquet": read_parquet}[shard.kind](shard)


def read_source(source: DataSource) -> Iterator[tuple[str, Record | Fault]]:
    """Every record of a source with its place, ``file:number``. Raises `DataError` if a file is missing."""
    for shard in scan(0, source).shards:
        for number, record in read_shard(shard, source):
            yield (f"{shard.path}:{number}" if number else shard.path), record


# -- splitting -------------------------------------------------------------------------------------------------------


def _split(
    source: int, number: int, file: Path, content: Content, shard_bytes: int
) -> tuple[tuple[FileShard, ...], bytes]:
    """The shards of a file, and the digest of the whole file."""
    kind = content.kind
    whole = hashlib.sha256()
    part = hashlib.sha256()
    cuts: list[tuple[int, int, str]] = []  # start, lines before it, digest
    utf8 = Utf8Check()
    start = 0
    position = 0
    line = 0
    first = 0
    ends_with_cr = False
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            whole.update(block)
            if kind != "parquet" and content.fault is None:
                utf8.add(block)
            while kind == "lines" and position + len(block) - start >= shard_bytes:
                end = block.find(b"\n", max(0, start + shard_bytes - position - 1)) + 1
                if end == 0:
                    break  # the line continues in the next block
                part.update(block[:end])
                cuts.append((start, first, part.hexdigest()))
                line += _line_ends(block[:end], ends_with_cr)
                ends_with_cr = False
                position += end
                block = block[end:]
                start = position
                first = line
                part = hashlib.sha256()
            part.update(block)
            line += _line_ends(block, ends_with_cr)
            ends_with_cr = block.endswith(b"\r") if block else ends_with_cr
            position += len(block)
    utf8.add(b"", is_last=True)
    fault = content.fault
    if fault is None and not utf8.holds:
        fault = other_encoding_fault(file, is_first_line_decisive=kind in ("csv", "array"))
    if fault is not None:
        return (FileShard(source, number, str(file), kind, 0, position, 1, whole.hexdigest(), fault),), whole.digest()
    if position > start or not cuts:
        cuts.append((start, first, part.hexdigest()))
    if kind == "parquet":
        digest = digest_of_end(file)
        shards = [FileShard(source, number, str(file), kind, *group, digest) for group in row_groups(file, shard_bytes)]
    else:
        ends = [*(start for start, _, _ in cuts[1:]), position]
        shards = [
            FileShard(source, number, str(file), kind, start, end, first + 1, digest, None, content.delimiter)
            for (start, first, digest), end in zip(cuts, ends, strict=True)
        ]
    return tuple(shards), whole.digest()


def _line_ends(block: bytes, follows_cr: bool) -> int:
    """The line ends in a block: LF, CRLF, or CR alone. With `follows_cr`, a leading LF belongs to a counted CR."""
    ends = block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n")
    return ends - (follows_cr and block.startswith(b"\n"))
