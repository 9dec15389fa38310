"""A server with files, over real HTTP, and keys for it. Its base has a tokenizer and answers nothing."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import Engine

from ft_service.registry.registry import Registry
from ft_service.storage.storage import Storage
from serve.api import create_api
from serve.database.database import open_database
from serve.database.keys import create_key
from serve.inference.bases import load_base
from serve.inference.models import ServedModels
from serve.settings import BaseSettings, ServeSettings
from tests.browser import served
from tests.serve.test_health import Idle
from tests.worlds import SMALL, made_up_texts, write_base

ROOT_KEY = "a-root-key-of-this-test"
FILES = {"max_file_mib": 4, "max_part_mib": 2, "max_upload_mib": 8, "key_gib": 20 / 1024}
EXAMPLE = {"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This one."}]}


def jsonl(*records: object) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


TRAINING = jsonl(*[EXAMPLE] * 10)


@dataclass(frozen=True)
class FileServer:
    url: str
    """It ends in /v1."""
    storage: Path
    database: str

    def engine(self) -> Engine:
        return open_database(self.database)

    def client(self, name: str, organization: str | None = None, is_admin: bool = False) -> httpx.Client:
        """A client with a new key."""
        key, _ = create_key(self.engine(), name, organization=organization, is_admin=is_admin)
        return self.with_key(key)

    def with_key(self, key: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {key}"}, timeout=60)

    def on_storage(self) -> dict[str, list[str]]:
        """The names in each folder of files, hidden ones too."""
        folders = ("content", "incoming", "parts", "errors")
        return {
            name: sorted(one.relative_to(self.storage / "files" / name).as_posix() for one in found)
            for name in folders
            if (found := [one for one in (self.storage / "files" / name).rglob("*") if one.is_file()])
        }


def write_tiny_base(folder: Path) -> Path:
    write_base(folder, made_up_texts(20), 600, SMALL)
    return folder


@contextmanager
def file_server(base: Path, folder: Path, database: str | None = None, **files: object) -> Iterator[FileServer]:
    """`files` are settings of files. The database is SQLite, if none is given."""
    (folder / "storage").mkdir()
    bases = BaseSettings(base=str(base), name="tiny")
    settings = ServeSettings.model_validate(
        {
            "storage": str(folder / "storage"),
            "database": database or f"sqlite:///{folder}/service.db",
            "api_key": ROOT_KEY,
            "bases": [bases],
            "fine_tuning": {"templates": {"tiny": {"model": {"base": str(base)}}}, "files": {**FILES, **files}},
        }
    )
    models = ServedModels(Registry(Storage(str(settings.storage))), [load_base(bases)])
    with served(create_api(models, {"tiny": Idle()}, settings)) as address:
        yield FileServer(f"{address}/v1", folder / "storage", str(settings.database))


def send(client: httpx.Client, content: bytes = TRAINING, name: str = "train.jsonl", **fields: Any) -> httpx.Response:
    """Upload a file for training, if `fields` say nothing else."""
    return client.post("/files", files={"file": (name, content)}, data={"purpose": "fine-tune", **fields})
