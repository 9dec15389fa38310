"""The Ray cluster: joining one, or starting one here; what of it is free, and what is about to go."""

import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import ray

from ft_service.data.files.shard import ShardChanged
from ft_service.errors import ClusterError, FtError
from ft_service.text import last_line

PROJECT = Path(__file__).resolve().parents[2]
CONNECT_SECONDS = 10
_TASK_RETRIES = 3
Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")


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
            f"RAY_ADDRESS = {address or 'local'!r}: cannot be joined ({type(error).__name__}: {last_line(error)}). "
            "Check that the cluster is up, and that RAY_AUTH_MODE and the token are those of its head."
        ) from None


def is_submitted_job() -> bool:
    """Whether this process is the driver of a job submitted to a cluster; Ray tells it by this variable."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def draining_nodes() -> set[str]:
    """Ids of the nodes that are about to be taken away (`ray drain-node`, or a cloud's preemption notice)."""
    return set(ray._private.state.state.get_draining_nodes())


def disconnect() -> None:
    """Leave the cluster; actors and tasks of this process end with that."""
    ray.shutdown()


def kill_actors(class_name: str) -> None:
    """SIGKILL the actors of a class that this driver has made; the actors that they made end with them."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    core: Any = ray._private.worker.global_worker.core_worker  # type: ignore[attr-defined]
    for actor_id, actor in ray._private.state.actors(job_id=job).items():
        if actor["ActorClassName"] == class_name and actor["State"] != "DEAD":
            with suppress(ray.exceptions.ActorHandleNotFoundError):  # it is another actor's
                core.kill_actor(ray.ActorID.from_hex(actor_id), True)


def this_node() -> str:
    return str(ray.get_runtime_context().get_node_id())


def free_slots(resources: Mapping[str, float]) -> int:
    """How many workers that need `resources` each find room now, on nodes that stay."""
    going = draining_nodes()
    free = ray._private.state.available_resources_per_node()
    return sum(
        min(int(node.get(name, 0) / amount) for name, amount in resources.items() if amount)
        for node_id, node in free.items()
        if node_id not in going
    )


def ask_for_room(resources: Mapping[str, float], count: int) -> None:
    """Tell the autoscaler, if there is one, that room for `count` workers is wanted, busy or not; 0 takes it back."""
    if not ray.is_initialized():
        return
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[dict(resources)] * count)


def spread(task: Callable[[Shared, Item], Result], shared: Shared, items: Sequence[Item]) -> Iterator[Result]:
    """Run `task(shared, item)` for each item on the cluster's CPUs; gives the results in order of the items.

    What a node cannot do because its files are others (`ShardChanged`) is done in this process.
    """
    if len(items) < 2:
        yield from (task(shared, item) for item in items)
        return
    handle = ray.put(shared)
    remote = ray.remote(num_cpus=1, max_retries=_TASK_RETRIES, scheduling_strategy="SPREAD")(task)
    ahead = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting: deque[tuple[Item, Any]] = deque()
    rest = iter(items)
    while True:
        waiting.extend((item, remote.remote(handle, item)) for item in islice(rest, ahead - len(waiting)))
        if not waiting:
            return
        item, result = waiting.popleft()
        try:
            yield ray.get(result)
        except ShardChanged:
            yield task(shared, item)
        except ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None)
            raise (cause if isinstance(cause, FtError) else error) from None


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
