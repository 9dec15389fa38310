"""Metrics of runs and of storage, without a cluster: which value each has, and when."""

import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ft_service.catalog import models
from ft_service.cluster import run_metrics, storage_metrics
from ft_service.cluster.run_metrics import RunMetrics
from ft_service.cluster.storage_metrics import StorageMetrics
from ft_service.errors import StorageError
from ft_service.plan.facts import DatasetFacts, Resources
from ft_service.plan.make import make_plan
from ft_service.plan.measured import measured_mfu
from ft_service.plan.plan import RunPlan
from ft_service.runs.events import EventLog, TrainingStarted, WorkerPlace
from ft_service.runs.folder import RunFolder
from ft_service.runs.lease import Lease
from ft_service.runs.metrics import JsonlSink
from ft_service.spec.schema import RunSpec
from ft_service.storage import timing
from ft_service.storage.storage import Storage
from tests.runs.run_cases import Clock, step_metrics

NOW = 1_000_000.0
Values = dict[str, float]


class Recorded:
    """Takes the place of a gauge of Ray."""

    def __init__(self, name: str, values: Values) -> None:
        self._name = name
        self._values = values

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert tags.get("run", "r") == "r"
        others = [value for name, value in tags.items() if name != "run"]
        self._values["/".join([self._name, *others])] = value


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> Values:
    found: Values = {}
    for module in (run_metrics, storage_metrics):
        for name in [name for name in vars(module) if name.startswith(("run_", "storage_"))]:
            monkeypatch.setattr(module, name, Recorded(name, found))
    return found


def spec(**changes: Any) -> RunSpec:
    base = {"name": "x", "model": {"base": "meta-llama/Llama-3.1-8B"}, "storage": "/nowhere"}
    data = {"train": [{"path": "/nowhere", "source": "s", "license": "MIT"}], "max_seq_len": 4096}
    return RunSpec.model_validate({**base, "data": data, "train": {"global_batch_size": 8}, **changes})


def exported(metrics: RunMetrics) -> None:
    metrics.read()
    metrics.export()


def metrics_of(run: RunFolder, now: Any = lambda: NOW) -> RunMetrics:
    lease = Lease(run, log=print)
    lease.renewed_at = NOW - 7
    return RunMetrics(run, spec(queue={"priority": "low"}), lease, print, now=now)


def test_a_run_that_waits_has_a_state_and_no_figures(tmp_path: Path, values: Values) -> None:
    run = RunFolder(Storage(str(tmp_path)), "r")
    run.set_state("queued")
    exported(metrics_of(run))
    assert values == {
        "run_state/queued/low": 1,
        "run_since": NOW,
        "run_lease": NOW - 7,
        "run_attempts": 0,
        "run_wasted": 0,
    }


def test_an_earlier_state_is_0_and_a_state_counts_from_its_first_sight(tmp_path: Path, values: Values) -> None:
    run = RunFolder(Storage(str(tmp_path)), "r")
    times = iter((NOW, NOW + 60))
    metrics = metrics_of(run, lambda: next(times))
    for state in ("queued", "queued", "running"):  # the queue writes a state again with another message
        run.set_state(state)
        exported(metrics)
    assert (values["run_state/queued/low"], values["run_state/running/low"]) == (0, 1)
    assert values["run_since"] == NOW + 60


def test_the_figures_are_those_of_the_last_step_and_the_newest_validation(tmp_path: Path, values: Values) -> None:
    storage = Storage(str(tmp_path))
    run = RunFolder(storage, "r")
    place = WorkerPlace(host="h", pid=1)
    for step, repeated in ((0, 0), (2, 3), (4, 1)):
        EventLog(storage, "r").emit(TrainingStarted(message="", step=step, repeated=repeated, workers=[place] * 2))
    sink = JsonlSink(storage, "r")
    sink(step_metrics(1, validation_loss=2.5))
    sink(step_metrics(2, validation_loss=1.5, loss=0.5))
    later = datetime(2100, 1, 1, tzinfo=UTC)
    sink(step_metrics(3, loss=math.nan, grad_norm=9.0, tokens_per_second=123.0, peak_memory_gib=2.0, time=later))
    exported(metrics_of(run))
    assert math.isnan(values.pop("run_loss"))
    assert (values["run_step"], values["run_norm"], values["run_speed"]) == (3, 9.0, 123.0)
    assert values["run_memory"] == 2 * 2**30
    assert values["run_validation"] == 1.5
    assert (values["run_attempts"], values["run_wasted"], values["run_workers"]) == (3, 4, 2)
    assert values["run_progress"] == later.timestamp()
    assert "run_mfu" not in values and "run_planned" not in values  # there is no plan


def test_an_attempt_that_begins_counts_as_progress(tmp_path: Path, values: Values) -> None:
    """Otherwise the hours between two attempts would look like a stalled run."""
    storage = Storage(str(tmp_path))
    JsonlSink(storage, "r")(step_metrics(1))
    EventLog(storage, "r").emit(TrainingStarted(message="", step=1, workers=[WorkerPlace(host="h", pid=1)]))
    before = datetime.now(UTC).timestamp() - 60
    exported(metrics_of(RunFolder(storage, "r")))
    assert values["run_progress"] > before


