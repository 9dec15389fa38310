"""The Ray Serve application, built from settings.

serve run serve.app:app storage=/mnt/ft/storage [base=...]
serve deploy serve/config.yaml
"""

from collections.abc import Mapping
from typing import Any, cast

import ray
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from ft_service.errors import UsageError
from ft_service.registry.registry import Registry
from ft_service.storage.storage import Storage
from serve.fine_tuning.deployment import FineTuning
from serve.fine_tuning.templates import with_templates_read
from serve.gateway import Gateway
from serve.inference.models import only_base
from serve.replica import BaseReplica, MakeEngine, make_engine
from serve.router import CONTROL_CALLS, AdapterRouter
from serve.settings import BaseSettings, ServeSettings, absolute

GATEWAY = "gateway"
FINE_TUNING = "fine-tuning"
CONTROLLER_STOP_SECONDS = 10.0
_ROUTER = f"{AdapterRouter.__module__}.{AdapterRouter.__qualname__}"
MAX_GATEWAY_REQUESTS = 2048
"""Far more than any base accepts: requests wait for their base, so that listing models does not wait behind them."""

HEALTH_CHECK_SECONDS = 2
"""A replica that has died is replaced within so long, and the time that loading takes."""
QUEUE_BACKOFF_SECONDS = 0.05
"""So long a place in the batch may stay free while a request waits. Serve's own is 0.5 s."""


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
    handles = {base.model_name: _replicas(settings, base, make_engine) for base in settings.bases}
    gateway = Gateway.options(  # type: ignore[attr-defined]
        name=GATEWAY,
        num_replicas=settings.gateways,
        max_ongoing_requests=MAX_GATEWAY_REQUESTS,
        max_surge_percent=100,  # an update starts the new ones first
        health_check_period_s=HEALTH_CHECK_SECONDS,
        graceful_shutdown_timeout_s=settings.limits.request_seconds,
        ray_actor_options={"num_cpus": 0},
    )
    return gateway.bind(settings, handles, _fine_tuning(settings, handles))


def _fine_tuning(settings: ServeSettings, handles: Mapping[str, Application]) -> Application | None:
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
    return cast(Application, controller.bind(settings, handles))


def _replicas(settings: ServeSettings, base: BaseSettings, make_engine: MakeEngine) -> Application:
    gpus = _one_gpu_if_available() if base.gpus is None else base.gpus
    options: dict[str, Any] = {
        "name": base.model_name,
        "max_ongoing_requests": base.max_batch + CONTROL_CALLS,
        "max_queued_requests": settings.limits.max_queue,
        "graceful_shutdown_timeout_s": settings.limits.request_seconds,
        "health_check_period_s": HEALTH_CHECK_SECONDS,
        "max_constructor_retry_count": 2,
        **resources(base, gpus),
        "request_router_config": RequestRouterConfig(
            request_router_class=_ROUTER,  # type: ignore[arg-type]  # its annotation is wrong in Ray 2.60
            request_router_kwargs={"busy_requests": max(1, base.max_batch // 2)},
            max_backoff_s=QUEUE_BACKOFF_SECONDS,  # type: ignore[arg-type]  # likewise
        ),
        **_number_of_replicas(base),
    }
    return BaseReplica.options(**options).bind(settings, base, make_engine)  # type: ignore[attr-defined]


def resources(base: BaseSettings, gpus: int) -> Mapping[str, Any]:
    """What Ray reserves for a replica, and the interpreter that runs it.

    vLLM's workers are processes of the replica and share its GPUs, so all of them are one bundle: one node.
    """
    actor: dict[str, Any] = {"num_cpus": base.cpus, "num_gpus": gpus}
    if base.python is not None:
        actor["runtime_env"] = {"py_executable": base.python}
    options: dict[str, Any] = {"ray_actor_options": actor}
    if base.engine == "vllm" and gpus > 1:
        # Ray refuses bundles with an entry of 0.
        bundle = {name: amount for name, amount in (("CPU", base.cpus), ("GPU", gpus)) if amount}
        options |= {"placement_group_bundles": [bundle], "placement_group_strategy": "STRICT_PACK"}
    return options


def _number_of_replicas(base: BaseSettings) -> Mapping[str, Any]:
    if base.autoscaling is None:
        return {"num_replicas": base.replicas}
    scaling = base.autoscaling
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=scaling.min_replicas,
            initial_replicas=scaling.min_replicas,
            max_replicas=scaling.max_replicas,
            target_ongoing_requests=scaling.target_requests,
            downscale_delay_s=scaling.downscale_delay_seconds,
            upscale_delay_s=0,
        )
    }


def _one_gpu_if_available() -> int:
    if ray.is_initialized():
        return int(ray.cluster_resources().get("GPU", 0) > 0)
    import torch  # the head of a cluster needs it not

    return int(torch.cuda.is_available())


def app(settings: ServeSettings) -> Application:
    """Called by ``serve run`` and ``serve deploy``, with the arguments of the command or of the config file."""
    return build_app(settings)
