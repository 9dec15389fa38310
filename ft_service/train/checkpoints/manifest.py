"""The files of a checkpoint: their content, the index, and checks that a checkpoint is complete."""

import hashlib
from collections.abc import Callable
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ft_service.errors import NewerFormatError, StorageError, UnreachableError
from ft_service.runs.folder import RunFolder
from ft_service.storage.formats import StoredFile, renamed
from ft_service.storage.storage import Storage
from ft_service.train.protocol import TrainingState

FP32_BYTES = 4
"""Every saved value is fp32."""
_HASH_CHUNK_BYTES = 8 * 1024 * 1024


class _StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SavedShard(_StrictModel):
    """Elements [start, stop) of a flattened parameter, once per kind: the kinds follow each other from byte `at`."""

    start: int
    stop: int
    at: int


class Part(_StrictModel):
    """One file that a rank wrote."""

    file: str
    bytes: int
    sha256: str
    shards: dict[str, SavedShard] = Field(description="By parameter name.")
    rng_offset: int = Field(description="Byte where the rank's random state starts.")
    rng_bytes: dict[str, int] = Field(
        description="Its generators, in order, with their lengths in bytes; {} but in the rank's last part."
    )


class RankParts(_StrictModel):
    """The parts of one rank, in order (part-*.json)."""

    parts: list[Part]


class Manifest(StoredFile):
    """A complete checkpoint (manifest.json)."""

    # Before the first validation the best loss is infinite, which JSON would otherwise turn into null.
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")

    format: int = Field(default=3, description="Version of this file's layout.")
    step: int
    adam_step: int
    state: dict[str, Any] = Field(description="The loop's TrainingState.")
    weights: str = Field(description="Path of the best weights below the run's folder; '' if there are none yet.")
    training_digest: str = Field(description="See RunPlan.training_digest. A run resumes only if it is the same.")
    created: datetime
    parts: list[Part]

    @classmethod
    def upgraded(cls, data: dict[str, Any], written: int) -> dict[str, Any]:
        if written == 2:  # one part for each rank; format 3 allows several
            return data
        parts = [renamed(part, {"random_at": "rng_offset", "random_bytes": "rng_bytes"}) for part in data["parts"]]
        return {**renamed(data, {"course": "training_digest"}), "parts": parts}

    def training_state(self) -> TrainingState:
        return TrainingState(**self.state)


class IndexEntry(_StrictModel):
    """One checkpoint in the index."""

    folder: str
    step: int
    weights: str
    sha256: str = Field(description="Of manifest.json.")


class _Index(StoredFile):
    checkpoints: list[IndexEntry] = Field(default_factory=list)


class Checkpoints:
    """The checkpoints of a run on storage. Only rank 0 calls these methods, except where noted."""

    def __init__(self, run: RunFolder) -> None:
        self.storage: Storage = run.storage
        self.path = f"{run.path}/checkpoints"

    def entries(self) -> list[IndexEntry]:
        """All checkpoints, oldest first."""
        return self.read_index()[0]

    def newest_step(self) -> int:
        """0 if there is no checkpoint."""
        return max((entry.step for entry in self.entries()), default=0)

    def read_index(self) -> tuple[list[IndexEntry], str]:
        """All checkpoints, oldest first, and what is wrong with the index ('' if nothing is).

        If the index is missing or damaged, the entries come from the manifests. Raises `StorageError` if the index is
        damaged and there is no manifest either, and `NewerFormatError` if a newer version wrote the index.
        """
        file = f"{self.path}/index.json"
        if self.storage.exists(file):
            content = self.storage.read_bytes(file)
            try:
                return _Index.parse(content, self.storage.uri(file)).checkpoints, ""
            except NewerFormatError:
                raise
            except StorageError as error:
                problem = str(error)
        else:
            problem = f"{self.storage.uri(file)}: missing."
        found = self._entries_from_manifests()
        if not found and self.storage.exists(file):
            raise StorageError(
                f"{problem} No complete checkpoint was found next to it. Use another --run-id, or delete the file."
            )
        return found, problem if found else ""

    def _entries_from_manifests(self) -> list[IndexEntry]:
        found = []
        for folder in self.storage.folders(self.path):
            file = f"{self.path}/{folder}/manifest.json"
            if self.storage.exists(file):
                content = self.storage.read_bytes(file)
                try:
                    manifest = Manifest.parse(content, self.storage.uri(file))
                except NewerFormatError:
                    raise
                except StorageError:
                    continue
                found.append((manifest.step, manifest.created, _index_entry(folder, manifest, content)))
        return [entry for *_, entry in sorted(found, key=lambda item: item[:2])]

    def manifest(self, entry: IndexEntry) -> Manifest:
        """Raises `StorageError` if the manifest is missing or its digest differs from the index.

        Raises `NewerFormatError` if a newer version wrote it.
        """
        file = f"{self.path}/{entry.folder}/manifest.json"
        content = self.storage.read_bytes(file)
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise StorageError(f"{self.storage.uri(file)}: damaged.")
        return Manifest.parse(content, self.storage.uri(file))

    def part_problem(self, folder: str, part: Part, on_progress: Callable[[], None] = lambda: None) -> str:
        """What is wrong with a part on storage; '' if nothing is. Reads the whole part. Any rank may call it.

        Raises `UnreachableError` if the storage does not answer.
        """
        path = f"{self.path}/{folder}/{part.file}"
        try:
            digest = hashlib.sha256()
            for start in range(0, part.bytes, _HASH_CHUNK_BYTES):
                digest.update(self.storage.read_range(path, start, min(_HASH_CHUNK_BYTES, part.bytes - start)))
                on_progress()
            size = self.storage.size(path)
        except UnreachableError:
            raise
        except StorageError as error:
            return str(error)
        if size != part.bytes:
            return f"{self.storage.uri(path)}: {size:,} bytes instead of {part.bytes:,}."
        return "" if digest.hexdigest() == part.sha256 else f"{self.storage.uri(path)}: its bytes have changed."

    def commit(self, folder: str, manifest: Manifest) -> None:
        """Write the manifest, then list the checkpoint in the index."""
        content = manifest.model_dump_json(indent=2).encode()
        self.storage.write_bytes(f"{self.path}/{folder}/manifest.json", content)
        # Checkpoints of later steps were written before the run was resumed from an earlier one: drop them.
        kept = [other for other in self.entries() if other.step < manifest.step]
        self._write_index([*kept, _index_entry(folder, manifest, content)])

    def discard(self, folder: str) -> None:
        """Delete the files of a failed save, unless the index lists it after all."""
        if folder not in {entry.folder for entry in self.entries()}:
            self.storage.delete(f"{self.path}/{folder}")

    def keep_newest(self, count: int) -> None:
        """Delete all but the newest `count`: first from the index, then the folders."""
        entries = self.entries()
        if len(entries) > count:
            self._write_index(entries[-count:])
        known = {entry.folder for entry in entries[-count:]}
        for folder in self.storage.folders(self.path):
            if folder not in known:
                self.storage.delete(f"{self.path}/{folder}")

    def _write_index(self, entries: list[IndexEntry]) -> None:
        self.storage.write_json(f"{self.path}/index.json", _Index(checkpoints=entries).model_dump(mode="json"))


def _index_entry(folder: str, manifest: Manifest, content: bytes) -> IndexEntry:
    digest = hashlib.sha256(content).hexdigest()
    return IndexEntry(folder=folder, step=manifest.step, weights=manifest.weights, sha256=digest)
