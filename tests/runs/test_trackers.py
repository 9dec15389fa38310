"""W&B, MLflow and TensorBoard get every step once, and training never waits for them. Real libraries, offline."""

import json
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ft_service.errors import UsageError
from ft_service.runs import trackers
from ft_service.runs.folder import RunFolder
from ft_service.runs.metrics import JsonlSink, StepMetrics
from ft_service.runs.trackers import BackgroundTracker, Mlflow, TrackedRun, new_tracker, tracker_problems
from ft_service.spec.schema import ReportSpec
from ft_service.storage.storage import Storage
from tests.runs.run_cases import RUN, step_metrics

SETTINGS = {"train.learning_rate": 2e-4, "method.type": "lora", "plan.num_steps": 4}


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # a person's .netrc may hold a key


def tracked(storage: Storage, **changes: Any) -> TrackedRun:
    shown = {"name": "first try", "entity": "acme", "tags": ("a", "b")}
    return TrackedRun(RUN, "support", {**SETTINGS, **changes}, storage, **shown)


def interrupted_and_resumed(name: str, storage: Storage) -> None:
    """Two attempts. The second continues from step 2, so that it repeats step 3: loss 3.5 at first, then 3.0."""
    first = BackgroundTracker(name, new_tracker(name, tracked(storage)), [])
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.5)):
        first(step_metrics(step, loss=loss))
    first.close(complete=False)
    earlier = [step_metrics(1, loss=1.0), step_metrics(2, loss=2.0)]
    second = BackgroundTracker(name, new_tracker(name, tracked(storage)), earlier)
    second(step_metrics(3, loss=3.0))
    second(step_metrics(4, loss=4.0, validation_loss=4.5))
    second.close(complete=True)


