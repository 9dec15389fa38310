"""Keeps the full models of a server deployed: each is an application of Ray Serve, beside the server's own."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Protocol

from ft_service.errors import FtError, ServingError
from serve.fine_tuning.full_models import FullModels
from serve.settings import BaseSettings

DELETION_SECONDS = 15.0
"""How often models are looked for whose files are left to delete. Files that something needs are tried again after
longer and longer times: that reads through the whole storage."""
RETRY_SECONDS = 60.0
MOST_RETRY_SECONDS = 3600.0
"""Replicas that have failed are started again after `RETRY_SECONDS`, and after twice as long each time."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AppStatus:
    """The replicas of a model, as Serve sees them."""

    problem: str = ""
    """Why they cannot start."""
    has_given_up: bool = False
    """Serve starts no more of them."""
    is_unplaced: bool = False
    """No node has room for one."""


class Apps(Protocol):
    """The applications of added bases, by the model's id. Each call may raise `ServingError`."""

    def deployed(self) -> Mapping[str, AppStatus]:
        """Those that exist."""
        ...

    def deploy(self, model_id: str, base: BaseSettings) -> None:
        """Deploy a model, or again with other settings. Replicas of the same settings stay."""
        ...

    def delete(self, model_id: str) -> None:
        """Stop a model's replicas once they have answered. Returns at once."""
        ...


class DoesNotStartError(ServingError):
    """The replicas of a model fail when they start."""


class NoRoomError(DoesNotStartError):
    """No node of the cluster can ever have room for a replica of a model."""


@dataclass(frozen=True)
class _Retry:
    """When something is tried again, and how long after the last time."""

    time: float
    seconds: float

    def next(self, now: float) -> "_Retry":
        """After twice as long."""
        seconds = min(2 * self.seconds, MOST_RETRY_SECONDS)
        return _Retry(now + seconds, seconds)


class ModelServers:
    """Compares what is deployed with what should be. Thread-safe.

    Nothing is remembered that matters: a new process deploys everything again, which changes nothing where the settings
    are the same, and a new cluster gets all models. What is left to delete is on storage: the tombstones of models
    whose files are still there.
    """

    def __init__(
        self,
        models: FullModels,
        apps: Apps,
        deleted: Callable[[], Set[str]],
        finish_deletion: Callable[[str], object],
        problem: Callable[[BaseSettings], str | None] = lambda base: None,
        waits_for: Callable[[BaseSettings], str] = lambda base: "room for a replica",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`deleted` lists the models whose deletion has begun and not ended; `finish_deletion` goes on with one.

        `problem` is why a base can never have a replica, and `waits_for` what one waits for that has no place yet.
        """
        self._models = models
        self._apps = apps
        self._deleted = deleted
        self._finish_deletion = finish_deletion
        self._problem = problem
        self._waits_for = waits_for
        self._deployed: dict[str, BaseSettings] = {}
        self._clock = clock
        self._next_look = clock()
        self._restarts: dict[str, _Retry] = {}
        self._deletions: dict[str, _Retry] = {}
        self._lock = threading.Lock()

    def step(self) -> None:
        """Deploy what is missing, delete what is no longer wanted. A model that fails does not hold up the others."""
        with self._lock:
            wanted = self._models.settings()
            deployed = self._apps.deployed()
            for model_id in sorted(deployed.keys() - wanted.keys()):
                self._try(model_id, self._end)
            for model_id, base in wanted.items():
                if model_id not in deployed or self._deployed.get(model_id) != base:
                    self._try(model_id, lambda one: self._deploy(one, wanted[one]))
                else:
                    self._try(model_id, lambda one: self._restart_failed(one, deployed[one]))
            self._finish_deletions(deployed)

    def ensure(self, model_id: str) -> None:
        """Returns once a model is deployed; its replicas may start only when it is asked.

        Raises `ServingError` if it is not, `DoesNotStartError` if its replicas fail, and `NoRoomError` if they can
        never have a place.
        """
        with self._lock:
            base = self._models.settings().get(model_id)
            if base is None:
                raise ServingError(f"{model_id}: is not a model of this server.")
            if self._deployed.get(model_id) != base:
                self._deploy(model_id, base)
            status = self._apps.deployed().get(model_id)
        if status is None:
            raise ServingError(f"{model_id}: is not deployed yet.")
        if status.problem:
            raise DoesNotStartError(f"{model_id}: {status.problem}")
        if problem := self._problem(base):
            raise NoRoomError(problem)

    def waits_for(self, model_id: str) -> str:
        """What the replicas of a model wait for, as the rest of a sentence; '' if they do not wait for room."""
        with self._lock:
            base = self._deployed.get(model_id)
            status = self._apps.deployed().get(model_id)
        return self._waits_for(base) if base is not None and status is not None and status.is_unplaced else ""

    def _deploy(self, model_id: str, base: BaseSettings) -> None:
        self._apps.deploy(model_id, base)
        self._deployed[model_id] = base

    def _end(self, model_id: str) -> None:
        self._deployed.pop(model_id, None)
        self._apps.delete(model_id)

    def _restart_failed(self, model_id: str, status: AppStatus) -> None:
        """Delete the application of a model whose replicas Serve has given up; the next step deploys it anew.

        They may have failed because the storage was away.
        """
        if not status.has_given_up:
            return
        now = self._clock()
        retry = self._restarts.setdefault(model_id, _Retry(now + RETRY_SECONDS, RETRY_SECONDS))
        if retry.time <= now:
            self._restarts[model_id] = retry.next(now)
            logger.warning("full model %s: starts again (%s)", model_id, status.problem)
            self._end(model_id)

    def _finish_deletions(self, deployed: Mapping[str, AppStatus]) -> None:
        now = self._clock()
        if now < self._next_look:
            return
        self._next_look = now + DELETION_SECONDS
        begun = self._deleted() - deployed.keys()
        self._deletions = {model_id: retry for model_id, retry in self._deletions.items() if model_id in begun}
        for model_id in sorted(begun):
            retry = self._deletions.get(model_id)
            if retry is None or retry.time <= now:
                self._deletions[model_id] = retry.next(now) if retry else _Retry(now, DELETION_SECONDS)
                self._try(model_id, self._finish_deletion)

    def _try(self, model_id: str, act: Callable[[str], object]) -> None:
        try:
            act(model_id)
        except FtError as error:
            logger.warning("full model %s: %s", model_id, error)
