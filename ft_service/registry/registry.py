"""Published adapters and models on storage: immutable and content-addressed.

    <storage>/adapters/<id>/   adapter_model.safetensors  adapter_config.json  chat_template.jinja
                               README.md (model card)  record.json
    <storage>/models/<id>/     the weights of a `full` run, usable as the base of another run, with card and record
    <storage>/tombstones/<id>.json   the record of a deleted adapter or model
    <storage>/index/           a copy of all records in one object, for listing; see `ft_service.registry.index`

`record.json` contains the digest of every other file. It is written last, so it also marks a folder as complete.
Deleting starts with it: a folder without `record.json` is not listed, resolved or served.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ft_service.errors import NotPublishedError, StorageError, TrainingError, UnreachableError
from ft_service.registry.finite import nonfinite_tensor
from ft_service.registry.index import RecordIndex
from ft_service.registry.vllm import vllm_problems
from ft_service.storage.formats import StoredFile
from ft_service.storage.storage import Storage

RECORD_FILE = "record.json"
CARD_FILE = "README.md"
DIGESTS_FILE = "digests.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
TOMBSTONES = "tombstones"
_HASH_CHUNK_BYTES = 8 * 1024 * 1024

Kind = Literal["adapter", "model"]
KINDS: tuple[Kind, ...] = ("adapter", "model")
_SHOWN_IDS = 20
"""Of the published ids in an error."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseModelRef(_Record):
    """The base model: its id, its revision, and a digest of its files."""

    id: str = Field(description="Hub id, or path of the folder.")
    revision: str | None = Field(description="Hub revision; None for a folder.")
    short_name: str = Field(description="Name of the base in adapter ids and over HTTP.")
    fingerprint: str = Field(description="SHA-256 over config and weights, see `ft_service.model.base.fingerprint`.")


class DatasetRef(_Record):
    """One source of training data, with its origin and license."""

    path: str
    source: str | None
    license: str | None
    records: int = Field(description="Number of records read.")
    digest: str = Field(description="SHA-256 of its files.")


class Waiver(_Record):
    """A data-check finding that the spec accepts, and why."""

    code: str
    severity: str
    count: int = Field(description="Number of records (or sources) with the finding.")
    reason: str


class ExtensionRef(_Record):
    """A resumed run was given more or fewer steps than planned before."""

    step: int = Field(description="Step from which the new schedule applies.")
    num_steps: int = Field(description="Steps that were planned before.")


class AdapterRecord(StoredFile):
    """Everything that serving and evaluation need to know about an adapter, or about the model of a `full` run."""

    id: str = Field(description="<base short name>-<run name>-<8 hex of the digest>, lower case.")
    kind: Kind
    digest: str = Field(description="SHA-256 over the names and digests of the weight and config files.")
    created: datetime
    run_id: str
    run_name: str
    plan_digest: str
    base: BaseModelRef
    method: dict[str, object] = Field(description="The spec's `method` section, resolved.")
    datasets: list[DatasetRef]
    dataset_digest: str = Field(description="Digest of the prepared (tokenised, packed) dataset.")
    data_verdict: str = Field(description="Result of the data check: pass, warn or fail (then with waivers).")
    waivers: list[Waiver] = Field(description="Data-check findings that the spec accepts.")
    steps: int = Field(description="Optimizer steps that produced these weights.")
    extensions: list[ExtensionRef] = Field(
        default_factory=list, description="How the run was given more or fewer steps, oldest first."
    )
    final_loss: float = Field(description="Training loss of the run's last step, nats per loss token.")
    validation_loss: float | None = Field(description="Validation loss of these weights.")
    chat_template_digest: str
    end_of_turn_ids: list[int] = Field(description="Token ids that end an answer.")
    packages: dict[str, str] = Field(description="Package name -> version used for training.")
    files: dict[str, str] = Field(description="File name -> SHA-256, of every file except this record.")
    vllm_problems: list[str] = Field(
        default_factory=list, description="Why vLLM cannot serve the adapter; empty if nothing is known against it."
    )


@dataclass(frozen=True)
class UnreadableRecord:
    """A folder in the registry that is not served, because its record cannot be used."""

    id: str
    """Name of the folder."""
    problem: str
    """What is wrong, with the path and a cure."""


@dataclass(frozen=True)
class Listing:
    """What is published, oldest first, and what would be if its record could be read."""

    records: tuple[AdapterRecord, ...]
    unreadable: tuple[UnreadableRecord, ...]


@dataclass(frozen=True)
class _Parsed:
    """An index, and what its lines say."""

    lines: dict[str, bytes]
    by_name: dict[str, AdapterRecord | UnreadableRecord]
    listing: Listing