EXPECTED = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_tensorboard_shows_each_step_of_a_resumed_run_once(storage: Storage, tmp_path: Path) -> None:
    interrupted_and_resumed("tensorboard", storage)
    events = EventAccumulator(storage.uri(f"runs/{RUN}/tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == EXPECTED
    assert [(event.step, event.value) for event in events.Scalars("validation_loss")] == [(4, 4.5)]


def test_mlflow_keeps_the_first_value_of_a_repeated_step(storage: Storage) -> None:
    from mlflow import MlflowClient

    interrupted_and_resumed("mlflow", storage)
    client = MlflowClient(tracking_uri=Path(storage.uri("mlflow")).as_uri())
    experiment = client.get_experiment_by_name("support")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "first try" and {"a", "b"} <= run.data.tags.keys()
    assert run.info.status == "FINISHED"
    assert run.data.params["train.learning_rate"] == "0.0002"
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [
        *EXPECTED[:2],
        (3, 3.5),
        EXPECTED[3],
    ]


def test_mlflow_shows_a_stopped_run_as_stopped_and_a_changed_setting_as_a_tag(storage: Storage) -> None:
    from mlflow import MlflowClient

    for settings in ({}, {"plan.num_steps": 9}):
        tracker = Mlflow(tracked(storage, **settings))
        tracker.open()
        tracker.close(complete=False)
    client = MlflowClient(tracking_uri=Path(storage.uri("mlflow")).as_uri())
    [run] = client.search_runs([client.get_experiment_by_name("support").experiment_id])
    assert run.info.status == "KILLED"
    assert run.data.params["plan.num_steps"] == "4"
    assert run.data.tags["changed.plan.num_steps"] == "9"


def test_wandb_offline_holds_a_resumed_run_in_one_folder(storage: Storage) -> None:
    interrupted_and_resumed("wandb", storage)
    [file] = Path(storage.uri(f"runs/{RUN}/wandb")).glob("offline-run-*/*.wandb")
    records = list(wandb_records(file))
    history = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [(step["_step"], step["loss"]) for step in history] == EXPECTED
    assert history[-1]["validation_loss"] == 4.5
    [run] = [record.run for record in records if record.HasField("run")]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert run.run_id == RUN
    assert run.project == "support"
    assert (run.display_name, run.entity, list(run.tags)) == ("first try", "acme", ["a", "b"])
    assert config["method.type"] == "lora"


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: protocol buffers in LevelDB's log format, after seven bytes of header."""
    from wandb.proto.wandb_internal_pb2 import Record

    block_bytes = 32_768
    content = file.read_bytes()
    position = 7
    record = b""
    while position + 7 <= len(content):
        if block_bytes - position % block_bytes < 7:  # the rest of a block is padding
            position += block_bytes - position % block_bytes
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""


class Faulty:
    """A tracker whose server refuses, or does not answer until it is released."""

    def __init__(self, answer: threading.Event | None = None) -> None:
        self._answer = answer
        self.steps: list[int] = []

    def open(self) -> int:
        return 0

    def log(self, metrics: StepMetrics) -> None:
        if self._answer is None:
            raise ConnectionError("503 Service Unavailable")
        self._answer.wait()
        self.steps.append(metrics.step)

    def close(self, complete: bool) -> None: ...


@pytest.mark.parametrize(
    ("name", "folder", "command"),
    [
        ("tensorboard", f"runs/{RUN}/tensorboard", "tensorboard --logdir {}"),
        ("wandb", f"runs/{RUN}/wandb", "wandb sync {}/offline-run-*"),
        ("mlflow", "mlflow", "MLFLOW_ALLOW_FILE_STORE=true mlflow server --backend-store-uri {}"),
    ],
)
def test_sending_a_run_says_where_to_look(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, name: str, folder: str, command: str
) -> None:
    monkeypatch.setattr(trackers, "tracked_run", lambda run: tracked(storage))
    JsonlSink(storage, RUN)(step_metrics(1))
    sent = trackers.send(RunFolder(storage, RUN), name)
    assert (sent.num_steps, sent.place) == (1, storage.uri(folder))
    assert sent.look == command.format(storage.uri(folder))
    assert Path(sent.place).is_dir()


def test_a_tracker_that_fails_is_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    sink = BackgroundTracker("wandb", Faulty(), [])
    for step in (1, 2, 3):
        sink(step_metrics(step))
    sink.flush()
    sink.close()
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert "503 Service Unavailable" in warnings[0]
    assert "ft runs send RUN --to wandb" in warnings[0]


def test_training_does_not_wait_for_a_tracker_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "_CLOSE_SECONDS", 0.01)
    answer = threading.Event()
    tracker = Faulty(answer)
    sink = BackgroundTracker("mlflow", tracker, [])
    sink(step_metrics(1))
    sink.flush()
    sink.close()  # comes back although step 1 has not been sent
    assert tracker.steps == []
    assert "left behind" in capsys.readouterr().err
    answer.set()


def test_a_missing_package_names_setting_and_cure(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "wandb" else object())
    [problem] = tracker_problems(ReportSpec(trackers=["tensorboard", "wandb"]), storage)
    assert problem.setting == "report.trackers"
    assert "pip install wandb" in problem.fix


def test_object_storage_needs_a_server_for_wandb_and_mlflow(remote: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    report = ReportSpec(trackers=["tensorboard", "wandb", "mlflow"])
    assert [problem.value for problem in tracker_problems(report, remote)] == ["wandb", "mlflow"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.internal:5000")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert tracker_problems(report, remote) == []
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert [problem.value for problem in tracker_problems(report, remote)] == ["wandb"]


def test_a_key_from_wandb_login_means_online(remote: Storage, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {'k' * 40}\n")
    (home / ".netrc").chmod(0o600)
    assert tracker_problems(ReportSpec(trackers=["wandb"]), remote) == []


def test_an_unknown_tracker_names_the_known(storage: Storage) -> None:
    with pytest.raises(UsageError, match="tensorboard, wandb, mlflow"):
        new_tracker("comet", tracked(storage))


def test_the_earlier_setting_of_tensorboard_is_read() -> None:
    assert ReportSpec.model_validate({"tensorboard": True}).trackers == ["tensorboard"]
    assert ReportSpec.model_validate({"tensorboard": False, "samples": 2}).trackers == []
