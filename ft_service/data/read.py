"""Files in, records out, each with its number in the file, so that whatever is wrong with it can be found.

`scan` reads each file once, for its digest, and cuts it into shards that are read by themselves, on any machine that
has the file. Nothing is ever read whole but a JSON array; a record that cannot be read is a `Fault` in its place.
"""

import csv
import hashlib
import io
import json
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet

from ft_service.errors import DataError
from ft_service.spec.schema import DataSource

Record = dict[str, Any]
Kind = Literal["lines", "array", "csv", "parquet", "dataset"]
Wants = Callable[[int], bool]

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
HUB_PREFIX = "hub:"
SHARD_BYTES = 8 * 2**20
LONGEST_LINE_BYTES = 64 * 2**20
"""Of JSON lines, and of a field of CSV. A book has one or two million bytes."""
LONGEST_ARRAY_BYTES = 256 * 2**20
"""Of a JSON array, which can only be read whole and then takes about five times as much memory."""
_DATASET_ROWS = 50_000
_BLOCK_BYTES = 2**20
_END_BYTES = 2**16
_PARQUET_ROWS = 256  # records that are in memory at a time
_OTHER_ENCODINGS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""By their byte order marks, the longer ones first."""
_LINE_END = re.compile(r"\r\n|\r|\n")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Fault:
    """Why a record, or a whole file, cannot be used: a code of the data gate, and what is wrong with this one."""

    code: str
    reason: str
    text: str = ""
    """What stands there, where it could be got hold of; of bytes that are no UTF-8, these as escapes."""


@dataclass(frozen=True)
class FileShard:
    """A part of a source that one task reads: some lines, row groups or rows, or all of a file."""

    source: int
    """Number of the source among all."""
    file: int
    """Number of the file among the source's."""
    path: str
    kind: Kind
    start: int
    end: int
    """Bytes of lines, row groups of Parquet, rows of a saved or hub dataset; otherwise bytes too."""
    first: int
    """Number of its first line or row, from 1."""
    digest: str
    """SHA-256 of its bytes (Parquet: of the end of the file, which tells where all rows are). A task that finds others
    must not go on."""


@dataclass(frozen=True)
class Scan:
    """What a source consists of."""

    files: tuple[str, ...]
    """In the order in which shards and findings number them. A hub dataset is one."""
    shards: tuple[FileShard, ...]
    digest: str
    """SHA-256 over the bytes of the files and their suffixes, which say how they are read; of a hub dataset, over its
    fingerprint."""
    foreign: tuple[str, ...] = ()
    """Files of the folder that are of no kind that is read."""


class ShardChanged(DataError):
    """What a shard was cut from is not there any more, or not on this machine, or says something else."""


def scan(number: int, source: DataSource, shard_bytes: int = SHARD_BYTES) -> Scan:
    """Read a source once through. Raises `DataError` where a file is missing or may not be read."""
    if (rows := _dataset(source)) is not None:
        shards = tuple(
            FileShard(number, 0, source.path, "dataset", start, min(start + _DATASET_ROWS, len(rows)), start + 1, "")
            for start in range(0, max(1, len(rows)), _DATASET_ROWS)
        )
        return Scan((source.path,), shards, hashlib.sha256(_fingerprint(source, rows).encode()).hexdigest())
    files, foreign = files_of(source)
    digest = hashlib.sha256()
    shards = ()
    for at, file in enumerate(files):
        try:
            found, of_file = _cut(number, at, file, shard_bytes)
        except OSError as error:
            raise _unreadable(file, error) from None
        digest.update(of_file + file.suffix.encode())
        shards += found
    return Scan(tuple(map(str, files)), shards, digest.hexdigest(), tuple(map(str, foreign)))


def files_of(source: DataSource) -> tuple[list[Path], list[Path]]:
    """The files of a source in order of name, and those of its folder that are not read. Raises `DataError`."""
    path = Path(source.path).expanduser()
    if path.is_dir():
        inside = sorted(path.iterdir())
        files = [file for file in inside if file.suffix in SUFFIXES and _may_be_read(file)]
        if not files:
            raise DataError(f"{path}: a folder without {', '.join(SUFFIXES)} files. Name a folder that has some.")
        return files, sorted(set(inside) - set(files))
    if not path.is_file():
        raise DataError(f"{path}: no such file. Mend the path in data (relative paths start at the working directory).")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: files of this kind are not read. Use one of {', '.join(SUFFIXES)}.")
    return [path], []


def _may_be_read(file: Path) -> bool:
    """Neither a folder nor a pipe, which would be waited for; a link that leads nowhere is told when it is opened."""
    try:
        return stat.S_ISREG(file.stat().st_mode)
    except OSError:
        return True