class _IndexLine(BaseModel):
    """What the index holds for a folder: its record, or why there is none."""

    size: int
    """Bytes of `record.json`."""
    record: AdapterRecord | None = None
    problem: str | None = None


class Tombstone(StoredFile):
    """What remains of a deleted adapter or model (tombstones/<id>.json)."""

    deleted: datetime = Field(description="When it was hidden.")
    record: AdapterRecord

    @classmethod
    def parse(cls, data: Mapping[str, Any] | bytes, where: str) -> "Tombstone":
        """Upgrades the record as well."""
        tombstone = super().parse(data, where)
        content = json.loads(data) if isinstance(data, bytes) else data
        return tombstone.model_copy(update={"record": AdapterRecord.parse(content["record"], where)})


def page_file(adapter_id: str) -> str:
    """Where `ft adapters page` writes the page of one adapter."""
    return f"scorecards/{adapter_id}.html"


class Registry:
    """Publishes, lists, resolves, hides and checks adapters and models. A published record never changes."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._indexes = {kind: RecordIndex(storage, kind, self._line_reader(kind)) for kind in KINDS}
        self._parsed: dict[Kind, _Parsed] = {}

    def __reduce__(self) -> tuple[type["Registry"], tuple[Storage]]:
        return Registry, (self.storage,)

    def publish(self, folder: Path, draft: dict[str, object], base_short_name: str, card: str) -> AdapterRecord:
        """Publish the weights in `folder` and return their record. Publishing the same content again returns the first.

        `draft` contains the fields of the record except `id`, `digest`, `created` and `files`, which are computed.
        `card` is the model card, with the placeholders ``{id}`` and ``{digest}``. Raises `TrainingError` if a weight is
        not finite.
        """
        for file in sorted(folder.glob("*.safetensors")):
            if (tensor := nonfinite_tensor(file)) is not None:
                raise TrainingError(
                    f"{file.name}: {tensor} has values that are not finite (NaN or infinity), so it is not published. "
                    "Train again with a lower learning rate, or from an earlier checkpoint."
                )
        digests = {file.name: sha256_of(file) for file in sorted(folder.iterdir()) if file.name not in _NOT_CONTENT}
        draft = {"vllm_problems": _vllm_problems(folder), **draft}
        record, added = _compose(digests, draft, base_short_name, card)
        place = _place(record.kind, record.id)
        for name, content in added.items():
            (folder / name).write_bytes(content)
        with self._indexes[record.kind].changing(record.id, "published"):
            self._clear_deleted(record.id, place)
            self.storage.put_folder(folder, place, marker=RECORD_FILE)
        return self._read(place)

    def publish_stored(self, path: str, draft: dict[str, object], base_short_name: str, card: str) -> AdapterRecord:
        """Like `publish`, for weights that are already in the folder `path` of this storage. Does not read them.

        The folder must contain the digests of its files, in `DIGESTS_FILE`.
        """
        digests = self.storage.read_json(f"{path}/{DIGESTS_FILE}")
        record, added = _compose(digests, draft, base_short_name, card)
        place = _place(record.kind, record.id)
        with self._indexes[record.kind].changing(record.id, "published"):
            self._clear_deleted(record.id, place)
            self.storage.publish_within(path, digests, place, added, marker=RECORD_FILE)
        return self._read(place)

    def listing(self, kind: Kind = "adapter") -> Listing:
        """What is published of one kind: one read of the storage, however much that is.

        A folder that was damaged, copied or renamed by hand is noticed once `reconcile` has seen it.
        """
        lines = self._indexes[kind].read()
        earlier = self._parsed.get(kind)
        if earlier is None or earlier.lines != lines:
            earlier = self._parsed[kind] = self._parse(kind, lines, earlier)
        return earlier.listing

    def records(self, kind: Kind = "adapter") -> list[AdapterRecord]:
        """All records of one kind that can be read, oldest first."""
        return list(self.listing(kind).records)

    def settle(self) -> None:
        """Complete the index after a crash, or after publishers that overwrote each other's: two requests if it is."""
        for index in self._indexes.values():
            index.settle()

    def reconcile(self) -> None:
        """Correct the index after changes by hand or by an older version. Lists the folders, reads what is in doubt."""
        for index in self._indexes.values():
            index.reconcile()

    def refresh(self) -> None:
        """Correct the index as far as that is cheap, for whoever lists often: `reconcile` in a folder, else `settle`.

        Changes nothing on a storage that cannot be written.
        """
        with suppress(StorageError):
            if self.storage.is_local:
                self.reconcile()
            else:
                self.settle()

    def find(self, adapter_id: str) -> AdapterRecord | None:
        """The record of an adapter or model, None if it is not published: one read if it is an adapter.

        Raises `StorageError` for a record that cannot be read.
        """
        if "/" in adapter_id or adapter_id.startswith("."):
            return None
        for kind in KINDS:
            content = self._read_or_none(f"{_place(kind, adapter_id)}/{RECORD_FILE}")
            if content is not None:
                record = self._parse_record(content, _place(kind, adapter_id))
                if (record.id, record.kind) == (adapter_id, kind):  # otherwise a copied or renamed folder
                    return record
        return None

    def resolve(self, adapter_id: str) -> AdapterRecord:
        """Like `find`, but raises `NotPublishedError`, which lists published ids, for an unknown id."""
        record = self.find(adapter_id)
        if record is not None:
            return record
        if "/" not in adapter_id and not adapter_id.startswith(".") and self.storage.exists(_tombstone(adapter_id)):
            deleted = self.tombstone(adapter_id).deleted
            raise NotPublishedError(
                f"adapter = {adapter_id!r}: was deleted from {self.storage.root} at {deleted:%Y-%m-%d %H:%M} UTC. "
                "Train it again under another run id."
            )
        known = [record.id for kind in KINDS for record in self.records(kind)]
        shown = ", ".join(known[-_SHOWN_IDS:]) or "nothing yet"
        more = f", and {len(known) - _SHOWN_IDS:,} older ones" if len(known) > _SHOWN_IDS else ""
        raise NotPublishedError(
            f"adapter = {adapter_id!r}: not published on {self.storage.root}. Published: {shown}{more}."
        )

    def hide(self, record: AdapterRecord) -> Tombstone:
        """Hide a published record from now on: nobody lists, resolves or serves it. Its files stay.

        Hiding again continues an interrupted call. Publishing the same content again brings the record back.
        """
        tombstone = Tombstone(deleted=datetime.now(UTC), record=record)
        with self._indexes[record.kind].changing(record.id, "hidden"):
            # The tombstone first: after a crash in between the record is still published, and can be hidden again.
            self.storage.write_json(_tombstone(record.id), tombstone.model_dump(mode="json"))
            self.storage.delete(f"{_place(record.kind, record.id)}/{RECORD_FILE}")
        return tombstone

    def delete_hidden_files(self, record: AdapterRecord) -> None:
        """Delete the files of a hidden record, this machine's copy of them, and its page. The tombstone stays."""
        place = _place(record.kind, record.id)
        assert not self.storage.exists(f"{place}/{RECORD_FILE}"), f"{record.id} is not hidden"
        self._indexes[record.kind].settle(record.id)  # `hide` may have been interrupted before that
        self.storage.delete(page_file(record.id))
        self.storage.delete(place)
        self.storage.delete_local_copy(place)

    def tombstone(self, adapter_id: str) -> Tombstone:
        """What remains of a deleted adapter or model. Raises `StorageError` if there is no such tombstone."""
        file = _tombstone(adapter_id)
        return Tombstone.parse(self.storage.read_json(file), self.storage.uri(file))

    def tombstones(self) -> list[Tombstone]:
        """All tombstones, oldest first."""
        names = [name.removesuffix(".json") for name in self.storage.files(TOMBSTONES) if name.endswith(".json")]
        return sorted(map(self.tombstone, names), key=lambda tombstone: tombstone.deleted)

    def folder(self, record: AdapterRecord) -> Path:
        """A local folder with the files of `record`, downloaded if the storage is remote."""
        return self.storage.local_folder(_place(record.kind, record.id))

    def damaged_files(self, record: AdapterRecord) -> list[str]:
        """Names of the files that are missing or differ from what was published."""
        folder = self.folder(record)
        return [
            name
            for name, digest in record.files.items()
            if not (folder / name).is_file() or sha256_of(folder / name) != digest
        ]

    def _clear_deleted(self, adapter_id: str, place: str) -> None:
        """Make room for content that was deleted and is published again.

        The tombstone goes before the record comes back: a record next to a tombstone counts as a deletion to continue.
        """
        if self.storage.exists(_tombstone(adapter_id)):
            self.storage.delete(f"{place}/{RECORD_FILE}")
            self.storage.delete(place)
            self.storage.delete_local_copy(place)
            self.storage.delete(_tombstone(adapter_id))

    def _read(self, place: str) -> AdapterRecord:
        return self._parse_record(self.storage.read_bytes(f"{place}/{RECORD_FILE}"), place)

    def _parse_record(self, content: bytes, place: str) -> AdapterRecord:
        where = self.storage.uri(f"{place}/{RECORD_FILE}")
        try:
            return AdapterRecord.parse(json.loads(content), where)
        except ValueError as error:
            raise StorageError(f"{where}: is damaged, not JSON ({error}).") from None

    # -- the index -------------------------------------------------------------------------------------------------

    def _line_reader(self, kind: Kind) -> Callable[[str], bytes | None]:
        """A function of an id that gives the line of the index for its folder as it is now, None without a record."""

        def read_line(name: str) -> bytes | None:
            place = _place(kind, name)
            content = self._read_or_none(f"{place}/{RECORD_FILE}")
            if content is None:
                return None
            try:
                record = self._parse_record(content, place)
                if (record.id, record.kind) != (name, kind):
                    raise StorageError(
                        f"{self.storage.uri(place)}: contains the record of {record.kind} {record.id}. "
                        "A copied or renamed folder is not served; delete it, or rename it back."
                    )
            except StorageError as error:
                return _IndexLine(size=len(content), problem=str(error)).model_dump_json(exclude_none=True).encode()
            return _IndexLine(size=len(content), record=record).model_dump_json(exclude={"problem"}).encode()

        return read_line

    def _read_or_none(self, path: str) -> bytes | None:
        """Content of a file; None if it does not exist."""
        try:
            return self.storage.read_bytes(path)
        except UnreachableError:
            raise
        except StorageError:
            # It may have been written in between.
            return self.storage.read_bytes(path) if self.storage.exists(path) else None

    def _parse(self, kind: Kind, lines: dict[str, bytes], earlier: "_Parsed | None") -> "_Parsed":
        """Lines that have not changed keep their records: the same objects."""
        parsed: dict[str, AdapterRecord | UnreadableRecord] = {}
        for name, line in lines.items():
            if earlier is not None and earlier.lines.get(name) == line:
                parsed[name] = earlier.by_name[name]
                continue
            try:
                parsed[name] = self._record_of(line, _place(kind, name))
            except StorageError as error:
                parsed[name] = UnreadableRecord(name, str(error))
        records = [one for one in parsed.values() if isinstance(one, AdapterRecord)]
        records.sort(key=lambda record: record.created)
        unreadable = tuple(one for one in parsed.values() if isinstance(one, UnreadableRecord))
        return _Parsed(lines, parsed, Listing(tuple(records), unreadable))

    def _record_of(self, line: bytes, place: str) -> AdapterRecord:
        try:
            parsed = _IndexLine.model_validate_json(line)
        except ValidationError:
            parsed = None
        if parsed and parsed.problem:
            raise StorageError(parsed.problem)
        if parsed and parsed.record and parsed.record.format == AdapterRecord.model_fields["format"].default:
            return parsed.record
        where = self.storage.uri(f"{place}/{RECORD_FILE}")  # written by another version
        return AdapterRecord.parse(json.loads(line).get("record"), where)


