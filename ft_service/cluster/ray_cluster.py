"""The Ray cluster: join one or start one here; its free resources, and its draining nodes."""

import logging
import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
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
    """Join the cluster at `address` or RAY_ADDRESS, or start Ray on this machine.

    Workers can then import this project. Raises `ClusterError` when nothing answers at the address, or when the
    cluster rejects the token.
    """
    if ray.is_initialized():
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        _check_not_jobs_api(address)
        _check_reachable(address)
    else:
        _put_this_python_first()
    try:
        ray.init(
            address=address or "local",
            runtime_env=_runtime_env(address),
            logging_level=logging.WARNING,
            # Ray Train watches its controller through the dashboard's API, and logs a warning every second without one.
            include_dashboard=None if address else True,
        )
    except Exception as error:  # ConnectionError, RuntimeError, ValueError, and Ray's own for a wrong token
        raise ClusterError(
            f"RAY_ADDRESS = {address or 'local'!r}: cannot be joined ({type(error).__name__}: {last_line(error)}). "
            "Check that the cluster is up, and that RAY_AUTH_MODE and the token are those of its head node."
        ) from None


def _put_this_python_first() -> None:
    """Jobs run `python`: on a Ray that this process starts it is this one, also if its environment is not active."""
    here = str(Path(sys.executable).parent)  # not resolved: an environment's python is a link
    folders = [folder for folder in os.environ.get("PATH", "").split(os.pathsep) if folder != here]
    os.environ["PATH"] = os.pathsep.join([here, *folders])


def _check_not_jobs_api(address: str) -> None:
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"RAY_ADDRESS = {address!r}: is the address of the Jobs API (the dashboard), where runs are submitted: "
            f"ft submit SPEC --address {address}. To join the cluster from one of its machines, set RAY_ADDRESS to its "
            "head's address, such as 10.0.0.1:6379, or to auto."
        )


def is_submitted_job() -> bool:
    """Whether this process is the driver of a job submitted to a cluster; Ray sets this variable for it."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def draining_nodes() -> set[str]:
    """Ids of the nodes that are draining (`ray drain-node`, an autoscaler, or a cloud's preemption notice)."""
    return set(ray._private.state.state.get_draining_nodes())


def disconnect() -> None:
    """Leave the cluster, which ends the actors and tasks of this process."""
    ray.shutdown()


def kill_actors(class_name: str) -> None:
    """Kill (SIGKILL) this driver's actors of a class, and with them the actors that those have started."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    core: Any = ray._private.worker.global_worker.core_worker  # type: ignore[attr-defined]
    for actor_id, actor in ray._private.state.actors(job_id=job).items():
        if actor["ActorClassName"] == class_name and actor["State"] != "DEAD":
            with suppress(ray.exceptions.ActorHandleNotFoundError):  # started by another actor
                core.kill_actor(ray.ActorID.from_hex(actor_id), True)


def remove_placement_groups() -> None:
    """Remove this driver's placement groups, and end what still runs in them.

    Ray removes a placement group that an actor created only when both the actor and its driver have ended.
    """
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    job = ray.get_runtime_context().get_job_id()
    for group_id, group in placement_group_table().items():
        if group_id.endswith(job) and group["state"] != "REMOVED":  # an id ends with that of its job
            remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group_id)))


@dataclass(frozen=True)
class NumActors:
    """Actors of one class that this driver, or its actors, have started and that have not ended."""

    starting: int
    living: int


def num_actors(class_name: str) -> NumActors:
    """How many of them are starting, and how many live."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    actors = ray._private.state.actors(job_id=job).values()
    states = [actor["State"] for actor in actors if actor["ActorClassName"] == class_name and actor["State"] != "DEAD"]
    living = states.count("ALIVE")
    return NumActors(len(states) - living, living)


def nodes_of_actors(class_name: str) -> list[str]:
    """The node of each living actor of this driver, or of its actors, of one class."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    actors = ray._private.state.actors(job_id=job).values()
    return [
        str(actor["Address"]["NodeID"])
        for actor in actors
        if actor["ActorClassName"] == class_name and actor["State"] == "ALIVE"
    ]


def this_node_id() -> str:
    return str(ray.get_runtime_context().get_node_id())


def free_worker_slots(resources: Mapping[str, float]) -> int:
    """How many workers fit now that need `resources` each, not counting draining nodes."""
    draining = draining_nodes()
    free = ray._private.state.available_resources_per_node()
    return sum(
        min(int(node.get(name, 0) / amount) for name, amount in resources.items() if amount)
        for node_id, node in free.items()
        if node_id not in draining
    )


def request_resources(resources: Mapping[str, float], count: int) -> None:
    """Ask the autoscaler, if there is one, to keep room for `count` workers, busy or idle; 0 withdraws the request."""
    if not ray.is_initialized():
        return
    from ray.autoscaler import sdk

    sdk.request_resources(bundles=[dict(resources)] * count)


def map_on_cluster(task: Callable[[Shared, Item], Result], shared: Shared, items: Sequence[Item]) -> Iterator[Result]:
    """Run `task(shared, item)` for each item on the cluster's CPUs; yields the results in the order of the items.

    A task that finds other files on its node (`ShardChanged`) runs again in this process.
    """
    if len(items) < 2:
        yield from (task(shared, item) for item in items)
        return
    handle = ray.put(shared)
    remote = ray.remote(num_cpus=1, max_retries=_TASK_RETRIES, scheduling_strategy="SPREAD")(task)
    max_pending = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    pending: deque[tuple[Item, Any]] = deque()
    remaining = iter(items)
    while True:
        pending.extend((item, remote.remote(handle, item)) for item in islice(remaining, max_pending - len(pending)))
        if not pending:
            return
        item, result = pending.popleft()
        try:
            yield ray.get(result)
        except ShardChanged:
            yield task(shared, item)
        except ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", None)
            raise (cause if isinstance(cause, FtError) else error) from None


def _runtime_env(address: str | None) -> dict[str, Any] | None:
    if is_submitted_job():
        return None  # Ray copies its working directory to the nodes
    if address:
        return {"py_modules": [str(PROJECT / package) for package in ("ft_service", "serve")]}
    python_path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    return {"env_vars": {"PYTHONPATH": python_path}}


def _check_reachable(address: str) -> None:
    """Ray itself would retry for more than a minute before it fails."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # "auto" and the like
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"RAY_ADDRESS = {address!r}: no answer ({error}). Start the cluster, correct the address, or unset "
            "RAY_ADDRESS to use only this machine."
        ) from None
