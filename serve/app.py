"""The Ray Serve application, from settings: ``serve run serve.app:app``, or ``serve run serve.app:app storage=... base=...``.

Settings come from the environment where the command does not give them: FT_STORAGE, FT_BASE, FT_BASE_REVISION,
FT_API_KEY, FT_REPLICAS, FT_GPUS_PER_REPLICA.
"""

import os
import time
from typing import Any

import ray
import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, SecretStr
from ray import serve
from ray.serve import Application

from ft_service.errors import UsageError
from ft_service.model.base import fingerprint, resolve_base, short_name
from ft_service.registry import BaseModelRef, Registry
from ft_service.storage import Storage
from serve.api import create_api
from serve.models import ServedModels, only_base
from serve.transformers_engine import TransformersEngine

# Requests wait for the engine inside the replica, where listing models and health checks can pass them by.
MAX_ONGOING_REQUESTS = 256


def _from_env(name: str) -> Any:
    return Field(default_factory=lambda: os.environ.get(name) or None)


class ServeConfig(BaseModel):
    """What a server is told. A field left out is read from the environment."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    storage: str | None = _from_env("FT_STORAGE")
    base: str | None = _from_env("FT_BASE")
    base_revision: str | None = _from_env("FT_BASE_REVISION")
    api_key: SecretStr | None = _from_env("FT_API_KEY")
    replicas: int = Field(default_factory=lambda: int(os.environ.get("FT_REPLICAS", "1")), ge=1)
    gpus_per_replica: int = Field(default_factory=lambda: _default_gpus(), ge=0)


def _default_gpus() -> int:
    if "FT_GPUS_PER_REPLICA" in os.environ:
        return int(os.environ["FT_GPUS_PER_REPLICA"])
    has_gpu = ray.cluster_resources().get("GPU", 0) > 0 if ray.is_initialized() else torch.cuda.is_available()
    return int(has_gpu)


@serve.deployment(name="models", max_ongoing_requests=MAX_ONGOING_REQUESTS)
@serve.ingress()
class ModelServer:
    """A replica: one engine and its routes. It takes no request before the model is loaded."""

    def __init__(self, config: ServeConfig) -> None:
        assert config.storage and config.base
        registry = Registry(Storage(config.storage))
        folder = resolve_base(config.base, config.base_revision)
        base = BaseModelRef(
            id=config.base,
            revision=config.base_revision,
            short_name=short_name(config.base),
            fingerprint=fingerprint(folder),
        )
        engine = TransformersEngine(folder, registry)
        api_key = config.api_key.get_secret_value() if config.api_key else None
        self._api = create_api(engine, ServedModels(registry, base, created=int(time.time())), api_key)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._api


def build_app(config: ServeConfig) -> Application:
    """The Serve application of `config`; raises `UsageError` when storage or base are not said and cannot be found."""
    if not config.storage:
        raise UsageError("storage = None: where adapters are published. Set FT_STORAGE, or say storage=FOLDER.")
    storage = Storage(config.storage)
    if storage.is_local and not storage.exists(""):
        raise UsageError(f"storage = {config.storage!r}: no such folder. Name the storage of your runs, or create it.")
    if not config.base:
        base, revision = only_base(Registry(storage))
        config = config.model_copy(update={"base": base, "base_revision": revision})
    server = ModelServer.options(  # type: ignore[attr-defined]
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": config.gpus_per_replica},
    )
    return server.bind(config)  # type: ignore[no-any-return]


def app(config: ServeConfig) -> Application:
    """What ``serve run`` and ``serve deploy`` call, with the arguments of the command or of the config file."""
    return build_app(config)
