"""Training across hosts that share no address, name or memory, and what happens when one of them is cut off.

Each host is a network namespace with a raylet in it. On one address Ray takes all raylets for one node: then every
worker has node rank 0 and its own local rank, and a rendezvous on the loopback address works by chance.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ft_service.cli.doctor import _merged, _print
from ft_service.cluster.doctor_nodes import NodeCheck
from ft_service.runs.folder import RunFolder
from ft_service.train.checkpoints.manifest import Checkpoints
from tests.faults import Attempt, Driver, attempts, last_step, steps
from tests.hosts import QUICK_HEALTH_CHECKS, ROOT, Cluster, Host, wait_for
from tests.namespaces import Network, connections, needs_hosts, network, run_inside
from tests.worlds import prepared_run, work, write_world

pytestmark = pytest.mark.cluster

STEPS = 160
RUN_SECONDS = 150
SETTINGS = {
    "train.max_steps": STEPS,
    "train.validate_every_steps": STEPS,
    "train.learning_rate": 3e-3,
    "checkpoint.every_steps": 20,
    "report.samples": 0,
}
METHODS: dict[str, dict[str, object]] = {
    "lora": {"method": "{type: lora, lora_rank: 4}", "parallel.zero_stage": 2},
    "full": {"method": "{type: full}", "parallel.zero_stage": 3},
}


@pytest.fixture(scope="module", autouse=True)
def the_same_ninja() -> Iterator[None]:
    """With and without Ray: two versions of it in turn would build DeepSpeed's operators anew at each start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
        yield


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    needs_hosts()
    with network(tmp_path_factory.mktemp("network"), {"head": 0, "a": 1, "b": 1, "c": 1}) as found:
        yield found


