"""A killed run resumes from its last intact checkpoint, and ends as if it had not been killed."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from ft_service.runs.events import read_events
from ft_service.runs.folder import RunFolder
from ft_service.runs.metrics import StepMetrics, read_metrics
from ft_service.train.checkpoints.manifest import Checkpoints
from ft_service.train.continuation import continued_plan
from tests.worlds import kill_when, prepared_run, start, work, write_world

pytestmark = pytest.mark.multiprocess

STEPS = 60
SETTINGS = {
    "train.max_steps": STEPS,
    "train.global_batch_size": 6,
    "train.validate_every_steps": 12,
    "train.learning_rate": 3e-3,
    "checkpoint.every_steps": 5,
    "train.precision": "bf16",
}
METHODS: dict[str, dict[str, object]] = {
    "lora": {"method": "{type: lora, lora_rank: 4, lora_dropout: 0.2}"},
    "qlora": {"method": "{type: qlora, lora_rank: 4}"},
    "full": {"method": "{type: full}"},
    "no dropout": {"method": "{type: lora, lora_rank: 4}"},  # dropout is drawn by each worker for itself
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


def prepared(world: Path, run_id: str, method: str, workers: int, stage: int, **more: object) -> RunFolder:
    settings = {**SETTINGS, **METHODS[method], "parallel.zero_stage": stage, **more}
    return prepared_run(world, run_id, workers, **settings)


def has_checkpoints(run: RunFolder, at_least: int) -> Callable[[], bool]:
    return lambda: len({entry.step for entry in Checkpoints(run).entries()}) >= at_least


def weights_of(run: RunFolder) -> dict[str, bytes]:
    folder = Path(run.storage.root, run.path, run.outcome().weights)
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def curve(run: RunFolder) -> list[StepMetrics]:
    metrics = read_metrics(run.storage, run.run_id)
    assert [m.step for m in metrics] == list(range(1, STEPS + 1))  # no gap, no double entry
    return metrics


def starts(run: RunFolder) -> list[int]:
    """The steps that attempts began from."""
    return [event.model_dump()["step"] for event in read_events(run.storage, run.run_id) if event.type == "training"]


@pytest.fixture(scope="module")
def undisturbed(world: Path) -> Callable[[str, int, int], RunFolder]:
    done: dict[tuple[str, int, int], RunFolder] = {}

    def get(method: str, workers: int, stage: int) -> RunFolder:
        key = (method, workers, stage)
        if key not in done:
            done[key] = prepared(world, f"whole-{method}-{workers}-{stage}", method, workers, stage)
            work(done[key])
        return done[key]

    return get


@pytest.mark.parametrize(
    ("method", "workers", "stage"), [("lora", 2, 2), ("qlora", 2, 3), ("full", 2, 3), ("full", 1, 1), ("lora", 1, 0)]
)
def test_resuming_on_the_same_workers_is_equal_bit_for_bit(
    world: Path, undisturbed: Callable[[str, int, int], RunFolder], method: str, workers: int, stage: int
) -> None:
    run = prepared(world, f"killed-{method}-{workers}-{stage}", method, workers, stage)
    kill_when(run, has_checkpoints(run, 2))
    work(run)
    assert starts(run)[0] == 0 and starts(run)[1] >= 5 and starts(run)[1] % 5 == 0
    whole = undisturbed(method, workers, stage)
    assert weights_of(run) == weights_of(whole)
    assert [(m.loss, m.validation_loss) for m in curve(run)] == [(m.loss, m.validation_loss) for m in curve(whole)]
    assert run.outcome().model_copy(update={"weights": ""}) == whole.outcome().model_copy(update={"weights": ""})


def test_more_steps_leave_the_earlier_losses_unchanged(
    world: Path, undisturbed: Callable[[str, int, int], RunFolder]
) -> None:
    whole = curve(undisturbed("lora", 2, 2))
    run = prepared(world, "extended", "lora", 2, 2)
    kill_when(run, has_checkpoints(run, 2))
    first = run.plan()
    saved = Checkpoints(run).newest_step()
    longer = prepared(world, "extended-plan", "lora", 2, 2, **{"train.max_steps": STEPS + 20}).plan()
    continued = continued_plan(longer, run)
    run.write_plan(continued.spec, continued, run.sources())
    work(run)
    metrics = read_metrics(run.storage, run.run_id)
    assert [m.step for m in metrics] == list(range(1, STEPS + 21))
    assert starts(run) == [0, saved]
    assert [m.loss for m in metrics[:saved]] == [m.loss for m in whole[:saved]]

    def cosine(step: int, num_steps: int) -> float:
        warmup = first.warmup_steps
        if step < warmup:
            return 3e-3 * (step + 1) / warmup
        return 3e-3 * (1 + math.cos(math.pi * min(1, (step - warmup) / (num_steps - warmup)))) / 2

    moved = [min(1.0, max(0, step - saved + 1) / first.warmup_steps) for step in range(STEPS + 20)]
    expected = [(1 - part) * cosine(step, STEPS) + part * cosine(step, STEPS + 20) for step, part in enumerate(moved)]
    assert [m.learning_rate for m in metrics] == pytest.approx(expected)
    assert run.outcome().steps_run == STEPS + 20


@pytest.mark.parametrize(
    ("method", "before", "after"),
    [
        ("no dropout", (2, 2), (1, 1)),
        ("no dropout", (1, 0), (3, 3)),
        ("full", (3, 3), (2, 2)),
        ("qlora", (2, 3), (1, 1)),
    ],
)
def test_resuming_on_other_workers_gives_the_same_losses(
    world: Path,
    undisturbed: Callable[[str, int, int], RunFolder],
    method: str,
    before: tuple[int, int],
    after: tuple[int, int],
) -> None:
    run_id = f"moved-{method[:2]}-{before[0]}-{after[0]}"
    run = prepared(world, run_id, method, *before, **{"train.precision": "fp32"})
    kill_when(run, has_checkpoints(run, 2))
    run = prepared(world, run_id, method, *after, **{"train.precision": "fp32"})
    work(run)
    assert starts(run)[1] >= 5
    whole = prepared(world, f"{run_id}-whole", method, *after, **{"train.precision": "fp32"})
    work(whole)
    assert [m.loss for m in curve(run)] == pytest.approx([m.loss for m in curve(whole)], abs=1e-3)


def test_damaged_checkpoint_is_reported_and_the_previous_one_used(world: Path) -> None:
    run = prepared(world, "damaged", "lora", 2, 2)
    kill_when(run, has_checkpoints(run, 2))
    older, newest = Checkpoints(run).entries()[-2:]
    folder = Path(run.storage.root, run.path, "checkpoints", newest.folder)
    part = next(folder.glob("*.safetensors"))
    content = part.read_bytes()
    part.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    work(run)
    reported = [event for event in read_events(run.storage, run.run_id) if event.type == "checkpoint_damaged"]
    assert len(reported) == 1 and newest.folder in reported[0].message and part.name in reported[0].message
    assert starts(run)[1] == older.step
    assert len(curve(run)) == STEPS


def test_run_fails_if_all_checkpoints_are_damaged(world: Path) -> None:
    run = prepared(world, "ruined", "lora", 2, 2)
    kill_when(run, has_checkpoints(run, 2))
    for manifest in Path(run.storage.root, run.path, "checkpoints").glob("*/manifest.json"):
        manifest.write_text("{}")
    workers = start(run)
    printed = workers.wait(timeout=240)
    assert workers.returncode != 0 and "checkpoints are damaged" in printed


def test_checkpoints_of_another_training_are_rejected(world: Path) -> None:
    run = prepared(world, "other", "lora", 2, 2)
    kill_when(run, has_checkpoints(run, 1))
    run = prepared(world, "other", "lora", 2, 2, **{"train.seed": 5})
    workers = start(run)
    printed = workers.wait(timeout=240)
    assert workers.returncode != 0 and "Use another --run-id" in printed


def test_checkpoint_has_only_trained_weights_and_old_ones_are_deleted(
    world: Path, undisturbed: Callable[[str, int, int], RunFolder]
) -> None:
    run = undisturbed("lora", 2, 2)
    checkpoints = Checkpoints(run)
    assert [entry.step for entry in checkpoints.entries()] == [STEPS - 5, STEPS]  # keep: 2
    root = Path(run.storage.root, checkpoints.path)
    assert {folder.name for folder in root.iterdir() if folder.is_dir()} == {e.folder for e in checkpoints.entries()}
    trained = run.plan().trainable_parameters
    newest = root / checkpoints.entries()[-1].folder
    written = sum(file.stat().st_size for file in newest.glob("*.safetensors"))
    # Weight and two moments in fp32, and some KiB of headers and random states: never the frozen base.
    assert 12 * trained <= written <= 12 * trained + 2 * 40_000
    manifest = json.loads((newest / "manifest.json").read_text())
    held = [shard["stop"] - shard["start"] for part in manifest["parts"] for shard in part["shards"].values()]
    assert sum(held) == trained
