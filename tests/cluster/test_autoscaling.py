"""Ray's autoscaler starts nodes of cluster.yaml's shapes when a run asks for them, and ends them when they are idle.

A run asks once it is its turn: while another run has all that may join, it waits in the queue and starts no node. One
that is larger than the cluster could ever be is refused, and one whose nodes do not come reports what it waits for.

The autoscaler is the one of `ray up` (version 2); only the provider is fake: it starts raylets on this machine instead
of instances. Their GPUs are numbers for placement; what trains here trains on the CPU type. That run has secrets in its
environment, which must be in nothing that it leaves.
"""

import copy
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from typer.testing import CliRunner

from examples.quickstart.quickstart import OBJECT_STORE_BYTES
from ft_service.cli.app import app
from ft_service.cluster.queue.board import Board
from ft_service.cluster.queue.capacity import RayNodes, joining_nodes, node_types
from ft_service.cluster.queue.schedule import could_ever_fit
from ft_service.cluster.ray_cluster import request_resources
from ft_service.cluster.room import room_per_worker
from ft_service.runs.events import Queued, read_events
from ft_service.runs.folder import RunFolder
from ft_service.runs.lease import Lease
from ft_service.spec.load import load_run_spec
from ft_service.storage.storage import Storage
from tests.cluster.queue.queue_cases import entry
from tests.faults import Driver
from tests.hosts import QUICK_HEALTH_CHECKS, ROOT, Cluster, Host, wait_for
from tests.shared_cluster import OFTEN, joined
from tests.worlds import prepared_run, write_world

pytestmark = pytest.mark.cluster

SPOT = "gpu-1x24gb"
"""Has exchanged its limit with its spot twin."""
NOT_TO_BE_HAD = "gpu-8x-a100"
"""The cloud has none at present: the autoscaler starts no node of this type, though cluster.yaml allows two."""
IDLE_SECONDS = 4
SCALING_SECONDS = 120
RUN_SECONDS = 240
HEAD = Host("head", "127.0.0.1", 0)
SETTINGS = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    # Otherwise a node with 192 CPUs starts 192 processes for work to come.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
}


def autoscaling_config(address: str) -> dict[str, Any]:
    """cluster.yaml with its node types and limits, and a provider of this machine."""
    ours = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    on_demand, spot = (ours["available_node_types"][name] for name in (SPOT, f"{SPOT}-spot"))
    on_demand["max_workers"], spot["max_workers"] = spot["max_workers"], on_demand["max_workers"]
    types = {
        name: {
            "resources": {**it["resources"], "object_store_memory": OBJECT_STORE_BYTES},
            "node_config": {},
            "min_workers": it["min_workers"],
            "max_workers": it["max_workers"],
            "idle_timeout_s": IDLE_SECONDS,
        }
        for name, it in ours["available_node_types"].items()
        if name != ours["head_node_type"]
    }
    head = {"resources": {"CPU": 0}, "node_config": {}, "min_workers": 0, "max_workers": 0}
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "fake",
        "max_workers": ours["max_workers"],
        "idle_timeout_minutes": ours["idle_timeout_minutes"],
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "gcs_address": address,
        },
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "rsync_exclude": [],
        "rsync_filter": [],
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "available_node_types": {**types, FAKE_HEAD_NODE_TYPE: head},
        **{f"{name}_commands": [] for name in commands},
    }


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("autoscaling")

    def arguments(address: str) -> list[str]:
        config = autoscaling_config(address)
        config["available_node_types"][NOT_TO_BE_HAD]["max_workers"] = 0
        (folder / "config.yaml").write_text(json.dumps(config))
        return [f"--autoscaling-config={folder / 'config.yaml'}"]

    with Cluster(folder, HEAD, {**QUICK_HEALTH_CHECKS, **OFTEN, **SETTINGS}, arguments) as found:
        found.start(HEAD)
        yield found


def workers(cluster: Cluster) -> Counter[str]:
    """How many nodes of each type live, the head left out."""
    status = get_cluster_status(cluster.environment["RAY_ADDRESS"])
    nodes = [*status.active_nodes, *status.idle_nodes]
    return Counter(node.ray_node_type_name for node in nodes if node.node_id != FAKE_HEAD_NODE_ID)