@pytest.fixture(scope="module")
def cluster(hosts: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head without room for workers, and two hosts with room for one each; the third comes when one is gone."""
    # The second lets the dashboard tell the ranks that Ray Train gave.
    settings = {**QUICK_HEALTH_CHECKS, "RAY_TRAIN_ENABLE_STATE_TRACKING": "1"}
    with Cluster(tmp_path_factory.mktemp("cluster"), hosts.hosts[0], settings) as found:
        found.start(*hosts.hosts[:3])
        yield found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


def begun(world: Path, cluster: Cluster, method: str) -> tuple[RunFolder, Driver]:
    """A run on the cluster, once its second checkpoint is there."""
    run = prepared_run(world, f"across-{method}", 2, **SETTINGS, **METHODS[method])
    spec = Path(run.storage.uri(f"{run.path}/spec.yaml"))
    driver = Driver(cluster, spec, run, [], world / f"{method}.log")
    wait_for(lambda: driver.has_ended() or len(Checkpoints(run).entries()) >= 2, RUN_SECONDS, log=driver.log)
    assert not driver.has_ended(), driver.said()
    return run, driver


def undisturbed(world: Path, method: str) -> RunFolder:
    """The same run by two workers of this host, without Ray."""
    run = prepared_run(world, f"alone-{method}", 2, **SETTINGS, **METHODS[method])
    work(run)
    return run


def told_ranks(cluster: Cluster, attempt: Attempt) -> list[tuple[int, int]]:
    """(node rank, local rank) that Ray Train gave each worker of an attempt; asked on the head's host."""
    ask = (
        "import os, sys, urllib.request as r; print(r.urlopen(r.Request(sys.argv[1], headers={'Authorization': "
        "'Bearer ' + os.environ['RAY_AUTH_TOKEN']}), timeout=20).read().decode())"
    )
    command = [sys.executable, "-c", ask, f"{cluster.dashboard}/api/train/v2/runs/v1"]
    done = run_inside(cluster.head, command, env=cluster.environment)
    assert done.returncode == 0, done.stderr
    reported: dict[int, tuple[int, int]] = {}
    for trained in json.loads(done.stdout)["train_runs"]:
        for workers in (group["workers"] for group in trained["attempts"]):
            if {worker["pid"] for worker in workers} == {attempt.pid(0), attempt.pid(1)}:
                reported = {worker["pid"]: (worker["node_rank"], worker["local_rank"]) for worker in workers}
    return [reported[attempt.pid(rank)] for rank in (0, 1)]


def check_places(hosts: Network, attempt: Attempt) -> None:
    """Each worker is the only one of its host, and talks to the other by that one's address."""
    names = [worker.host for worker in attempt.workers]
    assert len(set(names)) == 2
    assert [hosts.host_of(attempt.pid(rank)) for rank in (0, 1)] == names
    address = {host.name: host.address for host in hosts.hosts}
    for rank in (0, 1):
        # Nothing of Ray's connects two hosts with workers here: these are rendezvous store and gradients.
        assert (address[names[rank]], address[names[1 - rank]]) in connections(attempt.pid(rank))


def test_doctor_names_the_hosts_and_measures_a_slow_cable(hosts: Network, cluster: Cluster, tmp_path: Path) -> None:
    command = [*cluster.head.inside, sys.executable, "-m", "ft_service.cli.app", "doctor", "--cluster", "--nodes", "3"]
    command += ["--json", "--storage", str(tmp_path)]
    with hosts.slow(hosts.hosts[1], "400mbit"):
        done = subprocess.run(
            command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=RUN_SECONDS
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout)
    head, *others = (host.address for host in hosts.hosts[:3])
    for name in ("ports", "clock"):
        levels = {check["node"]: check["level"] for check in found if check["name"] == name}
        assert levels == {f"{head}, head": "ok", **dict.fromkeys(others, "ok")}, name
    assert len([check for check in found if check["name"] == "storage speed"]) == 3
    [network] = [check for check in found if check["name"] == "gloo between nodes"]
    _print(_merged([NodeCheck(**check) for check in found]), "node")
    assert network["level"] == "warn" and network["detail"].endswith("GB/s, slow")


@pytest.mark.parametrize(("method", "cut_off"), [("lora", 1), ("full", 0)])
def test_training_continues_elsewhere_when_a_host_is_cut_off(
    hosts: Network, cluster: Cluster, world: Path, method: str, cut_off: int
) -> None:
    alone = undisturbed(world, method)
    working = [host for host in hosts.hosts[1:] if host.name in cluster.running()]
    [spare] = [host for host in hosts.hosts[1:] if host not in working]
    run, driver = begun(world, cluster, method)
    first = attempts(run)[0]
    assert first.step == 0
    check_places(hosts, first)
    lost = next(host for host in working if host.name == first.workers[cut_off].host)
    hosts.pull_cable(lost)
    began = time.monotonic()
    cluster.start(spare)
    assert told_ranks(cluster, first) == [(0, 0), (1, 0)]
    reached = last_step(run)
    assert reached < STEPS
    wait_for(lambda: driver.has_ended() or len(attempts(run)) == 2, RUN_SECONDS, log=driver.log)
    print(f"{method}: going on {time.monotonic() - began:.1f} s after {lost.name} was cut off")
    driver.wait(RUN_SECONDS)

    second = attempts(run)[1]
    assert told_ranks(cluster, second) == [(0, 0), (1, 0)]
    stayed = next(host for host in working if host != lost)
    assert {worker.host for worker in second.workers} == {stayed.name, spare.name}
    assert 40 <= second.step <= reached + 20 and second.step % 20 == 0
    assert [metrics.step for metrics in steps(run)] == list(range(1, STEPS + 1))
    assert run.outcome().final_loss == pytest.approx(alone.outcome().final_loss, abs=1e-3)
    assert [m.loss for m in steps(run)] == pytest.approx([m.loss for m in steps(alone)], abs=1e-3)
    let_go(hosts, cluster, lost)


def let_go(hosts: Network, cluster: Cluster, lost: Host) -> None:
    """What still runs on a host that was cut off is ended, and the host can join again."""
    cluster.kill(lost)
    hosts.plug_in(lost)
