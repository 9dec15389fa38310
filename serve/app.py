"""The Ray Serve application, built from settings: ``serve run serve.app:app [storage=... base=...]``.

Settings come from the environment where the command does not give them: FT_STORAGE, FT_BASE, FT_BASE_REVISION,
FT_API_KEY, FT_REPLICAS, FT_GPUS_PER_REPLICA.
"""

import os
import time
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, SecretStr
from ray import serve
from ray.serve import Application

from ft_service.errors import UsageError
from ft_service.model.base import fingerprint, looks_like_folder, read_config, resolve_base, short_name
from ft_service.model.light_imports import light_imports
from ft_service.registry.registry import BaseModelRef, Registry
from ft_service.registry.servers import Announcement
from ft_service.storage.storage import Storage
from serve.inference.models import ServedModels, only_base
from serve.inference.routes import create_api

# Requests wait for the engine inside the replica, so that listing models and health checks do not wait behind them.
MAX_ONGOING_REQUESTS = 256


def _from_env(name: str, default: str | None = None, **bounds: Any) -> Any:
    return Field(default_factory=lambda: os.environ.get(name) or default, validate_default=True, **bounds)


def _one_gpu_if_available() -> int:
    if ray.is_initialized():
        return int(ray.cluster_resources().get("GPU", 0) > 0)
    import torch  # the head of a cluster needs it not

    return int(torch.cuda.is_available())


class ServeConfig(BaseModel):
    """Settings of a server. A field that is not given is read from the environment."""

    model_config = ConfigDict(extra="forbid")

    storage: str | None = _from_env("FT_STORAGE")
    base: str | None = _from_env("FT_BASE")
    base_revision: str | None = _from_env("FT_BASE_REVISION")
    api_key: SecretStr | None = _from_env("FT_API_KEY")
    replicas: int = _from_env("FT_REPLICAS", "1", ge=1)
    gpus_per_replica: int | None = _from_env("FT_GPUS_PER_REPLICA", ge=0)


@serve.deployment(name="models", max_ongoing_requests=MAX_ONGOING_REQUESTS, max_constructor_retry_count=2)
@serve.ingress()
class ModelServer:
    """A replica: one engine and its routes. It accepts requests once the model is loaded."""

    def __init__(self, config: ServeConfig) -> None:
        folder, models = served_models(config)
        # Here, not at the top: `ft serve` and Serve's controller import this module too, and load no model. Loading
        # belongs inside: transformers asks of each weight whether it is a distributed tensor.
        with light_imports(four_bit="quantization_config" in read_config(folder)):
            from serve.engines.transformers_engine import TransformersEngine

            engine = TransformersEngine(folder, models.registry)
        self._announcement = Announcement(models.registry.storage, models.base.base)
        self._announcement.start()
        api_key = config.api_key.get_secret_value() if config.api_key else None
        self._api = create_api(engine, models, api_key)

    def __del__(self) -> None:
        """Called by Serve before it stops a replica."""
        if hasattr(self, "_announcement"):
            self._announcement.stop()

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._api


def complete(config: ServeConfig) -> ServeConfig:
    """`config` with every field set and absolute folders, because replicas run in other working directories.

    Raises `UsageError` when storage or base are not given and cannot be determined.
    """
    if not config.storage:
        raise UsageError("storage = None: is required to find the adapters. Set FT_STORAGE, or pass storage=FOLDER.")
    storage = Storage(config.storage)
    if storage.is_local and not storage.exists(""):
        raise UsageError(f"storage = {config.storage!r}: no such folder. Use the storage of your runs, or create it.")
    base = config.base
    revision = config.base_revision
    if not base:
        base, revision = only_base(Registry(storage))
    gpus = config.gpus_per_replica
    return config.model_copy(
        update={
            "storage": _absolute(config.storage) if storage.is_local else config.storage,
            "base": _absolute(base) if looks_like_folder(base) else base,
            "base_revision": revision,
            "gpus_per_replica": _one_gpu_if_available() if gpus is None else gpus,
        }
    )


def _absolute(folder: str) -> str:
    return str(Path(folder).expanduser().absolute())


def served_models(config: ServeConfig) -> tuple[Path, ServedModels]:
    """The base's folder, downloaded if needed, and the models that a server of this `complete` config serves."""
    assert config.storage and config.base
    folder = resolve_base(config.base, config.base_revision)
    base = BaseModelRef(
        id=config.base,
        revision=config.base_revision,
        short_name=short_name(config.base),
        fingerprint=fingerprint(folder),
    )
    return folder, ServedModels(Registry(Storage(config.storage)), base, created=int(time.time()))


def build_app(config: ServeConfig) -> Application:
    """The Serve application of `config`. Raises `UsageError`, see `complete`."""
    config = complete(config)
    server = ModelServer.options(  # type: ignore[attr-defined]
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": config.gpus_per_replica},
    )
    return server.bind(config)


def app(config: ServeConfig) -> Application:
    """Called by ``serve run`` and ``serve deploy``, with the arguments of the command or of the config file."""
    return build_app(config)
