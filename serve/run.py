"""``ft serve``: judge the settings, start Ray or join it, serve until interrupted, and leave nothing of it behind."""

import os
import signal
import socket
from contextlib import ExitStack
from threading import Event
from types import FrameType
from typing import NoReturn

import ray
from pydantic import ValidationError
from ray import serve

from ft_service.cluster.ray_cluster import connect
from ft_service.errors import ServingError, UsageError
from ft_service.text import last_line
from serve.app import ServeConfig, build_app, complete, served_models
from serve.http.keys import is_loopback

APP_NAME = "ft"
_WILDCARDS = ("0.0.0.0", "::")


def run_server(
    storage: str, base: str | None, host: str = "127.0.0.1", port: int = 8000, ray_address: str | None = None
) -> None:
    """Serve `base` and its adapters on `storage` until SIGINT or SIGTERM.

    `base` None takes the one base that the adapters were trained on. Ray is joined at `ray_address` or RAY_ADDRESS,
    else started on this machine. Raises `ServingError` (port in use, an open address without FT_API_KEY, a replica
    that does not start), `UsageError`, `ModelError`, `StorageError` or `ClusterError`.
    """
    ray_address = ray_address or os.environ.get("RAY_ADDRESS")
    config = _config(storage, base)
    _check_reach(host, config)
    if not ray_address:
        _check_port(host, port)
        served_models(complete(config))  # a base that cannot be loaded is told here, not by a replica
    with ExitStack() as started:
        try:
            connect(ray_address)
            started.callback(ray.shutdown)
            signal.signal(signal.SIGTERM, _interrupt)  # after ray.init, which sets its own
            if serve.status().proxies:
                raise ServingError(
                    f"ray address = {ray_address!r}: Serve already runs there, on an address of its own. "
                    "Add this application with: serve run serve.app:app --name ft --route-prefix /ft"
                )
            started.callback(serve.shutdown)
            serve.start(http_options={"host": host, "port": port})
            _deploy(config)
            _announce(config, host, port, local=not ray_address)
            Event().wait()
        except KeyboardInterrupt:
            print("Stopping.", flush=True)


def _config(storage: str, base: str | None) -> ServeConfig:
    try:
        return ServeConfig.model_validate({"storage": storage, **({"base": base} if base else {})})
    except ValidationError as error:
        first = error.errors()[0]
        variable = f"FT_{str(first['loc'][0]).upper()}"
        raise UsageError(f"{variable} = {first['input']!r}: {first['msg']}. Correct or unset it.") from None


def _check_reach(host: str, config: ServeConfig) -> None:
    if not is_loopback(host) and config.api_key is None:
        raise ServingError(
            f"host = {host!r}: others can reach this address, and there is no API key. "
            "Set FT_API_KEY to a long random text, or use --host 127.0.0.1."
        )


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ServingError(
                f"port = {port}: cannot listen on {host} ({error}). Stop what uses it, or choose another with --port."
            ) from None


def _deploy(config: ServeConfig) -> None:
    try:
        serve.run(build_app(config), name=APP_NAME)
    except RuntimeError:  # it names the deployment; why a replica failed is in the status
        deployments = serve.status().applications[APP_NAME].deployments.values()
        reasons = "; ".join(last_line(deployment.message) for deployment in deployments)
        raise ServingError(f"the server did not start: {reasons}") from None


def _announce(config: ServeConfig, host: str, port: int, local: bool) -> None:
    name = socket.gethostname() if host in _WILDCARDS else host
    url = f"http://{f'[{name}]' if ':' in name else name}:{port}/v1"
    key = ' -H "Authorization: Bearer $FT_API_KEY"' if config.api_key else ""
    print(f"Serving at {url}")
    if local:
        _, models = served_models(complete(config))
        print("Models:", *(f"  {model.id}" for model in models.all()), sep="\n")
        example = models.all()[-1].id
        print(
            f"Ask one:\n  curl {url}/completions{key} -H 'Content-Type: application/json' \\\n"
            f"""    -d '{{"model": "{example}", "prompt": "Hello", "max_tokens": 32}}'"""
        )
    print(f"List them:\n  curl {url}/models{key}", flush=True)


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
