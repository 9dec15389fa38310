"""The weights that a worker keeps on storage."""

from pathlib import Path

from ft_service.runs.folder import RunFolder
from ft_service.storage.storage import Storage
from ft_service.train.protocol import TrainingState
from ft_service.train.weights import WeightsOnStorage


class Alone:
    is_rank_zero = True

    def all_gather_object(self, value: object) -> list[object]:
        return [value]

    def gather_trained(self) -> dict[str, object]:
        return {}


class Writes:
    """A fake model whose weights are a text."""

    is_adapter = True

    def __init__(self, text: str) -> None:
        self.text = text

    def export_adapter(self, weights: dict[str, object], folder: Path) -> None:
        folder.mkdir()
        (folder / "adapter_config.json").write_text(self.text)


def keep(run: RunFolder, text: str, *steps: int) -> str:
    weights = WeightsOnStorage(run, Writes(text), Alone())  # type: ignore[arg-type]
    for step in steps:
        weights.keep(TrainingState(step=step))
    return run.storage.read_bytes(f"{run.path}/{weights.path}/adapter_config.json").decode()


def test_a_second_attempt_never_publishes_the_weights_of_the_first(tmp_path: Path) -> None:
    run = RunFolder(Storage(str(tmp_path)), "bot-1")
    assert keep(run, "first", 3) == "first"
    assert keep(run, "second", 3) == "second"


def test_weights_are_kept_while_a_checkpoint_refers_to_them(tmp_path: Path) -> None:
    run = RunFolder(Storage(str(tmp_path)), "bot-1")
    weights = WeightsOnStorage(run, Writes("text"), Alone())  # type: ignore[arg-type]
    for step in (3, 6, 9):
        weights.keep(TrainingState(step=step))
    weights.delete_all_but({"weights/step-6"})
    assert run.storage.folders("runs/bot-1/weights") == ["step-6", "step-9"]
    weights.delete_all_but(set())
    assert run.storage.folders("runs/bot-1/weights") == ["step-9"]


def test_a_resumed_run_keeps_its_best_weights(tmp_path: Path) -> None:
    run = RunFolder(Storage(str(tmp_path)), "bot-1")
    keep(run, "first", 3)
    resumed = WeightsOnStorage(run, Writes("second"), Alone(), path="weights/step-3")  # type: ignore[arg-type]
    assert run.storage.read_bytes(f"{run.path}/{resumed.path}/adapter_config.json") == b"first"
