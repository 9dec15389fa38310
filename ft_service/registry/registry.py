"""What was produced: adapters and models on storage, immutable and content-addressed.

    <storage>/adapters/<id>/   adapter_model.safetensors  adapter_config.json  chat_template.jinja
                               README.md (model card)  record.json
    <storage>/models/<id>/     a model folder of a `full` run, which can be the base of the next run, with the same two

`record.json` holds the digest of every other file, so it is also the mark that a folder is whole.
"""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ft_service.errors import NotPublishedError, StorageError
from ft_service.storage.storage import Storage

RECORD_FILE = "record.json"
CARD_FILE = "README.md"
DIGESTS_FILE = "digests.json"
_HASH_CHUNK_BYTES = 8 * 1024 * 1024

Kind = Literal["adapter", "model"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseModelRef(_Record):
    """The base that was fine-tuned: by id and revision, and by what its files hold."""

    id: str = Field(description="Hub id, or the folder it was read from.")
    revision: str | None = Field(description="Hub revision; none for a folder.")
    short_name: str = Field(description="How the base is named in adapter ids and over HTTP.")
    fingerprint: str = Field(description="SHA-256 over config and weights, see `ft_service.model.base.fingerprint`.")


class DatasetRef(_Record):
    """One source of training data, and the right to use it."""

    path: str
    source: str | None
    license: str | None
    records: int = Field(description="Records read from it.")
    digest: str = Field(description="SHA-256 of its files.")


class Waiver(_Record):
    """A finding of the data gate that was accepted, and why."""

    code: str
    severity: str
    count: int = Field(description="Records (or sources) that it was found on.")
    reason: str


class AdapterRecord(_Record):
    """Everything serving and evaluation need to know of an adapter (or of a model a `full` run produced)."""

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
    data_verdict: str = Field(description="What the data gate said of it: pass, warn or fail (then with waivers).")
    waivers: list[Waiver] = Field(description="Findings of the data gate that the spec accepted.")
    steps: int = Field(description="Optimizer steps behind these weights.")
    final_loss: float = Field(description="Training loss of the run's last step, nats per loss token.")
    validation_loss: float | None = Field(description="Validation loss of exactly these weights.")
    chat_template_digest: str
    end_of_turn_ids: list[int] = Field(description="Token ids that end an answer.")
    packages: dict[str, str] = Field(description="Name -> version of the packages that trained it.")
    files: dict[str, str] = Field(description="File name -> SHA-256, of every file but this record.")


class Registry:
    """Publish, list, resolve and check what runs produced. A record never changes once published."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def publish(self, folder: Path, draft: dict[str, object], base_short_name: str, card: str) -> AdapterRecord:
        """Publish the weights in `folder` and return their record; the same content twice gives the first record.

        `draft` holds the record's fields but `id`, `digest`, `created` and `files`, which follow from the content;
        `card` is the model card, in which ``{id}`` and ``{digest}`` stand for the two.
        """
        digests = {
            file.name: sha256_of(file) for file in sorted(folder.iterdir()) if file.name not in _BESIDE_THE_CONTENT
        }
        record, added = _compose(digests, draft, base_short_name, card)
        place = _place(record.kind, record.id)
        for name, content in added.items():
            (folder / name).write_bytes(content)
        self.storage.put_folder(folder, place, marker=RECORD_FILE)
        return self._read(place)

    def publish_stored(self, path: str, draft: dict[str, object], base_short_name: str, card: str) -> AdapterRecord:
        """Like `publish`, of weights that lie in the folder `path` of this storage, and without reading them.

        Whoever wrote the folder has taken the digests of its files, and left them there in `DIGESTS_FILE`.
        """
        digests = self.storage.read_json(f"{path}/{DIGESTS_FILE}")
        record, added = _compose(digests, draft, base_short_name, card)
        place = _place(record.kind, record.id)
        self.storage.publish_within(path, digests, place, added, marker=RECORD_FILE)
        return self._read(place)

    def records(self, kind: Kind = "adapter") -> list[AdapterRecord]:
        """Everything published of one kind, oldest first; half-written folders are not there."""
        places = (f"{kind}s/{name}" for name in self.storage.folders(f"{kind}s"))
        found = [self._read(place) for place in places if self.storage.exists(f"{place}/{RECORD_FILE}")]
        return sorted(found, key=lambda record: record.created)

    def resolve(self, adapter_id: str) -> AdapterRecord:
        """The record of an adapter or model. Raises `NotPublishedError`, which names the ids that come close."""
        if "/" not in adapter_id and not adapter_id.startswith("."):
            for kind in ("adapter", "model"):
                place = _place(kind, adapter_id)
                if self.storage.exists(f"{place}/{RECORD_FILE}"):
                    return self._read(place)
        known = [record.id for kind in ("adapter", "model") for record in self.records(kind)]
        raise NotPublishedError(
            f"adapter = {adapter_id!r}: not published on {self.storage.root}. "
            f"Published: {', '.join(known) or 'none yet'}."
        )

    def folder(self, record: AdapterRecord) -> Path:
        """A local folder with the files of `record`, fetched if the storage is remote."""
        return self.storage.local_folder(_place(record.kind, record.id))

    def damaged_files(self, record: AdapterRecord) -> list[str]:
        """Names of the files that are missing or whose bytes are not those that were published."""
        folder = self.folder(record)
        return [
            name
            for name, digest in record.files.items()
            if not (folder / name).is_file() or sha256_of(folder / name) != digest
        ]

    def _read(self, place: str) -> AdapterRecord:
        try:
            return AdapterRecord.model_validate(self.storage.read_json(f"{place}/{RECORD_FILE}"))
        except ValidationError as error:
            raise StorageError(
                f"{self.storage.uri(place)}/{RECORD_FILE}: not a record of this version ({error})."
            ) from None


_BESIDE_THE_CONTENT = {RECORD_FILE, CARD_FILE}


def _compose(
    digests: dict[str, str], draft: dict[str, object], base_short_name: str, card: str
) -> tuple[AdapterRecord, dict[str, bytes]]:
    """The record of content with these digests, and the files that stand beside the content: card and record."""
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


def _place(kind: object, adapter_id: str) -> str:
    return f"{kind}s/{adapter_id}"


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; reads it in chunks."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def content_digest(digests: dict[str, str]) -> str:
    """One digest of a folder: over the names and digests of its files, in order of name."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