def test_nodes_of_the_right_type_come_for_a_request_and_go_without(cluster: Cluster) -> None:
    with joined(cluster):
        assert workers(cluster) == {}
        request_resources({"CPU": 1, "GPU": 1, "accelerator_type:L4": 0.001}, 1)
        wait_for(lambda: workers(cluster) == {"gpu-1x24gb-spot": 1}, SCALING_SECONDS)
        request_resources({}, 0)
        spec = load_run_spec(ROOT / "jobs/specs/lora-70b.yaml", ["parallel.num_workers=16"])
        group = placement_group([room_per_worker(spec.parallel)] * 16, "PACK")  # as Ray Train does
        try:
            assert group.wait(SCALING_SECONDS)
            on_nodes = Counter(placement_group_table(group)["bundles_to_node_id"].values())
            assert sorted(on_nodes.values()) == [8, 8]
            wait_for(lambda: workers(cluster) == {"gpu-8x-h100": 2}, SCALING_SECONDS)  # two of four, and no spot node
        finally:
            remove_placement_group(group)
        wait_for(lambda: workers(cluster) == {}, SCALING_SECONDS)


# -- a run, with secrets in its environment ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A completed run, the folder of all its files, and the types of the nodes that lived meanwhile."""

    run: RunFolder
    world: Path
    node_types: frozenset[str]
    waited_for: str
    """Why it waited in the queue."""
    refused: str
    """What another run printed meanwhile, which is larger than the cluster could ever be."""
    nodes_while_it_waited: dict[str, int]


CANARIES = {
    name: f"c4nary-{name.lower().replace('_', '-')}-5d1f"
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "HF_TOKEN",
        "WANDB_API_KEY",
        "MLFLOW_TRACKING_PASSWORD",
        "FT_API_KEY",
        "OPENAI_API_KEY",
    )
}


