"""Resuming with other settings: what is refused changes nothing, and a run can be given more steps or fewer."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ft_service import launch
from ft_service.data.tasks import run_locally
from ft_service.errors import RunStopped, SpecError
from ft_service.plan.facts import Resources
from ft_service.plan.plan import RunPlan
from ft_service.registry.card import model_card
from ft_service.runs.events import read_events
from ft_service.runs.folder import RunFolder, resumed_spec
from ft_service.spec.load import parse_run_spec
from ft_service.spec.schema import RunSpec
from ft_service.storage.storage import Storage
from ft_service.train.checkpoints.manifest import Checkpoints, Manifest
from ft_service.train.schedule import planned_learning_rate
from tests.registry.test_card import draft
from tests.worlds import write_world

PEAK = 1e-2
WARMUP = 10
"""A tenth of the 100 steps."""


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunSpec:
    monkeypatch.setattr("ft_service.runs.lease._SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(launch, "connect", lambda: None)
    monkeypatch.setattr(launch, "cluster_resources", Resources)
    monkeypatch.setattr(launch, "map_on_cluster", run_locally)
    write_world(tmp_path)
    return parse_run_spec(f"""
name: words
model: {{base: {tmp_path}/base}}
method: {{type: lora, lora_rank: 4}}
data:
  train: [{{path: {tmp_path}/train.jsonl, source: made up, license: CC0-1.0}}]
  validation: {{fraction: 0.2}}
  max_seq_len: 128
