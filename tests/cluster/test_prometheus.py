"""A real Prometheus, with the shipped configuration, sees a run that trains on a real cluster."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ft_service.runs.folder import RunFolder, stop_run
from ft_service.storage.storage import Storage
from tests.cluster.test_dashboards import DASHBOARDS, METRICS
from tests.hosts import ROOT, Cluster, wait_for
from tests.prometheus import Prometheus, filled, prometheus
from tests.worlds import TINY, write_world

pytestmark = pytest.mark.cluster

RUN = "watched"
SECONDS = 400
ABSENT = {"ray_ft_run_mfu", "ray_ft_jobs", "ray_ft_jobs_longest_wait_seconds"}
"""What a run on CPUs, without a server, has not."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that is yet to start: it trains until it is stopped."""
    folder = tmp_path_factory.mktemp("watched")
    write_world(folder, sizes=TINY)
    (folder / "spec.yaml").write_text(f"""
name: words
model: {{base: {folder}/base}}
method: {{type: lora, lora_rank: 4}}
data:
  train: [{{path: {folder}/train.jsonl, source: made up, license: CC0-1.0}}]
  validation: {{fraction: 0.2}}
  max_seq_len: 128
train: {{max_steps: 100000, global_batch_size: 4, validate_every_steps: 2, precision: fp32}}
parallel: {{num_workers: 2, use_gpu: false}}
queue: {{priority: high}}
report: {{samples: 0}}
storage: {folder}/storage
""")
    return RunFolder(Storage(str(folder / "storage")), RUN)


@pytest.fixture(scope="module")
def driver(cluster: Cluster, run: RunFolder) -> Iterator[subprocess.Popen[bytes]]:
    """`ft train` of that run on the cluster. Ray exports what this process has every second, instead of every ten."""
    folder = Path(run.storage.root).parent
    with (folder / "driver.log").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ft_service.cli.app", "train", str(folder / "spec.yaml"), "--run-id", RUN],
            cwd=ROOT,
            env=cluster.environment | {"RAY_metrics_report_interval_ms": "1000"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    yield process
    if process.poll() is None:
        stop_run(run.storage, RUN, now=True, wait=False, log=print)
    process.wait(SECONDS)


@pytest.fixture(scope="module")
def seen(
    cluster: Cluster, driver: subprocess.Popen[bytes], run: RunFolder, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """A Prometheus, once it has seen what the training dashboard shows of that run."""
    wanted = {
        target["expr"]
        for panel in DASHBOARDS["training"]["panels"]
        for target in panel["targets"]
        if not any(name in target["expr"] for name in ABSENT) and "queued" not in target["expr"]
    }
    with prometheus(cluster.sessions / cluster.head.name, tmp_path_factory.mktemp("prometheus")) as found:

        def has_all() -> bool:
            wanted.difference_update([expression for expression in wanted if found.query(filled(expression))])
            return not wanted

        wait_for(has_all, SECONDS, driver, Path(run.storage.root).parent / "driver.log")
        yield found


def test_every_node_of_the_service_discovery_is_scraped(seen: Prometheus) -> None:
    targets = seen.get("targets")["activeTargets"]
    assert len(targets) >= 2 and {target["labels"]["job"] for target in targets} == {"ray"}
    wait_for(lambda: all(target["health"] == "up" for target in seen.get("targets")["activeTargets"]), SECONDS)


def test_each_metric_of_runs_has_a_sample_with_the_labels_of_the_run(seen: Prometheus, run: RunFolder) -> None:
    for metric in METRICS:
        name = f"ray_{metric.info['name']}"
        if not name.startswith("ray_ft_run_") or name in ABSENT:
            continue
        samples = seen.query(f'last_over_time({name}{{run="{RUN}"}}[5m])')
        assert samples and all(set(metric.info["tag_keys"]) <= set(one["metric"]) for one in samples), name
    # Not the last value: while a checkpoint is saved, the state is another one.
    (state,) = seen.query(f'max_over_time(ray_ft_run_state{{run="{RUN}",state="running"}}[5m])')
    assert state["metric"]["priority"] == "high" and state["value"][1] == "1"
    assert seen.query(f'last_over_time(ray_ft_run_workers{{run="{RUN}"}}[5m])')[0]["value"][1] == "2"
    assert float(seen.query(f'last_over_time(ray_ft_run_loss{{run="{RUN}"}}[5m])')[0]["value"][1]) > 0


def test_a_run_on_cpus_has_no_mfu(seen: Prometheus) -> None:
    assert seen.query("last_over_time(ray_ft_run_mfu[5m])") == []


def test_storage_is_timed_in_the_driver_and_in_the_workers(seen: Prometheus) -> None:
    processes = "count by (WorkerId) (last_over_time(ray_ft_storage_calls[5m]))"
    wait_for(lambda: len(seen.query(processes)) >= 3, SECONDS)


def test_every_expression_of_both_dashboards_is_taken(seen: Prometheus) -> None:
    for dashboard in DASHBOARDS.values():
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                seen.query(filled(target["expr"]))


def test_the_alerts_are_evaluated_without_error_and_none_fires(seen: Prometheus) -> None:
    wait_for(lambda: {rule["health"] for rule in seen.rules()} == {"ok"}, SECONDS)
    firing = {rule["name"] for rule in seen.rules() if rule["state"] == "firing"}
    assert not any(name.startswith(("FtRun", "FtQueue", "FtStorage")) for name in firing)


def test_a_run_that_has_ended_is_gone(
    seen: Prometheus, driver: subprocess.Popen[bytes], run: RunFolder, cluster: Cluster
) -> None:
    stop_run(run.storage, RUN, now=False, wait=False, log=print)
    assert driver.wait(SECONDS) == 3, (Path(run.storage.root).parent / "driver.log").read_text()[-3000:]
    wait_for(lambda: seen.query(f'ray_ft_run_state{{run="{RUN}"}}') == [], SECONDS)
