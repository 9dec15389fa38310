"""``ft serve``: check the settings, start or join Ray, serve until interrupted, then shut everything down."""

import os
import re
import signal
import socket
import time
from collections.abc import Collection
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from threading import Event, Thread
from types import FrameType
from typing import NoReturn

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve._private.common import ReplicaState
from ray.serve.context import _get_global_client, _set_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from ft_service.cluster.ray_cluster import connect
from ft_service.errors import ServingError, UsageError
from ft_service.registry.registry import Registry
from ft_service.spec.schema import RUN_NAME_PATTERN
from ft_service.storage.storage import Storage
from ft_service.text import last_line
from serve.app import GATEWAY, build_app, complete
from serve.http.keys import is_loopback
from serve.inference.bases import load_base
from serve.inference.models import ServedModels
from serve.model_apps import applications_of
from serve.settings import ServeSettings, load_config, read_settings
from serve.transport import prepare_ray

APP_NAME = "ft"
LOGGING = LoggingConfig(encoding="JSON", enable_access_log=False)
"""The gateway writes one line a request itself."""
PROXY_LOGGING = LoggingConfig(enable_access_log=False)
"""For the same reason the proxy of a Serve that is ours alone writes none."""
# Routes of the application at "/": Serve prefers the longest route that matches, so a name such as v1 would hide them.
_RESERVED_NAMES = ("v1", "vote", "docs", "redoc", "health", "default")
_WILDCARDS = ("0.0.0.0", "::")
_LISTEN_SECONDS = 300
_POLL_SECONDS = 0.1
_REPORT_SECONDS = 5.0
_ASK_SECONDS = 5.0
_CUT_SECONDS = 5.0
"""So long the errors of answers that are cut may take to reach their clients."""
_DELETE_SECONDS = 60.0
"""So long replicas may take to end once no request is in flight."""


def run_server(
    storage: str,
    base: str | None,
    host: str = "127.0.0.1",
    port: int = 8000,
    ray_address: str | None = None,
    name: str = APP_NAME,
    dtype: str | None = None,
    stop_seconds: float | None = None,
) -> None:
    """Serve `base` and its adapters on `storage` until SIGINT or SIGTERM.

    `base` None uses the one base that all adapters share; `dtype` is what it computes in, by default the checkpoint's
    own. `stop_seconds` is the limit of that name, None its default.

    Joins Ray at `ray_address` or RAY_ADDRESS, or starts it on this machine. Where Ray Serve already runs, the
    application called `name` joins it at a route of its own, and only that application is deleted at the end.

    Raises `ServingError` (port, name or route in use, a reachable address without a key, a replica that does not
    start), `UsageError`, `ModelError`, `StorageError` or `ClusterError`.
    """
    given = {"storage": storage, **({"base": base} if base else {})}
    settings = read_settings(given, "FT_")
    if dtype is not None:
        settings = complete(settings)  # the base may be the one that all adapters share
        bases = [{**one.model_dump(), "dtype": dtype} for one in settings.bases]
        settings = read_settings({"storage": settings.storage, "bases": bases}, "--")
    if stop_seconds is not None:
        limits = settings.limits.model_copy(update={"stop_seconds": stop_seconds})
        settings = settings.model_copy(update={"limits": limits})
    _run(settings, host, port, ray_address, name)


def run_config(file: Path, name: str = APP_NAME) -> None:
    """Serve what a Ray Serve config with this project's application describes. Raises as `run_server` does."""
    config = load_config(file)
    _run(config.settings, config.host, config.port, None, name)


def _run(settings: ServeSettings, host: str, port: int, ray_address: str | None, name: str) -> None:
    ray_address = ray_address or os.environ.get("RAY_ADDRESS")
    _check_name(name)
    _check_api_key(host, settings)
    if not ray_address:
        _check_port(host, port)
        for one in complete(settings).bases:
            load_base(one)  # a base that cannot be loaded fails here instead of in a replica
    with ExitStack() as started:
        try:
            if not ray_address:
                prepare_ray()  # every process of this Ray inherits it
            connect(ray_address)
            started.callback(ray.shutdown)
            signal.signal(signal.SIGTERM, _interrupt)  # after ray.init, which installs its own
            _check_running_serve(host, port, name)
            started.callback(_stop_serving, name, not ray_address, settings.limits.stop_seconds)
            serve.start(
                http_options={"host": host, "port": port}, logging_config=None if ray_address else PROXY_LOGGING
            )
            _deploy(settings, name)
            _wait_until_listening(host, port, local=not ray_address)
            _announce(settings, host, port, name, local=not ray_address)
            Event().wait()
        except KeyboardInterrupt:
            print("Stopping: no new requests are accepted. Again to stop at once.", flush=True)


