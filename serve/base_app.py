"""The deployment of one base, as Ray Serve is asked for it."""

from collections.abc import Mapping
from typing import Any, cast

import ray
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig

from serve.replica import BaseReplica, MakeEngine
from serve.router import CONTROL_CALLS, AdapterRouter
from serve.settings import BaseSettings, ServeSettings

HEALTH_CHECK_SECONDS = 2
"""A replica that has died is replaced within so long, and the time that loading takes."""
QUEUE_BACKOFF_SECONDS = 0.05
"""So long a place in the batch may stay free while a request waits. Serve's own is 0.5 s."""
_ROUTER = f"{AdapterRouter.__module__}.{AdapterRouter.__qualname__}"


def base_app(
    settings: ServeSettings, base: BaseSettings, make_engine: MakeEngine, version: str | None = None
) -> Application:
    """The replicas of a base. Deployed again with the same `version`, they stay; by default each time is new."""
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
    if version is not None:
        options |= {"version": version, "_internal": True}
    return cast(Application, BaseReplica.options(**options).bind(settings, base, make_engine))  # type: ignore[attr-defined]


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
