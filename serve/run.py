"""``ft serve``: judge the settings, start Ray or join it, serve until interrupted, and leave nothing of it behind."""

import os
import signal
import socket
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import Any

import ray
from pydantic import SecretStr
from ray import serve

from ft_service.errors import ClusterError, ModelError, ServingError
from ft_service.model.base import resolve_base
from ft_service.registry import Registry
from ft_service.storage import Storage
from serve.app import ServeConfig, build_app
from serve.auth import is_loopback
from serve.models import only_base

APP_NAME = "ft"
_PROJECT = Path(__file__).resolve().parent.parent


def run_server(
    storage: str, base: str | None, host: str = "127.0.0.1", port: int = 8000, ray_address: str | None = None
) -> None:
    """Serve `base` and its adapters on `storage` until SIGINT or SIGTERM.

    `base` None takes the one base that the adapters were trained on. Ray is joined at `ray_address` or RAY_ADDRESS,
    else started on this machine. Raises `ServingError` (port in use, an open address without FT_API_KEY, no start),
    `UsageError`, `ModelError`, `StorageError` or `ClusterError`.
    """
...