_NOT_CONTENT = {RECORD_FILE, CARD_FILE}


def _compose(
    digests: dict[str, str], draft: dict[str, object], base_short_name: str, card: str
) -> tuple[AdapterRecord, dict[str, bytes]]:
    """The record of content with these digests, and the files to add to the content: card and record."""
    digest = content_digest(digests)
    adapter_id = f"{base_short_name}-{draft['run_name']}-{digest[:8]}".lower()
    card_bytes = card.replace("{id}", adapter_id).replace("{digest}", digest).encode()
    record = AdapterRecord.model_validate(
        {
            **draft,
            "id": adapter_id,
            "digest": digest,
            "created": datetime.now(UTC),
            "files": {**digests, CARD_FILE: hashlib.sha256(card_bytes).hexdigest()},
        }
    )
    return record, {CARD_FILE: card_bytes, RECORD_FILE: (record.model_dump_json(indent=2) + "\n").encode()}


def _vllm_problems(folder: Path) -> list[str]:
    """Of an adapter; a model has no adapter's configuration."""
    file = folder / ADAPTER_CONFIG_FILE
    return vllm_problems(json.loads(file.read_bytes())) if file.is_file() else []


def _tombstone(adapter_id: str) -> str:
    return f"{TOMBSTONES}/{adapter_id}.json"


def _place(kind: object, adapter_id: str) -> str:
    return f"{kind}s/{adapter_id}"


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Reads the file in chunks."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def content_digest(digests: dict[str, str]) -> str:
    """Digest of a folder: SHA-256 over the sorted names and digests of its files."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
