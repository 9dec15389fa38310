"""Real processes that enter one queue at the same moment: never more workers than there is room for."""

import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import boto3
import pytest

from ft_service.cluster.queue import turn as turn_module
from ft_service.cluster.queue.board import CLUSTERS
from ft_service.cluster.queue.entry import Entry
from ft_service.cluster.queue.snapshot import Snapshots
from ft_service.cluster.queue.turn import Turn
from ft_service.cluster.queue.usage import QueueLimits
from ft_service.runs.folder import LeaseHolder, RunFolder
from ft_service.spec.schema import RunSpec
from ft_service.storage.storage import Storage
from tests.cluster.queue.queue_cases import FakeCluster, Gave, entry, looks, running
from tests.cluster.queue.test_snapshot import look_again
from tests.hosts import ROOT
from tests.storage.test_storage_faults import object_store

pytestmark = pytest.mark.multiprocess

SECONDS = 120
DRIVER = """
import json, sys, time
from pathlib import Path
from ft_service.cluster.queue import turn as turn_module
from ft_service.cluster.queue.turn import Turn
from ft_service.runs import lease as lease_module
from ft_service.runs.folder import RunFolder
from ft_service.runs.lease import Lease
from ft_service.spec.schema import RunSpec
from ft_service.storage.storage import Storage
from tests.cluster.queue.queue_cases import FakeCluster

root, results, name, workers, rounds = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5])
lease_module._SETTLE_SECONDS = 0.0
turn_module.POLL_SECONDS = 0.01
turn_module._FIRST_POLL_SECONDS = 0.01
storage = Storage(root)
spec = RunSpec.model_validate({
    "name": "r", "model": {"base": "b"}, "data": {"train": [{"path": "p"}]}, "train": {"global_batch_size": 24},
    "parallel": {"use_gpu": False, "num_workers": workers}, "storage": root,
})
held = []
print("ready", flush=True)
sys.stdin.readline()
for number in range(rounds):
    run = RunFolder(storage, f"{name}-{number}")
    with Lease(run, print) as lease:
        with Turn(run, spec, {"CPU": 1.0}, lease.token, FakeCluster(), lambda text: None) as turn:
            assert turn.take(lambda: None) == workers
            start = time.monotonic()
            time.sleep(0.002)
            turn.placed(["n"] * workers, None)
            time.sleep(0.002)
            held.append((start, time.monotonic(), workers))
Path(results, f"{name}.json").write_text(json.dumps(held))
"""
"""A driver that takes turns on a cluster of four slots, and records when it had workers by the machine's clock."""


def take_turns(root: str, results: Path, sizes: Sequence[int], rounds: int) -> None:
    """Check that drivers of these sizes, on four slots, never have more workers at once than that."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DRIVER, root, str(results), f"d{number}", str(size), str(rounds)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number, size in enumerate(sizes)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        assert process.wait(SECONDS) == 0
    held = [
        tuple(item) for number in range(len(sizes)) for item in json.loads((results / f"d{number}.json").read_text())
    ]
    assert len(held) == len(sizes) * rounds
    for moment, _, _ in held:
        assert sum(workers for start, end, workers in held if start <= moment < end) <= 4
    storage = Storage(root)
    assert all(storage.files(f"{CLUSTERS}/{cluster}") == [] for cluster in storage.folders(CLUSTERS))


def test_drivers_that_enter_at_once_never_have_more_workers_than_fit(tmp_path: Path) -> None:
    take_turns(str(tmp_path / "storage"), tmp_path, (3, 2, 4, 1), rounds=12)


def test_the_same_on_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with object_store(monkeypatch) as (_, _, root):
        take_turns(root, tmp_path, (3, 2), rounds=3)


# -- a long queue ----------------------------------------------------------------------------------------------------


def waiting_on(root: str, count: int) -> tuple[Turn, list[Entry]]:
    """A driver that waits behind `count` others and knows them, and their entries. None of the others has a process."""
    storage = Storage(root)
    cluster = FakeCluster(id=f"cluster-of-{count}")
    time = datetime.now(UTC)
    resources = {"worker_resources": {"CPU": 1.0}}
    first = running(f"all-{count}", {"n": 4}, **resources)
    crowd = [first, *(entry(f"r{count}-{number}", 4, number, **resources) for number in range(count))]

    where = urlsplit(root)
    store = boto3.client("s3", endpoint_url=f"http://{parse_qs(where.query)['endpoint_override'][0]}")
    for one in crowd:
        holder = LeaseHolder(token=one.driver, host="h", machine="another", pid=1, time=time)
        for path, content in ((f"runs/{one.run_id}/lease.json", holder), (f"{CLUSTERS}/{cluster.id}/{one.file}", one)):
            store.put_object(Bucket=where.netloc, Key=f"root/{path}", Body=content.model_dump_json().encode())
    document = {
        "name": "r",
        "model": {"base": "b"},
        "data": {"train": [{"path": "p"}]},
        "train": {"global_batch_size": 24},
        "parallel": {"use_gpu": False, "num_workers": 4},
        "storage": root,
    }
    run = RunFolder(storage, f"own-{count}")
    turn = Turn(run, RunSpec.model_validate(document), {"CPU": 1.0}, "own-token", cluster, print)
    with pytest.raises(Gave):
        turn.take(looks(1))
    return turn, crowd


def test_a_run_that_waits_with_two_hundred_others_sends_one_request_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_module.time, "sleep", lambda seconds: None)
    with object_store(monkeypatch) as (_, gate, root):
        for count in (20, 200):
            turn, crowd = waiting_on(root, count)
            storage = Storage(root)
            snapshots = Snapshots(storage, f"cluster-of-{count}")
            snapshots.read()
            snapshots.write(crowd[1], [turn._own, crowd[0], *crowd[2:]], {}, QueueLimits())
            assert look_again(turn) is None
            before = gate.requests
            assert look_again(turn) is None
            assert gate.requests - before == 1
            if count == 20:
                snapshots.resign(crowd[1], [turn._own, crowd[0]])  # so that it is the first in line, and writes
                before = gate.requests
                for _ in range(2):
                    assert look_again(turn) is None
                assert gate.requests - before > 2 * count
