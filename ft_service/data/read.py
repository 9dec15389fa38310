"""Files in, records out: each with the place it came from, so that whatever is wrong with it can be found."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from ft_service.errors import DataError
from ft_service.spec import DataSource

Record = dict[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
HUB_PREFIX = "hub:"
_SHOWN = 10
_LONGEST_CSV_FIELD = 2**31 - 1  # characters; Python's own limit of 128 Ki is less than a document


class Faults:
    """Collects what is wrong with records, so that one error tells of all of them."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[str] = []

    def add(self, place: str, message: str) -> None:
        """Note that the record at `place` (``file:line``) cannot be used, and why."""
        self.count += 1
        if len(self._first) < _SHOWN:
            self._first.append(f"  - {place}: {message}")

    def raise_if_any(self) -> None:
        """Raise `DataError` with the first faults and the number of all."""
        if not self.count:
            return
        more = f"\n  ... and {self.count - _SHOWN} more" if self.count > _SHOWN else ""
        raise DataError(
            f"{self.count} record{'s' if self.count > 1 else ''} cannot be used. Mend or remove them; nothing was left "
            "out in silence:\n" + "\n".join(self._first) + more
        )


def files_of(source: DataSource) -> list[Path]:
    """The files of a source, in order of name; raises `DataError` if there are none. A hub dataset has no files."""
    if source.path.startswith(HUB_PREFIX):
        return []
    path = Path(source.path).expanduser()
    if _is_saved_dataset(path):
        return sorted(file for file in path.rglob("*") if file.is_file())
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise DataError(f"{path}: a folder without {', '.join(SUFFIXES)} files. Name a folder that has some.")
        return files
    if not path.is_file():
        raise DataError(f"{path}: no such file. Mend the path in data (relative paths start at the working directory).")
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: files of this kind are not read. Use one of {', '.join(SUFFIXES)}.")
    return [path]


def source_digest(source: DataSource) -> str:
    """SHA-256 over the bytes of a source's files; of a hub dataset, over its fingerprint."""
    digest = hashlib.sha256()
    if source.path.startswith(HUB_PREFIX):
        digest.update(_hub_dataset(source)._fingerprint.encode())
    for file in files_of(source):
        try:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise _unreadable(file, error) from None
    return digest.hexdigest()


def read_records(source: DataSource, faults: Faults) -> Iterator[tuple[Record, str]]:
    """Every record of a source with its place; what cannot be read goes to `faults`."""
    path = Path(source.path).expanduser()
    if source.path.startswith(HUB_PREFIX) or _is_saved_dataset(path):
        dataset = _hub_dataset(source) if source.path.startswith(HUB_PREFIX) else _saved_dataset(path)
        yield from ((dict(record), f"{source.path}:{number}") for number, record in enumerate(dataset, 1))
        return
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    for file in files_of(source):
        try:
            yield from readers[file.suffix](file, faults)
        except OSError as error:
            raise _unreadable(file, error) from None


# -- one reader a format ---------------------------------------------------------------------------------------------


def _read_jsonl(file: Path, faults: Faults) -> Iterator[tuple[Record, str]]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            place = f"{file}:{number}"
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                faults.add(place, f"is not UTF-8 (byte {error.start}: {error.reason})")
            except (ValueError, RecursionError) as error:
                faults.add(place, f"is not JSON ({error})")
            else:
                yield from _if_object(record, place, faults)


def _read_json(file: Path, faults: Faults) -> Iterator[tuple[Record, str]]:
    text = _text(file)
    if not text.lstrip().startswith("["):  # JSON lines under another name
        yield from _read_jsonl(file, faults)
        return
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{file}: is not a JSON array of records ({error}). Mend it, or use one record a line."
        ) from None
    for number, record in enumerate(records, 1):
        yield from _if_object(record, f"{file}: record {number}", faults)


def _read_csv(file: Path, faults: Faults) -> Iterator[tuple[Record, str]]:
    csv.field_size_limit(_LONGEST_CSV_FIELD)
    reader = csv.DictReader(io.StringIO(_text(file), newline=""), strict=True)
    try:
        for record in reader:
            place = f"{file}:{reader.line_num}"
            # DictReader files values beyond the header under None, and gives None to columns beyond the values
            if None in record or None in record.values():
                faults.add(place, f"has not the {len(reader.fieldnames or [])} columns of the header")
                continue
            yield record, place
    except csv.Error as error:
        # line_num is still that of the last good record: a quote left open swallows the rest of the file
        faults.add(f"{file}:{reader.line_num + 1}", f"is not CSV ({error})")


def _read_parquet(file: Path, faults: Faults) -> Iterator[tuple[Record, str]]:
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            number = 0
            for batch in parquet.iter_batches():
                for record in batch.to_pylist():
                    number += 1
                    yield record, f"{file}: row {number}"
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as Parquet ({error}). Write it again; it may be cut off.") from None


def _if_object(record: object, place: str, faults: Faults) -> Iterator[tuple[Record, str]]:
    if isinstance(record, dict):
        yield record, place
    else:
        faults.add(place, f"is a JSON {type(record).__name__}, not an object with columns")


def _unreadable(file: Path, error: OSError) -> DataError:
    return DataError(
        f"{file}: cannot be read ({error.strerror or error}). Check that it is a file, and its permissions."
    )


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = file.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(f"{file}:{line}: is not UTF-8 ({error.reason}). Convert the file to UTF-8.") from None


# -- the datasets library --------------------------------------------------------------------------------------------


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
