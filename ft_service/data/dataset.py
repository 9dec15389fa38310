"""A prepared dataset on storage, as workers read it. Imports nothing of what prepared it.

<storage>/datasets/<digest>/   rows-00000/{train,validation}.arrow ...   manifest.json
                               judged/{judgement.json, findings.jsonl, quarantine.jsonl}
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ft_service.plan.facts import DatasetFacts
from ft_service.registry.registry import DatasetRef
from ft_service.storage.formats import StoredFile
from ft_service.storage.storage import Storage

if TYPE_CHECKING:
    from ft_service.data.gate import Judgement

MANIFEST_FILE = "manifest.json"
CHECK_FOLDER = "judged"
JUDGEMENT_FILE = "judgement.json"
ROWS = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        ("document_lengths", pa.list_(pa.int32())),
    ]
)
"""The columns of a file of packed rows."""


@dataclass(frozen=True)
class Row:
    """One packed sequence: ids int32 [T], loss mask bool [T], and the lengths int32 [D] of its documents (sum T)."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    document_lengths: np.ndarray


class RowTable:
    """Packed rows in Arrow files. They are memory-mapped: opening is free, and processes of a node share the pages."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._tables = [pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in files]
        self._ends = np.cumsum([table.num_rows for table in self._tables])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Row:
        number = int(np.searchsorted(self._ends, index, side="right"))
        table = self._tables[number]
        at = index - int(self._ends[number]) + table.num_rows
        ids, mask, lengths = (table.column(name)[at].values.to_numpy(zero_copy_only=False) for name in ROWS.names)
        return Row(ids, mask, lengths)


@dataclass(frozen=True)
class PreparedDataset:
    """A prepared dataset, as workers read it."""

    digest: str
    facts: DatasetFacts
    sources: list[DatasetRef]
    train: RowTable
    validation: RowTable | None
    folder: Path

    @cached_property
    def judgement(self) -> "Judgement":
        """What the data gate found. Raises `StorageError` if the file is damaged."""
        from ft_service.data.gate import Judgement  # half a second, which workers need not spend

        file = self.folder / CHECK_FOLDER / JUDGEMENT_FILE
        return Judgement.parse(file.read_bytes(), str(file))


class DatasetManifest(StoredFile):
    """Written last: a dataset that has it is complete (manifest.json)."""

    facts: DatasetFacts
    sources: list[DatasetRef]

    @classmethod
    def upgraded(cls, data: dict[str, Any], written: int) -> dict[str, Any]:
        """Format 1 called its number `format_version`."""
        return {name: value for name, value in data.items() if name != "format_version"}


def open_dataset(storage: Storage, digest: str) -> PreparedDataset:
    """A prepared dataset. Raises `StorageError` if it does not exist."""
    place = f"datasets/{digest}/{MANIFEST_FILE}"
    manifest = DatasetManifest.parse(storage.read_json(place), storage.uri(place))
    folder = storage.local_folder(f"datasets/{digest}")
    train = sorted(folder.glob("rows-*/train.arrow"))
    validation = sorted(folder.glob("rows-*/validation.arrow"))
    return PreparedDataset(
        digest=digest,
        facts=manifest.facts,
        sources=manifest.sources,
        train=RowTable(train),
        validation=RowTable(validation) if validation else None,
        folder=folder,
    )
