"""The Ray Serve application, built from settings.

serve run serve.app:app storage=/mnt/ft/storage [base=...]
serve deploy serve/config.yaml
"""

from collections.abc import Mapping
from typing import cast

from ray.serve import Application

from ft_service.errors import UsageError
from ft_service.registry.registry import Registry
from ft_service.storage.storage import Storage
from serve.base_app import HEALTH_CHECK_SECONDS, base_app
from serve.fine_tuning.deployment import FineTuning
from serve.fine_tuning.templates import with_templates_read
from serve.gateway import Gateway
from serve.inference.models import only_base
from serve.replica import MakeEngine, make_engine
from serve.settings import BaseSettings, ServeSettings, absolute

GATEWAY = "gateway"
FINE_TUNING = "fine-tuning"
CONTROLLER_STOP_SECONDS = 10.0
MAX_GATEWAY_REQUESTS = 2048
"""Far more than any base accepts: requests wait for their base, so that listing models does not wait behind them."""


def complete(settings: ServeSettings) -> ServeSettings:
    """`settings` with storage and at least one base, and absolute folders.

    Raises `UsageError` when storage or base are not given and cannot be determined.
    """
    if not settings.storage:
        raise UsageError("storage = None: is required to find the adapters. Set FT_STORAGE, or pass storage=FOLDER.")
    storage = Storage(settings.storage)
    if storage.is_local and not storage.exists(""):
        raise UsageError(f"storage = {settings.storage!r}: no such folder. Use the storage of your runs, or create it.")
    bases = settings.bases
    if not bases:
        base, revision = only_base(Registry(storage))
        bases = (BaseSettings(base=base, revision=revision),)
    root = absolute(settings.storage) if storage.is_local else settings.storage
    complete = settings.model_copy(update={"storage": root, "bases": bases}).with_absolute_folders()
    return with_templates_read(complete)


def build_app(settings: ServeSettings, make_engine: MakeEngine = make_engine) -> Application:
    """The Serve application of `settings`. Raises `UsageError`, see `complete`."""
    settings = complete(settings)
    handles = {base.model_name: base_app(settings, base, make_engine) for base in settings.bases}
    gateway = Gateway.options(  # type: ignore[attr-defined]
        name=GATEWAY,
        num_replicas=settings.gateways,
        max_ongoing_requests=MAX_GATEWAY_REQUESTS,
        max_surge_percent=100,  # an update starts the new ones first
        health_check_period_s=HEALTH_CHECK_SECONDS,
        graceful_shutdown_timeout_s=settings.limits.request_seconds,
        ray_actor_options={"num_cpus": 0},
    )
    return gateway.bind(settings, handles, _fine_tuning(settings, handles, make_engine))


def _fine_tuning(
    settings: ServeSettings, handles: Mapping[str, Application], make_engine: MakeEngine
) -> Application | None:
    """The controller of fine-tuning jobs. The gateway never calls it; bound to it, it belongs to the application."""
    if settings.fine_tuning is None:
        return None
    controller = FineTuning.options(  # type: ignore[attr-defined]
        name=FINE_TUNING,
        num_replicas=1,
        health_check_period_s=HEALTH_CHECK_SECONDS,
        graceful_shutdown_timeout_s=CONTROLLER_STOP_SECONDS,
        ray_actor_options={"num_cpus": 0},
    )
    return cast(Application, controller.bind(settings, handles, make_engine))


def app(settings: ServeSettings) -> Application:
    """Called by ``serve run`` and ``serve deploy``, with the arguments of the command or of the config file."""
    return build_app(settings)
