"""A run's weights on storage: an adapter from one worker, a whole model from all of them at once."""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ft_service.errors import StorageError, UnreachableError
from ft_service.model.adapter import CONFIG_FILE as ADAPTER_CONFIG_FILE
from ft_service.model.trainable import TrainableModel
from ft_service.model.weight_files import CONFIG_FILE, INDEX_FILE
from ft_service.model.writer import MAX_FILE_BYTES, WeightWriter, index_of, lay_out
from ft_service.registry.registry import DIGESTS_FILE
from ft_service.runs.folder import RunFolder
from ft_service.storage.storage import Storage
from ft_service.train.parallel import Parallel
from ft_service.train.protocol import TrainingState


class WeightsOnStorage:
    """The best weights of the run on storage. Every worker calls `keep`, the first one alone `forget_all_but`.

    Earlier ones stay as long as a checkpoint refers to them: resumed from it, the run would have them as its best.
    """

    def __init__(
        self,
        run: RunFolder,
        model: TrainableModel,
        parallel: Parallel,
        place: str = "",
        start: TrainingState | None = None,
    ) -> None:
        """`place` is that of the best weights when the run is resumed, from the state `start`."""
        self._run, self._model, self._parallel = run, model, parallel
        self.place = self._coming = place
        start = start or TrainingState()
        self._best = start.best_step, start.best_validation_loss
        if parallel.is_first and not place:
            run.storage.delete(f"{run.path}/weights")

    def keep(self, state: TrainingState) -> None:
        """Raises the same `StorageError` on all workers if they cannot be written: the best of before then stays."""
        self._coming = f"weights/step-{state.step}"
        path = f"{self._run.path}/{self._coming}"
        try:
            # An earlier attempt's weights of the same step would otherwise stay, and be published as this one's.
            by_first(self._parallel, lambda: self._run.storage.delete(path))
            write = write_adapter if self._model.is_adapter else write_model
            write(self._model, self._parallel, self._run.storage, path)
        except StorageError:
            self._coming = self.place
            if self._parallel.is_first:
                with suppress(StorageError):
                    self._run.storage.without_retries().delete(path)
            raise
        self.place, self._best = self._coming, (state.best_step, state.best_validation_loss)

    def keep_if_possible(self, state: TrainingState) -> str:
        """Like `keep`; where it fails, the best of `state` is again the best that is kept. Returns why it failed."""
        try:
            self.keep(state)
        except StorageError as error:
            state.best_step, state.best_validation_loss = self._best
            return str(error)
        return ""

    def forget_all_but(self, places: set[str]) -> None:
        """Delete all weights but those at these places, the best of now, and those that are being written."""
        for folder in self._run.storage.folders(f"{self._run.path}/weights"):
            if f"weights/{folder}" not in places | {self.place, self._coming}:
                self._run.storage.delete(f"{self._run.path}/weights/{folder}")


def together(parallel: Parallel, do: Callable[[], None]) -> None:
    """Call `do` on every worker; where it raises a `StorageError` on any, all raise it. Every worker must call this."""
    failure = None
    try:
        do()
    except StorageError as error:
        failure = error
    if failures := [(rank, found) for rank, found in enumerate(parallel.from_all(failure)) if found is not None]:
        rank, first = next(((r, f) for r, f in failures if not isinstance(f, UnreachableError)), failures[0])
        raise type(first)(f"worker {rank}: {first}")


def by_first(parallel: Parallel, do: Callable[[], None]) -> None:
    """`together`, with nothing to do for any but the first worker."""
    together(parallel, do if parallel.is_first else lambda: None)


def write_adapter(model: TrainableModel, parallel: Parallel, storage: Storage, path: str) -> None:
    """Write the trained adapter as the folder `path` of storage. It is small: one worker gathers and writes it."""
    gathered = parallel.gather_trained()

    def write() -> None:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "weights")
            model.export_adapter(gathered, folder)
            storage.put_folder(folder, path, marker=ADAPTER_CONFIG_FILE)

    by_first(parallel, write)


def write_model(
    model: TrainableModel, parallel: Parallel, storage: Storage, path: str, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Write the trained model as the folder `path` of storage: each worker its own tensors, all at the same time.

    No worker holds more than two whole tensors: one that is written, one that comes. The folder counts as whole once it
    has its config.json, the last file that is written. The digests of all files stand in `DIGESTS_FILE`.
    """
    files = lay_out(parallel.trained_formats(), parallel.world_size, max_file_bytes)
    owners = {name: file.owner for file in files for name in file.tensors}
    mine = [file for file in files if file.owner == parallel.rank]
    written: dict[str, str] = {}

    def write_mine() -> None:
        tensors = parallel.whole_on_owners(owners)
        try:
            with WeightWriter(mine, lambda name: storage.writing(f"{path}/{name}")) as writer:
                for name, tensor in tensors:
                    writer.write(name, tensor)
        except StorageError:
            for _ in tensors:  # the other workers cannot have theirs without this one
                pass
            raise
        written.update(writer.digests)

    # A stream that breaks cannot be mended: all begin anew, or none.
    storage.retry(lambda: together(parallel, write_mine), clock=lambda: parallel.from_first(time.monotonic()))
    digests = parallel.union(written)

    def write_beside() -> None:
        beside = {INDEX_FILE: index_of(files)} | model.files_beside_weights()
        digests.update({name: hashlib.sha256(content).hexdigest() for name, content in beside.items()})
        beside[DIGESTS_FILE] = (json.dumps(digests, indent=2, sort_keys=True) + "\n").encode()
        for name in sorted(beside, key=lambda name: name == CONFIG_FILE):
            storage.write_bytes(f"{path}/{name}", beside[name])

    by_first(parallel, write_beside)