def check_sources(sources: list[DataSource]) -> None:
    """Raises `DataError` where a file is missing, at once; a hub dataset is not asked for."""
    for source in sources:
        if not source.path.startswith(HUB_PREFIX) and not _is_saved_dataset(Path(source.path).expanduser()):
            files_of(source)


def read_shard(
    shard: FileShard, source: DataSource, wants: Wants | None = None
) -> Iterator[tuple[int, Record | Fault]]:
    """Every record of a shard with its number (line, row, place in an array), from 1; 0 stands for the whole file.

    With `wants`, records of other numbers are passed over, where possible unread. Raises `ShardChanged`.
    """
    readers = {
        "lines": _read_lines,
        "array": _read_array,
        "csv": _read_csv,
        "parquet": _read_parquet,
    }
    try:
        found = _read_dataset(shard, source) if shard.kind == "dataset" else readers[shard.kind](shard, wants)
        for number, record in found:
            if wants is None or wants(number):
                yield number, record
    except OSError as error:
        raise ShardChanged(f"{shard.path}: cannot be read ({error.strerror or error}).") from None


def read_source(source: DataSource) -> Iterator[tuple[str, Record | Fault]]:
    """Every record of a source with its place, ``file:number``. Raises `DataError` where a file is missing."""
    for shard in scan(0, source).shards:
        for number, record in read_shard(shard, source):
            yield (f"{shard.path}:{number}" if number else shard.path), record


# -- cutting ---------------------------------------------------------------------------------------------------------


def _cut(source: int, number: int, file: Path, shard_bytes: int) -> tuple[tuple[FileShard, ...], bytes]:
    """The shards of a file, and the digest of all of it."""
    kind = _kind_of(file)
    whole, part = hashlib.sha256(), hashlib.sha256()
    cuts: list[tuple[int, int, str]] = []  # start, line before it, digest
    start = position = line = first = 0
    with file.open("rb") as stream:
        is_cut = kind == "lines" and _other_encoding_of(stream.read(4)) is None
        stream.seek(0)
        while block := stream.read(_BLOCK_BYTES):
            whole.update(block)
            while is_cut and position + len(block) - start >= shard_bytes:
                end = block.find(b"\n", max(0, start + shard_bytes - position - 1)) + 1
                if end == 0:
                    break  # the line goes on in the next block
                part.update(block[:end])
                cuts.append((start, first, part.hexdigest()))
                line += block.count(b"\n", 0, end)
                position, block = position + end, block[end:]
                start, first, part = position, line, hashlib.sha256()
            part.update(block)
            line += block.count(b"\n")
            position += len(block)
    if position > start or not cuts:
        cuts.append((start, first, part.hexdigest()))
    if kind == "parquet":
        groups = _row_groups(file, shard_bytes)
        shards = [FileShard(source, number, str(file), kind, *group, _digest_of_end(file)) for group in groups]
    else:
        ends = [*(start for start, _, _ in cuts[1:]), position]
        shards = [
            FileShard(source, number, str(file), kind, start, end, first + 1, digest)
            for (start, first, digest), end in zip(cuts, ends, strict=True)
        ]
    return tuple(shards), whole.digest()


def _kind_of(file: Path) -> Kind:
    if file.suffix == ".json":
        with file.open("rb") as stream:
            beginning = stream.read(_BLOCK_BYTES).removeprefix(_BYTE_ORDER_MARK).lstrip()
        return "array" if beginning.startswith(b"[") else "lines"
    kinds: dict[str, Kind] = {".jsonl": "lines", ".csv": "csv", ".parquet": "parquet"}
    return kinds[file.suffix]


def _row_groups(file: Path, shard_bytes: int) -> list[tuple[int, int, int]]:
    """First and last row group of each shard, and the number of its first row. A damaged file is one shard."""
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            sizes = [
                (parquet.metadata.row_group(at).num_rows, parquet.metadata.row_group(at).total_byte_size)
                for at in range(parquet.metadata.num_row_groups)
            ]
    except (pyarrow.ArrowException, OSError):
        return [(0, 0, 1)]
    groups: list[tuple[int, int, int]] = []
    start, first, row, held = 0, 1, 1, 0
    for at, (rows, size) in enumerate(sizes, start=1):
        row, held = row + rows, held + size
        if held >= shard_bytes or at == len(sizes):
            groups.append((start, at, first))
            start, first, held = at, row, 0
    return groups or [(0, 0, 1)]


# -- one reader a kind -----------------------------------------------------------------------------------------------


