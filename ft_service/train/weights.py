"""Writing a run's weights to storage: rank 0 writes an adapter, all ranks write a full model in parallel."""

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
    """The best weights of the run on storage. Every rank calls `keep`; only rank 0 calls `delete_all_but`.

    Earlier weights are kept as long as a checkpoint refers to them, because a run resumed from it needs them.
    """

    def __init__(
        self,
        run: RunFolder,
        model: TrainableModel,
        parallel: Parallel,
        path: str = "",
        start: TrainingState | None = None,
    ) -> None:
        """`path` is where a resumed run has its best weights, below the run's folder; `start` is the resumed state."""
        self._run = run
        self._model = model
        self._parallel = parallel
        self.path = path
        self._path_being_written = path
        start = start or TrainingState()
        self._best = start.best_step, start.best_validation_loss
        if parallel.is_rank_zero and not path:
            run.storage.delete(f"{run.path}/weights")

    def keep(self, state: TrainingState) -> None:
        """Write the current weights as the best.

        If that fails, raises the same `StorageError` on all ranks, and the previous best weights are kept.
        """
        self._path_being_written = f"weights/step-{state.step}"
        path = f"{self._run.path}/{self._path_being_written}"
        try:
            # Files that an earlier attempt wrote at the same step must not be mixed with these.
            run_on_rank_zero(self._parallel, lambda: self._run.storage.delete(path))
            write = write_adapter if self._model.is_adapter else write_model
            write(self._model, self._parallel, self._run.storage, path)
        except StorageError:
            self._path_being_written = self.path
            if self._parallel.is_rank_zero:
                with suppress(StorageError):
                    self._run.storage.without_retries().delete(path)
            raise
        self.path = self._path_being_written
        self._best = state.best_step, state.best_validation_loss

    def keep_if_possible(self, state: TrainingState) -> str:
        """Like `keep`, but if writing fails, reset `state` to the previous best and return the reason, otherwise ''."""
        try:
            self.keep(state)
        except StorageError as error:
            state.best_step, state.best_validation_loss = self._best
            return str(error)
        return ""

    def delete_all_but(self, paths: set[str]) -> None:
        """Delete all weights except those at `paths`, the current best, and those being written."""
        for folder in self._run.storage.folders(f"{self._run.path}/weights"):
            if f"weights/{folder}" not in paths | {self.path, self._path_being_written}:
                self._run.storage.delete(f"{self._run.path}/weights/{folder}")


def raise_on_all(parallel: Parallel, do: Callable[[], None]) -> None:
    """Call `do` on every rank; if it raises a `StorageError` on any, raise that on all. Every rank must call this."""
    failure = None
    try:
        do()
    except StorageError as error:
        failure = error
    failures = [(rank, error) for rank, error in enumerate(parallel.all_gather_object(failure)) if error is not None]
    if failures:
        # Prefer an error that a retry cannot fix, such as a full disk, to "unreachable".
        rank, first = next(((r, e) for r, e in failures if not isinstance(e, UnreachableError)), failures[0])
        raise type(first)(f"worker {rank}: {first}")


def run_on_rank_zero(parallel: Parallel, do: Callable[[], None]) -> None:
    """Call `do` on rank 0; if it raises a `StorageError`, raise that on all. Every rank must call this."""
    raise_on_all(parallel, do if parallel.is_rank_zero else lambda: None)


def write_adapter(model: TrainableModel, parallel: Parallel, storage: Storage, path: str) -> None:
    """Write the trained adapter to the folder `path` on storage. It is small: rank 0 gathers and writes all of it."""
    gathered = parallel.gather_trained()

    def write() -> None:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "weights")
            model.export_adapter(gathered, folder)
            storage.put_folder(folder, path, marker=ADAPTER_CONFIG_FILE)

    run_on_rank_zero(parallel, write)


def write_model(
    model: TrainableModel, parallel: Parallel, storage: Storage, path: str, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Write the trained model to the folder `path` on storage: the ranks write their own tensors in parallel.

    No rank holds more than two whole tensors: the one being written and the next. config.json is written last: a folder
    that has it is complete. `DIGESTS_FILE` has the SHA-256 of every other file.
    """
    files = lay_out(parallel.trained_formats(), parallel.world_size, max_file_bytes)
    owners = {name: file.owner for file in files for name in file.tensors}
    own_files = [file for file in files if file.owner == parallel.rank]
    own_digests: dict[str, str] = {}

    def write_own_files() -> None:
        tensors = parallel.gather_to_owners(owners)
        try:
            with WeightWriter(own_files, lambda name: storage.writing(f"{path}/{name}")) as writer:
                for name, tensor in tensors:
                    writer.write(name, tensor)
        except StorageError:
            for _ in tensors:  # the other ranks gather their tensors in the same collectives
                pass
            raise
        own_digests.update(writer.digests)

    # A broken stream cannot be continued, so either all ranks start over or none. They share rank 0's clock.
    storage.retry(
        lambda: raise_on_all(parallel, write_own_files),
        clock=lambda: parallel.broadcast_from_rank_zero(time.monotonic()),
    )
    digests = {name: digest for part in parallel.all_gather_object(own_digests) for name, digest in part.items()}

    def write_other_files() -> None:
        others = {INDEX_FILE: index_of(files)} | model.config_and_tokenizer_files()
        digests.update({name: hashlib.sha256(content).hexdigest() for name, content in others.items()})
        others[DIGESTS_FILE] = (json.dumps(digests, indent=2, sort_keys=True) + "\n").encode()
        for name in sorted(others, key=lambda name: name == CONFIG_FILE):
            storage.write_bytes(f"{path}/{name}", others[name])

    run_on_rank_zero(parallel, write_other_files)
