"""Joining a Ray cluster, or starting one here, with one clear error when that fails."""

import logging
import os
import socket
from pathlib import Path
from typing import Any

import ray

from ft_service.errors import ClusterError

PROJECT = Path(__file__).resolve().parents[1]
CONNECT_SECONDS = 10


def connect(address: str | None = None) -> None:
    """Join the cluster at `address` or RAY_ADDRESS, or start a Ray on this machine.

    Joined or started, its workers can import this project. Raises `ClusterError` when nobody answers at the address, or
    the token is refused.
    """
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        _check_that_somebody_listens(address)
    try:
        ray.init(
            address=address or "local",
            runtime_env=_runtime_env(address),
            logging_level=logging.WARNING,
            # Ray Train watches its controller through the dashboard's API, and complains every second without one.
            include_dashboard=None if address else True,
        )
    except Exception as error:  # ConnectionError, RuntimeError, ValueError, and Ray's own when a token is refused
        raise ClusterError(
            f"RAY_ADDRESS = {address or 'local'!r}: cannot be joined ({type(error).__name__}: {_last_line(error)}). "
            "Check that the cluster is up, and that RAY_AUTH_MODE and the token are those of its head."
        ) from None


def is_submitted_job() -> bool:
    """Whether this process is the driver of a job submitted to a cluster; Ray tells it by this variable."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def _runtime_env(address: str | None) -> dict[str, Any] | None:
    if is_submitted_job():
        return None  # Ray ships its working directory
    if address:
        return {"py_modules": [str(PROJECT / package) for package in ("ft_service", "serve")]}
    python_path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    return {"env_vars": {"PYTHONPATH": python_path}}


def _check_that_somebody_listens(address: str) -> None:
    """Ray itself would try for more than a minute before it says so."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # "auto" and the like
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"RAY_ADDRESS = {address!r}: nobody answers there ({error}). Start the cluster, correct the address, or "
            "unset RAY_ADDRESS to use this machine alone."
        ) from None


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[-1].strip()