def _read_lines(shard: FileShard, wants: Wants | None) -> Iterator[tuple[int, Record | Fault]]:
    digest = hashlib.sha256()
    with open(shard.path, "rb") as stream:
        if shard.start == 0 and (encoding := _other_encoding_of(stream.read(4))):
            yield 0, _other_encoding(encoding)
            return
        stream.seek(shard.start)
        left, number = shard.end - shard.start, shard.first
        while left > 0:
            line = stream.readline(min(left, LONGEST_LINE_BYTES))
            if not line:
                break
            digest.update(line)
            left -= len(line)
            is_whole = True
            while left > 0 and not line.endswith(b"\n"):
                is_whole = False
                line = stream.readline(min(left, LONGEST_LINE_BYTES))
                digest.update(line)
                left -= len(line)
                if not line:
                    break
            if wants is None or wants(number):
                if not is_whole:
                    yield number, _too_long()
                elif line.strip():
                    yield number, _parsed(line, number)
            number += 1
    _check(shard, digest.hexdigest())


def _parsed(line: bytes, number: int) -> Record | Fault:
    try:
        record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return Fault("form.encoding", f"is not UTF-8 (byte {error.start}: {error.reason})", _as_text(line))
    except (ValueError, RecursionError) as error:
        return Fault("form.unreadable", f"is not JSON ({error})", _as_text(line))
    return _if_object(record)


def _as_text(line: bytes) -> str:
    return line.decode("utf-8", "backslashreplace").rstrip("\r\n")


def _read_array(shard: FileShard, wants: Wants | None) -> Iterator[tuple[int, Record | Fault]]:
    if shard.end > LONGEST_ARRAY_BYTES:
        limit = LONGEST_ARRAY_BYTES // 2**20
        yield (
            0,
            Fault(
                "form.unreadable-file", f"is a JSON array of more than {limit} MiB. Write one record a line (.jsonl)"
            ),
        )
        return
    content = Path(shard.path).read_bytes()
    _check(shard, hashlib.sha256(content).hexdigest())
    try:
        records = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        yield content[: error.start].count(b"\n") + 1, Fault("form.unreadable-file", f"is not UTF-8 ({error.reason})")
        return
    except (ValueError, RecursionError) as error:
        yield 0, Fault("form.unreadable-file", f"is not a JSON array of records ({error})")
        return
    del content
    for number, record in enumerate(records, 1):
        yield number, _if_object(record)


