"""Running servers announce their base on storage, so that nobody deletes what they serve.

<storage>/servers/<replica>.json   written again every few seconds, deleted or left to expire at the end
"""

import os
import secrets
import socket
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from pydantic import Field

from ft_service.errors import StorageError
from ft_service.registry.registry import BaseModelRef
from ft_service.storage.formats import StoredFile
from ft_service.storage.storage import Storage

SERVERS = "servers"
ANNOUNCE_SECONDS = 30.0
EXPIRES_SECONDS = 450.0
"""Far more than `ANNOUNCE_SECONDS`, because clocks of machines may differ by minutes."""


class ServerNotice(StoredFile):
    """A replica that serves a base and its adapters (servers/<replica>.json)."""

    base: BaseModelRef
    host: str
    pid: int
    time: datetime = Field(description="When it was last seen.")

    def is_expired(self, now: datetime) -> bool:
        return now - self.time > timedelta(seconds=EXPIRES_SECONDS)


class Announcement:
    """Announces a server from `start` until `stop` or the end of the process.

    Storage that cannot be written does not stop the server; nothing then protects what it serves.
    """

    def __init__(self, storage: Storage, base: BaseModelRef, every_seconds: float = ANNOUNCE_SECONDS) -> None:
        self._storage = storage.without_retries()
        self._base = base
        self._every_seconds = every_seconds
        self._path = f"{SERVERS}/{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.json"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="announcement", daemon=True)

    def start(self) -> None:
        self._write()
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()
        with suppress(StorageError):  # then it expires
            self._storage.delete(self._path)

    def _renew(self) -> None:
        while not self._ended.wait(self._every_seconds):
            self._write()

    def _write(self) -> None:
        notice = ServerNotice(base=self._base, host=socket.gethostname(), pid=os.getpid(), time=datetime.now(UTC))
        with suppress(StorageError):  # written again when storage is back
            self._storage.write_json(self._path, notice.model_dump(mode="json"))


def server_notices(storage: Storage) -> dict[str, ServerNotice]:
    """File name -> notice of every server that has announced itself, also of those that are gone."""
    found = {}
    for name in storage.files(SERVERS):
        path = f"{SERVERS}/{name}"
        if name.endswith(".json"):
            try:
                found[name] = ServerNotice.parse(storage.read_json(path), storage.uri(path))
            except StorageError:
                if storage.exists(path):
                    raise
    return found