def _check_name(name: str) -> None:
    if not re.fullmatch(RUN_NAME_PATTERN, name) or name in _RESERVED_NAMES:
        raise UsageError(
            f"--name = {name!r}: cannot be part of an address. Use lower-case letters, digits and dashes, and none of "
            f"{', '.join(_RESERVED_NAMES)}."
        )


def _check_api_key(host: str, settings: ServeSettings) -> None:
    if not is_loopback(host) and settings.api_key is None and settings.database is None:
        raise ServingError(
            f"host = {host!r}: other machines can reach this address, and no API key is set. "
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
                f"port = {port}: cannot listen on {host} ({error}). Stop the program that uses it, or set another "
                "--port."
            ) from None


def _route(name: str) -> str:
    return "/" if name == APP_NAME else f"/{name}"


def _check_running_serve(host: str, port: int, name: str) -> None:
    """Raise `ServingError` if this server would replace an application of the cluster's Ray Serve, or not be reached.

    Deploying under a name or a route that is in use takes down the application that has it.
    """
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    applications = client.get_serve_details()["applications"]
    routes = {other: details.get("route_prefix") for other, details in applications.items()}
    if name in routes or _route(name) in routes.values():
        free = next(other for number in count(2) if (other := f"{APP_NAME}-{number}") not in routes)
        raise ServingError(
            f"--name = {name!r}: an application with this name or the route {_route(name)} already runs on this "
            f"cluster. To serve beside it, add: --name {free}. To replace it, stop that server first."
        )
    running = client.http_config
    if (running.host, running.port) != (host, port):
        raise ServingError(
            f"--host {host} --port {port}: Ray Serve already listens on {running.host}, port {running.port}, for all "
            f"applications of this cluster. Use --host {running.host} --port {running.port}."
        )


def _stop_serving(name: str, local: bool, stop_seconds: float) -> None:
    """End the requests in flight, then delete this application; shut Ray Serve down only if no other one is left.

    A Ray of this process ends with it, and Serve with Ray. With 0 seconds the application is given up first of all: a
    job that is stopped has three seconds until it is killed. Trap: when Serve shuts down, Ray prints that a task failed
    and is tried again without end.
    """
    try:
        if name in serve.status().applications:
            if stop_seconds > 0:
                _end_requests(name, stop_seconds)
            _delete(name)
        if not local and not serve.status().applications:
            serve.shutdown()
    except KeyboardInterrupt:
        print("Stopping at once.", flush=True)
        if not local:
            for one in {name, *_full_models(name)}.intersection(serve.status().applications):
                serve.delete(one, _blocking=False)
    finally:
        if local:
            _set_global_client(None)  # it would be used again with the next Ray of this process


def _end_requests(name: str, stop_seconds: float) -> None:
    """Refuse new requests, wait until those in flight are answered, and cut what takes longer than `stop_seconds`.

    Deleting the application alone is not enough: Serve stops gateways and engines together, and a request that waits in
    a gateway's queue finds no engine any more.
    """
    gateways = serve.get_deployment_handle(GATEWAY, name)
    if left := _wait_for_requests(gateways, "refuse_new", stop_seconds):
        print(f"Cutting {left} requests that were not answered within {stop_seconds:g} s.", flush=True)
        _wait_for_requests(gateways, "cut", _CUT_SECONDS)


def _wait_for_requests(gateways: DeploymentHandle, method: str, seconds: float) -> int:
    """Call `method` of all gateways until no request is in flight, for `seconds` at most. Returns how many are left."""
    deadline = time.monotonic() + seconds
    shown = False
    while (left := _requests_in_flight(gateways, method)) and time.monotonic() < deadline:
        if not shown:
            print(f"Waiting at most {seconds:g} s for requests in flight: {left}.", flush=True)
            shown = True
        time.sleep(_POLL_SECONDS)
    return left