def test_storage_that_does_not_answer_is_logged_once_and_does_not_disturb_the_run(
    tmp_path: Path, values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(Storage(str(tmp_path)), "r")
    logged: list[str] = []
    metrics = RunMetrics(run, spec(), Lease(run, log=print), logged.append, seconds=0.001)
    looks: list[int] = []

    def fail() -> None:
        looks.append(1)
        if values and len(looks) > 1:
            metrics._ended.set()
        raise StorageError("away")

    run.set_state("running")
    metrics.read()
    monkeypatch.setattr(metrics, "read", fail)
    with metrics:
        metrics._exporting.join(60)
    assert logged == ["The metrics of the run are not up to date: away"]
    assert values["run_state/running/normal"] == 1 and "run_lease" in values  # Ray drops what is not set again


def test_a_lease_says_when_it_was_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ft_service.runs.lease._SETTLE_SECONDS", 0.0)
    run = RunFolder(Storage(str(tmp_path)), "r")
    with Lease(run, log=print) as lease:
        holder = run.lease_holder()
        assert holder is not None and lease.renewed_at == holder.time.timestamp()
        monkeypatch.setattr(Storage, "write_if", _away)
        with pytest.raises(StorageError):
            lease._write(run, run.lease()[1])
        assert lease.renewed_at == holder.time.timestamp()


def _away(*_: object) -> None:
    raise StorageError("away")


# -- MFU -------------------------------------------------------------------------------------------------------------


def h100_plan() -> RunPlan:
    facts = models.find("meta-llama/Llama-3.1-8B")
    assert facts is not None
    dataset = DatasetFacts(
        digest="d" * 64, conversations=1000, rows=500, tokens=500 * 4096, loss_tokens=500 * 4096, truncated=0
    )
    asked = spec(parallel={"num_workers": 8}, train={"global_batch_size": 64})
    return make_plan(asked, dataset, facts.shape, Resources(num_gpus=8, gpu_type="H100", gpus_per_node=8))


def test_the_mfu_is_that_of_the_plan_where_only_computing_takes_time() -> None:
    """The plan assumes an MFU; a run that is as fast as computing alone at that rate would be has it."""
    plan = h100_plan()
    facts = models.find("meta-llama/Llama-3.1-8B")
    assert facts is not None and plan.estimate is not None
    overhead_free = plan.estimate.tokens_per_second / plan.estimate.compute_share
    mfu = measured_mfu(plan, facts.shape, overhead_free)
    assert mfu is not None and 0.85 * plan.estimate.mfu < mfu <= plan.estimate.mfu
    twice = measured_mfu(plan, facts.shape, 2 * overhead_free)
    assert twice == pytest.approx(2 * mfu)


def test_without_a_known_gpu_there_is_no_mfu() -> None:
    facts = models.find("meta-llama/Llama-3.1-8B")
    assert facts is not None
    plan = h100_plan()
    assert measured_mfu(plan.model_copy(update={"estimate": None}), facts.shape, 1.0) is None


# -- storage ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def storage_metrics_of(values: Values) -> Iterator[tuple[StorageMetrics, Clock]]:
    clock = Clock()
    metrics = StorageMetrics(clock)
    timing.observe_calls(metrics.on_call)
    yield metrics, clock
    timing.observe_calls(None)


Exporting = tuple[StorageMetrics, Clock]


def test_each_call_to_storage_is_timed_by_its_operation(
    tmp_path: Path, values: Values, storage_metrics_of: Exporting
) -> None:
    metrics, _ = storage_metrics_of
    storage = Storage(str(tmp_path))
    for _ in range(2):
        storage.write_bytes("a", b"x")
    assert storage.read_bytes("a") == b"x"
    metrics.export()
    assert (values["storage_calls/write_bytes"], values["storage_calls/read_bytes"]) == (2, 1)
    assert 0 < values["storage_mean/write_bytes"] <= values["storage_slowest/write_bytes"]
    assert values["storage_unreachable/write_bytes"] == 0


def test_only_the_calls_of_the_last_minute_count(values: Values, storage_metrics_of: Exporting) -> None:
    metrics, clock = storage_metrics_of
    metrics.on_call("size", 9.0, True)
    clock.now = 50
    metrics.on_call("size", 1.0, False)
    metrics.on_call("size", 3.0, False)
    metrics.export()
    assert (values["storage_slowest/size"], values["storage_unreachable/size"]) == (9.0, 1)
    clock.now = 61
    metrics.export()
    assert (values["storage_mean/size"], values["storage_slowest/size"], values["storage_unreachable/size"]) == (
        2,
        3,
        0,
    )
    values.clear()
    clock.now = 200
    metrics.export()
    assert values == {}


def test_a_storage_that_is_gone_counts_as_unreachable_and_a_missing_file_does_not(
    tmp_path: Path, values: Values, storage_metrics_of: Exporting
) -> None:
    metrics, _ = storage_metrics_of
    root = tmp_path / "root"
    root.mkdir()
    storage = Storage(str(root))
    with pytest.raises(StorageError):
        storage.read_bytes("missing")
    root.rmdir()
    with pytest.raises(StorageError):
        storage.exists("a")
    metrics.export()
    assert (values["storage_unreachable/read_bytes"], values["storage_unreachable/exists"]) == (0, 1)


def test_a_process_that_exports_nothing_times_nothing(tmp_path: Path, values: Values) -> None:
    Storage(str(tmp_path)).write_bytes("a", b"x")
    assert values == {}
