"""The deployment that runs the controller of fine-tuning jobs: one replica beside the gateways, without resources."""

import asyncio
import logging
import os
import threading
import uuid
from collections.abc import Mapping
from functools import partial

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from ft_service.cleanup.removal import deleted_models, finish_deletion
from ft_service.cluster.queue.capacity import RayNodes
from ft_service.cluster.storage_metrics import export_storage_metrics
from ft_service.cluster.submit import Submissions
from ft_service.errors import DatabaseError, FtError, ServingError, UsageError
from ft_service.registry.registry import Registry
from ft_service.storage.storage import Storage
from serve.database.database import open_database
from serve.fine_tuning.answers import Answers
from serve.fine_tuning.api_files import ApiFiles
from serve.fine_tuning.controller import Controller
from serve.fine_tuning.file_keeper import FileKeeper
from serve.fine_tuning.full_models import FullModels
from serve.fine_tuning.job_files import delete_ended_data
from serve.fine_tuning.job_records import JobRecords
from serve.fine_tuning.jobs import outside_of
from serve.fine_tuning.model_servers import ModelServers
from serve.fine_tuning.serving_room import ServingRoom
from serve.fine_tuning.work import Threads
from serve.gateway import Backends
from serve.inference.bases import load_base
from serve.inference.models import ServedModels
from serve.job_metrics import update_job_metrics
from serve.log import log_with_serve
from serve.model_apps import ServeApps
from serve.replica import MakeEngine, make_engine
from serve.settings import ServeSettings

STEP_SECONDS = 2.0
TIDY_SECONDS = 60.0

logger = logging.getLogger(__name__)


@serve.deployment
class FineTuning:
    """A controller in a thread. A second replica, or that of another server, waits for the lease."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: ServeSettings, handles: Mapping[str, DeploymentHandle], make_engine: MakeEngine = make_engine
    ) -> None:
        log_with_serve()
        export_storage_metrics()
        tuning = settings.fine_tuning
        assert settings.storage and tuning
        if settings.database is None:
            raise UsageError("fine_tuning: needs a database. Set FT_DATABASE_URL, or `database`.")
        self._storage = storage = Storage(settings.storage)
        database = await asyncio.to_thread(open_database, settings.database)
        self._records = records = JobRecords(database)
        models = ServedModels(Registry(storage), [load_base(base) for base in settings.bases])
        models.add_names(records)
        full_models = FullModels(records, models.registry, settings, models.bases)
        models.add_bases(full_models)
        application = serve.get_replica_context().app_name
        backends = Backends(handles, application)
        apps = ServeApps(application, settings, make_engine)
        room = ServingRoom(settings, RayNodes())
        self._model_servers = servers = ModelServers(
            full_models,
            apps,
            partial(deleted_models, storage),
            partial(finish_deletion, storage),
            room.problem,
            room.needed_room,
        )
        answers = Answers(models, backends, settings.limits)
        self._work = Threads()
        launcher = Submissions(_address(tuning.ray_address))
        bases = {base.name: base.folder for base in models.bases}
        self._keeper = FileKeeper(database, storage, tuning.files, bases)
        files = ApiFiles(self._keeper)
        outside = outside_of(records, storage, settings, files, answers.check, servers.ensure, servers.waits_for, room)
        self._controller = Controller(records, storage, launcher, outside, self._work, uuid.uuid4().hex)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)
        self._thread.start()
        threading.Thread(target=self._tidy, name="tidy-files", daemon=True).start()
        threading.Thread(target=self._serve_models, name="serve-models", daemon=True).start()

    def _run(self) -> None:
        while not self._stopping.wait(STEP_SECONDS):
            try:
                if self._controller.step():
                    update_job_metrics(self._records.engine, self._records.clock())
            except DatabaseError as error:
                logger.warning("%s", error)
            except Exception:
                logger.exception("a step of the controller failed")

    def _tidy(self) -> None:
        """Beside the controller, which must not wait for the check of a large file."""
        while True:  # at once too: an earlier process may have been killed within a deletion
            try:
                delete_ended_data(self._records, self._storage)
                self._keeper.tidy()
            except Exception:
                logger.exception("files cannot be tidied")
            if self._stopping.wait(TIDY_SECONDS):
                return

    def _serve_models(self) -> None:
        """Beside the controller too: each server has its own deployments, whoever holds the lease."""
        while not self._stopping.wait(STEP_SECONDS):
            try:
                self._model_servers.step()
            except FtError as error:
                logger.warning("full models: %s", error)
            except Exception:
                logger.exception("full models cannot be served")

    def check_health(self) -> None:
        """Called by Serve, which replaces a replica whose controller has ended."""
        if not self._thread.is_alive():
            raise ServingError("The controller of fine-tuning jobs has ended.")

    async def __del__(self) -> None:
        """Called by Serve before it stops a replica. Runs go on: the next controller finds them."""
        if hasattr(self, "_thread"):
            self._stopping.set()
            await asyncio.to_thread(self._thread.join, STEP_SECONDS)
            self._work.close()
            try:
                await asyncio.to_thread(self._controller.release)
            except DatabaseError as error:
                logger.warning("%s", error)


def _address(configured: str) -> str:
    if configured == "auto":
        return str(ray.get_runtime_context().gcs_address)
    os.environ["RAY_API_SERVER_ADDRESS"] = configured  # otherwise RAY_ADDRESS, which Ray sets here, has precedence
    return configured
