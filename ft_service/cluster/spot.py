"""Passes a cloud's notice that it takes this machine back on to Ray, so that runs save a checkpoint in time.

    python -m ft_service.cluster.spot --cloud aws --address HEAD:6379

AWS announces the end of a spot instance 2 minutes ahead, Google Cloud 30 seconds. Both do so on a metadata server that
only the machine itself reaches. Ray then drains the node: nothing new starts there, and a run that trains on it saves a
checkpoint and moves. `ray up` starts this on each worker (see cluster.yaml); it ends once the notice is passed on.
"""

import argparse
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from ft_service.errors import ClusterError

POLL_SECONDS = 5.0
_TIMEOUT_SECONDS = 2.0
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""A proxy of the environment does not reach the metadata server."""


@dataclass(frozen=True)
class Notice:
    """The machine is taken away `seconds_left` after the notice was read."""

    seconds_left: int
    reason: str


def aws_notice(server: str = "http://169.254.169.254") -> Notice | None:
    """Read the notice of an EC2 spot instance; None while there is none. Raises `OSError` without metadata server."""
    token = _fetch(f"{server}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, method="PUT")
    found = _fetch(f"{server}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token or ""})
    return Notice(110, f"AWS spot notice: {found}") if found else None


def gcp_notice(server: str = "http://metadata.google.internal") -> Notice | None:
    """Read the notice of a Google Cloud spot VM; None while there is none. Raises `OSError` without metadata server."""
    found = _fetch(f"{server}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return Notice(25, "Google Cloud preemption notice") if found == "TRUE" else None


NOTICES = {"aws": aws_notice, "gcp": gcp_notice}


def watch(notice: Callable[[], Notice | None], drain: Callable[[Notice], None], pause: Callable[[], None]) -> None:
    """Call `pause` between looks until there is a notice, then drain. A metadata server that fails is asked again."""
    while True:
        try:
            found = notice()
        except OSError as error:
            print(f"The metadata server does not answer: {error}", flush=True)
            found = None
        if found is not None:
            drain(found)
            return
        pause()


def drain_node(address: str, notice: Notice, node_ip: str | None = None) -> None:
    """Ask the cluster at `address` to drain the node with this IP address; None: the node of this machine.

    Raises `ClusterError` when the cluster has no such node, or refuses.
    """
    import ray
    from ray.core.generated import autoscaler_pb2

    client = ray._raylet.GcsClient(address=address)  # type: ignore[attr-defined]
    node_ip = node_ip or ray.util.get_node_ip_address()
    nodes = [node for node in client.get_all_node_info().values() if node.node_manager_address == node_ip]
    living = [node.node_id.hex() for node in nodes if node.state == 0]  # GcsNodeInfo.ALIVE
    if not living:
        raise ClusterError(f"{address}: the cluster has no living node with address {node_ip}.")
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # type: ignore[attr-defined]
    deadline_ms = time.time_ns() // 10**6 + notice.seconds_left * 1000
    for node_id in living:
        accepted, message = client.drain_node(node_id, reason, notice.reason, deadline_ms)
        if not accepted:
            raise ClusterError(f"{address}: node {node_id} cannot be drained: {message}")
        print(f"Draining node {node_id}: {notice.reason}", flush=True)


def _fetch(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """The answer's text; None when there is no such thing (404)."""
    assert urlsplit(url).scheme == "http"
    request = urllib.request.Request(url, headers=headers, method=method)
    try:
        with _OPENER.open(request, timeout=_TIMEOUT_SECONDS) as answer:
            return str(answer.read().decode()).strip()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Drain this Ray node when its cloud takes the machine back.")
    parser.add_argument("--cloud", choices=sorted(NOTICES), required=True)
    parser.add_argument("--address", required=True, help="address of the Ray head, such as 10.0.0.1:6379")
    chosen = parser.parse_args(arguments)
    watch(
        NOTICES[chosen.cloud],
        lambda notice: drain_node(chosen.address, notice),
        lambda: time.sleep(POLL_SECONDS),
    )


if __name__ == "__main__":
    main()