@pytest.fixture(scope="module")
def trained(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    world = tmp_path_factory.mktemp("world")
    write_world(world)
    run = prepared_run(world, "scaled", 2, **{"report.trackers": "[tensorboard]", "report.samples": 0})
    # `ray up` leaves its configuration in the home of the head, where a driver sees that nodes may join.
    config = autoscaling_config(cluster.environment["RAY_ADDRESS"])
    (world / "ray_bootstrap_config.yaml").write_text(json.dumps(config))
    at_home = copy.copy(cluster)
    at_home.environment = {**cluster.environment, **CANARIES, "HOME": str(world)}
    types: set[str] = set()
    with joined(cluster):
        spec = Path(run.storage.uri(f"{run.path}/spec.yaml"))
        with holder_of_all_nodes(run.storage, config):
            driver = Driver(at_home, spec, run, [], world / "driver.log")
            try:
                refused = refused_run(at_home, spec, "parallel.use_gpu=true", *settings_for(66))
                wait_for(lambda: queued(run) is not None or driver.has_ended(), RUN_SECONDS, log=driver.log)
            except BaseException:
                driver.end()
                raise
            waiting = queued(run)
            while_it_waited = dict(workers(cluster))
        try:

            def has_ended() -> bool:
                types.update(workers(cluster))
                return driver.has_ended()

            wait_for(has_ended, RUN_SECONDS, log=driver.log)
            driver.wait(1)
        finally:
            driver.end()
    waited_for = "" if waiting is None else waiting.waits_for
    return Trained(run, world, frozenset(types), waited_for, refused, while_it_waited)


def settings_for(num_workers: int) -> tuple[str, ...]:
    return f"parallel.num_workers={num_workers}", f"train.global_batch_size={num_workers}"


def refused_run(cluster: Cluster, spec: Path, *overrides: str) -> str:
    """What `ft train` prints before it ends with the code for a wrong spec."""
    command = [sys.executable, "-m", "ft_service.cli.app", "train", str(spec), "--run-id", "refused", *overrides]
    done = subprocess.run(
        command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=RUN_SECONDS
    )
    assert done.returncode == 2, done.stdout + done.stderr
    return " ".join((done.stdout + done.stderr).split())


def queued(run: RunFolder) -> Queued | None:
    """The newest report of its place in the queue."""
    events = read_events(run.storage, run.run_id)
    return next((event for event in reversed(events) if isinstance(event, Queued)), None)


@contextmanager
def holder_of_all_nodes(storage: Storage, config: dict[str, Any]) -> Iterator[None]:
    """Meanwhile a run has claimed all CPUs that may join. It asks Ray for nothing."""
    run = RunFolder(storage, "holder")
    board = Board(storage, RayNodes().id)
    with Lease(run, print) as lease:
        now = datetime.now(UTC)
        claim = entry(
            run.run_id,
            driver=lease.token,
            state="claiming",
            arrival=now,
            since=now,
            worker_resources={"CPU": 1.0},
            started=now,
        )
        claim = claim.model_copy(update={"workers": could_ever_fit(claim, joining_nodes(node_types(config), []))})
        board.write(claim)
        try:
            yield
        finally:
            board.delete(claim)
    storage.delete(run.path)


def test_a_run_waits_for_its_turn_before_it_asks_for_nodes(trained: Trained) -> None:
    assert "there is room for 0; running: holder" in trained.waited_for
    assert trained.nodes_while_it_waited == {}


def test_a_run_larger_than_the_cluster_could_ever_be_is_refused(trained: Trained) -> None:
    """The types of cluster.yaml have 68 GPUs on 12 nodes, of which it starts 8. A full queue changes nothing."""
    problem = (
        "parallel.num_workers = 66: needs 66 workers with 1 CPU, 1 GPU each, and this cluster has room for 64, also "
        "when it is empty and its autoscaler has started all nodes that it may."
    )
    assert problem in trained.refused
    assert queued(RunFolder(trained.run.storage, "refused")) is None


def test_a_run_whose_nodes_do_not_come_reports_what_it_waits_for(cluster: Cluster, trained: Trained) -> None:
    at_home = copy.copy(cluster)
    at_home.environment = {**cluster.environment, "HOME": str(trained.world)}
    run = RunFolder(trained.run.storage, "waiting")
    spec = Path(trained.run.storage.uri(f"{trained.run.path}/spec.yaml"))
    on_a100 = ("parallel.use_gpu=true", "parallel.accelerator_type=A100-80G", *settings_for(16))
    driver = Driver(at_home, spec, run, on_a100, trained.world / "waiting.log")
    needed = "Waiting for room for 16 workers with 1 CPU, 1 GPU (A100-80G) each"
    try:
        wait_for(lambda: driver.has_ended() or needed in ft(run, "runs"), RUN_SECONDS, log=driver.log)
        assert not driver.has_ended(), driver.said()
        assert f"{needed}; there is room for 0." in ft(run, "show waiting")
        ft(run, "stop waiting")
        wait_for(driver.has_ended, RUN_SECONDS, log=driver.log)
    finally:
        driver.end()
    assert run.recorded_state() == "stopped"
    with joined(cluster):
        assert not any(kind.startswith("gpu") for kind in workers(cluster))


def ft(run: RunFolder, command: str) -> str:
    done = CliRunner().invoke(app, [*command.split(), "--storage", run.storage.root])
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def test_a_run_on_cpus_starts_a_cpu_node_and_leaves_it_to_end(cluster: Cluster, trained: Trained) -> None:
    assert trained.node_types == {"cpu"}
    assert trained.run.storage.exists(f"{trained.run.path}/outcome.json")
    with joined(cluster):
        wait_for(lambda: workers(cluster) == {}, SCALING_SECONDS)


def files_with(secret: str, *folders: Path) -> list[str]:
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return [str(path) for path in files if secret.encode() in path.read_bytes()]


def test_no_file_and_no_output_of_the_run_has_a_secret_of_its_environment(cluster: Cluster, trained: Trained) -> None:
    """Spec, plan, record, card, logs, metrics, events, report, and Ray's own logs; and what commands print."""
    outputs = ""
    for command in ("show scaled", "logs scaled", "runs --json", "adapters --json"):
        arguments = [*command.split(), "--storage", trained.run.storage.root]
        done = CliRunner().invoke(app, arguments, env={**cluster.environment, **CANARIES})
        assert done.exit_code == 0, done.output
        outputs += done.output
    assert "scaled" in outputs
    (record,) = (trained.world / "storage/adapters").glob("*/record.json")
    assert (record.parent / "README.md").exists() and (record.parents[2] / "runs/scaled/report.html").exists()
    logs = [path for path in cluster.sessions.rglob("logs") if path.is_dir()]
    assert logs
    for secret in (*CANARIES.values(), cluster.environment["RAY_AUTH_TOKEN"]):
        assert secret not in outputs
        assert files_with(secret, trained.world, *logs) == []
