"""Completes deletions: the files of a deleted adapter go once no request can be answering with it.

What is left to delete is on storage, as tombstones beside files. So no restart forgets it, and whichever gateway comes
first does it.
"""

import logging
import threading
from collections.abc import Collection
from datetime import datetime

from ft_service.cleanup.removal import delete_hidden_adapters
from ft_service.errors import FtError
from ft_service.storage.storage import Storage
from serve.database.audit import audit
from serve.database.database import open_database, session

EVERY_SECONDS = 60.0
SERVER = "server"
"""In the audit log, who deleted the files."""

logger = logging.getLogger(__name__)


class Deletions:
    """The deletions of adapters of a server's bases, also those that `ft adapters delete` began."""

    def __init__(self, storage: Storage, fingerprints: Collection[str], database: str | None) -> None:
        """`database` is the URL of the one with the audit log."""
        self._storage = storage
        self._fingerprints = frozenset(fingerprints)
        self._database = database

    def start(self) -> None:
        """Complete them from now on, on a thread that ends with the process."""
        threading.Thread(target=self._run, name="deletions", daemon=True).start()

    def complete(self, now: datetime | None = None) -> None:
        """Delete what is due. A failure is logged; the next round tries again."""
        try:
            deleted = delete_hidden_adapters(self._storage, self._fingerprints, self._log, now)
            for adapter_id in deleted:
                logger.info("deleted the files of %s", adapter_id)
            if deleted and self._database:
                with session(open_database(self._database)) as opened:
                    for adapter_id in deleted:
                        audit(opened, SERVER, "models.delete.files", adapter_id)
                    opened.commit()
        except FtError as error:
            self._log(str(error))

    def _run(self) -> None:
        never = threading.Event()
        while not never.wait(EVERY_SECONDS):
            try:
                self.complete()
            except Exception:  # otherwise one failure would end all later rounds
                logger.exception("a round of deletions failed; the next one is in %g seconds", EVERY_SECONDS)

    @staticmethod
    def _log(problem: str) -> None:
        logger.warning("cannot complete a deletion: %s", problem)
