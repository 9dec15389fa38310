"""ZeRO-3 over four hosts at cables that lose and delay packets, of which one host is then cut off.

Each host is a network namespace with a raylet in it; see tests/namespaces.py.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ft_service.runs.folder import RunFolder
from ft_service.train.checkpoints.manifest import Checkpoints
from tests.faults import Attempt, Driver, attempts, last_step, steps
from tests.hosts import QUICK_HEALTH_CHECKS, Cluster, wait_for
from tests.namespaces import Network, connections, needs_hosts, network
from tests.shared_cluster import OFTEN
from tests.worlds import prepared_run, work, write_world

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

STEPS = 50
EVERY = 10
RUN_SECONDS = 200
SETTINGS = {
    "method": "{type: full}",
    "train.global_batch_size": 12,
    "train.max_steps": STEPS,
    "train.validate_every_steps": STEPS,
    "train.learning_rate": 3e-3,
    "checkpoint.every_steps": EVERY,
    "report.samples": 0,
}
LOSS = 0.01
DELAY_SECONDS = 0.005
RATE = "100mbit"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    needs_hosts()
    with network(tmp_path_factory.mktemp("network"), {"head": 0, "a": 1, "b": 1, "c": 1, "d": 1}) as found:
        yield found


@pytest.fixture(scope="module")
def cluster(hosts: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head without room for workers, and four hosts with room for one each."""
    with Cluster(tmp_path_factory.mktemp("cluster"), hosts.hosts[0], {**QUICK_HEALTH_CHECKS, **OFTEN}) as found:
        for host in hosts.hosts:  # one by one: Ray gives a raylet 30 seconds, however many start on this machine
            found.start(host)
        yield found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The same run by one process, without Ray and ZeRO."""
    world = tmp_path_factory.mktemp("world")
    write_world(world)
    run = prepared_run(world, "alone", 1, **SETTINGS)
    work(run)
    return run


def check_places(hosts: Network, attempt: Attempt) -> None:
    """Each worker is the only one of its host, and is connected with every other by that one's address."""
    names = [worker.host for worker in attempt.workers]
    assert len(set(names)) == len(names)
    assert [hosts.host_of(worker.pid) for worker in attempt.workers] == names
    address = {host.name: host.address for host in hosts.hosts}
    for worker in attempt.workers:
        others = {(address[worker.host], address[name]) for name in names if name != worker.host}
        assert others <= set(connections(worker.pid))


def test_training_over_bad_cables_continues_without_the_host_that_is_cut_off(
    hosts: Network, cluster: Cluster, alone: RunFolder
) -> None:
    world = Path(alone.storage.root).parent
    several = {"parallel.num_workers": "{min: 3, max: 4}", "parallel.zero_stage": 3}
    run = prepared_run(world, "four", 4, **SETTINGS, **several)
    driver = Driver(cluster, Path(run.storage.uri(f"{run.path}/spec.yaml")), run, [], world / "driver.log")
    began = time.monotonic()
    try:
        reach(driver, run, EVERY)
        (first,) = attempts(run)
        check_places(hosts, first)
        print(f"first steps after {time.monotonic() - began:.1f} s")
        clean = seconds_for(driver, run, EVERY)
        with ExitStack() as bad:
            _, a, b, *_ = hosts.hosts
            lost = [bad.enter_context(hosts.lossy(host, LOSS)) for host in hosts.hosts[1:]]
            bad.enter_context(hosts.slow(a, RATE))
            bad.enter_context(hosts.delayed(b, DELAY_SECONDS))
            bad_seconds = seconds_for(driver, run, EVERY)
            print(f"{EVERY} steps: {clean:.1f} s; over bad cables {bad_seconds:.1f} s")
            wait_for(lambda: len(Checkpoints(run).entries()) >= 2, RUN_SECONDS, log=driver.log)
            assert len(attempts(run)) == 1 and not driver.has_ended(), driver.said()
            cut_off = next(host for host in hosts.hosts if host.name == first.workers[2].host)
            hosts.pull_cable(cut_off)
            pulled = time.monotonic()
            bad.callback(hosts.plug_in, cut_off)
            bad.callback(cluster.kill, cut_off)  # before, so that it does not come back
            reached = last_step(run)
            wait_for(lambda: driver.has_ended() or len(attempts(run)) == 2, RUN_SECONDS, log=driver.log)
            print(f"going on {time.monotonic() - pulled:.1f} s after {cut_off.name} was cut off at {reached}")
            driver.wait(RUN_SECONDS)
            print(f"all: {time.monotonic() - began:.1f} s; lost packets: {[count() for count in lost]}")
            assert all(count() > 0 for count in lost)
    finally:
        driver.end()

    second = attempts(run)[1]
    assert {worker.host for worker in second.workers} == {h.name for h in hosts.hosts[1:] if h != cut_off}
    assert reached < STEPS and second.step % EVERY == 0 and EVERY <= second.step <= reached + EVERY
    taken = steps(run)
    assert [metrics.step for metrics in taken] == list(range(1, STEPS + 1))
    assert [m.loss for m in taken] == pytest.approx([m.loss for m in steps(alone)], abs=1e-3)
    assert run.outcome().final_loss == pytest.approx(alone.outcome().final_loss, abs=1e-3)


def seconds_for(driver: Driver, run: RunFolder, num_steps: int) -> float:
    began = time.monotonic()
    reach(driver, run, last_step(run) + num_steps)
    return time.monotonic() - began


def reach(driver: Driver, run: RunFolder, step: int) -> None:
    wait_for(lambda: driver.has_ended() or last_step(run) >= step, RUN_SECONDS, log=driver.log)
    assert not driver.has_ended(), driver.said()
