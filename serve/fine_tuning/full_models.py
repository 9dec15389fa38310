"""The models of `full` jobs: each is a base of its own, which a running server adds and removes.

Such a model is served while the database has a job that published it and the registry on storage has the model, on
every server that has its parent among its own bases. Nothing else records the list, so nothing can disagree with it.
"""

import logging
import math
import threading
import time
from collections.abc import Sequence

from ft_service.errors import ModelError, StorageError
from ft_service.registry.registry import AdapterRecord, Registry
from serve.fine_tuning.job_records import JobRecords
from serve.inference.bases import ServedBase, load_base
from serve.settings import BaseSettings, ServeSettings

REMEMBERED_SECONDS = 30.0
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

logger = logging.getLogger(__name__)


class FullModels:
    """The full models that a server has, and how it serves them. Thread-safe.

    Every call may raise `DatabaseError` or `StorageError`.
    """

    def __init__(
        self, records: JobRecords, registry: Registry, settings: ServeSettings, bases: Sequence[ServedBase]
    ) -> None:
        """`bases` are those of the settings."""
        self._records = records
        self._registry = registry
        self._settings = settings
        self._parents = {base.model_name: base for base in settings.bases}
        self._precisions = {base.name: base.precision for base in bases}
        self._loaded: dict[str, ServedBase] = {}
        self._found: dict[str, tuple[ServedBase | None, float]] = {}
        self._loading = threading.Lock()

    def settings(self) -> dict[str, BaseSettings]:
        """How each model is served, by its id."""
        return {record.id: settings for record, settings, _ in self._listed()}

    def find(self, record: AdapterRecord) -> ServedBase | None:
        """A published model as a base; None for one that this server does not serve. Raises `ModelError`.

        A job that has failed since is noticed after `REMEMBERED_SECONDS`, so that requests need no database.
        """
        now = time.monotonic()
        base, found = self._found.get(record.id, (None, -math.inf))
        if base is None or now - found > REMEMBERED_SECONDS:
            parent = self._records.parents_of([record.id]).get(record.id)
            base = self._base(record, parent) if parent in self._parents else None
            self._found[record.id] = (base, now)
        return base

    def all(self) -> Sequence[tuple[AdapterRecord, ServedBase]]:
        """Every model with its base. One that cannot be read is logged and left out."""
        found = []
        for record, _, parent in self._listed():
            try:
                found.append((record, self._base(record, parent)))
            except (ModelError, StorageError) as error:
                logger.warning("not served: %s (%s)", record.id, error)
        return found

    def _listed(self) -> list[tuple[AdapterRecord, BaseSettings, str]]:
        records = self._registry.records("model")
        parents = self._records.parents_of([record.id for record in records])
        return [
            (record, self._settings_of(record.id, parents[record.id]), parents[record.id])
            for record in records
            if parents.get(record.id) in self._parents
        ]

    def _settings_of(self, model_id: str, parent: str) -> BaseSettings:
        """Those of its parent, with weights of its own and replicas as they are needed.

        It computes as its parent does, whatever its training computed in, so that it takes the same memory.
        """
        assert self._settings.fine_tuning
        settings = self._parents[parent]
        changes = {
            "dtype": _DTYPES.get(self._precisions[parent], settings.dtype),
            "base": self._registry.storage.uri(f"models/{model_id}"),
            "revision": None,
            "name": model_id,
            "autoscaling": self._settings.fine_tuning.full_models,
            "pinned": (),
        }
        return settings.model_copy(update=changes)

    def _base(self, record: AdapterRecord, parent: str | None) -> ServedBase:
        """Remembered: published weights never change."""
        assert parent is not None
        with self._loading:
            if record.id not in self._loaded:
                settings = self._settings_of(record.id, parent)
                self._loaded[record.id] = load_base(settings, parent=parent, weights=False)
            return self._loaded[record.id]
