"""A checkpoint is copied through a buffer of bounded size, whatever the state's size."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ft_service.errors import UnreachableError
from ft_service.model.shards import Span
from ft_service.runs.events import EventLog, read_events
from ft_service.runs.folder import RunFolder
from ft_service.spec.schema import CheckpointSpec
from ft_service.storage import retry
from ft_service.storage.storage import Storage
from ft_service.train.checkpoints.manifest import Checkpoints, Manifest
from ft_service.train.checkpoints.resume import resume
from ft_service.train.checkpoints.save import Checkpointer
from ft_service.train.optimizer_state import KINDS, ParameterShard
from ft_service.train.protocol import TrainingState
from tests.train.staged import Staged

BYTES_PER_ELEMENT = 12
NUMELS = {"embedding": 50_000, "norm": 7, "up": 20_000, "gate": 20_000, "bias": 1, "down": 20_000}
STATE_BYTES = BYTES_PER_ELEMENT * sum(NUMELS.values())
STAGING_BYTES = STATE_BYTES // 8
"""Less than the largest parameter."""


class State:
    """An optimizer's state on one rank."""

    step = 3

    def __init__(self, fill: Callable[[int], torch.Tensor]) -> None:
        self.tensors = {name: {kind: fill(numel) for kind in KINDS} for name, numel in NUMELS.items()}

    def shards(self) -> Iterator[ParameterShard]:
        for name, tensors in self.tensors.items():
            everything = Span(0, NUMELS[name])
            yield ParameterShard(name, NUMELS[name], everything, everything, tensors)

    def restore(self, read: Any, step: int) -> None:
        for shard in self.shards():
            for kind, tensor in shard.tensors.items():
                read(shard.name, kind, shard.held, tensor)


class OneRank:
    rank = 0
    world_size = 1
    is_rank_zero = True

    def __init__(self, state: State) -> None:
        self.state = state
        self.random = torch.arange(8, dtype=torch.uint8)

    def on_progress(self) -> None:
        """Nobody watches."""

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]

    def broadcast_from_rank_zero(self, value: Any) -> Any:
        return value

    def sum_over_ranks(self, *values: float) -> list[float]:
        return [float(value) for value in values]

    def random_state(self) -> dict[str, torch.Tensor]:
        return {"cpu": self.random.clone()}

    def restore_random_state(self, states: dict[str, torch.Tensor]) -> None:
        self.random = states["cpu"]

    def optimizer_state(self) -> State:
        return self.state


def saver(run: RunFolder, state: State, **more: Any) -> Checkpointer:
    return Checkpointer(run, OneRank(state), "digest", CheckpointSpec(), **more)  # type: ignore[arg-type]


def manifest_of(run: RunFolder) -> Manifest:
    checkpoints = Checkpoints(run)
    return checkpoints.manifest(checkpoints.entries()[-1])


def restored(run: RunFolder) -> tuple[State, torch.Tensor]:
    rank = OneRank(State(torch.zeros))
    rank.random = torch.zeros(8, dtype=torch.uint8)
    plan: Any = SimpleNamespace(continues=lambda digest, step: True)
    assert resume(run, rank, plan, EventLog(run.storage, run.run_id)) is not None  # type: ignore[arg-type]
    return rank.state, rank.random


def test_copies_never_exceed_the_staging_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(Storage(str(tmp_path)), "bot")
    state = State(torch.rand)
    expected = {name: {kind: tensor.clone() for kind, tensor in of.items()} for name, of in state.tensors.items()}
    staged = Staged(monkeypatch)
    save = saver(run, state, staging_bytes=STAGING_BYTES)
    save.save(TrainingState(step=3), "", lambda kept: None)
    for of in state.tensors.values():  # training continues
        for tensor in of.values():
            tensor.fill_(-1.0)
    save.wait()
    assert 0 < staged.peak <= STAGING_BYTES
    assert staged.now == 0
    state_read, random = restored(run)
    for name, of in expected.items():
        for kind, tensor in of.items():
            assert torch.equal(state_read.tensors[name][kind], tensor), (name, kind)
    assert random.tolist() == list(range(8))
    assert len(manifest_of(run).parts) > 8


def test_a_state_that_fits_is_copied_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training then waits for the copy alone, and not for storage."""
    run = RunFolder(Storage(str(tmp_path)), "bot")
    may_write = threading.Event()
    writing = Storage.writing

    def held_back(storage: Storage, path: str) -> Any:
        assert may_write.wait(60)
        return writing(storage, path)

    monkeypatch.setattr(Storage, "writing", held_back)
    save = saver(run, State(torch.rand), staging_bytes=STATE_BYTES)
    save.save(TrainingState(step=3), "", lambda kept: None)  # returns although nothing can be written
    may_write.set()
    save.wait()
    assert [part.file for part in manifest_of(run).parts] == [
        "part-00000-of-00001.safetensors",
        "part-00000-of-00001-1.safetensors",
    ]


def test_each_file_is_written_again_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken stream needs no second copy of the state, which training may have changed by then."""
    run = RunFolder(Storage(str(tmp_path), retry_seconds=60), "bot")
    state = State(torch.rand)
    weight = state.tensors["down"]["weight"].clone()
    writing = Storage.writing
    broken: set[str] = set()

    def breaks_once(storage: Storage, path: str) -> Any:
        if path.endswith(".safetensors") and path not in broken:
            broken.add(path)
            raise UnreachableError("gone")
        return writing(storage, path)

    monkeypatch.setattr(Storage, "writing", breaks_once)
    monkeypatch.setattr(retry, "_FIRST_PAUSE_SECONDS", 0.0)
    save = saver(run, state, staging_bytes=STAGING_BYTES)
    save.save(TrainingState(step=3), "", lambda kept: None)
    for of in state.tensors.values():
        for tensor in of.values():
            tensor.fill_(-1.0)
    save.wait()
    assert [event.message for event in read_events(run.storage, "bot")] == ["Saved the checkpoint of step 3."]
    assert len(broken) == len(manifest_of(run).parts)
    assert torch.equal(restored(run)[0].tensors["down"]["weight"], weight)
