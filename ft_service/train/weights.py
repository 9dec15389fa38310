"""A run's weights on storage: an adapter from one worker, a whole model from all of them at once."""

import hashlib
import json
import tempfile
from pathlib import Path

from ft_service.model.adapter import CONFIG_FILE as ADAPTER_CONFIG_FILE
from ft_service.model.checkpoint import CONFIG_FILE, INDEX_FILE
from ft_service.model.trainable import TrainableModel
from ft_service.model.writer import MAX_FILE_BYTES, WeightWriter, index_of, lay_out
from ft_service.registry import DIGESTS_FILE
from ft_service.runs import RunFolder
from ft_service.storage import Storage
from ft_service.train.loop import TrainingState
from ft_service.train.parallel import Parallel


class WeightsOnStorage:
    """The best weights of the run on storage. Every worker calls `keep`, the first one alone `forget_all_but`.

    Earlier ones stay as long as a checkpoint refers to them: resumed from it, the run would have them as its best.
    """

    def __init__(self, run: RunFolder, model: TrainableModel, parallel: Parallel, place: str = "") -> None:
        """`place` is that of the best weights when the run is resumed."""
        self._run, self._model, self._parallel = run, model, parallel
        self.place = place
        if parallel.is_first and not place:
            run.storage.delete(f"{run.path}/weights")

    def keep(self, state: TrainingState) -> None:
        self.place = f"weights/step-{state.step}"
        path = f"{self._run.path}/{self.place}"
        if self._parallel.is_first:
            # An earlier attempt's weights of the same step would otherwise stay, and be published as this one's.
            self._run.storage.delete(path)
        self._parallel.barrier()
        write = write_adapter if self._model.is_adapter else write_model
        write(self._model, self._parallel, self._run.storage, path)

    def forget_all_but(self, places: set[str]) -> None:
        """Delete all weights but those at these places and the best of now."""
        for folder in self._run.storage.folders(f"{self._run.path}/weights"):
            if f"weights/{folder}" not in places | {self.place}:
                self._run.storage.delete(f"{self._run.path}/weights/{folder}")


def write_adapter(model: TrainableModel, parallel: Parallel, storage: Storage, path: str) -> None:
    """Write the trained adapter as the folder `path` of storage. It is small: one worker gathers and writes it."""
    gathered = parallel.gather_trained()
    if parallel.is_first:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary, "weights")
            model.export_adapter(gathered, folder)
            storage.put_folder(folder, path, marker=ADAPTER_CONFIG_FILE)


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
    with WeightWriter(mine, lambda name: storage.writing(f"{path}/{name}")) as writer:
        for name, tensor in parallel.whole_on_owners(owners):
            writer.write(name, tensor)
    digests = parallel.union(writer.digests)  # every worker is through with its files once this returns
    if parallel.is_first:
        beside = {INDEX_FILE: index_of(files)} | model.files_beside_weights()
        digests |= {name: hashlib.sha256(content).hexdigest() for name, content in beside.items()}
        beside[DIGESTS_FILE] = (json.dumps(digests, indent=2, sort_keys=True) + "\n").encode()
        for name in sorted(beside, key=lambda name: name == CONFIG_FILE):
            storage.write_bytes(f"{path}/{name}", beside[name])
