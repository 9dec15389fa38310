"""Reads what the `datasets` library provides: folders that it saved, and datasets of the hub."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ft_service.data.files.shard import Fault, FileShard, Record, shard_changed
from ft_service.errors import DataError
from ft_service.spec.schema import DataSource

HUB_PREFIX = "hub:"


def open_dataset(source: DataSource) -> Any:
    """A hub or saved dataset, memory-mapped; None if the source is files. Raises `DataError`."""
    if source.path.startswith(HUB_PREFIX):
        return _hub_dataset(source)
    path = Path(source.path).expanduser()
    return _saved_dataset(path) if is_saved_dataset(path) else None


def read_dataset(shard: FileShard, source: DataSource) -> Iterator[tuple[int, Record | Fault]]:
    """Some rows of a dataset, with their row numbers."""
    rows = open_dataset(source)
    if rows is None or len(rows) < shard.end:
        raise shard_changed(shard)
    for at in range(shard.start, shard.end):
        try:
            # NaN in a column of numbers is how pandas writes a missing value.
            yield at + 1, {name: None if value != value else value for name, value in rows[at].items()}
        except (OverflowError, ValueError) as error:
            yield at + 1, Fault("form.wrong-type", f"has a value that Python cannot represent ({error})")


def fingerprint(source: DataSource, rows: Any) -> str:
    """SHA-256 of the files of a saved dataset; for a hub dataset, the fingerprint that the library gives it."""
    if source.path.startswith(HUB_PREFIX):
        return str(rows._fingerprint)
    digest = hashlib.sha256()
    for file in sorted(file for file in Path(source.path).expanduser().rglob("*") if file.is_file()):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def is_saved_dataset(path: Path) -> bool:
    """Whether the `datasets` library saved this folder."""
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
        raise DataError(f"{path}: has the splits {', '.join(dataset)}. Name the folder of one of them.")
    return dataset


def _hub_dataset(source: DataSource) -> Any:
    """``hub:NAME``, ``hub:NAME:SPLIT`` or ``hub:NAME:CONFIGURATION:SPLIT``; the split is train by default."""
    from datasets import load_dataset

    name, *parts = source.path.removeprefix(HUB_PREFIX).split(":", 2)
    split = parts[-1] if parts else ""
    configuration = parts[0] if len(parts) == 2 else None
    try:
        return load_dataset(name, configuration or None, split=split or "train")
    except Exception as error:  # the library raises many kinds: not found, offline, no such split
        raise DataError(
            f"data path = {source.path!r}: cannot be downloaded ({type(error).__name__}: {error}). "
            "Write hub:OWNER/NAME, hub:OWNER/NAME:SPLIT or hub:OWNER/NAME:CONFIGURATION:SPLIT, or download it first."
        ) from None
