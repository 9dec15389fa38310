"""Keeps the full models of a server deployed: each is an application of Ray Serve, beside the server's own."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from ft_service.errors import FtError, ServingError
from serve.fine_tuning.full_models import FullModels
from serve.settings import BaseSettings

DELETION_SECONDS = 15.0
"""How often it is tried to delete files that a replica still announces: that reads through the whole storage."""

logger = logging.getLogger(__name__)


class Apps(Protocol):
    """The applications of added bases, by the model's id. Each call may raise `ServingError`."""

    def deployed(self) -> Mapping[str, str]:
        """Those that exist, with the reason why they cannot start; '' while there is none."""
        ...

    def deploy(self, model_id: str, base: BaseSettings) -> None:
        """Deploy a model, or again with other settings. Replicas of the same settings stay."""
        ...

    def delete(self, model_id: str) -> None:
        """Stop a model's replicas once they have answered. Returns at once."""
        ...


class DoesNotStartError(ServingError):
    """The replicas of a model fail when they start."""


class ModelServers:
    """Compares what is deployed with what should be. Thread-safe.

    Nothing is remembered that matters: a new process deploys everything again, which changes nothing where the settings
    are the same, and a new cluster gets all models.
    """

    def __init__(
        self,
        models: FullModels,
        apps: Apps,
        finish_deletion: Callable[[str], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`finish_deletion` deletes the files of a model that is no longer published; False while they are in use."""
        self._models = models
        self._apps = apps
        self._finish_deletion = finish_deletion
        self._deployed: dict[str, BaseSettings] = {}
        self._clock = clock
        self._ended: dict[str, float] = {}
        self._lock = threading.Lock()

    def step(self) -> None:
        """Deploy what is missing, delete what is no longer wanted. A model that fails does not hold up the others."""
        with self._lock:
            wanted = self._models.settings()
            deployed = self._apps.deployed()
            known = deployed.keys() | self._deployed.keys()  # an application may be gone before its model is deleted
            for model_id in sorted(known - wanted.keys()):
                self._try(model_id, self._end)
            for model_id, base in wanted.items():
                if model_id not in deployed or self._deployed.get(model_id) != base:
                    self._try(model_id, lambda one: self._deploy(one, wanted[one]))
            for model_id in sorted(self._ended.keys() - deployed.keys()):
                if self._ended[model_id] <= self._clock():
                    self._try(model_id, self._delete_files)

    def ensure(self, model_id: str) -> None:
        """Returns once a model is deployed; its replicas may start only when it is asked.

        Raises `ServingError` if it is not, and `DoesNotStartError` if its replicas fail.
        """
        with self._lock:
            base = self._models.settings().get(model_id)
            if base is None:
                raise ServingError(f"{model_id}: is not a model of this server.")
            if self._deployed.get(model_id) != base:
                self._deploy(model_id, base)
            problem = self._apps.deployed().get(model_id)
        if problem is None:
            raise ServingError(f"{model_id}: is not deployed yet.")
        if problem:
            raise DoesNotStartError(f"{model_id}: {problem}")

    def _deploy(self, model_id: str, base: BaseSettings) -> None:
        self._apps.deploy(model_id, base)
        self._deployed[model_id] = base

    def _end(self, model_id: str) -> None:
        self._ended[model_id] = self._clock()
        self._deployed.pop(model_id, None)
        self._apps.delete(model_id)

    def _delete_files(self, model_id: str) -> None:
        self._ended[model_id] = self._clock() + DELETION_SECONDS
        if self._finish_deletion(model_id):
            del self._ended[model_id]

    def _try(self, model_id: str, act: Callable[[str], None]) -> None:
        try:
            act(model_id)
        except FtError as error:
            logger.warning("full model %s: %s", model_id, error)