def _read_csv(shard: FileShard, wants: Wants | None) -> Iterator[tuple[int, Record | Fault]]:
    csv.field_size_limit(LONGEST_LINE_BYTES)
    with open(shard.path, "rb") as file:
        if encoding := _other_encoding_of(file.read(4)):
            yield 0, _other_encoding(encoding)
            return
        file.seek(0)
        hashed = _Hashed(file)
        # Bytes that are no UTF-8 come as half characters, so that one of them spoils one record and not the file.
        text = io.TextIOWrapper(io.BufferedReader(hashed), "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.DictReader(text, strict=True)
        last = 1
        while True:
            try:
                record = next(reader, None)
            except csv.Error as error:
                # A quotation mark left open swallows the rest of the file: it is told where it opens.
                yield last + 1, Fault("form.unreadable", f"is not CSV ({error})")
                last = reader.reader.line_num
                continue
            if record is None:
                break
            last = reader.line_num
            yield last - _line_ends(record), _if_complete(record, len(reader.fieldnames or []))
        _check(shard, hashed.digest.hexdigest())


def _line_ends(record: dict[str | None, Any]) -> int:
    """Inside the values: a record that takes several lines stands where it begins."""
    values = chain.from_iterable(value if isinstance(value, list) else [value or ""] for value in record.values())
    return sum(len(_LINE_END.findall(value)) for value in values)


def _if_complete(record: dict[str | None, Any], columns: int) -> Record | Fault:
    # DictReader files values beyond the header under None, and gives None to columns beyond the values
    if None in record or None in record.values():
        told = json.dumps(list(record.values()), ensure_ascii=False)
        return Fault("form.unreadable", f"has not the {columns} columns of the header", told)
    for value in record.values():
        if not value.isascii() and any("\udc80" <= character <= "\udcff" for character in value):
            return Fault("form.encoding", "is not UTF-8", json.dumps(list(record.values())))
    return dict(record)  # type: ignore[arg-type]


class _Hashed(io.RawIOBase):
    """A file that is digested as it is read."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self.digest.update(memoryview(buffer)[:count])
        return count


def _read_parquet(shard: FileShard, wants: Wants | None) -> Iterator[tuple[int, Record | Fault]]:
    if _digest_of_end(Path(shard.path)) != shard.digest:
        raise _changed(shard)
    number = shard.first
    try:
        with pyarrow.parquet.ParquetFile(shard.path) as parquet:
            groups = list(range(shard.start, shard.end))
            for batch in parquet.iter_batches(_PARQUET_ROWS, row_groups=groups) if groups else ():
                for record in _rows(batch):
                    yield number, record
                    number += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        yield 0, Fault("form.unreadable-file", f"cannot be read as Parquet ({error}). It may be cut off")


def _rows(batch: pyarrow.RecordBatch) -> list[Record]:
    """The rows as Python values; of a column that holds a date that Python has not (year 10000), as text or numbers."""
    try:
        return batch.to_pylist()
    except (OverflowError, ValueError):
        columns = [_values(column) for column in batch.columns]
        return [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]


def _values(column: pyarrow.Array) -> list[Any]:
    for plain in (None, pyarrow.string(), pyarrow.int64(), pyarrow.int32()):
        try:
            return (column if plain is None else column.cast(plain)).to_pylist()
        except (OverflowError, ValueError, NotImplementedError):  # Arrow's own errors are of these kinds
            continue
    return ["<values that Python has not>"] * len(column)


def _read_dataset(shard: FileShard, source: DataSource) -> Iterator[tuple[int, Record | Fault]]:
    rows = _dataset(source)
    if rows is None or len(rows) < shard.end:
        raise _changed(shard)
    for at in range(shard.start, shard.end):
        try:
            yield at + 1, dict(rows[at])
        except (OverflowError, ValueError) as error:
            yield at + 1, Fault("form.wrong-type", f"holds a value that Python has not ({error})")


def _check(shard: FileShard, digest: str) -> None:
    if digest != shard.digest:
        raise _changed(shard)


def _changed(shard: FileShard) -> ShardChanged:
    return ShardChanged(f"{shard.path}: has changed since it was looked at, or is another file on this machine.")


def _digest_of_end(file: Path) -> str:
    with file.open("rb") as stream:
        stream.seek(max(0, file.stat().st_size - _END_BYTES))
        return hashlib.sha256(stream.read()).hexdigest()


def _if_object(record: object) -> Record | Fault:
    if isinstance(record, dict):
        return record
    told = json.dumps(record, ensure_ascii=False)
    return Fault("form.unreadable", f"is a JSON {type(record).__name__}, not an object with columns", told)


def _other_encoding_of(beginning: bytes) -> str | None:
    return next((name for mark, name in _OTHER_ENCODINGS.items() if beginning.startswith(mark)), None)


def _other_encoding(encoding: str) -> Fault:
    return Fault("form.unreadable-file", f"is {encoding}. Convert it to UTF-8: iconv -f {encoding} -t UTF-8")


def _too_long() -> Fault:
    return Fault("form.unreadable", f"is longer than {LONGEST_LINE_BYTES // 2**20} MiB")


def _unreadable(file: Path, error: OSError) -> DataError:
    return DataError(
        f"{file}: cannot be read ({error.strerror or error}). Check that it is a file, and its permissions."
    )


# -- the datasets library --------------------------------------------------------------------------------------------


def _dataset(source: DataSource) -> Any:
    """A hub or saved dataset, memory-mapped; None where the source consists of files."""
    if source.path.startswith(HUB_PREFIX):
        return _hub_dataset(source)
    path = Path(source.path).expanduser()
    return _saved_dataset(path) if _is_saved_dataset(path) else None


def _fingerprint(source: DataSource, rows: Any) -> str:
    """Of a saved dataset the bytes of its files; of a hub dataset what the library tells it from others by."""
    if source.path.startswith(HUB_PREFIX):
        return str(rows._fingerprint)
    digest = hashlib.sha256()
    for file in sorted(file for file in Path(source.path).expanduser().rglob("*") if file.is_file()):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _is_saved_dataset(path: Path) -> bool:
    return path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file())


def _saved_dataset(path: Path) -> Any:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except Exception as error:  # the library raises many kinds: a missing file, a cut-off one, an unknown feature
        raise DataError(
            f"{path}: cannot be loaded as a saved dataset ({type(error).__name__}: {error}). Save it again."
        ) from None
    if isinstance(dataset, DatasetDict):
        raise DataError(f"{path}: holds the splits {', '.join(dataset)}. Name the folder of one of them.")
    return dataset


def _hub_dataset(source: DataSource) -> Any:
    from datasets import load_dataset

    name, _, split = source.path.removeprefix(HUB_PREFIX).partition(":")
    try:
        return load_dataset(name, split=split or "train")
    except Exception as error:  # the library raises many kinds: not found, offline, no such split
        raise DataError(
            f"data path = {source.path!r}: cannot be fetched ({type(error).__name__}: {error}). "
            "Write hub:OWNER/NAME or hub:OWNER/NAME:SPLIT, or download it first."
        ) from None