train: {{max_steps: 100, global_batch_size: 4, learning_rate: {PEAK}, warmup_ratio: 0.1, schedule: cosine}}
parallel: {{num_workers: 1, use_gpu: false}}
storage: {tmp_path}/storage
""")


def drive(monkeypatch: pytest.MonkeyPatch, spec: RunSpec, to_step: int) -> RunPlan:
    """A driver whose workers save a checkpoint of that step and are stopped; returns its plan."""
    plans: list[RunPlan] = []

    class Attempts:
        def __init__(self, spec: RunSpec, run: RunFolder, plan_for: Any, *others: Any) -> None:
            self._run = run
            self._plan_for = plan_for

        def train(self) -> None:
            plans.append(self._plan_for(1))
            self._run.set_state("running")
            save_checkpoint(self._run, to_step)
            raise RunStopped("SIGTERM")

    monkeypatch.setattr(launch, "Attempts", Attempts)
    with pytest.raises(RunStopped):
        launch.run(spec, "r", lambda text: None)
    return plans[0]


def save_checkpoint(run: RunFolder, step: int) -> None:
    manifest = Manifest(
        step=step,
        adam_step=step,
        state={"step": step},
        weights="",
        training_digest=run.plan().training_digest,
        created=datetime.now(UTC),
        parts=[],
    )
    Checkpoints(run).commit(f"step-{step}", manifest)


def run_of(spec: RunSpec) -> RunFolder:
    return RunFolder(Storage(spec.storage), "r")


def files_of(spec: RunSpec) -> dict[str, bytes]:
    root = Path(spec.storage)
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def resumed(spec: RunSpec, *overrides: str) -> RunSpec:
    return resumed_spec("r", spec.storage, overrides)


# -- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["train.seed=5"], ["train.seed = 5: is 0 in run r", "Set it to 0"]),
        (
            ["train.max_steps=40"],
            ["train.max_steps = 40: makes 40 steps, and 60 are trained already", "Ask for 61 steps or more"],
        ),
        (["train.max_steps=60"], ["train.max_steps = 60: makes 60 steps, and 60 are trained already"]),
        (["train.epochs=1"], ["train.epochs = 1.0: makes", "and 60 are trained already"]),
        (["method.lora_rank=8", "train.schedule=linear"], ["lora_rank = 8: is 4", "schedule = 'linear': is 'cosine'"]),
        (["data.max_seq_len=64"], ["data.max_seq_len = 64: is 128 in run r"]),
        (["data.train.0.path=other.jsonl"], ["data.train.0.path = 'other.jsonl': is"]),
    ],
)
def test_a_refused_resume_changes_nothing(
    spec: RunSpec, monkeypatch: pytest.MonkeyPatch, overrides: Sequence[str], messages: Sequence[str]
) -> None:
    drive(monkeypatch, spec, to_step=60)
    before = files_of(spec)
    with pytest.raises(SpecError) as refused:
        launch.run(resumed(spec, *overrides), "r", lambda text: None)
    for message in messages:
        assert message in str(refused.value)
    assert files_of(spec) == before
    status = run_of(spec).status()
    assert status is not None and status.state == "stopped"
    drive(monkeypatch, resumed(spec), to_step=80)  # it can still be resumed


def test_changed_data_are_refused_by_name_and_the_run_stays_stopped(
    spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive(monkeypatch, spec, to_step=60)
    before = files_of(spec)
    file = Path(spec.data.train[0].path)
    records = file.read_bytes()
    file.write_bytes(records + b'\n{"instruction": "Say x", "output": "x"}')
    with pytest.raises(SpecError, match=r"data = '.*train\.jsonl': has changed since this run began"):
        launch.run(resumed(spec), "r", lambda text: None)
    after = files_of(spec)
    assert {name for name in before if after[name] != before[name]} == {"runs/r/events.jsonl"}
    assert read_events(run_of(spec).storage, "r")[-1].type == "refused"
    file.write_bytes(records)
    drive(monkeypatch, resumed(spec), to_step=80)


def test_a_run_without_checkpoints_may_change(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    class Attempts:
        def __init__(self, spec: RunSpec, run: RunFolder, plan_for: Any, *others: Any) -> None:
            plan_for(1)

        def train(self) -> None:
            raise RunStopped("SIGTERM")

    monkeypatch.setattr(launch, "Attempts", Attempts)
    for each in (spec, parse_run_spec(run_spec_text(spec), ["train.seed=5", "train.max_steps=40"])):
        with pytest.raises(RunStopped):
            launch.run(each, "r", lambda text: None)
    plan = run_of(spec).plan()
    assert (plan.spec.train.seed, plan.num_steps, plan.extensions) == (5, 40, [])


def run_spec_text(spec: RunSpec) -> str:
    from ft_service.spec.load import dump_run_spec

    return dump_run_spec(spec)


def test_a_complete_run_cannot_be_given_more_steps(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    drive(monkeypatch, spec, to_step=100)
    run = run_of(spec)
    run.storage.delete(f"{run.path}/checkpoints")
    run.set_state("succeeded", published="base-words-12345678")
    with pytest.raises(SpecError, match=r"max_steps = 400: run r is complete after 100 steps(?s:.*)another --run-id"):
        launch.run(resumed(spec, "train.max_steps=400"), "r", lambda text: None)


# -- more steps ------------------------------------------------------------------------------------------------------


def cosine(step: int, num_steps: int) -> float:
    """On paper: linear warmup of 10 steps, then half a cosine wave to 0."""
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    return PEAK * math.cos(math.pi / 2 * min(1, (step - WARMUP) / (num_steps - WARMUP))) ** 2


def test_more_steps_continue_the_schedule_without_a_jump(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    first = drive(monkeypatch, spec, to_step=60)
    longer = drive(monkeypatch, resumed(spec, "train.max_steps=400"), to_step=200)
    assert longer.num_steps == 400
    assert [(each.step, each.num_steps) for each in longer.extensions] == [(60, 100)]
    assert (longer.warmup_steps, longer.validate_every_steps) == (WARMUP, first.validate_every_steps)

    expected = [cosine(step, 100) for step in range(60)]
    for number in range(1, WARMUP + 1):  # from one curve to the other, a tenth of the way each step
        step = 59 + number
        expected.append((1 - number / 10) * cosine(step, 100) + number / 10 * cosine(step, 400))
    expected += [cosine(step, 400) for step in range(70, 400)]
    assert [planned_learning_rate(longer, step) for step in range(400)] == pytest.approx(expected)
    changes = [abs(after - before) for before, after in pairwise(expected[WARMUP:])]
    assert max(changes) < PEAK / WARMUP  # no step changes the rate more than the warmup does

    sentence = next(sentence for sentence in longer.summary if sentence.startswith("Extended: "))
    assert "at step 60 from 100 steps to 400 steps" in sentence and "over 10 steps" in sentence


def test_fewer_steps_end_the_schedule_earlier(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    drive(monkeypatch, spec, to_step=19)
    shorter = drive(monkeypatch, resumed(spec, "train.max_steps=50"), to_step=40)
    assert (shorter.num_steps, shorter.warmup_steps) == (50, WARMUP)
    expected = [cosine(step, 100) for step in range(19)]
    expected += [
        (1 - number / 10) * cosine(18 + number, 100) + number / 10 * cosine(18 + number, 50) for number in range(1, 11)
    ]
    expected += [cosine(step, 50) for step in range(29, 50)]
    assert [planned_learning_rate(shorter, step) for step in range(50)] == pytest.approx(expected)
    sentence = next(sentence for sentence in shorter.summary if sentence.startswith("Shortened: "))
    assert "at step 19 from 100 steps to 50 steps" in sentence and "over 10 steps" in sentence

    last = drive(monkeypatch, resumed(spec, "train.max_steps=44"), to_step=42)  # fewer are left than the warmup has
    assert [(each.step, each.num_steps) for each in last.extensions] == [(19, 100), (40, 50)]
    moved = [(4 - left) / 4 * cosine(43 - left, 44) + left / 4 * cosine(43 - left, 50) for left in (3, 2, 1, 0)]
    assert [planned_learning_rate(last, step) for step in range(40, 44)] == pytest.approx(moved)


def test_a_length_within_the_warmup_says_so(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    drive(monkeypatch, spec, to_step=4)
    shorter = drive(monkeypatch, resumed(spec, "train.max_steps=8"), to_step=6)
    assert "The 10 steps of warmup stay, so it still rises at the end." in " ".join(shorter.summary)


def test_an_extension_survives_resuming_and_may_be_followed_by_another(
    spec: RunSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive(monkeypatch, spec, to_step=60)
    longer = drive(monkeypatch, resumed(spec, "train.max_steps=400"), to_step=60)  # dies before a new checkpoint
    again = drive(monkeypatch, resumed(spec), to_step=200)
    assert again.extensions == longer.extensions and again.training_digest == longer.training_digest
    twice = drive(monkeypatch, resumed(spec, "train.max_steps=500"), to_step=300)
    assert [(each.step, each.num_steps) for each in twice.extensions] == [(60, 100), (200, 400)]
    assert [planned_learning_rate(twice, step) for step in range(200)] == [
        planned_learning_rate(longer, step) for step in range(200)
    ]
    assert planned_learning_rate(twice, 250) == pytest.approx(cosine(250, 500))
    assert not twice.continues(longer.training_digest, 201)  # such a checkpoint would be of the shorter schedule


def test_more_epochs_replace_a_number_of_steps(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    first = drive(monkeypatch, spec, to_step=60)
    epochs = math.ceil(first.epochs) * 2
    longer = drive(monkeypatch, resumed(spec, f"train.epochs={epochs}"), to_step=100)
    rows = longer.dataset.rows
    assert longer.num_steps == math.ceil(epochs * rows / 4) > 100
    assert resumed(spec).train.max_steps is None
    with pytest.raises(SpecError, match="Set only one"):
        resumed(spec, "train.epochs=9", "train.max_steps=900")


def test_the_card_tells_of_the_extension() -> None:
    card = model_card(draft(extensions=[{"step": 60, "num_steps": 100}]), None)
    assert "| Planned steps changed | at step 60; 100 steps were planned before |" in card