def _requests_in_flight(gateways: DeploymentHandle, method: str) -> int:
    """On all gateways, as `method` of each returns it. A gateway that runs and does not answer counts as one."""
    application = serve.status().applications.get(gateways.app_name)  # somebody else may have deleted it
    deployment = application.deployments.get(GATEWAY) if application else None
    running = deployment.replica_states.get(ReplicaState.RUNNING, 0) if deployment else 0
    if not running:
        return 0
    try:
        answers = gateways.broadcast(method).results(timeout_s=_ASK_SECONDS, return_exceptions=True)
    except (TimeoutError, RayError, RayServeException):  # a new handle does not know its replicas yet
        return running
    known = [answer for answer in answers if isinstance(answer, int)]
    return sum(known) + max(0, running - len(known))


def _delete(name: str) -> None:
    """Delete the application, then those of its full models, which it would deploy again."""
    _delete_all([name])
    _delete_all(_full_models(name))


def _delete_all(names: Collection[str]) -> None:
    """`serve.delete` itself gives up after a minute, with a traceback."""
    for name in names:
        serve.delete(name, _blocking=False)
    deadline = time.monotonic() + _DELETE_SECONDS
    while set(names).intersection(serve.status().applications) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _full_models(name: str) -> list[str]:
    return list(applications_of(name, serve.status().applications).values())


def _deploy(settings: ServeSettings, name: str) -> None:
    done = Event()
    Thread(target=_report_waiting, args=(name, done), daemon=True).start()
    try:
        serve.run(build_app(settings), name=name, route_prefix=_route(name), logging_config=LOGGING)
    except RuntimeError:  # its text names only the deployment; the status has the reason of the replica
        deployments = serve.status().applications[name].deployments.values()
        reasons = "; ".join(last_line(deployment.message) for deployment in deployments)
        raise ServingError(f"the server did not start: {reasons}") from None
    finally:
        done.set()


def _report_waiting(name: str, done: Event) -> None:
    """Print what Serve says of a deployment that waits: without room for its replicas it would wait in silence."""
    shown = set()
    while not done.wait(_REPORT_SECONDS):
        application = serve.status().applications.get(name)
        for deployment in application.deployments.values() if application else ():
            if deployment.message and deployment.message not in shown:
                print(f"Waiting: {deployment.message}", flush=True)
                shown.add(deployment.message)


def _wait_until_listening(host: str, port: int, local: bool) -> None:
    """`serve.run` waits only for the proxies that exist already; on a busy machine the first one starts later.

    A proxy may be called healthy before it listens, so a server on this machine is tried, too.
    """
    deadline = time.monotonic() + _LISTEN_SECONDS
    while not (_proxies_are_healthy() and (not local or _accepts_connections(host, port))):
        if time.monotonic() > deadline:
            raise ServingError(
                f"port = {port}: the HTTP server did not answer within {_LISTEN_SECONDS} s. See the logs of Ray Serve "
                "in the session folder of Ray (logs/serve/proxy_*.log)."
            )
        time.sleep(_POLL_SECONDS)


def _proxies_are_healthy() -> bool:
    states = set(serve.status().proxies.values())
    return "HEALTHY" in states and "STARTING" not in states


def _accepts_connections(host: str, port: int) -> bool:
    loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    try:
        socket.create_connection((loopback.get(host, host), port), timeout=1).close()
    except OSError:
        return False
    return True


def _announce(settings: ServeSettings, host: str, port: int, name: str, local: bool) -> None:
    address = socket.gethostname() if host in _WILDCARDS else host
    url = f"http://{f'[{address}]' if ':' in address else address}:{port}{_route(name).rstrip('/')}/v1"
    key = ' -H "Authorization: Bearer $FT_API_KEY"' if settings.api_key else ""
    print(f"Serving at {url}")
    if local:
        settings = complete(settings)
        assert settings.storage
        models = ServedModels(Registry(Storage(settings.storage)), [load_base(one) for one in settings.bases])
        print("Models:", *(f"  {model.id}" for model in models.all()), sep="\n")
        example = models.all()[-1].id
        print(
            f"Ask one:\n  curl {url}/completions{key} -H 'Content-Type: application/json' \\\n"
            f"""    -d '{{"model": "{example}", "prompt": "Hello", "max_tokens": 32}}'"""
        )
    print(f"List them:\n  curl {url}/models{key}", flush=True)


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
